"""Folders of runs made of chosen numbers and texts, in the form that training writes, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medvqa_rl.config import Config, DataConfig, EvalConfig
from medvqa_rl.core.answers import is_correct
from medvqa_rl.core.types import LETTERS, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.records import EvalRecord, write_records
from medvqa_rl.evaluation.statistics.summary import summarise
from tests.records import make_record

EVIL = (
    "</script><script>document.title = 'owned'</script><!--"
    "<img src=x onerror=\"document.title='owned'\">\u2028'&\ud800"
)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, values: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def step_row(step: int, **changes: float | None) -> dict[str, Any]:
    """A training step's line of metrics.jsonl."""
    return {
        "step": step,
        "reward": 1.0 + 0.01 * (step % 3),
        "rewards/format/mean": 0.9,
        "rewards/correctness/mean": 0.5,
        "completions/mean_length": 30.0,
        "completions/mean_length_correct": 29.0,
        "completions/mean_length_wrong": 31.0,
        "kl": 0.001 * step,
        "entropy": 0.8,
        "grad_norm": 1.0,
        "frac_reward_zero_std": 0.25,
        "no_answer_rate": 0.0,
        "completions/clipped_ratio": 0.0,
        "step_time": 2.0,
        **changes,
    }


def completion_rows(
    step: int, sample: Sample, texts: Sequence[tuple[str, str]], **changes: Any
) -> list[dict[str, Any]]:
    """Lines of samples/step_*.jsonl; a text comes with its outcome right, wrong or none."""
    return [
        {
            "step": step,
            "sample_id": sample.id,
            "index": index,
            "question": sample.question,
            "options": list(sample.options),
            "gold": sample.answer,
            "completion": text,
            "rewards": {"format": 1.0, "correctness": float(outcome == "right")},
            "reward": 1.0 + float(outcome == "right"),
            "advantage": 0.5 if outcome == "right" else -0.5,
            "length": 5 + len(text.split()),
            "prompt_length": 40,
            "is_truncated": False,
            "is_correct": outcome == "right",
            "has_answer": outcome != "none",
            "answer_type": sample.answer_type,
            "groups": dict(sample.groups),
            "extra": {},
            **changes,
        }
        for index, (text, outcome) in enumerate(texts)
    ]


def eval_record(index: int, is_correct: bool) -> EvalRecord:
    """A greedy answer; two questions share an image."""
    return make_record(
        sample_id=f"q{index}",
        image_key=f"image{index // 2}",
        options=("liver", "spleen"),
        gold="A",
        output="<think>x</think><answer>A</answer>",
        think="x",
        answer="A" if is_correct else "B",
        is_correct=is_correct,
        num_tokens=12,
        groups={"modality": "CT" if index % 3 else "MRI", "family": "organ"},
    )


def write_eval(folder: Path, correct: Sequence[bool]) -> dict[str, Any]:
    """An evaluation of as many questions; returns its results."""
    records = [eval_record(index, is_correct) for index, is_correct in enumerate(correct)]
    results = {**summarise(records, EvalConfig(bootstrap=200)), "dataset": {"name": "phantom/home/val"}}
    write(folder / "results.json", results)
    write_records(records, folder / "samples.jsonl")
    return results


def make_run(folder: Path, *, steps: int = 40, state: str = "finished", **settings: Any) -> Path:
    """A run on the phantom world with curves, two evaluations and samples of its steps 20 and 40 (8 groups of 3)."""
    config = Config.model_validate(
        {"output_dir": str(folder), "train": {"steps": steps, "prompts_per_step": 4}, **settings}
    )
    data = load_dataset(config.data, "train")
    write(folder / "config.resolved.json", config.model_dump(mode="json"))
    write(
        folder / "env.json", {"python": "3.12", "packages": {"torch": "2.11.0"}, "git": None, "seed": 0, "threads": 1}
    )
    described = {"name": data.name, "fingerprint": data.fingerprint, "samples": None, "notes": {}}
    write(folder / "data.json", {"train": described})
    status = {"state": state, "step": steps, "steps": steps, "kind": "train", "best_step": steps, "best_accuracy": 0.7}
    write(folder / "status.json", {**status, "pid": 1, "updated": "2026-01-01T00:00:00+00:00"})
    before, after = [index % 2 == 0 for index in range(20)], [index % 10 < 7 for index in range(20)]
    evals = []
    for step, correct in ((0, before), (steps, after)):
        results = write_eval(folder / "eval" / f"step_{step:06d}", correct)
        names = ("accuracy", "accuracy_low", "accuracy_high")
        evals.append({"step": step, **{f"eval/{name}": results[name] for name in names}})
    write_lines(folder / "metrics.jsonl", [evals[0], *(step_row(step + 1) for step in range(steps)), evals[1]])
    for step in (steps // 2, steps):
        rows: list[dict[str, Any]] = []
        for place in range(4):
            sample = data[(step - 1) * 4 + place]
            gold, wrong = sample.answer, "Z" if sample.options else "something else"
            texts = [
                (f"<think>It is clear.</think><answer>{gold}</answer>", "right"),
                (f"<think>It is {EVIL}</think><answer>{wrong}</answer>", "wrong"),
                (f"I give up at step {step}.", "none"),
            ]
            rows += completion_rows(step, sample, texts)
        write_lines(folder / "samples" / f"step_{step:06d}.jsonl", rows)
    return folder


def gold_text(sample: Sample) -> str:
    """The gold answer as a page shows it."""
    if not sample.options:
        return sample.answer
    return f"{sample.answer}: {sample.options[LETTERS.index(sample.answer)]}"


def write_evaluation(folder: Path, name: str, count: int = 12, *, same: int = 0, **changes: Any) -> Path:
    """An evaluation of phantom test questions; the first ones answered alike by all, whatever the name."""
    config = Config(data=DataConfig(num_test=count))
    data = load_dataset(config.data, "test")
    records = []
    for index in range(count):
        sample = data[index]
        who = "all" if index < same else name
        answer = sample.answer if (index + len(who)) % 2 else "nothing of the kind"
        think = f"Seen by {index} {'x' * len(who)}. {EVIL}"
        records.append(
            make_record(
                sample_id=sample.id,
                image_key=sample.image_key,
                question=f"{sample.question} {EVIL}",
                options=sample.options,
                gold=sample.answer,
                output=f"<think>{think}</think><answer>{answer}</answer>",
                think=think,
                answer=answer,
                is_correct=is_correct(sample, answer),
                num_tokens=10,
                answer_type=sample.answer_type,
                dataset=data.name,
            )
        )
    records = [replace(record, **changes) for record in records]
    results = summarise(records, EvalConfig(bootstrap=100))
    results |= {"dataset": {"name": data.name, "fingerprint": data.fingerprint}}
    write(folder / name / "results.json", {**results, "config": config.model_dump(mode="json")})
    write_records(records, folder / name / "samples.jsonl")
    return folder / name
