"""Attack the package: damaged inputs, kills, faults, hostile servers, checkpoints, pages and archives.

    python -m dev.attacks                         # all of them
    python -m dev.attacks inputs kills --seed 1   # some
    python -m dev.attacks inputs --case image:17  # one input again, with its traceback

Each attack prints what did not hold, then one line with what was done. Exit code 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import archives, checkpoints, children, faults, inputs, kills, network, pages, servers

ATTACKS = {
    "inputs": inputs.main,
    "kills": kills.main,
    "faults": faults.main,
    "servers": servers.main,
    "checkpoints": checkpoints.main,
    "pages": pages.main,
    "archives": archives.main,
    "network": network.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dev.attacks", description=__doc__)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"{', '.join(ATTACKS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=10_000, help="number of damaged inputs")
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--only", nargs="*", default=[], help="kinds of input or accident")
    parser.add_argument("--case", default="", help="one damaged input, KIND:NUMBER")
    parser.add_argument("--out", type=Path, default=Path("out/attacks"), help="folder for what the attacks write")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if unknown := set(arguments.attacks) - set(ATTACKS):
        parser.error(f"there is no attack {', '.join(sorted(unknown))}: choose from {', '.join(ATTACKS)}")
    children.import_all()
    if arguments.case:
        inputs.show(arguments)
        return
    held = True
    for name in arguments.attacks or ATTACKS:
        began = time.monotonic()
        ok = ATTACKS[name](arguments)
        held &= ok
        print(f"{'held' if ok else 'FAILED'}: {name}, {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(not held)


if __name__ == "__main__":
    main()
