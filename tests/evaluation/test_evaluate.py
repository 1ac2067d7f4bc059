"""Evaluation end to end with an engine that returns given texts: every number is computed by hand.

Run: pytest tests/evaluation/test_evaluate.py
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from medvqa_rl.config import EvalConfig, RolloutConfig
from medvqa_rl.core.files import without_nan
from medvqa_rl.core.prompts import DEFAULT_WORDING
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, ImageSource, Sample
from medvqa_rl.data.images.files import FileImage, MemoryImage
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.evaluation.answering import batches
from medvqa_rl.evaluation.evaluate import (
    EvaluationFailed,
    check_unscored,
    evaluate,
    questions_hash,
    write_evaluation,
)
from medvqa_rl.evaluation.records import EvalRecord, parse_record, read_records, record_line, write_records
from medvqa_rl.evaluation.scoring import _sampled_answer
from medvqa_rl.evaluation.statistics.intervals_and_tests import (
    cluster_bootstrap,
    cluster_permutation,
    cluster_standard_error,
    effective_n,
    minimum_detectable_effect,
)
from medvqa_rl.evaluation.statistics.summary import paired_gain, summarise
from medvqa_rl.evaluation.statistics.tables import results_table

CONFIG = EvalConfig(batch_size=2, bootstrap=500)
PIXEL = Image.new("RGB", (2, 2))
PROMPT = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "")


class ScriptedEngine:
    """Answers with the text given for each sample, and records its inputs."""

    def __init__(self, texts: dict[str, str], truncated: frozenset[str] = frozenset()) -> None:
        self.processor = self
        self.texts, self.truncated = texts, truncated
        self.streams: list[list[str]] = []
        self.encoded: list[str] = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def encode(self, sample: Sample) -> EncodedPrompt:
        assert all(isinstance(image, MemoryImage) for image in sample.images)
        self.encoded.append(sample.id)
        return replace(PROMPT, text=sample.question)

    def encoding_bytes(self, sample: Sample) -> int:
        return 0

    def greedy(
        self,
        samples: Iterable[Sample],
        *,
        max_completion_length: int,
        batch_size: int,
        prompts: Iterable[EncodedPrompt],
    ) -> Iterator[Group]:
        self.streams.append([])
        for sample, prompt in zip(samples, prompts, strict=True):
            assert prompt.text == sample.question
            self.streams[-1].append(sample.id)
            text = self.texts[sample.id]
            tokens = tuple(range(len(text.split())))
            yield Group(sample, PROMPT, [Completion(tokens, text, sample.id in self.truncated)])


def image(key: str) -> tuple[ImageSource, ...]:
    return (MemoryImage(key, PIXEL),)


def in_form(answer: str) -> str:
    return f"<think>two words</think><answer>{answer}</answer>"


SAMPLES = (
    Sample("1", "Which?", "B", "choice", image("x"), ("mass", "cyst"), groups={"modality": "CT", "family": "kind"}),
    Sample("2", "Which?", "A", "choice", image("x"), ("mass", "cyst"), groups={"modality": "CT", "family": "kind"}),
    Sample("3", "Is it?", "yes", "closed", image("y"), groups={"modality": "MRI", "family": "presence"}),
    Sample("4", "Where?", "left upper lobe", "open", image("z"), groups={"modality": "MRI"}),
    Sample("5", "Which?", "B", "choice", image("z"), ("mass", "cyst"), groups={"modality": "MRI", "family": "kind"}),
)
TEXTS = {
    "1": in_form("B"),  # right
    "2": "<think>I go on and on",  # no answer, truncated
    "3": "I say <answer>Yes.</answer>",  # right, malformed
    "4": in_form("left lobe"),  # wrong; F1 = 2 * 2 / (2 + 3)
    "5": in_form("cyst"),  # right
}
DATASET = StoredDataset("tiny", SAMPLES, {"dropped": 1})


def run(config: EvalConfig = CONFIG, dataset: StoredDataset = DATASET, **texts: str):
    engine = ScriptedEngine({**TEXTS, **{name[1:]: text for name, text in texts.items()}}, frozenset({"2"}))
    return evaluate(engine, dataset, config, max_completion_length=64)


def test_results_by_hand() -> None:
    results = run().results
    assert (results["n"], results["num_scored"], results["num_clusters"]) == (5, 5, 3)
    assert results["accuracy"] == 3 / 5
    interval = cluster_bootstrap([1, 0, 1, 0, 1], ["x", "x", "y", "z", "z"], resamples=500)
    assert (results["accuracy_low"], results["accuracy_high"]) == (interval.low, interval.high)
    assert results["format_rate"] == 3 / 5
    assert results["no_answer_rate"] == 1 / 5
    assert results["truncated_rate"] == 1 / 5
    assert results["unscored_rate"] == 0
    lengths = [len(text.split()) for text in TEXTS.values()]
    assert results["mean_length"] == pytest.approx(sum(lengths) / 5)
    assert results["median_length"] == sorted(lengths)[2]
    assert results["token_f1"] == pytest.approx(0.8)
    by = results["by"]
    assert {value: summary["accuracy"] for value, summary in by["answer_type"].items()} == {
        "choice": 2 / 3,
        "closed": 1.0,
        "open": 0.0,
    }
    assert by["answer_type"]["choice"]["majority_baseline"] == 2 / 3  # always B
    assert {value: (summary["n"], summary["accuracy"]) for value, summary in by["modality"].items()} == {
        "CT": (2, 1 / 2),
        "MRI": (3, 2 / 3),
    }
    assert {value: summary["n"] for value, summary in by["family"].items()} == {"kind": 3, "presence": 1}
    assert math.isnan(by["family"]["presence"]["accuracy_low"])  # one image, no interval
    assert math.isnan(by["answer_type"]["choice"]["token_f1"])
    assert results["dataset"] == {
        "name": "tiny",
        "fingerprint": DATASET.fingerprint,
        "size": 5,
        "questions": questions_hash(SAMPLES),
        "notes": {"dropped": 1},
    }
    assert questions_hash(SAMPLES) != questions_hash(SAMPLES[:4])
    assert results["seeds"] == {"choice": 0, "sampling": 0, "bootstrap": 0}
    assert results["effective_n"] == pytest.approx(effective_n([1, 0, 1, 0, 1], ["x", "x", "y", "z", "z"]))
    assert results["exact_match"] == 0 and results["rouge_l"] == pytest.approx(0.8)
    assert results["settings"]["template"] == "think_answer"
    assert results["settings"]["max_completion_length"] == 64
    assert set(results["versions"]) >= {"python", "torch", "transformers", "numpy"}


def test_averages_by_hand() -> None:
    results = run().results
    assert results["averages"] == {
        "micro_questions": 3 / 5,
        "macro_images": pytest.approx((1 / 2 + 1 + 1 / 2) / 3),
        "macro_answer_type": pytest.approx((2 / 3 + 1 + 0) / 3),
        "macro_answer_kind": pytest.approx((1 + 2 / 4) / 2),
        "macro_modality": pytest.approx((1 / 2 + 2 / 3) / 2),
        "macro_family": pytest.approx((2 / 3 + 1) / 2),
    }


def test_detectable_differences_count_no_more_questions_than_there_are() -> None:
    """80 % power at the 5 % level, if a quarter of the answers differ."""
    record = run().records[0]

    def summary(right: str) -> dict[str, Any]:
        """Two questions per image."""
        records = [
            replace(record, sample_id=str(number), image_key=str(number // 2), is_correct=mark == "1")
            for number, mark in enumerate(right)
        ]
        return summarise(records, EvalConfig(bootstrap=200))

    alike, unlike = summary("110011000011"), summary("1010100110111")
    assert alike["effective_n"] < 12 and unlike["effective_n"] > 2 * 13
    for results, count in ((alike, alike["effective_n"]), (unlike, 13)):
        assert results["detectable_difference"] == pytest.approx(2.8016 * math.sqrt(0.25 / count), rel=1e-4)
        assert f"Equivalent to {count:.0f} independent questions." in " ".join(results_table(results).notes)
    for difference, said in ((1.0, "a true difference of 100.0 points is detected"), (1.01, "no difference is det")):
        assert said in " ".join(results_table({**alike, "detectable_difference": difference}).notes)


def test_scores_by_annotation_and_by_yes_or_no() -> None:
    by = run().results["by"]
    assert {value: summary["n"] for value, summary in by["answer_type"].items()} == {
        "choice": 3,
        "closed": 1,
        "open": 1,
    }
    assert {value: summary["n"] for value, summary in by["answer_kind"].items()} == {"other": 4, "yes/no": 1}


def test_letters_by_hand() -> None:
    letters = run().results["letters"]
    assert letters["gold"] == {"A": 1, "B": 2, "none": 0}
    assert letters["given"] == {"A": 0, "B": 2, "none": 1}
    assert letters["distance"] == pytest.approx(1 / 3)


class Sampler(ScriptedEngine):
    """Also samples: the answers are the words of a text in turn."""

    def rollout(
        self,
        samples: Sequence[Sample],
        config: RolloutConfig,
        *,
        seed: int,
        stream: str,
        step: int,
        prompts: Sequence[EncodedPrompt],
    ) -> list:
        assert len(prompts) == len(samples)
        assert (config.num_generations, seed, stream, config.temperature) == (4, 0, "eval", 0.7)
        answers = {"1": "B A B A", "2": "A A B -", "3": "yes no Yes. no", "4": "x y z x", "5": "B B B B"}
        return [
            Group(
                sample,
                PROMPT,
                [Completion((0,), "" if word == "-" else in_form(word), False) for word in answers[sample.id].split()],
            )
            for sample in samples
        ]


def test_sampled_answers_by_hand() -> None:
    config = CONFIG.model_copy(update={"num_samples": 4, "temperature": 0.7})
    evaluation = evaluate(Sampler(TEXTS), DATASET, config, max_completion_length=64)
    assert evaluation.results["accuracy"] == 3 / 5  # greedy, as without samples
    sampled = evaluation.results["sampled"]
    # Correct among four: 2, 2, 2, 0, 4.
    assert sampled["num_samples"] == 4
    assert sampled["mean_accuracy"]["value"] == sampled["pass@1"]["value"] == pytest.approx(10 / 20)
    assert sampled["majority@1"]["value"] == pytest.approx(10 / 20)
    assert sampled["pass@2"]["value"] == pytest.approx((5 / 6 * 3 + 0 + 1) / 5)
    assert sampled["pass@4"]["value"] == pytest.approx(4 / 5)
    assert sampled["majority@4"]["value"] == pytest.approx((1 / 2 + 1 + 1 / 2 + 0 + 1) / 5)
    assert sampled["no_answer_rate"] == pytest.approx(1 / 20)
    shown = " ".join(results_table(evaluation.results).notes)
    assert "Of 4 sampled answers: mean accuracy 50.0, pass@1 50.0, majority@1 50.0, pass@2 70.0," in shown
    assert "cut off" not in " ".join(results_table({**evaluation.results, "truncated_rate": 0.099}).notes)
    for results, where in ((evaluation.results, "below"), (run().results, "(`--samples 4`)")):
        cut_off = " ".join(results_table({**results, "truncated_rate": 0.1}).notes)
        assert "10.0 % of the greedy answers were cut off at the token limit. Greedy decoding can repeat" in cut_off
        assert f"compare with the sampled answers {where}." in cut_off
    assert sampled["pass@2"]["low"] < sampled["pass@2"]["value"] < sampled["pass@2"]["high"]
    record = evaluation.records[1]
    assert [answer.vote for answer in record.sampled] == ["A", "A", "B", None]
    assert run().results["sampled"] == {}


def test_records_explain_their_score(tmp_path: Path) -> None:
    records = run(_5=in_form("mass or cyst"), _1=in_form("A")).records
    assert [record.why for record in records] == [
        "the answer names A, not B",
        "no answer: the token limit came first",
        "normalised, 'yes' is the gold answer",
        "normalised, 'left lobe' is not 'left upper lobe'",
        "the answer names none of the options",
    ]
    assert [record.choice for record in records] == ["A", None, None, None, None]
    assert {record.dataset for record in records} == {"tiny"} and {r.template for r in records} == {"think_answer"}
    assert {record.prompt_hash for record in records} == {hashlib.sha256(b"").hexdigest()[:16]}
    pixels = hashlib.sha256(b"(2, 2)" + bytes(12)).hexdigest()[:16]
    assert {record.image_hash for record in records} == {pixels}
    more = run(_3="<answer>yes</answer><answer>no</answer>", _4="<answer></answer>", _1="B").records
    assert [more[place].why for place in (0, 2, 3)] == [
        "no answer: 0 answer sections",
        "no answer: 2 answer sections",
        "no answer: its section is empty or unclosed",
    ]


def test_an_image_that_the_model_refuses_affects_only_its_question() -> None:
    class Picky(ScriptedEngine):
        def encode(self, sample: Sample) -> EncodedPrompt:
            if sample.id == "4":
                raise ValueError("An image of sample '4' cannot be used: absolute aspect ratio.")
            return super().encode(sample)

    evaluation = evaluate(Picky(TEXTS), DATASET, CONFIG, max_completion_length=8)
    assert [record.is_scored for record in evaluation.records] == [True, True, True, False, True]
    assert "aspect ratio" in (evaluation.records[3].unscored_reason or "")
    with pytest.raises(EvaluationFailed, match=r"1 of 5 questions of tiny could not be scored, more than .* = 0.05"):
        check_unscored(evaluation.results, CONFIG)
    check_unscored(evaluation.results, CONFIG.model_copy(update={"fail_on_unscored": 0.2}))


def test_records_of_an_older_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_records(run().records, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for name in ("why", "sampled", "prompt_hash", "image_hash", "template", "choice", "exact_match"):
            del row[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_records(path)
    assert summarise(records, CONFIG)["accuracy"] == 3 / 5 and records[0].why == ""
    path.write_text(json.dumps(rows[0] | {"sampled": [{"shape": 1}]}))
    with pytest.raises(ValueError, match=r"Line 1 .* has no field sampled.0.output"):
        read_records(path)


def test_metrics_have_the_names_of_the_training_log() -> None:
    metrics = run().metrics
    assert metrics["eval/accuracy"] == 3 / 5
    assert metrics["eval/accuracy/choice"] == 2 / 3
    assert metrics["eval/no_answer_rate"] == 1 / 5
    assert {"eval/format_rate", "eval/mean_length", "eval/accuracy_low", "eval/accuracy_high"} <= metrics.keys()
    assert not any(math.isnan(value) for value in metrics.values())


def test_records_keep_the_output() -> None:
    records = run().records
    assert [record.sample_id for record in records] == ["1", "2", "3", "4", "5"]
    assert (records[2].answer, records[2].think, records[2].is_well_formed) == ("Yes.", None, False)
    assert (records[1].output, records[1].has_answer, records[1].is_correct) == (TEXTS["2"], False, False)
    assert records[3].token_f1 == pytest.approx(0.8) and records[0].token_f1 is None


def test_results_are_recomputed_from_the_files(tmp_path: Path) -> None:
    evaluation = run(_5="line\u2028break\x85 \ud800 <answer>é</answer>\n")
    write_evaluation(evaluation, tmp_path / "eval")
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["results.json", "samples.jsonl"]
    records = read_records(tmp_path / "eval" / "samples.jsonl")
    half = evaluation.records[4]
    assert records == [*evaluation.records[:4], replace(half, output=half.output.replace("\ud800", "?"))]
    stored = json.loads((tmp_path / "eval" / "results.json").read_text())
    again = summarise(records, CONFIG)
    assert again.keys() < stored.keys()
    for name, value in again.items():
        if name != "by":
            assert stored[name] == without_nan(value)
    assert stored["by"]["family"]["presence"]["accuracy_low"] is None
    assert stored["by"]["modality"]["MRI"]["accuracy"] == again["by"]["modality"]["MRI"]["accuracy"]


def test_records_have_the_image_description(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    described = [replace(sample, description=f"Film {sample.id}.") for sample in SAMPLES]
    described[4] = replace(described[4], images=(FileImage("bad.png", tmp_path),))
    records = run(dataset=StoredDataset("tiny", tuple(described))).records
    assert [record.description for record in records] == [f"Film {number}." for number in range(1, 6)]
    assert not records[4].is_scored
    write_records(records, tmp_path / "samples.jsonl")
    assert read_records(tmp_path / "samples.jsonl") == list(records)


def test_a_broken_image_is_unscored_and_affects_only_its_question(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    broken = tuple(
        replace(sample, images=(FileImage("bad.png", tmp_path),)) if sample.id == "4" else sample for sample in SAMPLES
    )
    evaluation = run(dataset=StoredDataset("tiny", broken))
    record = evaluation.records[3]
    assert record.is_correct is None and not record.is_scored
    assert "bad.png" in (record.unscored_reason or "")
    assert (evaluation.results["n"], evaluation.results["num_scored"]) == (5, 4)
    assert evaluation.results["accuracy"] == 3 / 4
    assert evaluation.results["unscored_rate"] == 1 / 5
    assert evaluation.results["no_answer_rate"] == 1 / 4
    assert math.isnan(evaluation.results["by"]["answer_type"]["open"]["accuracy"])
    table = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.print(results_table(evaluation.results))
    assert "1 of 5 questions could not be scored" in table.export_text()


def test_questions_about_an_image_are_answered_together_with_progress() -> None:
    engine = ScriptedEngine(TEXTS)
    seen: list[tuple[int, int]] = []
    mixed = StoredDataset("mixed", tuple(SAMPLES[index] for index in (4, 0, 2, 3, 1)))
    evaluation = evaluate(
        engine, mixed, CONFIG, max_completion_length=8, progress=lambda done, total: seen.append((done, total))
    )
    # Images x, y and z, and "Where?" is shorter than "Which?"; a chunk has two batches of two.
    assert engine.streams == [["1", "2", "3", "4"], ["5"]]
    assert [record.sample_id for record in evaluation.records] == ["5", "1", "3", "4", "2"]
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_batches_consider_image_size(tmp_path: Path) -> None:
    sizes = {"a": 300, "b": 30, "c": 290, "d": 40}
    for name, size in sizes.items():
        Image.new("L", (size, size)).save(tmp_path / f"{name}.png")
    (tmp_path / "e.png").write_bytes(b"broken")  # its size is not known, and that is no error here
    samples = [replace(SAMPLES[2], id=name, images=(FileImage(f"{name}.png", tmp_path),)) for name in "abcde"]
    found = batches(samples, "think_answer", 2)
    assert [[sample.id for sample in batch] for batch in found] == [["e", "b"], ["d", "c"], ["a"]]


def test_a_limit_keeps_the_same_choice_for_every_model() -> None:
    config = CONFIG.model_copy(update={"max_samples": 3})
    one, other = run(config), run(config, _1="nothing")
    assert len(one.records) == 3
    assert [record.sample_id for record in one.records] == [record.sample_id for record in other.records]


def test_nothing_to_evaluate_is_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        run(dataset=StoredDataset("empty", ()))
    with pytest.raises(ValueError, match="endless"):
        run(dataset=StoredDataset("endless", SAMPLES, is_endless=True))


def test_the_paired_gain_by_hand() -> None:
    before, after = run(), run(_2=in_form("A"), _4=in_form("left upper lobe"), _1=in_form("A"))
    gain = paired_gain(before.records, after.records[::-1], CONFIG)
    assert (gain["n"], gain["num_clusters"]) == (5, 3)
    assert (gain["accuracy_before"], gain["accuracy_after"]) == (3 / 5, 4 / 5)
    assert gain["gain"] == pytest.approx(1 / 5)
    interval = cluster_bootstrap([-1, 1, 0, 1, 0], ["x", "x", "y", "z", "z"], resamples=500)
    assert (gain["gain_low"], gain["gain_high"]) == (interval.low, interval.high)
    assert (gain["improved"], gain["worsened"], gain["mcnemar_p"]) == (2, 1, 1.0)
    clusters = ["x", "x", "y", "z", "z"]
    assert gain["permutation_p"] == cluster_permutation([0, 0, 0, 0, 0], [-1, 1, 0, 1, 0], clusters) == 1.0
    error = cluster_standard_error([-1, 1, 0, 1, 0], clusters)
    assert gain["detectable_gain"] == pytest.approx(minimum_detectable_effect(error))
    wrong = [replace(record, is_correct=False) for record in before.records]
    right = [replace(record, is_correct=True) for record in before.records]
    assert math.isnan(paired_gain(wrong, right, CONFIG)["detectable_gain"])  # equal differences say nothing of others


def test_evaluations_of_different_questions_are_refused() -> None:
    records = run().records
    with pytest.raises(ValueError, match="5 and 4, 4 in common"):
        paired_gain(records, records[:4], CONFIG)
    with pytest.raises(ValueError, match=r"'1' asks 'Which\?' with the gold answer 'B: cyst' in one and"):
        paired_gain(records, [replace(records[0], gold="A"), *records[1:]], CONFIG)
    unscored = [replace(record, is_correct=None) for record in records]
    with pytest.raises(ValueError, match="No question is scored in both"):
        paired_gain(records, unscored, CONFIG)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with pytest.raises(ValueError, match="no evaluation records"):
        read_records(path)
    path.write_text('{"sample_id": "1"}\n')
    with pytest.raises(ValueError, match=r"Line 1 .* has no field image_key"):
        read_records(path)
    path.write_text("not json\n")
    with pytest.raises(ValueError, match=r"Line 1 .* not JSON"):
        read_records(path)


def test_the_table_shows_stored_results_too(tmp_path: Path) -> None:
    evaluation = run()
    write_evaluation(evaluation, tmp_path)
    texts = []
    for results in (evaluation.results, json.loads((tmp_path / "results.json").read_text())):
        console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(results_table(results, "before"))
        texts.append(console.export_text())
    assert texts[0] == texts[1]
    shown = " ".join(texts[0].split())
    assert "60.0" in shown and "modality: MRI" in shown
    assert "over images 66.7, answer type 55.6, answer kind 75.0, modality 58.3, family 83.3." in shown
    assert "Open answers: exact match 0.0, token F1 80.0, ROUGE-L 80.0." in shown


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(sorted(item.name for item in fields(EvalRecord))), JSON, st.integers(0, 400))
def test_a_damaged_line_is_a_record_or_a_clear_error(field: str, value: object, cut: int) -> None:
    line = record_line(run_once())
    for damaged in (json.dumps(json.loads(line) | {field: value}), line[:cut], line[cut:]):
        try:
            record = parse_record(damaged, "Line 7 of x")
        except ValueError as error:
            assert str(error).startswith("Line 7 of x ")
        else:
            assert isinstance(record, EvalRecord)


@cache
def run_once() -> EvalRecord:
    return run().records[0]


def test_several_correct_answers_and_sets_by_hand(tmp_path: Path) -> None:
    samples = (
        Sample("1", "What?", "ependymoma", "open", image("x"), alternatives=("brain tumor", "large mass")),
        Sample("2", "What?", "ependymoma", "open", image("x"), alternatives=("large brain tumor",)),
        Sample("3", "Which?", "A", "choice", image("y"), ("mass", "cyst", "stone"), alternatives=("C",)),
        Sample("4", "Where?", "spinal cord, lung", "open", image("z"), answers_as="set"),
        Sample("5", "Where?", "lung and heart", "open", image("z"), answers_as="set"),
    )
    answers = {"1": "Brain tumor", "2": "brain tumor", "3": "stone", "4": "Lung; spinal cord", "5": "lung, liver"}
    texts = {f"_{name}": in_form(answer) for name, answer in answers.items()}
    config = CONFIG.model_copy(update={"similarity": "tfidf"})
    evaluation = run(config, StoredDataset("several", samples), **texts)
    records = {record.sample_id: record for record in evaluation.records}
    assert [records[name].is_correct for name in "12345"] == [True, False, True, True, False]
    assert [records[name].token_f1 for name in "1245"] == [1, pytest.approx(0.8), 1, 0.5]
    assert [records[name].exact_match for name in "1245"] == [1, 0, 1, 0]
    assert [records[name].rouge_l for name in "1245"] == [1, pytest.approx(0.8), 1, 0.5]
    assert records["2"].reference == "ependymoma (also correct: large brain tumor)"
    assert records["3"].reference == "A: mass (also correct: C: stone)"
    assert records["2"].why == "normalised, 'brain tumor' is not 'ependymoma' or 'large brain tumor'"
    assert records["3"].why == "the answer names C, the gold"
    assert records["5"].why == "normalised, 'liver, lung' is not 'heart, lung'"
    # "ependymoma" is correct in 1 and 2.
    assert evaluation.results["majority_baseline"] == 2 / 5
    write_evaluation(evaluation, tmp_path)
    assert read_records(tmp_path / "samples.jsonl") == list(evaluation.records)
    with pytest.raises(ValueError, match=r"compares answers as set, the other as text: .* same data\.answers_as"):
        paired_gain(evaluation.records, [replace(record, answers_as="text") for record in records.values()], CONFIG)
    with pytest.raises(ValueError, match="also correct: brain tumor; large mass"):
        paired_gain(evaluation.records, [replace(record, alternatives=()) for record in records.values()], CONFIG)
    plain = [replace(sample, alternatives=(), answers_as="text") for sample in samples]
    assert questions_hash(plain) != questions_hash(samples)
    assert questions_hash(samples[3:]) != questions_hash(plain[3:]) and questions_hash(plain[:0]) != questions_hash(
        plain
    )


def test_different_correct_answers_vote_together() -> None:
    sample = Sample("1", "What?", "ependymoma", "open", alternatives=("brain tumor",))
    texts = ("brain tumor", "Ependymoma", "cyst", "cyst", "tumor")
    completions = [Completion((1,), in_form(text), False) for text in texts]
    votes = [_sampled_answer(sample, completion, "think_answer", DEFAULT_WORDING) for completion in completions]
    assert [(vote.vote, vote.is_correct) for vote in votes] == [
        ("ependymoma", True),
        ("ependymoma", True),
        ("cyst", False),
        ("cyst", False),
        ("tumor", False),
    ]
