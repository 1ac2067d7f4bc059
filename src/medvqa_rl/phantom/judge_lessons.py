"""What the embedded judges learn from: batches of texts with a verdict at the end of every sentence, and the loss.

Used by the recipe (:mod:`medvqa_rl.phantom.judge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from medvqa_rl.core.randomness import Draws
from medvqa_rl.data.phantom.claims import FLAWS, claims, flaws
from medvqa_rl.data.phantom.reasonings import Mixture, Reasoning, draw_reasoning
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, LEVELS, MODALITIES, SIDES, SIZES

POSITIONS = 512
"""Tokens that a judge can read."""
BATCH = 32
CHUNKS = 2
"""Parts of a step by length."""
OTHERS = 0.05
"""Weight of the loss for probability on anything but Yes and No."""
STATE_WEIGHT = 0.2
"""Weight of the probe of what was stated."""


@dataclass(frozen=True)
class Recipe:
    """One judge: its size, its data and how long it learns."""

    name: str
    seed: int
    hidden: int
    layers: int
    heads: int
    inner: int
    mixture: Mixture
    sampled_share: float
    """Share of the texts that the policies sampled."""
    steps: int
    learning_rate: float


STATE = (
    *(("modality", value) for value in MODALITIES),
    *(("organ", value) for value in ALL_ORGANS),
    *(("finding", value) for value in ALL_KINDS),
    *(("absent", value) for value in ALL_KINDS),
    *(("clear", value) for value in SIDES + LEVELS),
    *(("place", value) for value in SIDES + LEVELS),
    *(("size", value) for value in SIZES),
    ("none", ""),
)
"""What a text can have stated so far: topic and value."""


def stated(text: str) -> set[tuple[str, str]]:
    """Which of :data:`STATE` a text has stated."""
    found: set[tuple[str, str]] = set()
    for claim in claims(text):
        found.add((claim.topic, claim.value))
        if claim.finding is not None:
            finding = claim.finding
            found |= {("place", finding.side), ("place", finding.level), ("size", finding.size)}
    return found


class Batch(NamedTuple):
    """Texts of similar length with the n places at which a verdict is due."""

    ids: Tensor
    """(b, T) padded token ids."""
    row: Tensor
    """(n,) of each place its text."""
    place: Tensor
    """(n,) and its position."""
    label: Tensor
    """(n,) 1 where the text up to there is coherent, else 0."""
    flaws: Tensor
    """(n, flaws) 1 for each of FLAWS that it has."""
    state: Tensor
    """(n, statements) 1 for each of STATE that it has stated."""


class Lessons:
    """Endless texts as batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, sampled: Sequence[Reasoning]) -> None:
        self._tokenizer, self._recipe, self._sampled = tokenizer, recipe, sampled
        self._stop = tokenizer.convert_tokens_to_ids(".")
        self.answers = [int(tokenizer(word)["input_ids"][0]) for word in (" No", " Yes")]

    def texts(self, step: int) -> list[str]:
        """The texts of a step."""
        recipe = self._recipe
        draws = Draws("phantom judge", recipe.seed, recipe.name, step)
        return [
            draws.pick(self._sampled).text
            if self._sampled and draws.chance(recipe.sampled_share)
            else draw_reasoning(recipe.seed, f"judge {recipe.name}", step * BATCH + row, recipe.mixture).text
            for row in range(BATCH)
        ]

    def batches(self, texts: Sequence[str]) -> list[Batch]:
        """Texts of similar length together, so that little is padded."""
        rows: list[list[int]] = sorted((self._tokenizer(text)["input_ids"][:POSITIONS] for text in texts), key=len)
        size = -(-len(rows) // CHUNKS)
        return [self._collate(rows[first : first + size]) for first in range(0, len(rows), size)]

    def _collate(self, rows: list[list[int]]) -> Batch:
        ids = torch.full((len(rows), max(map(len, rows))), self._tokenizer.pad_token_id)
        places: list[tuple[int, int]] = []
        wrong: list[list[bool]] = []
        state: list[list[bool]] = []
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            for place, token in enumerate(tokens):
                if token == self._stop or place + 1 == len(tokens):
                    text = str(self._tokenizer.decode(tokens[: place + 1]))
                    has, said = flaws(text), stated(text)
                    places.append((row, place))
                    wrong.append([flaw in has for flaw in FLAWS])
                    state.append([item in said for item in STATE])
        row_of, place_of = torch.tensor(places).unbind(1)
        marks = torch.tensor(wrong, dtype=torch.float32)
        return Batch(ids, row_of, place_of, (marks.sum(1) == 0).long(), marks, torch.tensor(state).float())


class Probes(nn.Module):
    """Linear readings of hidden states that are trained along and thrown away.

    The verdict alone tells little about which of a dozen rules was broken. Reading what was stated off a middle layer
    and each flaw off the last one gives every rule a gradient of its own, and costs nothing.
    """

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.state, self.flaws = nn.Linear(hidden, len(STATE)), nn.Linear(hidden, len(FLAWS))


def lesson_loss(model: Any, probes: Probes, batch: Batch, answers: Sequence[int]) -> tuple[Tensor, int]:
    """Sum over the places of: the cross-entropy of Yes against No; a little for probability on other words; and the
    binary cross-entropies of the probes.

    Returns:
        The loss, and how many verdicts are right.
    """
    positions = torch.arange(batch.ids.shape[1])[None]
    output = model.biogpt(input_ids=batch.ids, position_ids=positions, output_hidden_states=True)
    last = output.last_hidden_state[batch.row, batch.place]
    middle = output.hidden_states[-2][batch.row, batch.place]
    logits = model.output_projection(last)
    pair = logits[:, list(answers)]  # the verdict is which of the two is likelier
    loss = functional.cross_entropy(pair, batch.label, reduction="sum")
    loss = loss + OTHERS * (logits.logsumexp(-1) - pair.logsumexp(-1)).sum()
    loss = loss + functional.binary_cross_entropy_with_logits(probes.flaws(last), batch.flaws, reduction="sum")
    wide = functional.layer_norm(middle, middle.shape[-1:])
    state = functional.binary_cross_entropy_with_logits(probes.state(wide), batch.state, reduction="sum")
    return loss + STATE_WEIGHT * state, int((pair.argmax(-1) == batch.label).sum())
