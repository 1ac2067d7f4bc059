"""The verbs ``medvqa-rl estimate`` and ``models``: what can be trained here, and what it needs. Imports no torch until
they run."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import typer

from medvqa_rl.cli.common import ConfigPath, Overrides, read_settings, use_threads, verb
from medvqa_rl.core.progress import open_console, waiting
from medvqa_rl.core.tables import TextTable

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
        typer.Option(help="A published model instead of the configured one, such as 2b; docs/estimate.md lists them."),
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


SETTING = (
    "Memory in GiB is estimated for a step of 8 prompts x 8 completions of at most 256 tokens on a GPU: bfloat16, one "
    "image of 512 x 512 pixels, gradient checkpointing, one prompt per micro-batch; LoRA of rank 8."
)


@verb
def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List published models that start with `model.path`, and the architectures of this transformers version."""
    import transformers

    from medvqa_rl.models.families import FAMILIES
    from medvqa_rl.models.families.published import CHECKPOINTS

    with waiting("estimating memory"):
        rows = [_describe(checkpoint) for checkpoint in CHECKPOINTS]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    header = ("checkpoint", "family", "parameters", "LoRA", "full", "medical", "licence", "gated")
    cells = [
        (
            row["checkpoint"],
            row["family"],
            *("-" if row[name] is None else f"{row[name]:.1f}{unit}" for name, unit in _NUMBERS),
            "yes" if row["medical"] else "",
            row["licence"],
            "yes" if row["gated"] else "",
        )
        for row in rows
    ]
    own = "; ".join(f"{family.title} ({', '.join(family.model_types)})" for family in FAMILIES)
    open_console().print(
        TextTable(
            f"Models for model.path (transformers {transformers.__version__})",
            header,
            cells,
            drop=("gated", "licence", "medical"),
            notes=(
                SETTING,
                f"Families with the fast path, also of other checkpoints: {own}. Other models of "
                "AutoModelForImageTextToText run through their own forward, more slowly.",
                "Names, licences and gates are not looked up: see the page of a checkpoint.",
            ),
        )
    )


_NUMBERS = (("parameters", " B"), ("lora", ""), ("full", ""))


def _describe(checkpoint: Any) -> dict[str, Any]:
    """The row of a checkpoint."""
    from medvqa_rl.learning.estimate.hardware import GIB
    from medvqa_rl.models.families import family_for

    family = family_for(checkpoint.model_type)
    row = {
        "checkpoint": checkpoint.path,
        "family": checkpoint.model_type if family is None else family.title,
        "parameters": None,
        "lora": None,
        "full": None,
        "medical": checkpoint.is_medical,
        "licence": checkpoint.licence,
        "gated": checkpoint.is_gated,
    }
    if checkpoint.size is not None:
        model, peaks = _estimate(checkpoint.size)
        row |= {"parameters": sum(model.parameters) / 1e9, "lora": peaks[0] / GIB, "full": peaks[1] / GIB}
    return row


def _estimate(size: str) -> tuple[Any, tuple[float, float]]:
    """The dimensions of a published model, and the peak memory in bytes with LoRA and in full."""
    from medvqa_rl.config import Config, LoraConfig, ModelConfig
    from medvqa_rl.learning.estimate.architecture import find_architecture
    from medvqa_rl.learning.estimate.estimate import Assumptions, estimate
    from medvqa_rl.learning.estimate.hardware import Machine, Rates

    model = find_architecture(ModelConfig(), size)
    machine, assumed = Machine("", Rates(1, 1), 1e30, True, ""), Assumptions(110, (512, 512), 1, size)

    def peak(lora: LoraConfig | None) -> float:
        config = Config.model_validate(
            {
                "model": {"lora": lora, "gradient_checkpointing": True, "dtype": "bfloat16"},
                "rollout": {"num_generations": 8, "max_completion_length": 256},
                "train": {"prompts_per_step": 8, "prompts_per_micro_batch": 1},
            }
        )
        return estimate(config, model, machine, assumed).peak

    return model, (peak(LoraConfig(rank=8, alpha=16)), peak(None))
