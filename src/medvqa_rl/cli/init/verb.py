"""The verb ``medvqa-rl init``. Imports no torch until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medvqa_rl.cli.common import Columns, TextOnly, read_columns, verb


@verb
def init(
    project: Annotated[Path, typer.Argument(metavar="PROJECT", help="Folder to create.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Your questions: CSV, Excel, JSON Lines, JSON, parquet, or a folder written by save_to_disk. Columns "
            "and the records of other tools are recognised (docs/data.md)."
        ),
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; not needed if the table holds them.")
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=1.0, help="Memory of the training GPU in GiB. Defaults to this machine's GPU."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Checkpoint to train on a GPU: a folder, or one that `medvqa-rl models` lists.")
    ] = "Qwen/Qwen3-VL-2B-Instruct",
    open_correctness: Annotated[
        Literal["exact", "token_f1", "similarity", "judge"] | None,
        typer.Option(help="How open-ended answers are scored; sets rewards.open_correctness."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split into train, val and test.")] = 0,
    columns: Columns = None,
    allow_text_only: TextOnly = False,
    max_dropped: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Largest share of unusable rows to leave out; more are refused.")
    ] = 0.05,
) -> None:
    """Turn your own questions into a project: check and split the data, and write a config that fits your GPU.

    Exits with 1 and writes nothing if the data check fails.
    """
    from medvqa_rl.cli.init.project import run_init

    is_right = run_init(
        project,
        table=data,
        images=images,
        gpu_memory=gpu_memory,
        model=model,
        open_correctness=open_correctness,
        seed=seed,
        columns=read_columns(columns),
        allow_text_only=allow_text_only,
        max_dropped=max_dropped,
    )
    if not is_right:
        raise typer.Exit(1)
