"""Attack the package: damaged inputs, kills, faults, hostile servers, checkpoints, pages and archives.

    python -m dev.attacks                         # all of them
    python -m dev.attacks --short                 # two minutes, with a seed of the commit
    python -m dev.attacks inputs kills --seed 1   # some
    python -m dev.attacks inputs --case image:17  # one input again, with its traceback

Each attack prints what did not hold, then one line with what was done. Exit code 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import archives, checkpoints, children, faults, inputs, kills, network, pages, servers, serving
from .seeds import make_run

ATTACKS = {
    "inputs": inputs.main,
    "kills": kills.main,
    "faults": faults.main,
    "servers": servers.main,
    "serving": serving.main,
    "checkpoints": checkpoints.main,
    "pages": pages.main,
    "archives": archives.main,
    "network": network.main,
}


SHORT = ("inputs", "kills", "servers", "serving", "pages", "archives", "network")


def seed_of_commit() -> int:
    """A seed that changes with the commit, so that attacks of every change try something else."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return int(done.stdout[:6] or "0", 16)


def _make_seed(out: Path) -> None:
    made = children.run(partial(make_run, out / "seed"), out / "seed.log")
    if made.code != 0:
        sys.exit(f"What is damaged could not be made: {made.last_words}")


def _attack(attack: Callable[[argparse.Namespace], bool], arguments: argparse.Namespace) -> None:
    sys.exit(not attack(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dev.attacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"{', '.join(ATTACKS)}; default: all")
    parser.add_argument("--short", action="store_true", help=f"a part that takes two minutes: {', '.join(SHORT)}")
    parser.add_argument("--seed", type=int, help="default: 0; for --short, from the commit")
    parser.add_argument("--inputs", type=int, help="number of damaged inputs; default: 10,000, short 250")
    parser.add_argument("--kills", type=int, help="number of kills; default: 100, short 3")
    parser.add_argument("--jobs", type=int, default=1, help="number of attacks that run beside each other")
    parser.add_argument("--only", nargs="*", default=[], help="kinds of input, kill or accident")
    parser.add_argument("--case", default="", help="one damaged input, KIND:NUMBER")
    parser.add_argument("--out", type=Path, default=Path("out/attacks"), help="folder for what the attacks write")
    arguments = parser.parse_args()
    if unknown := set(arguments.attacks) - set(ATTACKS):
        parser.error(f"there is no attack {', '.join(sorted(unknown))}: choose from {', '.join(ATTACKS)}")
    short = arguments.short
    defaults = {
        "seed": seed_of_commit() if short else 0,
        "inputs": 250 if short else 10_000,
        "kills": 3 if short else 100,
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    children.import_all()
    if arguments.case:
        if not (arguments.out / "seed").is_dir():
            _make_seed(arguments.out)
        inputs.show(arguments)
        return
    print(f"seed {arguments.seed}; to repeat: python -m dev.attacks {'--short ' * short}--seed {arguments.seed}")
    chosen = arguments.attacks or (SHORT if short else ATTACKS)
    if {"inputs", "pages"} & set(chosen):
        _make_seed(arguments.out)
    works = {name: partial(_attack, ATTACKS[name], arguments) for name in chosen}
    failed = False
    for name, ended in children.run_beside(works, arguments.out, jobs=arguments.jobs, limit=math.inf):
        failed |= ended.code != 0
        print(f"{ended.output}{'FAILED' if ended.code else 'held'}: {name}, {ended.seconds:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
