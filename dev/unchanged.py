"""Record what a change of layout must not change, and compare it afterwards.

    python dev/unchanged.py record FOLDER        # before the change
    python dev/unchanged.py compare FOLDER       # after it: names every difference, exit code 1

Recorded are the verbs with their options and defaults, the metrics and weights of 20 training steps with each loss, an
evaluation's files, the tables of a study with the cells in dev/unchanged/, and the demo's numbers. Everything runs
through the command line with one thread, so both sides of a move can be recorded on the same machine with the same
package versions. `--only verbs,study` records some of it; the whole takes about 8 minutes on one core.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "phantom_cpu.yaml"
CELLS = ROOT / "dev" / "unchanged"
SHORT = ["train.steps=20", "train.eval_steps=10", "train.save_steps=10", "data.num_val=32", "optimizer.warmup_steps=2"]
RUNS = {
    "grpo": ["train", "loss.type=grpo", "loss.beta=0.04", "advantage.scale=group", "rewards.cwr=0.5"],
    "dr_grpo": ["train", "loss.type=dr_grpo", "rewards.semantic=0.5", "judge.model=phantom:judge"],
    "dapo": ["train", "loss.type=dapo", "loss.num_iterations=2", "loss.mask_truncated_completions=true"],
    "dpo": [
        *["train", "loss.type=dpo", "loss.beta=0.1", "advantage.scale=group"],
        *["model.lora.rank=8", "model.train_vision=false"],
    ],
    "sft": ["sft"],
}
TIMES = {"step_time", "seconds", "time", "began", "ended", "questions_per_second", "tokens_per_second"}


def call(*arguments: str, cwd: Path) -> str:
    """Run ``medvqa-rl`` with one thread and return what it printed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "COLUMNS": "120",
        "XDG_CACHE_HOME": str(cwd / "cache"),  # cached verdicts are counted in the metrics
    }
    command = [sys.executable, "-m", "medvqa_rl", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def without_times(value: Any) -> Any:
    """JSON without seconds, folders and versions."""
    if isinstance(value, dict):
        kept = {
            key: item for key, item in value.items() if key not in TIMES and not key.startswith(("time/", "memory"))
        }
        return {key: without_times(item) for key, item in kept.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def read_lines(path: Path) -> list[Any]:
    return [without_times(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record_verbs(folder: Path) -> Any:
    """Every verb: its parameters with names, types, defaults; help texts may change."""
    code = (
        "import json, typer\n"
        "from medvqa_rl.cli.app import app\n"
        "def show(command):\n"
        "    if hasattr(command, 'commands'):\n"
        "        return {name: show(one) for name, one in sorted(command.commands.items())}\n"
        "    return [[p.param_type_name, p.name, sorted(p.opts + p.secondary_opts), type(p.type_descriptor).__name__, "
        "p.envvar, str(p.default), p.required, p.multiple] for p in command.params]\n"
        "print(json.dumps(show(typer.main.get_command(app))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    settings = call("config", "tables", cwd=folder)
    rows = [line.split("|")[1:4] for line in settings.split("\n") if line.startswith("|")]
    return {"verbs": json.loads(done.stdout), "settings": rows}


def record_losses(folder: Path) -> Any:
    found = {}
    for name, (verb, *settings) in RUNS.items():
        call(verb, str(CONFIG), f"output_dir={name}", *SHORT, *settings, cwd=folder)
        run = folder / name
        weights = {str(path.relative_to(run)): digest(path) for path in sorted(run.rglob("*.safetensors"))}
        samples = {path.name: read_lines(path) for path in sorted(run.glob("samples/*.jsonl"))}
        files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
        found[name] = {
            "metrics": read_lines(run / "metrics.jsonl"),
            "weights": weights,
            "samples": samples,
            "files": files,
        }
    return found


def record_evaluation(folder: Path) -> Any:
    settings = ["data.num_test=60", "eval.num_samples=2", "eval.similarity=tfidf", "eval.perplexity_model=phantom:lm"]
    call("eval", str(CONFIG), *settings, "--split", "test", "--output", "evaluation", cwd=folder)
    found: dict[str, Any] = {}
    for path in sorted((folder / "evaluation").rglob("*.json")):
        found[path.name] = without_times(json.loads(path.read_text(encoding="utf-8")))
    found["samples"] = read_lines(folder / "evaluation" / "samples.jsonl")
    return found


def record_study(folder: Path) -> Any:
    shutil.copytree(CELLS, folder / "study")
    call("study", "collect", "study/recipe.yaml", "--output", "study/cells", cwd=folder)
    tables = folder / "study" / "cells" / "tables"
    return {
        str(path.relative_to(tables)): path.read_text(encoding="utf-8")
        for path in sorted(tables.rglob("*"))
        if path.suffix in {".csv", ".tex", ".md"}
    }


def record_demo(folder: Path) -> Any:
    call("demo", "--output", "demo", cwd=folder)
    return without_times(json.loads((folder / "demo" / "demo.json").read_text(encoding="utf-8")))


PARTS: dict[str, Callable[[Path], Any]] = {
    "verbs": record_verbs,
    "study": record_study,
    "evaluation": record_evaluation,
    "losses": record_losses,
    "demo": record_demo,
}


def record(into: Path, only: list[str]) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(PARTS[name](Path(folder)), indent=1, sort_keys=True)
        (into / f"{name}.json").write_text(text.replace(folder, "FOLDER") + "\n", encoding="utf-8")
        print(f"recorded {name}", flush=True)


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, by path."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        pairs = [(before.get(key), after.get(key), f"{at}/{key}") for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(one, other, f"{at}[{place}]") for place, (one, other) in enumerate(zip(before, after))]
    elif isinstance(before, str) and isinstance(after, str) and "\n" in before + after:
        lines = difflib.unified_diff(before.split("\n"), after.split("\n"), lineterm="", n=0)
        return [f"{at}: {line[:200]}" for line in list(lines)[2:] if not line.startswith("@@")]
    else:
        return [] if before == after else [f"{at}: {str(before)[:200]} -> {str(after)[:200]}"]
    return [line for one, other, path in pairs for line in differences(one, other, path)]


def compare(before: Path, only: list[str]) -> int:
    with tempfile.TemporaryDirectory() as after:
        record(Path(after), only)
        found = {
            name: differences(
                json.loads((before / f"{name}.json").read_text()),
                json.loads((Path(after) / f"{name}.json").read_text()),
            )
            for name in only
        }
    for name, lines in found.items():
        print(f"{name}: {len(lines)} differences" if lines else f"{name}: equal")
        for line in lines[:20]:
            print(f"  {line}")
    return int(any(found.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help="some of: " + ",".join(PARTS))
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if arguments.action == "compare":
        return compare(arguments.folder, only)
    record(arguments.folder, only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
