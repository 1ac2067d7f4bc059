"""Advantages per token from judged steps.

Run: pytest tests/learning/objective/test_step_tokens.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.answers import token_span
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.learning.objective.step_tokens import with_steps
from medvqa_rl.models.loading import load_policy
from medvqa_rl.rewards.process import Step
from medvqa_rl.rewards.statements import split_statements

SAMPLE = Sample("q", "What?", "B", "choice", (), ("mass", "cyst"))


def letters(ids: object) -> str:
    """A token per two letters: token n writes "ab", "cd" ..."""
    return "".join("abcdefghijklmnopqrstuvwxyz"[2 * n : 2 * n + 2] for n in ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("start", "end", "tokens"),
    [
        (0, 2, (0, 1)),
        (0, 3, (0, 2)),
        (1, 2, (0, 1)),
        (2, 6, (1, 3)),
        (3, 5, (1, 3)),  # parts of two tokens
        (0, 26, (0, 13)),
        (24, 26, (12, 13)),
        (24, 40, (12, 13)),
    ],
)
def test_spans_by_hand(start: int, end: int, tokens: tuple[int, int]) -> None:
    assert token_span(range(13), start, end, letters) == tokens


def test_spans_of_a_real_tokenizer_hold_their_steps() -> None:
    processor = load_policy(ModelConfig(path="phantom:instruct", device="cpu")).processor
    think = "The organ is brain. There is a cyst: count two, upper left. Caf\u00e9 \u6b63\u5e38\u3002 So it is B."
    text = f"<think>{think}</think><answer>B</answer>"
    ids = processor.encode_completion(text)
    assert processor.decode(ids) == text
    taken: list[int] = []
    for step in split_statements(think):
        first, last = token_span(ids, step.start + 7, step.end + 7, processor.decode)
        assert processor.decode(ids[first:last]).strip() == step.text
        taken += range(first, last)
    assert len(taken) == len(set(taken)) < len(ids), "steps share no token, and the tags belong to none"


def test_advantages_are_those_of_completion_and_step() -> None:
    completions = [Completion(tuple(range(6)), letters(range(6)), False), Completion((0, 1), "abcd", False)]
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "")
    steps = [[Step(0, 4, 1.0), Step(6, 8, 0.0)], []]
    found = with_steps(
        torch.tensor([[0.5, -0.5]], dtype=torch.float64),
        [Group(SAMPLE, prompt, completions)],
        steps,
        weight=3.0,
        discount=0.5,
        decode=letters,
    )
    # Weights 1 and 1/2, of which 1 is valid: the mean is 2/3, the advantages are 1/3 and -1/3.
    torch.testing.assert_close(found[0][0], torch.tensor([1.5, 1.5, 0.5, -0.5, 0.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(found[0][1], torch.tensor([-0.5, -0.5], dtype=torch.float64))


def test_an_opening_tag_in_the_prompt_is_not_among_the_tokens() -> None:
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "Q?<think>\n")
    text = prompt.opening + letters(range(4))
    group = Group(SAMPLE, prompt, [Completion((0, 1, 2, 3), text, False), Completion((0,), "ab", False)])
    place = len(prompt.opening)
    steps = [[Step(place + 2, place + 4, 1.0), Step(place + 4, place + 8, 0.0)], []]
    (rows,) = with_steps(torch.zeros(1, 2), [group], steps, weight=1.0, discount=1.0, decode=letters)
    # Two steps of equal weight: 1/2 and -1/2.
    assert rows[0].tolist() == [0.0, 0.5, -0.5, -0.5]
