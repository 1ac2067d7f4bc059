"""Create a project from a table of questions and a folder of images.

Checks and splits the questions, chooses settings that fit a GPU, and writes the project folder all at once or not at
all. Imports torch only to find a GPU.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from medvqa_rl.cli.data.check import print_report
from medvqa_rl.cli.init.questions import check_table, find_obstacles, load_staged, read_checked, split_table
from medvqa_rl.cli.init.template import CPU, GPU, fill
from medvqa_rl.config import Config, ConfigError, DataConfig, ModelConfig
from medvqa_rl.config.inputs import ColumnsConfig
from medvqa_rl.config.yaml import build_config, read_yaml, write_yaml
from medvqa_rl.core.embedded import local_file
from medvqa_rl.core.files import temporary_folder, write_text
from medvqa_rl.core.progress import open_console, progress_bars
from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.text import shown
from medvqa_rl.core.types import Dataset, Sample
from medvqa_rl.data.check import check_data
from medvqa_rl.data.division import (
    output_suffix,
    write_divided,
)
from medvqa_rl.data.findings import DataReport
from medvqa_rl.data.sets.own import embeds_images
from medvqa_rl.learning.estimate.architecture import find_architecture
from medvqa_rl.learning.estimate.estimate import Assumptions, Estimate, estimate
from medvqa_rl.learning.estimate.hardware import GIB, Machine, Rates

ROOM = 0.85
"""Share of the GPU's memory that the settings may use; estimates are a few percent off, and images differ."""
MAX_DROPPED = 0.05
"""So large a share of the rows may be unusable unless ``--max-dropped`` says otherwise, as ``data.max_dropped``."""
MODEL = "Qwen/Qwen3-VL-2B-Instruct"
PASSES = 4
"""Passes over the training questions, within 50 to 2,000 steps."""

TIGHTER: tuple[Mapping[str, Any], ...] = (
    {"train.prompts_per_micro_batch": 4},
    {"train.prompts_per_micro_batch": 2},
    {"train.prompts_per_micro_batch": 1},
    {"rollout.max_batch": 4},
    {"model.gradient_checkpointing": True},
    {"rollout.max_batch": 1},
    {"model.max_pixels": 256},  # in image tokens, see pixels()
    {"rollout.max_completion_length": 128},
)
"""Changes that save memory, applied cumulatively; those that only cost time come first."""
ROOMY: Mapping[str, Any] = {
    "train.prompts_per_micro_batch": 8,
    "rollout.max_batch": 8,
    "model.gradient_checkpointing": False,
    "model.max_pixels": 512,
    "rollout.max_completion_length": 256,
}


@dataclass(frozen=True)
class Project:
    """What was asked for."""

    folder: Path
    images: Path | None
    model: str
    """``model.path`` on a GPU."""
    open_correctness: str | None
    columns: Mapping[str, str]
    """``data.columns``."""
    allow_text_only: bool
    """``data.allow_text_only``."""


@dataclass(frozen=True)
class Sized:
    """Settings that fit a GPU."""

    values: Mapping[str, Any]
    """Those of :data:`ROOMY`."""
    peak: float
    """Peak memory in bytes."""


