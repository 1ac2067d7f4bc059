"""The verb ``medvqa-rl ask``: one question about one image. Imports no torch until it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from medvqa_rl.cli.common import use_threads, verb
from medvqa_rl.core.progress import open_console
from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.text import shown

if TYPE_CHECKING:
    from medvqa_rl.core.types import Completion, Group, ImageSource, Sample, Template, Wording
    from medvqa_rl.models.loading import Policy

NO_ANSWER = "(no answer)"


@verb
def ask(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str, typer.Argument(help="Question about the image.")],
    model: Annotated[
        str, typer.Option(help="Model or adapter folder, Hub id, phantom:base or phantom:instruct.")
    ] = "phantom:instruct",
    option: Annotated[
        list[str] | None,
        typer.Option(help="An answer option; repeat it for each."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Number of sampled answers, whose votes are counted; 0 decodes greedily.")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Sampling temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    max_length: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")] = 256,
    direct: Annotated[bool, typer.Option("--direct", help="Prompt for the answer only, without reasoning.")] = False,
) -> None:
    """Ask a model one question about an image. Never use it for a decision about a patient."""
    run_ask(
        image,
        question,
        model=model,
        options=tuple(option or ()),
        samples=samples,
        temperature=temperature,
        seed=seed,
        max_length=max_length,
        template="direct" if direct else "think_answer",
    )


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
    """Print a model's answer to one question, or a group of sampled answers with their votes.

    Raises:
        ValueError: image, question, options or model cannot be used.
    """
    sample = make_question(image, question, options)
    sample.images[0].load()  # report an unreadable image before loading the model

    use_threads(model)
    from medvqa_rl.models.checkpoints import model_for
    from medvqa_rl.models.loading import load_policy

    policy = load_policy(model_for(model))
    wording = policy.processor.wording
    if wording.instruction and template != "direct":
        template = wording.template
    group = sample_answers(
        policy, sample, template, count=samples, temperature=temperature, seed=seed, max_length=max_length
    )
    print_group(open_console(), group, template)


def sample_answers(
    policy: Policy,
    sample: Sample,
    template: Template,
    *,
    count: int,
    temperature: float,
    seed: int,
    max_length: int,
) -> Group:
    """Answer one question ``count`` times, or greedily if that is 0."""
    from medvqa_rl.config import RolloutConfig
    from medvqa_rl.rollout.stock.generate import make_engine

    engine = make_engine(policy, template)
    if count == 0:
        (group,) = engine.greedy([sample], max_completion_length=max_length, batch_size=1)
    else:
        rollout = RolloutConfig(num_generations=count, max_completion_length=max_length, temperature=temperature)
        (group,) = engine.rollout([sample], rollout, seed=seed, stream="ask", step=0)
    return group


def make_question(image: Path, question: str, options: Sequence[str]) -> Sample:
    """Return a sample about an image file, whose answer is unknown.

    Raises:
        ValueError: no image or question, a single option, or more options than letters.
    """
    from medvqa_rl.data.images.files import FileImage

    if not image.is_file():
        what = "is a folder" if image.is_dir() else "does not exist"
        raise ValueError(f"The image {image} {what}: give the path of an image file, then the question in quotes.")
    return make_sample(f"{image.name}: {question}", question, options, (FileImage(image.name, image.parent),))


def make_sample(
    id: str, question: str, options: Sequence[str], images: Sequence[ImageSource], gold: str = ""
) -> Sample:
    """Return a sample.

    Args:
        gold: the gold answer, as text or as an option's letter; empty if it is unknown.

    Raises:
        ValueError: no question, a single option, more options than letters, or a gold answer that is no option.
    """
    from medvqa_rl.core.answers import read_choice
    from medvqa_rl.core.types import LETTERS, Sample

    if not question.strip():
        raise ValueError("The question is empty: give its text.")
    if len(options) == 1 or len(options) > len(LETTERS):
        raise ValueError(
            f"There are {len(options)} options, but a choice question needs 2 to {len(LETTERS)}: give one for each "
            "answer, or none."
        )
    answer = gold
    if options:  # no prompt depends on it
        letter = read_choice(gold, tuple(options)) if gold else LETTERS[0]
        if letter is None:
            raise ValueError(f"The gold answer {shown(gold)} is none of the options: give the letter or text of one.")
        answer = letter
    return Sample(
        id=id,
        question=question,
        answer=answer,
        answer_type="choice" if options else "open",
        images=tuple(images),
        options=tuple(options),
    )


def read_vote(sample: Sample, completion: Completion, template: Template, wording: Wording) -> str:
    """Return what a completion votes for: an option as "B: text", a normalised answer, or no answer."""
    from medvqa_rl.core.answers import parse_completion, read_choice
    from medvqa_rl.core.text import normalise
    from medvqa_rl.core.types import LETTERS

    answer = parse_completion(completion.text, template, wording).answer
    if answer is None:
        return NO_ANSWER
    if sample.answer_type != "choice":
        return normalise(answer) or answer
    letter = read_choice(answer, sample.options)
    return NO_ANSWER if letter is None else f"{letter}: {sample.options[LETTERS.index(letter)]}"


def print_group(console: Console, group: Group, template: Template) -> None:
    """Print the completions verbatim, and the votes if there are several."""
    is_group = len(group.completions) > 1
    rows = []
    votes: Counter[str] = Counter()
    for completion in group.completions:
        vote = read_vote(group.sample, completion, template, group.wording)
        votes[vote] += 1
        length = f"{len(completion.token_ids)}{' (truncated)' if completion.is_truncated else ''}"
        rows.append((completion.text, vote, length))
    header = ("completion", "answer", "tokens")
    console.print(TextTable("", header, rows, drop=("tokens",), prose=("answer",), rules=range(1, len(rows))))
    if is_group:
        for vote, count in votes.most_common():
            console.print(Text(f"{count:>3} of {len(group.completions)}  {vote}"))
    console.print("Research software: never use it for a decision about a patient.", style="dim")
