"""The verb ``medvqa-rl demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli.common import DryRun, use_threads, verb


@verb
def demo(
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of training.")] = 0,
    dry_run: DryRun = False,
) -> None:
    """Adapt the embedded model to an unseen scanner with RL, and report the gain. Takes minutes on a CPU."""
    use_threads("phantom:instruct")
    from medvqa_rl.phantom.demo import run_demo

    run_demo(output, seed, dry_run=dry_run)
