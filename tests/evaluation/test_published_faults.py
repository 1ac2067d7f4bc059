"""Fifteen faults found in the code of published medical VQA harnesses: one test for each that it is absent here.

Run: pytest tests/evaluation/test_published_faults.py
"""

import ast
import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medvqa_rl.config import DataConfig, EvalConfig
from medvqa_rl.core.answers import is_correct, score_correctness, token_f1
from medvqa_rl.core.prompts import render_answer, render_prompt
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.images.files import FileImage, MemoryImage
from medvqa_rl.data.images.fingerprints import measure
from medvqa_rl.data.overlap import find_overlap
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.evaluation.evaluate import (
    Evaluation,
    EvaluationFailed,
    check_unscored,
    evaluate,
    write_evaluation,
)
from medvqa_rl.evaluation.records import read_records
from medvqa_rl.evaluation.statistics.summary import summarise
from medvqa_rl.evaluation.statistics.tables import results_table
from medvqa_rl.rewards.functions import RewardLog, call_functions

CONFIG = EvalConfig(batch_size=4, bootstrap=100)
SOURCE = Path(__file__).parents[2] / "src" / "medvqa_rl"


def question(id: str, answer: str, answer_type: Any = "closed", **more: Any) -> Sample:
    images = (MemoryImage(f"image {id}", Image.new("RGB", (2, 2))),)
    return Sample(id, "Is there an effusion?", answer, answer_type, **{"images": images, **more})


