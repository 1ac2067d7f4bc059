"""Lengths, thinking reward, perplexity, similarity, faithfulness: each against an independent computation.

Run: pytest tests/evaluation/measures/test_measured.py
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from medvqa_rl.config import DataConfig, EvalConfig
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.phantom.claims import claims, is_true
from medvqa_rl.evaluation.answering import answer_all
from medvqa_rl.evaluation.evaluate import evaluate
from medvqa_rl.evaluation.measures.fluency import LanguageModel, load_language_model
from medvqa_rl.evaluation.measures.instruments import Instruments, NamedJudge, load_instruments, measure, remaining
from medvqa_rl.evaluation.measures.measured import measured_summary, perplexity
from medvqa_rl.evaluation.measures.similarity import TfidfSimilarity, candidate_text, load_similarity
from medvqa_rl.evaluation.records import EvalRecord, parse_record, record_line
from medvqa_rl.evaluation.scoring import AnswerSettings
from medvqa_rl.evaluation.statistics.compare import Evaluated, compare
from medvqa_rl.evaluation.statistics.comparison_tables import reasoning_table
from medvqa_rl.evaluation.statistics.summary import flat_metrics, summarise
from medvqa_rl.evaluation.statistics.tables import measured_table
from tests.records import make_record

PROMPT = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "")


def record(number: int, **changes: Any) -> EvalRecord:
    base = make_record(
        sample_id=str(number),
        image_key=str(number),
        options=("mass", "cyst"),
        gold="B",
        output="<think>a cyst</think><answer>B</answer>",
        think="a cyst",
        answer="B",
        is_correct=True,
        num_tokens=10,
    )
    return replace(base, **changes)


RECORDS = [
    record(1, num_tokens=10, think_tokens=4, verdict=1.0, verdict_by="judge"),
    record(2, num_tokens=14, think_tokens=8, verdict=0.0, verdict_by="judge"),
    record(3, num_tokens=40, think_tokens=0, is_correct=False, is_well_formed=False, verdict=0.0, verdict_by="judge"),
    record(4, num_tokens=20, think_tokens=12, is_correct=False, verdict=None, verdict_by="judge"),
    record(5, num_tokens=0, is_correct=None, unscored_reason="no image"),
]


# --- lengths and thinking reward -----------------------------------------------------------------------------------


def test_lengths_of_right_and_wrong_answers_by_hand() -> None:
    lengths = measured_summary(RECORDS)["lengths"]
    assert lengths["total"]["all"] == {
        "n": 4,
        "mean": 21.0,
        "variance": pytest.approx(np.var([10, 14, 40, 20], ddof=1)),
    }
    assert lengths["total"]["right"] == {"n": 2, "mean": 12.0, "variance": 8.0}
    assert lengths["total"]["wrong"] == {"n": 2, "mean": 30.0, "variance": 200.0}
    assert lengths["think"]["right"]["mean"] == 6.0
    assert lengths["think"]["wrong"] == {"n": 2, "mean": 6.0, "variance": 72.0}
    assert lengths["think"]["all"]["variance"] == pytest.approx(statistics.variance([4, 8, 0, 12]))
    one = measured_summary(RECORDS[:1])["lengths"]
    assert one["total"]["right"]["n"] == 1 and math.isnan(one["total"]["right"]["variance"])
    assert math.isnan(one["total"]["wrong"]["mean"])


def test_the_thinking_reward_by_hand() -> None:
    thinking = measured_summary(RECORDS)["thinking"]
    assert thinking == {"format": 3 / 4, "judged": 1 / 3, "reward": (2 + 1 + 0) / 3, "num_judged": 3, "by": "judge"}
    without = measured_summary([replace(found, verdict=None, verdict_by=None) for found in RECORDS])["thinking"]
    assert without["format"] == 3 / 4 and math.isnan(without["reward"]) and without["by"] is None


def test_a_judge_gives_the_judged_part() -> None:
    def verdicts(records: Sequence[EvalRecord]) -> list[float]:
        assert [found.sample_id for found in records] == ["1", "2", "3", "4"]  # the unscored one is not asked
        return [1.0, 0.0, math.nan, 1.0]

    plain = [replace(found, verdict=None, verdict_by=None) for found in RECORDS]
    measured = measure(plain, Instruments(judge=NamedJudge("mine", verdicts)))
    assert [found.verdict for found in measured] == [1.0, 0.0, None, 1.0, None]
    thinking = measured_summary(measured)["thinking"]
    assert (thinking["reward"], thinking["num_judged"], thinking["by"]) == (5 / 3, 3, "mine")


# --- perplexity ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """A random GPT-2 with 24 positions."""
    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("qwen2_vl"))
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = [
    "the left lung is clear",
    "no",
    "",
    "Is there a pleural effusion in the left lung? yes yes yes no liver kidney",
]


def stock_nll(folder: Path, text: str) -> tuple[float, int]:
    """Window by window and token by token, with the plain model."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    total = 0.0
    for start in range(0, len(ids), 23):
        window = [tokenizer.eos_token_id, *ids[start : start + 23]]
        for place in range(1, len(window)):
            with torch.no_grad():
                logits = model(torch.tensor([window[:place]])).logits[0, -1].double()
            total -= float(torch.log_softmax(logits, dim=-1)[window[place]])
    return total, len(ids)


