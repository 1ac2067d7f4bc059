"""The verb eval on a tiny random model: resumed, sharded, with several prompts and data sets, and with controls.

Run: pytest tests/evaluation/test_cells.py
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from medvqa_rl.config import Config, DataConfig, EvalConfig, ModelConfig, RolloutConfig
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.randomness import address
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.evaluation import answering, cells
from medvqa_rl.evaluation.cells import run_eval
from medvqa_rl.evaluation.evaluate import EvaluationFailed
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.store import RecordFile, Shard, hold_shard
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.fingerprint import weights_fingerprint
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import RolloutEngine
from tests import forking

MakePolicy = Callable[..., Policy]


@pytest.fixture
def config(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Config:
    return Config(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_folder("qwen2_vl")), device="cpu"),
        rollout=RolloutConfig(max_completion_length=6),
        eval=EvalConfig(batch_size=2, bootstrap=50, num_samples=2),
    )


@pytest.fixture
def questions(
    monkeypatch: pytest.MonkeyPatch, make_sample: Callable[..., Sample], make_image: Callable[..., Any]
) -> StoredDataset:
    """Seven questions about five images that replace the configured data set; their prompts vary in length."""
    samples = [
        make_sample(
            f"q{index}", images=(make_image(seed=index % 5),), question="Is there an effusion " * (1 + index % 3)
        )
        for index in range(5)
    ]
    options = ("left lung", "right lung", "liver")
    samples += [make_sample(f"q{index}", images=(make_image(seed=index % 5),), options=options) for index in (5, 6)]
    data = StoredDataset("seven", tuple(samples))
    monkeypatch.setattr(cells, "load_dataset", lambda config, split: data)
    return data


def content(folder: Path) -> dict[str, str]:
    """Every final file of an evaluation by its path."""
    files = [path for path in folder.rglob("*.json*") if "shards" not in path.parts]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_a_complete_evaluation_is_scored_by_other_rules_without_the_model(
    config: Config,
    questions: StoredDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "out"
    run_eval(config, output=folder)
    before = json.loads((folder / "results.json").read_text())

    def load(model: ModelConfig) -> Policy:
        raise AssertionError("the model is not needed")

    monkeypatch.setattr(cells, "load_policy", load)
    (evaluation,) = run_eval(config, output=folder, resume=True, protocols=("medevalkit", "lmms_eval"))
    results = json.loads((folder / "results.json").read_text())
    both = results.pop("protocols")
    assert results == before and both.keys() == {"medevalkit", "lmms_eval"} and evaluation.folder == folder
    # The data set is called "seven", for which neither harness has a rule of its own.
    assert both["lmms_eval"]["no_rule"] == {"lmms-eval has no task for seven.": 7}
    lines = (folder / "protocol-medevalkit.jsonl").read_text().splitlines()
    assert both["medevalkit"]["num_scored"] == 7 and both["medevalkit"]["num_different"] == len(lines)
    assert "The same answers by the scoring rules of other harnesses" in capsys.readouterr().out
    run_eval(config, output=folder, resume=True)
    assert json.loads((folder / "results.json").read_text())["protocols"] == both, "scored again as before"


def test_a_killed_evaluation_is_resumed_with_the_same_results(
    config: Config, questions: StoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "BATCHES_PER_CHUNK", 1)
    run_eval(config, output=tmp_path / "whole", controls=True)
    whole = content(tmp_path / "whole")
    greedy = RolloutEngine.greedy
    answered: list[str] = []

    def dying(limit: int) -> Callable[..., Iterator[Group]]:
        calls = iter(range(limit))

        def answer(self: RolloutEngine, samples: Iterable[Sample], prompts: Any, **rest: Any) -> Iterator[Group]:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            asked = list(zip(samples, prompts, strict=True))
            answered.extend(sample.id for sample, _ in asked)
            return greedy(self, [sample for sample, _ in asked], prompts=[prompt for _, prompt in asked], **rest)

        return answer

    folder = tmp_path / "killed"
    for limit in (1, 3, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(RolloutEngine, "greedy", dying(limit))
            run_eval(config, output=folder, controls=True, resume=limit != 1)
        assert not (folder / "results.json").exists()
        with (folder / "samples.jsonl").open("a") as file:
            file.write('{"sample_id": "q')  # as after a power failure in the middle of a line
    run_eval(config, output=folder, controls=True, resume=True)
    assert content(folder) == whole
    assert answered.count("q0") + answered.count("q3") <= 4  # answered questions are not generated again


def test_the_number_of_threads_is_recorded_and_kept(config: Config, questions: StoredDataset, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run_eval(config, output=folder)
    record, results = folder / "evaluation.json", folder / "results.json"
    found = json.loads(record.read_text())
    assert found["threads"] == json.loads(results.read_text())["threads"] == torch.get_num_threads()
    record.write_text(json.dumps(found | {"threads": 99}))
    results.unlink()
    (folder / "samples.jsonl").write_text("")
    run_eval(config, output=folder, resume=True)
    assert json.loads(results.read_text())["threads"] == 99


def test_an_evaluation_is_resumed_only_on_request_and_unchanged(
    config: Config, questions: StoredDataset, tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    run_eval(config, output=folder)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match="already holds an evaluation: choose another with --output, or show"):
        run_eval(config, output=folder)
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match="is not finished: continue it with --resume"):
        run_eval(config, output=folder)
    longer = config.model_copy(update={"rollout": RolloutConfig(max_completion_length=7)})
    with pytest.raises(ValueError, match="max_completion_length was 6 and is 7"):
        run_eval(longer, output=folder, resume=True)
    write_model(tiny_policy(seed=1), tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds a different evaluation \(model.path was"):
        run_eval(config, checkpoint=tmp_path / "other", output=folder, resume=True)
    # Other weights at the same path are detected too.
    load = cells.load_policy
    with monkeypatch.context() as patch:
        patch.setattr(cells, "load_policy", lambda model: tiny_policy(seed=1))
        with pytest.raises(ValueError, match="weights was"):
            run_eval(config, output=folder, resume=True)
    assert load is cells.load_policy
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by this command, so it cannot be continued"):
        run_eval(config, output=tmp_path / "trained", resume=True)
    (folder / "samples.jsonl").write_text(lines[0] + "broken\n" + lines[1])
    with pytest.raises(ValueError, match=r"Line 2 of .*samples.jsonl is not JSON"):
        run_eval(config, output=folder, resume=True)


def test_a_refused_model_does_not_claim_the_folder(config: Config, questions: StoredDataset, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="bert"):
        run_eval(config, checkpoint=tmp_path / "bert", output=folder)
    run_eval(config, output=folder)
    assert (folder / "results.json").exists()


def test_a_second_process_is_refused_and_named(config: Config, questions: StoredDataset, tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    with hold_shard(folder, Shard(1, 2)):
        with pytest.raises(
            ValueError, match=f"^Process {os.getpid()} is answering shard 1/2 in {folder}: wait for it"
        ):
            run_eval(config, output=folder, shard=Shard(1, 2))
        run_eval(config, output=folder, shard=Shard(0, 2))
    with hold_shard(folder, Shard()):
        before = content(folder)
        with pytest.raises(ValueError, match="is evaluating in"):
            run_eval(config, output=folder, resume=True)
        assert content(folder) == before
    run_eval(config, output=folder, shard=Shard(1, 2))
    assert (folder / "results.json").exists()


def test_an_evaluation_that_writes_nothing_leaves_no_folders(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for folder in (tmp_path / "new", tmp_path / "run" / "eval" / "test", tmp_path / "other" / "eval" / "test"):
        with hold_shard(folder, Shard()):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]
    with hold_shard(tmp_path / "run" / "eval" / "one", Shard()):
        (tmp_path / "run" / "eval" / "two").mkdir()
    assert [path.name for path in (tmp_path / "run" / "eval").iterdir()] == ["two"]


def test_records_that_are_removed_during_an_evaluation_are_missed(
    config: Config, questions: StoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RecordFile.append

    def remove_first(file: RecordFile, records: Sequence[EvalRecord]) -> None:
        append(file, records)
        if not (tmp_path / "removed").exists():
            file.own.rename(tmp_path / "removed")

    monkeypatch.setattr(RecordFile, "append", remove_first)
    with pytest.raises(ValueError, match=r"records of 2 of 7 questions are no longer in .*samples\.jsonl.*--resume"):
        run_eval(config, output=tmp_path / "eval")
    run_eval(config, output=tmp_path / "eval", resume=True)
    run_eval(config, output=tmp_path / "whole")
    assert content(tmp_path / "eval") == content(tmp_path / "whole")


def test_two_shards_equal_one_process(
    config: Config, questions: StoredDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval(config, output=tmp_path / "whole", controls=True)
    folder = tmp_path / "shared"
    capsys.readouterr()
    run_eval(config, output=folder, controls=True, shard=Shard(1, 2))
    assert "shard 1/2 is done, others are missing" in capsys.readouterr().out
    assert not (folder / "results.json").exists() and not (folder / "samples.jsonl").exists()
    with pytest.raises(ValueError, match="is not finished"):
        run_eval(config, output=folder, controls=True, shard=Shard(1, 2))
    run_eval(config, output=folder, controls=True, shard=Shard(0, 2))
    assert content(folder) == content(tmp_path / "whole")
    assert len(list((folder / "shards").iterdir())) == 2
    late = tmp_path / "late"
    run_eval(config, output=late, shard=Shard(0, 2))
    run_eval(config, output=late, controls=True, shard=Shard(1, 2))
    assert not (late / "results.json").exists()  # shard 0 has not answered the controls
    run_eval(config, output=late, controls=True, shard=Shard(0, 2), resume=True)
    assert content(late) == content(tmp_path / "whole")


def test_a_complete_evaluation_is_shown_again_without_a_model(
    config: Config, questions: StoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_eval(config, output=tmp_path / "out")
    before = content(tmp_path / "out")
    monkeypatch.setattr(cells, "load_policy", None)
    run_eval(config, output=tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == before


def test_prompts_and_data_sets_get_folders_and_are_compared(
    config: Config,
    questions: StoredDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    datasets = {"home": questions, "unseen": StoredDataset("other/data", questions.samples[:3])}
    monkeypatch.setattr(cells, "load_dataset", lambda config, split: datasets[config.scanner])
    run_eval(
        config,
        output=tmp_path / "out",
        data=[DataConfig(scanner="unseen")],
        prompts=("think_answer", "direct"),
    )
    folders = ["other-data-direct", "other-data-think_answer", "seven-direct", "seven-think_answer"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == folders
    rows = {
        name: [json.loads(line) for line in (tmp_path / "out" / name / "samples.jsonl").read_text().splitlines()]
        for name in folders
    }
    assert [len(rows[name]) for name in folders] == [3, 3, 7, 7]
    hashes = {name: {row["prompt_hash"] for row in some} for name, some in rows.items()}
    assert hashes["seven-direct"].isdisjoint(hashes["seven-think_answer"])
    assert {row["image_hash"] for row in rows["seven-direct"]} == {
        row["image_hash"] for row in rows["seven-think_answer"]
    }
    out = capsys.readouterr().out
    assert out.count("Differences between every two, in points") == 2
    results = json.loads((tmp_path / "out" / "other-data-direct" / "results.json").read_text())
    assert results["config"]["data"]["scanner"] == "unseen" and results["dataset"]["name"] == "other/data"
    datasets["unseen"] = questions
    with pytest.raises(ValueError, match="Two of the data sets are called seven"):
        run_eval(config, output=tmp_path / "twice", data=[DataConfig(scanner="unseen")])


def test_prompts_are_compared_in_pairs_and_resumed(
    config: Config, questions: StoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against an independent computation, with answers made correct or wrong by a hash; one prompt hides options."""
    monkeypatch.setattr(answering, "BATCHES_PER_CHUNK", 1)
    limit = iter(range(10**9))

    def scripted(
        self: RolloutEngine, samples: Sequence[Sample], prompts: Sequence[EncodedPrompt], **rest: Any
    ) -> Iterator[Group]:
        if next(limit, None) is None:
            raise KeyboardInterrupt
        for sample, prompt in zip(samples, prompts):
            said = sample.answer if address(sample.id, prompt.template) % 2 else "something else"
            text = render_answer("why", said, prompt.template, description="a lung")
            yield Group(sample, prompt, [Completion((1, 2), text, False)])

    monkeypatch.setattr(RolloutEngine, "greedy", scripted)
    config = config.model_copy(update={"eval": EvalConfig(batch_size=2, bootstrap=50)})
    names = ("think_answer", "open_ended", "describe_think")
    whole = tmp_path / "whole"
    run_eval(config, output=whole, prompts=names)
    (comparison,) = json.loads((whole / "prompts-seven.json").read_text())["comparisons"]
    right = {
        name: {
            row["sample_id"]: row["is_correct"]
            for row in map(json.loads, (whole / f"seven-{name}" / "samples.jsonl").open())
        }
        for name in names
    }
    for name in names:
        assert right[name] == {f"q{index}": address(f"q{index}", name) % 2 == 1 for index in range(7)}
    p_values = {}
    for row, (one, other) in zip(comparison["pairs"], combinations(names, 2), strict=True):
        assert (row["baseline"], row["run"]) == (one, other)
        better = sum(right[other][id] and not right[one][id] for id in right[one])
        worse = sum(right[one][id] and not right[other][id] for id in right[one])
        assert (row["improved"], row["worsened"], row["n"]) == (better, worse, 7)
        assert row["gain"] == pytest.approx((better - worse) / 7)
        p_values[other, one] = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
        assert row["mcnemar_p"] == pytest.approx(p_values[other, one])
    ordered = sorted(p_values.values())
    holm = {p: min(1.0, max((3 - k) * q for k, q in enumerate(ordered) if q <= p)) for p in ordered}
    assert [row["mcnemar_holm_p"] for row in comparison["pairs"]] == pytest.approx(
        [holm[p] for p in p_values.values()]
    )
    table = list(csv.DictReader((whole / "prompts-seven.csv").open()))
    assert [row["gain"] for row in table] == [str(row["gain"]) for row in comparison["pairs"]]
    assert {row["dataset"] for row in table} == {"seven"}
    hidden = [json.loads(line) for line in (whole / "seven-open_ended" / "samples.jsonl").open()]
    assert hidden[5]["options"] == [] and hidden[5]["gold"] == "left lung" and hidden[5]["answer_type"] == "open"

    for calls in (5, 4):
        limit = iter(range(calls))
        with pytest.raises(KeyboardInterrupt):
            run_eval(config, output=tmp_path / "killed", prompts=names, resume=calls != 5)
    limit = iter(range(10**9))
    run_eval(config, output=tmp_path / "killed", prompts=names, resume=True)
    assert content(tmp_path / "killed") == content(whole)
    assert (tmp_path / "killed" / "prompts-seven.csv").read_text() == (whole / "prompts-seven.csv").read_text()