class ScriptedEngine:
    """An engine with prepared answers that renders its prompts as the real one does."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.processor = self
        self.answers = answers

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def encode(self, sample: Sample) -> EncodedPrompt:
        return EncodedPrompt(np.zeros(1, dtype=np.int64), {}, repr(render_prompt(sample, "direct")))

    def encoding_bytes(self, sample: Sample) -> int:
        return 0

    def greedy(
        self,
        samples: Sequence[Sample],
        *,
        max_completion_length: int,
        batch_size: int,
        prompts: Sequence[EncodedPrompt],
    ) -> Iterator[Group]:
        for sample, prompt in zip(samples, prompts, strict=True):
            yield Group(sample, prompt, [Completion((1,), self.answers[sample.id], False)])


def answered(samples: Sequence[Sample], answers: dict[str, str], config: EvalConfig = CONFIG) -> Evaluation:
    dataset = StoredDataset("data", tuple(samples))
    return evaluate(ScriptedEngine(answers), dataset, config, max_completion_length=8, template="direct")  # type: ignore[arg-type]


def test_1_the_prompt_does_not_depend_on_the_gold_answer() -> None:
    samples = [question("1", "yes"), question("2", "a large left-sided one"), question("3", "no", "open")]
    records = answered(samples, dict.fromkeys("123", "yes")).records
    assert len({record.prompt_hash for record in records}) == 1


def test_2_closed_follows_the_data_set_and_yes_or_no_is_separate() -> None:
    samples = [
        question("1", "yes"),
        question("2", "left"),
        question("3", "no", "open"),
        question("4", "liver", "open"),
    ]
    by = answered(samples, {"1": "yes", "2": "right", "3": "no", "4": "spleen"}).results["by"]
    numbers = {key: {value: (row["n"], row["accuracy"]) for value, row in by[key].items()} for key in by}
    assert numbers["answer_type"] == {"closed": (2, 0.5), "open": (2, 0.5)}
    assert numbers["answer_kind"] == {"yes/no": (2, 1.0), "other": (2, 0.0)}


@pytest.mark.parametrize("answer", ["abnormal", "not seen", "unknown", "yes, abnormal", "no, yes", "nothing", "know"])
def test_3_a_word_inside_another_one_is_no_answer(answer: str) -> None:
    assert not is_correct(question("1", "no"), answer)
    assert not is_correct(question("1", "normal"), answer)
    assert is_correct(question("1", "no"), "No.")


def test_4_rambling_that_holds_the_gold_answer_is_not_right() -> None:
    sample = question("1", "left upper lobe", "open")
    rambling = "It may be the right lower lobe or the left upper lobe or the left lower lobe"
    evaluation = answered([sample], {"1": rambling})
    assert evaluation.results["accuracy"] == 0 and evaluation.results["exact_match"] == 0
    assert 0 < evaluation.results["token_f1"] < 0.5  # reported beside accuracy, never as accuracy
    assert score_correctness(sample, rambling, "direct") == 0  # nor as a reward
    assert evaluation.results["mean_length"] == 1


@given(st.lists(st.sampled_from("bcde"), max_size=6), st.lists(st.sampled_from("bcde"), max_size=6))
def test_5_f1_is_f1_and_an_empty_answer_is_a_number(given: list[str], gold: list[str]) -> None:
    shared = sum(min(given.count(word), gold.count(word)) for word in set(given))
    precision, recall = shared / max(1, len(given)), shared / max(1, len(gold))
    harmonic = 2 * precision * recall / (precision + recall) if shared else float(not given and not gold)
    assert token_f1(" ".join(given), " ".join(gold)) == pytest.approx(harmonic)
    assert token_f1(None, " ".join(gold)) == 0.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["closed", "open"]), st.sampled_from([True, False, None])), min_size=1))
def test_6_totals_are_recomputed_from_the_records_and_cannot_exceed_1(kinds: list[tuple[str, bool | None]]) -> None:
    samples = [question(str(index), "yes", kind) for index, (kind, _) in enumerate(kinds)]
    answers = {str(index): "yes" if right else "no" for index, (_, right) in enumerate(kinds)}
    config = CONFIG.model_copy(update={"bootstrap": 20})
    records = answered(samples, answers, config).records
    records = tuple(r if right is not None else replace(r, is_correct=None) for r, (_, right) in zip(records, kinds))
    results = summarise(records, config)
    right = [answer for _, answer in kinds if answer is not None]
    if right:
        assert results["accuracy"] == pytest.approx(sum(right) / len(right))
        parts = [row for row in results["by"]["answer_type"].values() if row["num_scored"]]
        total = sum(row["accuracy"] * row["num_scored"] for row in parts)
        assert results["accuracy"] == pytest.approx(total / results["num_scored"])
        assert all(0 <= row["accuracy"] <= 1 for row in parts)
    else:
        assert math.isnan(results["accuracy"])


def test_6b_the_written_totals_follow_from_the_written_records(tmp_path: Path) -> None:
    evaluation = answered([question("1", "yes"), question("2", "no")], {"1": "yes", "2": "yes"})
    write_evaluation(evaluation, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    again = summarise(read_records(tmp_path / "samples.jsonl"), CONFIG)
    assert stored["accuracy"] == again["accuracy"] == 0.5
    assert stored["by"]["answer_kind"]["yes/no"]["accuracy"] == again["by"]["answer_kind"]["yes/no"]["accuracy"]


@pytest.mark.parametrize("answer", ["E", "the first one", "mas", "cysts and masses", "A or B", "?", "mass cyst"])
def test_7_what_names_no_option_is_wrong_and_never_guessed(answer: str) -> None:
    for gold in "ABCD":
        sample = question("1", gold, "choice", options=("mass", "cyst", "stone", "scar"))
        (record,) = answered([sample], {"1": answer}).records
        assert record.is_correct is False and record.choice is None
        assert record.why == "the answer names none of the options"
    empty = answered([question("1", "A", "choice", options=("mass", "cyst"))], {"1": ""})
    assert empty.results["no_answer_rate"] == 1 and empty.results["letters"]["given"]["none"] == 1


def test_8_scoring_failures_do_not_count_against_the_model_and_stop_above_a_rate(tmp_path: Path) -> None:
    broken = question("2", "yes", images=(FileImage("missing.png", tmp_path),))
    results = answered([question("1", "yes"), broken], {"1": "yes", "2": "yes"}).results
    assert (results["accuracy"], results["num_scored"], results["unscored_rate"]) == (1.0, 1, 0.5)
    with pytest.raises(EvaluationFailed, match="1 of 2 questions of data could not be scored"):
        check_unscored(results, CONFIG)
    check_unscored(results, CONFIG.model_copy(update={"fail_on_unscored": 0.5}))


def test_9_a_verdict_is_parsed_exactly_or_fails() -> None:
    """1 is correct and 0 is wrong, everywhere; anything but a number or None is refused, not read as wrong."""
    sample = question("1", "yes")
    assert score_correctness(sample, render_answer("seen", "yes")) == 1.0
    assert score_correctness(sample, render_answer("seen", "no")) == 0.0
    group = Group(sample, EncodedPrompt(np.zeros(1, dtype=np.int64), {}, ""), [Completion((), "yes", False)])

    def verdict(value: Any) -> float | None:
        return call_functions({"f": lambda *_, **__: [value]}, [group], step=0, log=RewardLog())["f"][0]

    assert verdict(1.0) == 1.0 and verdict(0) == 0.0 and verdict(None) is None
    assert math.isnan(verdict(math.inf) or 0.0)
    for noise in ("0", "0.", "correct", "", ["1"]):
        with pytest.raises(ValueError, match="a reward is a float, or None where it does not apply"):
            verdict(noise)


def test_10_the_whole_split_is_loaded_and_its_size_and_hash_reported(shared_data: Path) -> None:
    settings = {"name": "vqa_rad", "path": str(shared_data / "vqa_rad"), "num_val": None}
    splits = {split: load_dataset(DataConfig(**settings), split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert len(splits["train"]) + len(splits["val"]) == 1797 and len(splits["test"]) == 451
    test = splits["test"]
    assert isinstance(test, StoredDataset)
    assert Counter(sample.answer_type for sample in test.samples) == {"closed": 272, "open": 179}
    assert Counter(sample.groups["organ"] for sample in test.samples) == {"chest": 174, "abdomen": 158, "head": 119}
    part = load_dataset(DataConfig(**settings, num_test=100), "test")  # type: ignore[arg-type]
    assert len({dataset.fingerprint for dataset in (*splits.values(), part)}) == 4


def test_10b_a_part_of_a_split_is_seen_in_the_results() -> None:
    samples = [question(str(index), "yes") for index in range(6)]
    answers = dict.fromkeys("012345", "yes")
    whole, part = answered(samples, answers), answered(samples, answers, CONFIG.model_copy(update={"max_samples": 4}))
    assert (whole.results["n"], part.results["n"], part.results["dataset"]["size"]) == (6, 4, 6)
    assert part.results["settings"]["max_samples"] == 4
    assert whole.results["dataset"]["questions"] != part.results["dataset"]["questions"]


def test_11_languages_are_not_mixed_under_one_name(tmp_path: Path) -> None:
    row = {"img_id": 1, "img_name": "x/source.jpg", "question": "Is it?", "answer": "Yes", "q_lang": "en", "qid": 1}
    row |= {"location": "Lung", "modality": "CT", "answer_type": "CLOSED", "base_type": "vqa"}
    row |= {"triple": ["vhead", "_", "_"], "content_type": "Position"}
    chinese = row | {"q_lang": "zh", "question": "这是肺吗？", "answer": "是", "qid": 2}
    (tmp_path / "imgs" / "x").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "imgs" / "x" / "source.jpg", "PNG")
    for file in ("train", "validate", "test"):
        (tmp_path / f"{file}.json").write_text(json.dumps([row, chinese]), encoding="utf-8")
    found = {}
    for name in ("slake_en", "slake_zh"):
        dataset = load_dataset(DataConfig(name=name, path=str(tmp_path)), "test")
        found[dataset.name] = [dataset[index].question for index in range(len(dataset))]
    assert found == {"slake_en/official/test": ["Is it?"], "slake_zh/official/test": ["这是肺吗？"]}


def test_12_every_test_file_has_its_own_name_in_the_results(tmp_path: Path) -> None:
    row = {"Figure_path": "PMC1_F1.jpg", "Question": "What is shown?", "Answer": "Brain", "Answer_label": "B"}
    row |= {f"Choice {letter}": text for letter, text in zip("ABCD", ("Lung", "Brain", "Liver", "Kidney"))}
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "PMC1_F1.jpg", "PNG")
    for file in ("train", "test", "test_clean"):
        with (tmp_path / f"{file}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
            writer.writerow(row)
    names = []
    for variant in ("v1", "v1_clean"):
        dataset = load_dataset(DataConfig(name="pmc_vqa", path=str(tmp_path), variant=variant), "test")
        speaker = ScriptedEngine({dataset[0].id: "B"})
        results = evaluate(speaker, dataset, CONFIG, max_completion_length=8, template="direct").results  # type: ignore[arg-type]
        names.append(results["dataset"]["name"])
        assert results["accuracy"] == 1
    assert names == ["pmc_vqa/test/test", "pmc_vqa/test_clean/test"]


def test_13_a_test_image_that_was_trained_on_is_found_under_another_name() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    train = [MemoryImage("train/1.png", pictures[0]), MemoryImage("train/2.png", pictures[1])]
    test = [MemoryImage("test/renamed.png", pictures[1]), MemoryImage("test/new.png", pictures[2])]
    facts = {source.key: found for source, found in measure([*train, *test]) if not isinstance(found, str)}
    overlap = find_overlap(("train", [i.key for i in train]), ("test", [i.key for i in test]), facts)
    assert [(pair.first, pair.second) for pair in overlap.pairs] == [("train/2.png", "test/renamed.png")]
    # The records of evaluations have a hash of the pixels.
    records = answered(
        [question("1", "yes", images=(test[0],)), question("2", "yes", images=(train[1],))], {"1": "", "2": ""}
    ).records
    assert records[0].image_hash == records[1].image_hash is not None


def test_14_every_number_has_an_interval_that_knows_of_shared_images() -> None:
    picture = Image.new("RGB", (2, 2))
    samples = [
        question(str(index), "yes", images=(MemoryImage(f"image {index // 6}", picture),)) for index in range(60)
    ]
    # All questions of an image are answered alike, so 60 questions carry the information of 10.
    answers = {str(index): "yes" if index // 6 % 2 else "no" for index in range(60)}
    clustered = answered(samples, answers).results
    alone = answered([replace(s, images=(MemoryImage(s.id, picture),)) for s in samples], answers).results
    assert clustered["accuracy"] == alone["accuracy"] == 0.5
    width, naive = (r["accuracy_high"] - r["accuracy_low"] for r in (clustered, alone))
    assert width > 1.9 * naive
    assert clustered["effective_n"] == pytest.approx(10, rel=0.2) and alone["effective_n"] == pytest.approx(60)
    assert clustered["detectable_difference"] > 2 * alone["detectable_difference"]
    assert "true difference of" in " ".join(results_table(clustered).notes)


def test_15_no_debugger_no_settings_from_the_environment_and_nothing_connects_when_imported() -> None:
    debuggers, environment = {"set_trace", "breakpoint", "pdb", "ipdb"}, {"environ", "getenv", "putenv"}
    clients = {"openai", "requests", "httpx", "aiohttp", "urllib3", "socket"}
    scoring = [SOURCE / name for name in ("evaluation", "rewards", "rollout", "config")]
    scoring += [SOURCE / "core" / f"{name}.py" for name in ("prompts", "answers", "text", "types")]
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE)
        banned = debuggers | (environment if any(map(path.is_relative_to, scoring)) else set())
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & banned, f"{path} uses {names & banned}"
        for statement in tree.body:
            imported = [a.name for a in statement.names] if isinstance(statement, ast.Import) else []
            imported += [str(statement.module)] if isinstance(statement, ast.ImportFrom) else []
            at_top = {name.partition(".")[0] for name in imported}
            if place != Path("core/network.py"):  # the guard itself
                assert not at_top & (clients | debuggers), f"{path} imports {at_top} at its top"
