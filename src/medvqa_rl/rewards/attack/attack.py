"""Write the completions of an attack and score them as training does. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medvqa_rl.core.answers import read_group
from medvqa_rl.core.prompts import SECTIONS
from medvqa_rl.core.text import printable
from medvqa_rl.core.types import Completion, EncodedPrompt, Group
from medvqa_rl.rewards.attack.question import Target
from medvqa_rl.rewards.attack.results import TOTAL, Attacked
from medvqa_rl.rewards.attack.texts import write_completions
from medvqa_rl.rewards.compose import Rewards
from medvqa_rl.rewards.judges.rubric import CORRECTNESS, STEP, Rubric
from medvqa_rl.rewards.statements import split_statements


@dataclass(frozen=True)
class Policy:
    """What the policy's tokenizer can write."""

    encode: Callable[[str], tuple[int, ...]]
    """Token ids of a completion, with the end-of-sequence token."""
    decode: Callable[[Sequence[int]], str]
    limit: int
    """Maximum number of tokens of a completion."""
    room: int
    """Number of tokens that attacks fill, at most ``limit``."""


def make_group(target: Target, prompt: EncodedPrompt, policy: Policy) -> tuple[tuple[str, ...], Group]:
    """Write the completions of an attack on a question as the policy could have sampled them.

    Where the prompt opens the think tag, completions continue inside of it. Texts that do not fit are truncated.

    Args:
        target: the question.
        prompt: of the same question.
        policy: the tokenizer and the limits.

    Returns:
        Names and, in the same order, completions.
    """
    tag, opening = target.wording.think[0], prompt.opening

    def continued(text: str) -> str:
        """The text behind the opening of the prompt."""
        if not opening:
            return text
        return text.removeprefix(tag) if text.startswith(tag) else target.wording.think[1] + text

    def fits(text: str) -> bool:
        return len(policy.encode(continued(text))) <= policy.room

    texts = write_completions(target, fits)
    completions = [_completion(policy.encode(continued(text)), opening, policy) for text in texts.values()]
    return tuple(texts), Group(target.sample, prompt, completions)


def _completion(ids: tuple[int, ...], opening: str, policy: Policy) -> Completion:
    """Tokens as a completion: its text is what they decode to, behind the prompt's opening."""
    kept = ids[: policy.limit]
    is_truncated = len(kept) < len(ids)
    return Completion(kept, opening + policy.decode(kept), is_truncated)


def score_group(
    names: Sequence[str], group: Group, rewards: Rewards, *, count_tokens: Callable[[str], int]
) -> Attacked:
    """Score the completions on a question in a call of their own, as a step with one prompt.

    Raises:
        ValueError: a reward function failed.
    """
    try:
        scores = rewards.score([group], step=0, count_tokens=count_tokens)
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        if not notes:  # only errors of the user's functions have them
            raise
        said = f"{type(error).__name__}: {printable(str(error), 400)}".removesuffix(".")
        own = ValueError(
            f"A reward function fails on a completion that a policy could write ({said}): let it return a number for "
            "any text, or None where it does not apply."
        )
        own.add_note(" ".join(note.replace(" in step 1.", ".") for note in notes))
        raise own from error
    values: dict[str, Mapping[str, float]] = {}
    for place, name in enumerate(names):
        parts = {part: float(table[0, place]) for part, table in scores.parts.items()}
        values[name] = parts | {TOTAL: float(scores.total[0, place])}
    sample = group.sample
    return Attacked(
        sample.id,
        sample.question,
        sample.options,
        sample.reference,
        {name: completion.text for name, completion in zip(names, group.completions)},
        values,
        {name: read.is_right for name, read in zip(names, scores.reads)},
    )


def most_requests(groups: Sequence[Group], rubrics: Sequence[Rubric]) -> int:
    """How many texts the judges are asked to grade at most: equal ones, and those with cached grades, count too."""
    reads = [read for group in groups for read in read_group(group)]
    asking = [read for read in reads if "think" in SECTIONS[read.template]]

    def number(rubric: Rubric) -> int:
        if rubric.name == STEP.name:
            return sum(len(split_statements(read.parsed.think or "")) for read in asking)
        if rubric.name == CORRECTNESS.name:
            return sum(read.sample.answer_type == "open" and not read.is_right for read in reads)
        return len(asking)

    return sum(map(number, rubrics))