def test_results_identify_model_data_and_seeds(
    config: Config, questions: StoredDataset, tiny_policy: MakePolicy, tmp_path: Path
) -> None:
    run_eval(config, output=tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["weights"] == weights_fingerprint(tiny_policy().model)
    assert results["model"]["weights"] != weights_fingerprint(tiny_policy(seed=1).model)
    assert results["config"] == config.model_dump(mode="json")
    assert results["seeds"] == {"choice": 0, "sampling": 0, "bootstrap": 0, "data": 0}
    assert results["dataset"]["fingerprint"] == questions.fingerprint
    assert (results["n"], results["effective_n"] is None or results["effective_n"] > 0) == (7, True)
    assert results["sampled"]["num_samples"] == 2 and "torch" in results["versions"]


def test_too_many_unscored_questions_fail_after_writing(
    config: Config, questions: StoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        key = "broken"

        def load(self) -> None:
            raise ValueError("The image broken.png cannot be decoded.")

        def header_pixels(self) -> None:
            return None

    samples = (*questions.samples[:6], replace(questions.samples[6], images=(Broken(),)))
    data = StoredDataset("seven", samples)
    monkeypatch.setattr(cells, "load_dataset", lambda config, split: data)
    with pytest.raises(EvaluationFailed, match=r"1 of 7 questions of seven could not be scored, more than"):
        run_eval(config, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["unscored_rate"] == pytest.approx(1 / 7)
    lenient = config.model_copy(update={"eval": config.eval.model_copy(update={"fail_on_unscored": 0.5})})
    run_eval(lenient, output=tmp_path / "lenient", controls=True)


def test_controls_are_written_and_printed(
    config: Config, questions: StoredDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval(config, output=tmp_path / "out", controls=True)
    controls = json.loads((tmp_path / "out" / "results.json").read_text())["controls"]
    assert set(controls) == {"blank", "shuffled", "no_image", "option_order"}
    assert [controls[name]["n"] for name in ("blank", "shuffled", "no_image")] == [7, 7, 7]
    assert controls["option_order"]["n"] == 2
    out = capsys.readouterr().out
    assert "Bias controls" in out and "blank image" in out and "Letters, gold/given" in out


KILLED = """
import os, signal, sys
from medvqa_rl.config import Config
from medvqa_rl.evaluation.cells import run_eval
from medvqa_rl.rollout.decode import RolloutEngine
from pathlib import Path

greedy, calls = RolloutEngine.greedy, iter(range(2))

def dying(self, samples, **rest):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return greedy(self, samples, **rest)

RolloutEngine.greedy = dying
run_eval(Config.model_validate_json(sys.argv[1]), output=Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_kill_9_on_real_processes(config: Config, tmp_path: Path) -> None:
    config = config.model_copy(update={"data": DataConfig(num_test=8)})
    folder = tmp_path / "killed"
    arguments = [sys.executable, "-c", KILLED, config.model_dump_json(), str(folder)]
    result = forking.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 4
    run_eval(config, output=folder, resume=True)
    run_eval(config, output=tmp_path / "whole")
    assert content(folder) == content(tmp_path / "whole")


def test_similarity_is_measured_once_by_one_instrument(
    config: Config, questions: StoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_words = config.model_copy(update={"eval": config.eval.model_copy(update={"similarity": "tfidf"})})
    folder = tmp_path / "out"
    run_eval(by_words, output=folder)
    whole = content(folder)
    section = json.loads(whole["results.json"])["similarity"]
    assert (section["by"], section["n"]) == ("tfidf", 7)
    rows = [json.loads(line) for line in whole["samples.jsonl"].splitlines()]
    assert section["value"] == pytest.approx(sum(row["similarity"] for row in rows) / 7)
    with monkeypatch.context() as patch:
        patch.setattr(
            "medvqa_rl.evaluation.measures.similarity.TfidfSimilarity.compare", None
        )  # must not be called again
        run_eval(by_words, output=folder, resume=True)
    assert content(folder) == whole
    other = config.model_copy(update={"eval": config.eval.model_copy(update={"similarity": "embeddings"})})
    with pytest.raises(ValueError, match=r"eval\.similarity is embeddings, which is neither a folder nor a Hub id"):
        run_eval(other, output=tmp_path / "other")
    assert not (tmp_path / "other").exists()  # reported before anything was generated