def test_perplexity_equals_that_of_the_stock_model_token_by_token(lm_folder: Path) -> None:
    model = load_language_model(str(lm_folder), "cpu")
    found = model.score(TEXTS)
    expected = [stock_nll(lm_folder, text) for text in TEXTS]
    assert [one.num_tokens for one in found] == [tokens for _, tokens in expected]
    assert max(tokens for _, tokens in expected) > 24  # more than one window
    assert [one.nll for one in found] == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(lm_folder), AutoTokenizer.from_pretrained(lm_folder)
    small = LanguageModel("small", plain, tokenizer, batch_size=1)
    assert [one.nll for one in small.score(TEXTS)] == pytest.approx([one.nll for one in found], rel=1e-5)


def test_perplexity_weighs_tokens_and_not_texts() -> None:
    assert perplexity([math.log(2) * 3, math.log(8)], [3, 1]) == pytest.approx(2 ** (6 / 4))
    assert perplexity([math.log(50) * 7], [7]) == pytest.approx(50.0)
    assert math.isnan(perplexity([], []))


def test_outputs_are_scored_without_their_tags(lm_folder: Path) -> None:
    instruments = load_instruments(EvalConfig(perplexity_model=str(lm_folder)), "cpu")
    some = [record(1, output="<think>the left lung</think><answer>yes</answer>"), record(2, output="no answer")]
    section = measured_summary(measure(some, instruments))["perplexity"]
    totals = [stock_nll(lm_folder, text) for text in ("the left lung  yes", "no answer")]
    tokens = sum(count for _, count in totals)
    assert section["tokens"] == tokens and section["by"] == str(lm_folder)
    assert section["value"] == pytest.approx(math.exp(sum(nll for nll, _ in totals) / tokens), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("no-such-model", "is neither a folder nor a Hub id"), ("EMPTY", "cannot be loaded")],
)
def test_a_missing_language_model_is_reported(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_language_model(str(tmp_path) if name == "EMPTY" else name, "cpu")


# --- similarity ----------------------------------------------------------------------------------------------------


def test_tfidf_by_hand() -> None:
    # Two references: "left lung" and "right lung". idf(lung) = ln(3 / 3) + 1 = 1, idf(left) = ln(3 / 2) + 1.
    left = math.log(3 / 2) + 1
    unseen = math.log(3) + 1
    texts = ["left lung", "the left", "", "lung lung"]
    references = ["left lung", "left lung", "right lung", "right lung"]
    found = TfidfSimilarity().compare(texts, references)
    assert found[0] == pytest.approx(1.0)
    assert found[1] == pytest.approx(left**2 / (math.hypot(left, unseen) * math.hypot(left, 1)))
    assert found[2] == 0.0
    assert found[3] == pytest.approx(2 / (2 * math.hypot(left, 1)))


def test_tfidf_agrees_with_scikit_learn() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    references = ["left lung", "right lung", "no finding is seen", "a large cyst in the upper left part"]
    vectorizer = text.TfidfVectorizer(token_pattern=r"\w+").fit(references)
    texts = ["lung left lung", "the right", "a finding is seen", "cyst of the upper left, large"]
    known = set(vectorizer.get_feature_names_out())
    texts = [" ".join(word for word in one.replace(",", "").split() if word in known) for one in texts]
    one, other = vectorizer.transform(texts).toarray(), vectorizer.transform(references).toarray()
    assert TfidfSimilarity().compare(texts, references) == pytest.approx((one * other).sum(axis=1))


def test_similarity_compares_the_documented_texts() -> None:
    assert (candidate_text(record(1)), record(1).gold_text) == ("a cyst cyst", "cyst")  # B is the cyst
    unread = record(2, output="<think>it is</think> B", think="it is", answer=None)
    assert candidate_text(unread) == "it is  B"
    opened = record(3, answer_type="open", options=(), gold="left lobe", answer="lobe", think=None)
    assert (candidate_text(opened), opened.gold_text) == ("lobe", "left lobe")


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers")
@pytest.mark.slow
def test_embeddings_are_compared_by_their_cosine(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "left", "right", "lung", "cyst", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    words = Transformer(str(tmp_path / "bert"))
    SentenceTransformer(modules=[words, Pooling(16)]).save(str(tmp_path / "model"))
    texts, references = ["the left lung", "cyst", "left lung"], ["left lung", "right lung", "left lung"]
    found = load_similarity(str(tmp_path / "model"), "cpu").compare(texts, references)

    def embed(text: str) -> torch.Tensor:
        ids = torch.tensor([[2, *[vocabulary.index(word) for word in text.split()], 3]])
        with torch.no_grad():
            return bert.eval()(ids).last_hidden_state[0].mean(dim=0)

    pairs = zip(texts, references)
    expected = [float(torch.cosine_similarity(embed(one), embed(other), dim=0)) for one, other in pairs]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[2] == pytest.approx(1.0) and found[1] < 0.999


def test_missing_sentence_transformers_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'medvqa-rl\[similarity\]'"):
        load_similarity(str(tmp_path), "cpu")
    with pytest.raises(ValueError, match="give tfidf"):
        load_similarity("embeddings", "cpu")


def test_instruments_are_never_mixed() -> None:
    some = [record(1, similarity=0.5, similarity_by="tfidf"), record(2, similarity=0.7, similarity_by="minilm")]
    with pytest.raises(ValueError, match="similarity of these answers was measured by minilm and tfidf"):
        measured_summary(some)
    one, other = (measured_summary([found]) for found in some)
    titles, rows = measured_table([("a", one), ("b", other)])
    assert "similarity (tfidf)" in titles and "similarity (minilm)" in titles
    cells = [dict(zip(titles, row[1:])) for row in rows]
    assert (cells[0]["similarity (tfidf)"], cells[0]["similarity (minilm)"]) == ("0.50", "")
    assert (cells[1]["similarity (tfidf)"], cells[1]["similarity (minilm)"]) == ("", "0.70")


# --- faithfulness, and everything together -------------------------------------------------------------------------


class ScriptedEngine:
    """Answers with a given reasoning and the gold answer."""

    def __init__(self, reasoning: dict[str, str]) -> None:
        self.processor = self
        self.reasoning = reasoning

    def encode(self, sample: Sample) -> EncodedPrompt:
        return PROMPT

    def encoding_bytes(self, sample: Sample) -> int:
        return 0

    def greedy(self, samples: Sequence[Sample], **rest: Any) -> Any:
        for sample in samples:
            text = render_answer(self.reasoning[sample.id], sample.answer)
            yield Group(sample, PROMPT, [Completion((0,) * len(text.split()), text, False)])

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def test_claims_are_checked_against_the_scene() -> None:
    dataset = load_dataset(DataConfig(num_test=12), "test")
    samples = [dataset[index] for index in range(12)]
    reasoning = {sample.id: sample.reasoning for sample in samples}
    modality = samples[0].images[0].scene.modality  # type: ignore[attr-defined]
    other = "CT" if modality != "CT" else "MRI"
    reasoning[samples[0].id] = f"The modality is {other}. The modality is {modality}. The image is sharp."
    reasoning[samples[1].id] = "I do not know."
    found: dict[str, EvalRecord] = {}

    def keep(some: Sequence[EvalRecord]) -> None:
        found.update({record.sample_id: record for record in some})

    answer_all(lambda: ScriptedEngine(reasoning), samples, AnswerSettings(EvalConfig(), 64), save=keep)  # type: ignore
    records = [found[sample.id] for sample in samples]
    assert (records[0].num_claims, records[0].faithfulness) == (2, 0.5)
    assert [record.distinct_truths for record in records[:2]] == [1, 0]
    assert (records[1].num_claims, records[1].faithfulness) == (0, None)
    assert records[1].think_tokens == 4
    shares = []
    for sample in samples:
        scene = sample.images[0].scene  # type: ignore[attr-defined]
        if told := claims(reasoning[sample.id]):
            shares.append(sum(is_true(claim, scene) for claim in told) / len(told))
    section = measured_summary(records)["faithfulness"]
    assert section["value"] == pytest.approx(sum(shares) / len(shares)) and section["n"] == len(shares) == 11
    truths = [
        len({claim for claim in claims(reasoning[sample.id]) if is_true(claim, sample.images[0].scene)})  # type: ignore
        for sample in samples
    ]
    assert section["distinct_truths"] == pytest.approx(sum(truths) / len(truths))
    assert section["right"] == section["value"] and math.isnan(section["wrong"])


def test_an_evaluation_measures_and_logs(lm_folder: Path) -> None:
    config = EvalConfig(perplexity_model=str(lm_folder), similarity="tfidf", bootstrap=50)
    dataset = load_dataset(DataConfig(num_test=6), "test")
    teller = ScriptedEngine({dataset[index].id: dataset[index].reasoning for index in range(6)})
    evaluation = evaluate(
        teller,  # type: ignore[arg-type]
        dataset,
        config,
        max_completion_length=64,
        instruments=load_instruments(config, "cpu"),
    )
    results, metrics = evaluation.results, evaluation.metrics
    assert metrics["eval/perplexity"] == results["perplexity"]["value"] > 1
    assert metrics["eval/similarity"] == results["similarity"]["value"] > 0
    assert metrics["eval/faithfulness"] == results["faithfulness"]["value"]
    assert "eval/thinking_reward" not in metrics
    again = [parse_record(record_line(found), "here") for found in evaluation.records]
    assert again == list(evaluation.records)
    assert flat_metrics(summarise(again, config)) == metrics
    instruments = load_instruments(config, "cpu")
    assert remaining(again, instruments) == Instruments()
    assert remaining([*again, record(9)], instruments) == instruments


def test_a_comparison_shows_the_measures() -> None:
    one = [replace(found, is_correct=True) for found in RECORDS[:3]]
    comparison = compare(
        [Evaluated("one", Path(), one), Evaluated("two", Path(), RECORDS[:3])], EvalConfig(bootstrap=50)
    )
    assert comparison["runs"][1]["lengths"]["total"]["wrong"]["mean"] == 40.0
    assert json.dumps(comparison["runs"][0]["thinking"])
    table = reasoning_table(comparison)
    titles = list(table.header)
    assert titles[:1] == ["run"] and "thinking reward of 2 (judge)" in titles and "tokens, wrong" in titles
