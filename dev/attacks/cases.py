"""The kinds of damaged input: each makes a valid one in the current folder, damages it and gives it to the command."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from . import viewing
from .command import Fault, invoke
from .data_cases import (
    archive,
    data_export,
    image,
    init,
    omnimed,
    own_csv,
    own_jsonl,
    own_parquet,
    path_vqa,
    pmc_vqa,
    slake,
    table,
    vqa_med,
    vqa_rad,
)
from .mutations import TEXTS, VALUES, damage_json, damage_rows, mutate_bytes, mutate_json
from .seeds import EVALUATED, STEPS, STUDY, png, read_lines

ROOT = Path(__file__).parents[2]
Case = Callable[[random.Random], None]


def _copy(name: str, folder: Path | str | None = None) -> Path:
    """Copy what :func:`medvqa_rl.dev.attacks.seeds.make_run` made; large files are linked, so replace them whole."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)

    return Path(shutil.copytree(Path("../seed") / name, folder or name, copy_function=copy))


def _damage_files(rng: random.Random, found: list[Path]) -> None:
    """Damage one to three files by their format; one in ten times, one of them disappears."""
    for path in rng.sample(sorted(found), min(len(found), rng.randint(1, 3))):
        old = path.read_bytes()
        if path.suffix == ".jsonl":
            data, _ = damage_rows(rng, read_lines(path))
        elif path.suffix == ".json" and rng.random() < 0.8:
            data = damage_json(rng, json.loads(old))
        elif path.suffix == ".safetensors":  # mostly the header, which is parsed
            data = mutate_bytes(rng, old[:20_000], 3) + old[20_000:]
        else:
            data = mutate_bytes(rng, old)
        path.unlink()
        path.write_bytes(data)
    if rng.random() < 0.1:
        path.unlink()


def settings(rng: random.Random) -> None:
    from medvqa_rl.config import Config, leaves

    text = rng.choice(sorted((ROOT / "configs").glob("*.yaml"))).read_bytes()
    kind = rng.random()
    if kind < 0.5:
        text = mutate_bytes(rng, text, rng.choice([1, 6]))
    elif kind < 0.7:
        text = rng.choice(
            [
                b"a: " + b"[" * 20_000, b"{" * 5_000, b"a: &x [1]\nb: *x\n", b"!!python/object/apply:os.system [id]",
                b"? [a]\n: b\n", b"- " * 2_000, b"train: {steps: 0x10}", b"train: {steps: .inf}", b"x" * 200_000,
                b"---\n---\n", b"%YAML 9.9\n---\na: b", b"train: {steps: " + b"9" * 6_000 + b"}", b"\t\ta: b",
                b"a: !<x> b",
                b"train: {steps: 1" + b"0" * 400 + b".0}", b'data: {path: "\\0"}', b'data: {path: "\\ud800"}',
                b"a: \xed\xa0\x80",
            ]
        )  # fmt: skip
    Path("config.yaml").write_bytes(text)
    names = sorted(leaves(Config().model_dump(mode="json")))
    overrides = []
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        key = rng.choice(names) if rng.random() < 0.85 else rng.choice(TEXTS) + rng.choice(names)
        overrides.append(f"{key}={rng.choice([*map(str, VALUES), '0', '1e-3', '[1, 2]', '{a: b}', 'phantom:base'])}")
    verb = rng.choice([["show"], *(["check", "--for", verb] for verb in ("train", "sft", "eval"))])
    invoke(["config", *verb, "config.yaml", "--", *overrides])


def recipe(rng: random.Random) -> None:
    from medvqa_rl.config.yaml import read_yaml, write_yaml

    folder = ROOT / "src" / "medvqa_rl" / "study" / "recipes"
    text = rng.choice(sorted(folder.glob("*phantom*.yaml"))).read_bytes()
    if rng.random() < 0.85:
        value = read_yaml(text.decode())
        for _ in range(rng.randint(1, 3)):
            value = mutate_json(rng, value)
        text = write_yaml(value).encode("utf-8", "surrogatepass")
    else:
        text = mutate_bytes(rng, text, 3)
    Path("recipe.yaml").write_bytes(text)
    invoke(["study", "plan", "recipe.yaml", "--output", "out", *(["--quick"] if rng.random() < 0.5 else [])])
    if list(Path("..").glob("*/passwd*")):
        raise Fault("a file outside the folder")


def records(rng: random.Random) -> None:
    """Damage one evaluation and compare it, judge it and make a rating sheet."""
    for name in "ab":
        _copy(name)
    file = Path("b") / rng.choice(["samples.jsonl", "samples.jsonl", "results.json"])
    if file.suffix == ".jsonl":
        data, _ = damage_rows(rng, read_lines(file))
    else:
        data = damage_json(rng, json.loads(file.read_bytes()))
    file.write_bytes(data)
    match rng.randrange(4):
        case 0:
            invoke(["compare", "a", "b", "--output", "comparison.json"])
        case 1:
            invoke(["judge", "sheet", "a", "b", "--output", "sheet.html", "--samples", "5", "--no-images"])
        case 2:
            invoke(["judge", "eval", "b", "--judge", "phantom:judge_eval", "--samples", "4", "--bias-samples", "2"])
        case _:
            invoke(["compare", "b", "a"])