def run_init(
    project: Path,
    *,
    table: Path,
    images: Path | None,
    gpu_memory: float | None = None,
    model: str = MODEL,
    open_correctness: str | None = None,
    seed: int = 0,
    columns: Mapping[str, str] = MappingProxyType({}),
    allow_text_only: bool = False,
    max_dropped: float = MAX_DROPPED,
) -> bool:
    """Check questions and images, write ``config.yaml`` and the table with its splits, and print the next commands.

    Args:
        project: folder to create.
        table: the questions, in any form that :mod:`medvqa_rl.data.sets.own` reads.
        images: image folder; None if the table holds its images.
        gpu_memory: memory of the training GPU in GiB; None uses the GPU of this machine.
        model: ``model.path`` on a GPU.
        open_correctness: value of ``rewards.open_correctness``, or None for its default.
        seed: of the split.
        columns: our name -> column of the table, where it is not recognised.
        allow_text_only: keep questions without an image.
        max_dropped: largest share of rows that may be left out because they cannot be used.

    Returns:
        Whether the data check passed; if not, nothing is written.

    Raises:
        ValueError: the project exists, or table, images or memory cannot be used.
    """
    if project.exists() and (not project.is_dir() or any(project.iterdir())):
        raise ValueError(f"{project} already exists and is not overwritten: choose another name, or move it away.")
    check_table(table)
    if images is not None and not images.is_dir():
        raise ValueError(f"The folder {images} does not exist: give the folder of the images with --images.")
    if embeds_images(table, columns):
        images = None
    elif images is None:
        raise ValueError(f"{table} names files of images: give their folder with --images.")
    memory, where = (gpu_memory, "as given") if gpu_memory is not None else find_gpu()
    if memory is None and model != MODEL:
        raise ValueError("--model is for a GPU, and torch finds none here: give the memory of one with --gpu-memory.")
    if memory is not None:
        pixels(model, ROOMY)  # a model that is not known is refused before the data is read
    from medvqa_rl.models.families.costs import image_rule

    out = open_console()
    with temporary_folder(project) as temporary:
        stage = temporary / "project"
        staged = stage / f"data{output_suffix(table)}"
        whole, equal = read_checked(table, images, columns, temporary, allow_text_only=allow_text_only)
        out.print(whole.about, soft_wrap=True, markup=False, highlight=False)
        if whole.checked(max_dropped).bad:
            out.print("\n".join(["Left out:", *whole.complaints()]), soft_wrap=True, markup=False, highlight=False)
        write_divided(split_table(whole, equal, seed), staged)
        data = DataConfig(
            name="own",
            path=str(stage),
            image_folder=None if images is None else str(images.resolve()),
            num_val=None,
            columns=ColumnsConfig(**columns),
            allow_text_only=allow_text_only,
            cache_dir=str(temporary),
        )
        datasets = load_staged(data, staged, table)
        samples = [dataset[index] for dataset in datasets.values() for index in range(len(dataset))]
        if problems := find_obstacles(samples, table, open_correctness):
            raise ConfigError(problems)
        template = CPU if memory is None else GPU
        given = Project(project, images, model, open_correctness, columns, allow_text_only)
        draft = build_config(read_yaml(fill(template, placeholders(template, given, datasets, None, ""))))
        report = run_check(datasets, draft)
        print_report(report, out, image_rule(draft.model)[1])
        if report.is_wrong():
            out.print("The data check failed (see above), so nothing was written: fix the data and run init again.")
            return False
        sized = None if memory is None else size_to(draft, memory, samples, report)
        line = machine_line(memory, where, sized)
        text = fill(template, placeholders(template, given, datasets, sized, line))
        build_config(read_yaml(text), purpose="train")
        write_text(stage / "config.yaml", text)
        os.replace(stage, project)
    out.print(f"\nWritten: {project / 'config.yaml'} and {project / staged.name}", soft_wrap=True)
    out.print(line, soft_wrap=True)
    out.print("\nNext:")
    for command in next_commands(project, on_gpu=memory is not None):
        out.print(f"  {command}", soft_wrap=True)
    return True


def find_gpu() -> tuple[float | None, str]:
    """Return memory in GiB and name of the GPU that torch would use, or None."""
    import torch

    if not torch.cuda.is_available():
        return None, ""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.total_memory / GIB, properties.name


def run_check(datasets: Mapping[str, Dataset], config: Config) -> DataReport:
    """Run the data check."""
    from medvqa_rl.models.families.costs import image_rule

    with progress_bars() as progress:
        return check_data(
            datasets,
            cost=image_rule(config.model)[0],
            template=config.prompt.template,
            workers=min(8, os.cpu_count() or 1),
            progress=progress,
        )


