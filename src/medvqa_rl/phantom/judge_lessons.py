"""Training data and loss of the embedded judges (:mod:`medvqa_rl.phantom.judge`).

Texts are batched with a label at the end of every sentence.
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
"""Context length of the judges in tokens."""
BATCH = 32
CHUNKS = 2
"""Batches per step; texts are sorted by length."""
OTHERS = 0.05
"""Weight of the penalty on the probability of tokens other than Yes and No."""
STATE_WEIGHT = 0.2
"""Weight of the loss of the probe for statements."""


@dataclass(frozen=True)
class Recipe:
    """Size, data and training length of one judge."""

    name: str
    seed: int
    hidden: int
    layers: int
    heads: int
    inner: int
    mixture: Mixture
    sampled_share: float
    """Share of the training texts that were sampled from the policies."""
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
"""Everything that a text can state, as pairs of topic and value."""


def stated(text: str) -> set[tuple[str, str]]:
    """Elements of :data:`STATE` that a text states."""
    found: set[tuple[str, str]] = set()
    for claim in claims(text):
        found.add((claim.topic, claim.value))
        if claim.finding is not None:
            finding = claim.finding
            found |= {("place", finding.side), ("place", finding.level), ("size", finding.size)}
    return found


class Batch(NamedTuple):
    """Texts of similar length, with n labelled positions."""

    ids: Tensor
    """(b, T) padded token ids."""
    row: Tensor
    """(n,) row of each label."""
    position: Tensor
    """(n,) position of each label."""
    label: Tensor
    """(n,) 1 if the text up to this position is coherent, else 0."""
    flaws: Tensor
    """(n, len(FLAWS)) 1 for each flaw that the text up to this position has."""
    state: Tensor
    """(n, len(STATE)) 1 for each statement that the text up to this position makes."""


class Lessons:
    """Endless training texts, in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, sampled: Sequence[Reasoning]) -> None:
        self._tokenizer, self._recipe, self._sampled = tokenizer, recipe, sampled
        self._stop = tokenizer.convert_tokens_to_ids(".")
        self.answers = [int(tokenizer(word)["input_ids"][0]) for word in (" No", " Yes")]

    def texts(self, step: int) -> list[str]:
        """Texts of a training step."""
        recipe = self._recipe
        draws = Draws("phantom judge", recipe.seed, recipe.name, step)
        return [
            draws.pick(self._sampled).text
            if self._sampled and draws.chance(recipe.sampled_share)
            else draw_reasoning(recipe.seed, f"judge {recipe.name}", step * BATCH + row, recipe.mixture).text
            for row in range(BATCH)
        ]

    def batches(self, texts: Sequence[str]) -> list[Batch]:
        """Tokenize texts and batch those of similar length, to minimise padding."""
        rows: list[list[int]] = sorted((self._tokenizer(text)["input_ids"][:POSITIONS] for text in texts), key=len)
        size = -(-len(rows) // CHUNKS)
        return [self._collate(rows[first : first + size]) for first in range(0, len(rows), size)]

    def _collate(self, rows: list[list[int]]) -> Batch:
        ids = torch.full((len(rows), max(map(len, rows))), self._tokenizer.pad_token_id)
        positions: list[tuple[int, int]] = []
        found: list[list[bool]] = []
        state: list[list[bool]] = []
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            for position, token in enumerate(tokens):
                if token == self._stop or position + 1 == len(tokens):
                    text = str(self._tokenizer.decode(tokens[: position + 1]))
                    text_flaws, statements = flaws(text), stated(text)
                    positions.append((row, position))
                    found.append([flaw in text_flaws for flaw in FLAWS])
                    state.append([item in statements for item in STATE])
        flaw_labels = torch.tensor(found).float()
        label = (flaw_labels.sum(1) == 0).long()
        row_of, position_of = torch.tensor(positions).unbind(1)
        return Batch(ids, row_of, position_of, label, flaw_labels, torch.tensor(state).float())


class Probes(nn.Module):
    """Auxiliary linear heads, trained with the judge and discarded.

    The verdict alone carries little information about which of a dozen rules was broken. Predicting the statements
    from the layer before the last, and each flaw from the last layer, gives every rule a separate gradient at almost
    no cost.
    """

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.state, self.flaws = nn.Linear(hidden, len(STATE)), nn.Linear(hidden, len(FLAWS))


def lesson_loss(model: Any, probes: Probes, batch: Batch, answers: Sequence[int]) -> tuple[Tensor, int]:
    """Sum over all labelled positions of three terms: the cross-entropy of Yes against No, a small penalty on the
    probability of other tokens, and the binary cross-entropies of the probes.

    Returns:
        The loss and the number of correct verdicts.
    """
    positions = torch.arange(batch.ids.shape[1])[None]
    output = model.biogpt(input_ids=batch.ids, position_ids=positions, output_hidden_states=True)
    last = output.last_hidden_state[batch.row, batch.position]
    previous = output.hidden_states[-2][batch.row, batch.position]
    logits = model.output_projection(last)
    pair = logits[:, list(answers)]  # the verdict is the likelier of the two
    loss = functional.cross_entropy(pair, batch.label, reduction="sum")
    loss = loss + OTHERS * (logits.logsumexp(-1) - pair.logsumexp(-1)).sum()
    loss = loss + functional.binary_cross_entropy_with_logits(probes.flaws(last), batch.flaws, reduction="sum")
    normed = functional.layer_norm(previous, previous.shape[-1:])
    state = functional.binary_cross_entropy_with_logits(probes.state(normed), batch.state, reduction="sum")
    return loss + STATE_WEIGHT * state, int((pair.argmax(-1) == batch.label).sum())