def ratings(rng: random.Random) -> None:
    for name in "ab":
        _copy(name)
    invoke(["judge", "sheet", "a", "b", "--output", "sheet.html", "--samples", "6", "--no-images"])
    key_file = next(Path(".").glob("*.key.json"))
    key = json.loads(key_file.read_bytes())
    files = []
    for rater in ("one", "two"):
        given = [
            {
                "item": item["item"],
                "correct": rng.choice([True, False, None]),
                "reasoning": rng.choice([0, 3, None]),
                "comment": "",
            }
            for item in key["items"]
        ]
        value = {"format": "medvqa-rl ratings 1", "sheet": key["sheet"], "rater": rater, "ratings": given}
        Path(f"{rater}.json").write_bytes(
            damage_json(rng, value) if rng.random() < 0.7 else json.dumps(value).encode()
        )
        files.append(f"{rater}.json")
    if rng.random() < 0.3:
        key_file.write_bytes(damage_json(rng, key))
    invoke(["judge", "ratings", str(key_file), *files, "--output", "out.json"])


def run_folder(rng: random.Random) -> None:
    """Damage one to three files of a finished run and make its pages."""
    run = _copy("run")
    _damage_files(rng, [path for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml")])
    words = rng.choice(
        [
            ["report", "run", "--output", "report.html"],
            ["report", "run", "--card"],
            ["view"],
            ["report", "run", "--figures", "figures"],
        ]
    )
    if words == ["view"]:
        for path, status, _ in viewing.answers(Path("run")):
            if status not in (200, 404):
                raise Fault(f"view answers {path} with {status}")
    else:
        invoke(words)


def study_folder(rng: random.Random) -> None:
    """Damage files of a finished study, plan it and collect its tables."""
    study = _copy("study")
    _damage_files(rng, [path for path in study.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml")])
    invoke(["study", rng.choice(["plan", "collect", "collect"]), str(STUDY), "--output", "study"])


def study_tests(rng: random.Random) -> None:
    """Damage the file that a study gives to the process that evaluates a cell."""
    study = _copy("study")
    given = next((study / "configs").glob("zero*-tests.yaml"))
    given.write_bytes(mutate_bytes(rng, given.read_bytes()))
    invoke(["study", "answer", str(given)])


def checkpoint(rng: random.Random) -> None:
    """Damage the settings, tokenizer, chat template or header of the weights of a model or an adapter, and use it."""
    if is_adapter := rng.random() < 0.3:
        model = _copy("adapter", "model")
    else:
        model = _copy("model")
    _damage_files(rng, [path for path in model.iterdir() if path.name != "README.md" and path.is_file()])
    Path("a.png").write_bytes(png(rng, 60, 60))
    match rng.randrange(3):
        case 0:
            invoke(["export", "model", "out", *(["--merge"] if is_adapter else [])])
        case _:
            invoke(["ask", "a.png", "Is there a mass?", "--model", "model", "--max-length", "4"])


def resumed(rng: random.Random) -> None:
    """Damage an unfinished run or evaluation and resume it."""
    if rng.random() < 0.3:
        run = _copy("run")
        state = [
            run / name for name in ("status.json", "metrics.jsonl", "data.json", "env.json", "config.resolved.json")
        ]
        newest = run / "checkpoints" / "step_000002"
        _damage_files(rng, [*state, *(path for path in newest.rglob("*") if path.is_file()), *run.glob("samples/*")])
        invoke([*STEPS, "output_dir=run", "--resume-from", "2"])
    else:
        folder = _copy("a")
        (folder / "results.json").unlink()
        _damage_files(rng, [folder / "samples.jsonl", folder / "evaluation.json"])
        invoke([*EVALUATED, "--output", "a", "--resume"])


def pairs(rng: random.Random) -> None:
    """Damage labelled reasoning, against which a judge is calibrated."""
    rows = [
        {"reasoning": f"{n} is a circle.", "label": ["yes", 0, True][n % 3], "question": "What?", "group": f"{n % 2}"}
        for n in range(6)
    ]
    data, _ = damage_rows(rng, rows)
    Path("pairs.jsonl").write_bytes(data)
    invoke(["judge", "calibrate", "--pairs", "pairs.jsonl", "--count", "2", "--no-policies", "--output", "out"])


def stored(rng: random.Random) -> None:
    """Damage one file that a later command reads again, and read it as that command does."""
    from medvqa_rl.config import ModelConfig
    from medvqa_rl.core.files import note_on_best
    from medvqa_rl.core.machine import recorded_threads
    from medvqa_rl.evaluation.judging.instrument import read_identities, rewarding_judges
    from medvqa_rl.evaluation.results import read_origin, read_results
    from medvqa_rl.evaluation.store import read_identity
    from medvqa_rl.learning.estimate.architecture import find_architecture
    from medvqa_rl.models.families.costs import image_rule

    run, a = Path("run"), Path("a")
    shutil.copytree("../seed/run", run)
    shutil.copytree("../seed/a", a)
    (run / "best").mkdir(exist_ok=True)
    (run / "best" / "best.json").write_text('{"step": 2, "accuracy": 0.5}')
    judge = {"name": "n", "fingerprint": "f", "prompt_hash": "p", "strictness": 0.0}
    (run / "judge.json").write_text(json.dumps({"reward": judge}))
    results = json.loads((a / "results.json").read_bytes())
    (a / "results.json").write_text(json.dumps({**results, "judges": {"reward": judge}}))
    checkpoint = run / "checkpoints" / "step_000002"
    model = ModelConfig(path=str(checkpoint))
    readers: dict[Path, Callable[[], object]] = {
        run / "judge.json": lambda: rewarding_judges(run / "best"),
        run / "best" / "best.json": lambda: note_on_best(run),
        run / "env.json": lambda: recorded_threads([run / "env.json"]),
        a / "results.json": lambda: (read_results(a / "results.json"), read_identities(read_origin(a))),
        a / "evaluation.json": lambda: read_identity(a),
        checkpoint / "config.json": lambda: find_architecture(model, None),
        checkpoint / "preprocessor_config.json": lambda: image_rule(model),
    }
    path = rng.choice(sorted(readers))
    path.write_bytes(damage_json(rng, json.loads(path.read_bytes())))
    readers[path]()


WORDS = [
    "yes", "no", "A", "b.", "(C)", "lung", "left", "not", "no evidence of", "mass", "<think>", "</think>", "<answer>",
    "</answer>", "<describe>", "...", "\n", "\u2028", "\0", "\uff21", "\u00b2", "10", "\ud800", "<|im_end|>", "{", '"',
    "score", "`",
]  # fmt: skip


def completions(rng: random.Random) -> None:
    """Parse and score completions, those that are long, nested and repetitive included."""
    from medvqa_rl.core.answers import is_correct, parse_completion, read_choice, token_f1
    from medvqa_rl.core.prompts import INSTRUCTIONS, render_prompt
    from medvqa_rl.core.text import normalise
    from medvqa_rl.core.types import Sample
    from medvqa_rl.rewards.guards import conflict

    def text() -> str:
        kind = rng.random()
        if kind < 0.05:
            return rng.choice(WORDS) * rng.choice([1_000, 20_000])
        if kind < 0.1:
            return "a" + rng.choice([".", "(", "'", " ", "-", "no ", "*", "\\boxed{", "$"]) * 20_000 + "a"
        if kind < 0.5:
            think, answer = (" ".join(rng.choices(WORDS, k=count)) for count in (5, 2))
            return f"<think>{think}</think><answer>{answer}</answer>"
        return "".join(rng.choice([" ", ""]) + rng.choice(WORDS + TEXTS[:12]) for _ in range(rng.randint(0, 30)))

    kind = rng.choice(["choice", "closed", "open"])
    options = tuple(f"{rng.choice(WORDS)} {number}" for number in range(rng.randint(2, 6))) if kind == "choice" else ()
    gold = "A" if options else rng.choice(["yes", text()[:200] or "x"])
    sample = Sample(id="s", question=text()[:2000], answer=gold, answer_type=kind, images=(), options=options)  # type: ignore[arg-type]
    completion = text()
    for template in INSTRUCTIONS:
        is_correct(sample, parse_completion(completion, template).answer)
        render_prompt(sample, template)
    answer = parse_completion(completion, "think_answer").answer or completion
    read_choice(answer, options)
    if normalise(normalise(answer)) != normalise(answer):
        raise Fault("normalising twice changes the text")
    if not 0 <= token_f1(answer, gold) <= 1:
        raise Fault("token F1 outside 0 to 1")
    conflict(answer, gold)


CASES: dict[Case, float] = {
    own_jsonl: 1.0, own_csv: 1.0, own_parquet: 0.5, table: 1.5, init: 0.5, pmc_vqa: 0.7, vqa_rad: 0.7, slake: 0.7,
    omnimed: 0.5, vqa_med: 0.4, path_vqa: 0.4, archive: 1.0, data_export: 0.4, image: 3.0, settings: 2.0, recipe: 1.0,
    records: 1.5, ratings: 0.8, run_folder: 1.5, study_folder: 0.6, study_tests: 0.2, checkpoint: 1.0, resumed: 0.3,
    pairs: 0.4, stored: 1.0, completions: 2.0,
}  # fmt: skip
"""Each kind of input with its share of the inputs."""