def size_to(config: Config, memory: float, samples: Sequence[Sample], report: DataReport) -> Sized:
    """Return the fastest settings that fit a GPU, for the largest image and the longest prompt in the data.

    Args:
        config: the settings of the project.
        memory: GiB of the GPU.

    Raises:
        ValueError: not even the smallest settings fit.
    """
    sizes = [size for split in report.splits for size in zip(split.widths, split.heights)]
    text = max(sum(len(part.get("text", "")) for part in render_prompt(s).messages[-1]["content"]) for s in samples)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    assumed = Assumptions(question_tokens=32 + text // 3, image_size=largest, ranks=1)
    model, machine = find_architecture(config.model, None), Machine("", Rates(1, 1), memory * GIB, True, "")

    def estimated(values: Mapping[str, Any]) -> Estimate:
        settings = config.model_dump()
        for path, value in {**values, **pixels(config.model.path, values)}.items():
            section, _, name = path.partition(".")
            settings[section][name] = value
        return estimate(Config.model_validate(settings), model, machine, assumed)

    values = dict(ROOMY)
    for change in ({}, *TIGHTER):
        values |= change
        peak = estimated(values).peak
        if peak <= ROOM * memory * GIB:
            return Sized(values, peak)
    raise ValueError(
        f"{config.model.path} needs at least {peak / GIB / ROOM:.1f} GiB of GPU memory to train on these questions, "
        f"but there are {memory:.1f} GiB: give the memory of a larger GPU with --gpu-memory, or smaller images."
    )


def machine_line(memory: float | None, where: str, sized: Sized | None) -> str:
    """Return a sentence on what the settings are sized for."""
    if memory is None or sized is None:
        return (
            "torch finds no GPU on this machine, so the settings are for the embedded model on the CPU. Everything "
            "works as with a large model, but it knows drawings and no medicine. For a machine with a 24 GiB GPU, run "
            "init with --gpu-memory 24."
        )
    return (
        f"Sized for a {memory:.0f} GiB GPU ({where}): a step needs at most about {sized.peak / GIB:.1f} GiB, "
        "as computed by medvqa-rl estimate for the largest image and the longest question."
    )


def is_here(model: str) -> bool:
    """Return whether a model is a folder, or in the cache of the Hub; opens no connection."""
    return local_file(model, None, "config.json") is not None


def pixels(model: str, values: Mapping[str, Any]) -> dict[str, int | None]:
    """``model.max_pixels`` for the image tokens in the values; None if the model's family has no such limit.

    Raises:
        ValueError: the family of the model is not known.
    """
    from medvqa_rl.models.families.costs import family_at

    family = family_at(ModelConfig(path=model))
    if family is None:
        raise ValueError(
            f"--model is {shown(model)}, whose config.json is not on this machine: give the folder of a "
            "checkpoint, or a name that `medvqa-rl models` lists."
        )
    per_token = family.pixels_per_token
    return {"model.max_pixels": None if per_token is None else values["model.max_pixels"] * per_token}


def placeholders(
    template: str, given: Project, datasets: Mapping[str, Dataset], sized: Sized | None, machine: str
) -> dict[str, Any]:
    """Return the values of a template's placeholders."""
    project, images = given.folder, given.images
    values = ROOMY if sized is None else sized.values
    limit = pixels(given.model, values)["model.max_pixels"] if template == GPU else None
    tokens = f"larger images are downscaled to {values['model.max_pixels']} tokens"
    count = len(datasets["train"]) if "train" in datasets else 0
    steps = min(2000, max(50, math.ceil(PASSES * count / 8)))
    return {
        "machine": machine,
        "network": "on" if template == GPU and not is_here(given.model) else "off",
        "config": project / "config.yaml",
        "output": str((project / "run").absolute()),
        "path": str(project.absolute()),
        "images": "" if images is None else f"  image_folder: {write_yaml(str(images.resolve()), inline=True)}\n",
        "columns": columns_lines(given.columns),
        "text_only": "  allow_text_only: true            # questions without an image, reported apart\n"
        * given.allow_text_only,
        "counts": ", ".join(f"{len(dataset)} {split}" for split, dataset in datasets.items()),
        "model": given.model,
        "pixels": "" if limit is None else f"  max_pixels: {limit}               # {tokens}\n",
        "open_correctness": "null" if given.open_correctness is None else given.open_correctness,
        "steps": steps,
        "passes": f"{steps * 8 / max(1, count):.1f}",
        "every": max(10, steps // 10),
        "warmup": min(20, steps // 10),
        **{path.rpartition(".")[2]: value for path, value in values.items()},
    }


def columns_lines(columns: Mapping[str, str]) -> str:
    """``data.columns`` in the config, or nothing."""
    lines = [f"    {name}: {write_yaml(column, inline=True)}\n" for name, column in columns.items()]
    return "".join(["  columns:                         # of your table\n", *lines]) if lines else ""


def next_commands(project: Path, *, on_gpu: bool) -> list[str]:
    """Return the commands to run next: they end with the accuracy before and after training."""
    config, run, before = (shlex.quote(str(project / name)) for name in ("config.yaml", "run", "before"))
    prompts = " --prompts think_answer,direct" if on_gpu else ""  # the embedded model knows one prompt only
    return [
        f"medvqa-rl train {config} --dry-run",
        f"medvqa-rl eval {config} --output {before}",
        f"medvqa-rl train {config}",
        f"medvqa-rl eval {run}{prompts}",
        f"medvqa-rl report {run} --evals {before}",
    ]
