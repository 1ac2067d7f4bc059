"""The verb ``medvqa-rl estimate``. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import typer

from medvqa_rl.cli.common import ConfigPath, Overrides, read_settings, use_threads, verb

Device = Literal["auto", "cpu", "cuda"]


def _image_size(text: str) -> tuple[int, int] | None:
    """Parse ``1024x768`` as width and height, or ``none`` for questions without images.

    Raises:
        ValueError: the text is neither.
    """
    if text == "none":
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise ValueError(f"--image-size is {text!r}: give WIDTHxHEIGHT in pixels, such as 1024x768, or none.")
    return int(match[1]), int(match[2])


@verb
def estimate(
    config: ConfigPath,
    overrides: Overrides = None,
    model_size: Annotated[
        str | None,
        typer.Option(help="Size of a model that is not on this machine: 2b, 7b, 2.5-3b, 2.5-7b or 2.5-32b."),
    ] = None,
    device: Annotated[Device, typer.Option(help="Device to measure; auto takes the one in the settings.")] = "auto",
    card: Annotated[
        str | None,
        typer.Option(help="Estimate for a GPU by name: h200, h100, a100-80, a100-40, rtx4090, l4 ..."),
    ] = None,
    matmul_tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="Matrix multiplication rate in TFLOP/s, instead of measuring it.")
    ] = None,
    bandwidth_gbs: Annotated[
        float | None, typer.Option(min=1e-3, help="Memory bandwidth in GB/s, instead of measuring it.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=1e-3, help="Memory in GiB, instead of the device's own.")
    ] = None,
    question_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in a prompt besides the image: template, question and options.")
    ] = 110,
    completion_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean completion length, for the time estimate. Defaults to the limit.")
    ] = None,
    image_size: Annotated[
        str, typer.Option(help="Image size before downscaling, as WIDTHxHEIGHT, or none.")
    ] = "1024x1024",
    ranks: Annotated[int, typer.Option(min=1, help="Number of devices that share the prompts of a step.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and seconds.")] = False,
) -> None:
    """Estimate memory and time of a training step without running it. Exits with 1 if it does not fit."""
    settings = read_settings(config, overrides or (), purpose="train").config
    if card is None:
        use_threads(settings.model.path)  # measures this machine as a run would use it
    from medvqa_rl.learning.estimate.command import run_estimate

    fits = run_estimate(
        settings,
        model_size=model_size,
        device=device,
        card_name=card,
        tflops=matmul_tflops,
        bandwidth=bandwidth_gbs,
        memory_gib=memory_gib,
        question_tokens=question_tokens,
        completion_tokens=completion_tokens,
        image_size=_image_size(image_size),
        ranks=ranks,
        as_json=as_json,
    )
    if not fits:
        raise typer.Exit(1)
