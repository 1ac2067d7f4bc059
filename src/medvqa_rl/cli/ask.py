"""What the verbs ``ask`` and ``env`` do: load the parts, run them, show the result."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medvqa_rl.config import RolloutConfig
from medvqa_rl.core.answers import parse_completion, read_choice
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS, Completion, Group, Sample, Template
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.models.checkpoints import model_for
from medvqa_rl.models.loading import load_policy
from medvqa_rl.rollout.decode import RolloutEngine

NO_ANSWER = "(no answer)"


def _console() -> Console:
    """The terminal, or a file wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 120)


def make_question(image: Path, question: str, options: Sequence[str]) -> Sample:
    """A sample for a question whose answer nobody knows.

    Raises:
        ValueError: no image or question, a single option, or more options than letters.
    """
    if not image.is_file():
        what = "is a folder" if image.is_dir() else "does not exist"
        raise ValueError(f"The image {image} {what}: give the path of an image file, then the question in quotes.")
    if not question.strip():
        raise ValueError("The question is empty: give it as the second argument, in quotes.")
    if len(options) == 1 or len(options) > len(LETTERS):
        raise ValueError(
            f"There are {len(options)} options, but a choice needs 2 to {len(LETTERS)}: give --option each."
        )
    return Sample(
        id=f"{image.name}: {question}",
        question=question,
        answer=LETTERS[0] if options else "",  # unknown, and no prompt depends on it
        answer_type="choice" if options else "open",
        images=(FileImage(image.name, image.parent),),
        options=tuple(options),
    )


def read_vote(sample: Sample, completion: Completion, template: Template) -> str:
    """What a completion votes for: an option as "B: text", a normalised answer, or no answer."""
    answer = parse_completion(completion.text, template).answer
    if answer is None:
        return NO_ANSWER
    if sample.answer_type != "choice":
        return normalise(answer) or answer
    letter = read_choice(answer, sample.options)
    return NO_ANSWER if letter is None else f"{letter}: {sample.options[LETTERS.index(letter)]}"


def run_ask(
    image: Path,
    question: str,
    *,
    model: str,
    options: Sequence[str],
    samples: int,
    temperature: float,
    seed: int,
    max_length: int,
    template: Template,
) -> None:
    """Print a model's answer to one question, or a group of sampled ones with their votes.

    Raises:
        ValueError: image, question, options or model cannot be used.
    """
    sample = make_question(image, question, options)
    sample.images[0].load()  # a wrong path is said before the model is loaded
    engine = RolloutEngine(load_policy(model_for(model)), template)
    console = _console()
    if samples == 0:
        (group,) = engine.greedy([sample], max_completion_length=max_length, batch_size=1)
    else:
        rollout = RolloutConfig(num_generations=samples, max_completion_length=max_length, temperature=temperature)
        (group,) = engine.rollout([sample], rollout, seed=seed, stream="ask", step=0)
    show_group(console, group, template)


def show_group(console: Console, group: Group, template: Template) -> None:
    """Print completions as they are, and what they vote for."""
    table = Table(show_header=len(group.completions) > 1, show_lines=len(group.completions) > 1, title_justify="left")
    table.add_column("completion", ratio=1, overflow="fold")
    table.add_column("answer", overflow="fold")
    table.add_column("tokens", justify="right")
    votes: Counter[str] = Counter()
    for completion in group.completions:
        vote = read_vote(group.sample, completion, template)
        votes[vote] += 1
        length = f"{len(completion.token_ids)}{' (cut off)' if completion.is_truncated else ''}"
        table.add_row(Text(completion.text), Text(vote), length)
    console.print(table)
    if len(group.completions) > 1:
        for vote, count in votes.most_common():
            console.print(Text(f"{count:>3} of {len(group.completions)}  {vote}"))
    console.print("Research software: never use it for a decision about a patient.", style="dim")


def installed_extras() -> dict[str, bool]:
    """Each optional extra of this package, and whether all that it needs is installed."""
    extras: dict[str, bool] = {}
    for requirement in requires("medvqa-rl") or ():
        match = re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if match is None:
            continue
        try:
            version(match[1])
            is_there = True
        except PackageNotFoundError:
            is_there = False
        extras[match[2]] = extras.get(match[2], True) and is_there
    return extras


def show_environment() -> None:
    """Print versions, device, threads, memory and extras."""
    names = ("medvqa-rl", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow", "pydantic")
    gib = 2**30
    rows = {"python": platform.python_version(), "platform": platform.platform()}
    rows |= {name: version(name) for name in names}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / gib:.0f} GiB"
        rows["CUDA of torch"] = str(torch.version.cuda)
    else:
        rows["GPU"] = "none that torch can use"
    rows["CPU"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    rows["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / gib:.1f} GiB"
    extras = installed_extras()
    rows["extras"] = ", ".join(name for name, is_there in extras.items() if is_there) or "none"
    rows["other extras"] = ", ".join(name for name, is_there in extras.items() if not is_there) or "none"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
