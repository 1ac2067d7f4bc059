"""The verb ``medvqa-rl export``. Imports no torch until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli.common import verb


@verb
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a run folder for its best, else its last checkpoint.")
    ],
    output: Annotated[Path, typer.Argument(help="New folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge a LoRA adapter into its base model, in full precision.")
    ] = False,
    average: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="Average the weights with those that training started from: SHARE * trained + (1 - SHARE) * start. "
            "Often keeps most of the gain and forgets less.",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload the folder to this repository of the Hugging Face Hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone read the repository; without it, a new one is private.")
    ] = False,
) -> None:
    """Write a model as a Hugging Face folder, or an adapter as a PEFT folder, with its model card."""
    from medvqa_rl.cli.export.folder import chosen, export_model
    from medvqa_rl.cli.export.hub import Upload

    if public and push_to_hub is None:
        raise ValueError(
            "--public says who may read an uploaded model: add --push-to-hub OWNER/NAME, or leave it out."
        )
    if merge and average is not None:
        raise ValueError(
            "--merge and --average are given together, but each writes another model: leave one of them out."
        )
    upload = None if push_to_hub is None else Upload(push_to_hub, is_public=public)
    if upload is not None:
        upload.check(chosen(checkpoint), merge=merge)
    print(export_model(checkpoint, output, merge=merge, average=average))
    if merge:
        typer.echo(
            "The adapter was merged into the base model's original weights, in full precision, even if it was trained "
            "on 4-bit weights.",
            err=True,
        )
    if upload is not None:
        print(upload.send(output))
