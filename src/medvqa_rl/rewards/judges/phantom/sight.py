"""What an image of the phantom world shows, as a small vision tower believes, and how likely claims are true of it.

A linear probe reads beliefs off the tower's image tokens: the kind, size and number of what lies in each of the six
cells, and the organ. A claim is true with the probability that these beliefs give it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from medvqa_rl.data.phantom.claims import Claim
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, LEVELS, MODALITY_OF, SIDES, SIZES
from medvqa_rl.models.families.tower import VisionTower, load_tower

CELLS = tuple((side, level) for side in SIDES for level in LEVELS)
CLASSES = (len(ALL_KINDS) + 1, len(SIZES) + 1, 4)
"""Number of kinds, sizes and counts per cell; class 0 means an empty cell."""
_GRID = 4
"""Image tokens per side."""
_PROBE = "probe.safetensors"


class Probe(nn.Module):
    """Linear classifiers on the image tokens."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = nn.Linear(_GRID * _GRID * hidden, len(CELLS) * sum(CLASSES))
        self.organ = nn.Linear(hidden, len(ALL_ORGANS))
        self.position = nn.Linear(hidden, 2 * _GRID)

    def read(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        """
        Args:
            features: (N, 16, hidden) image tokens.

        Returns:
            Logits of kind, size and count, each (N, 6, classes), and (N, organs) of the organ.
        """
        cells = self.cells(features.flatten(1)).view(len(features), len(CELLS), -1).split(CLASSES, dim=-1)
        return list(cells), self.organ(features.mean(dim=1))

    def loss(self, features: Tensor, cells: Tensor, organs: Tensor) -> tuple[Tensor, float]:
        """
        Args:
            features: (N, 16, hidden) image tokens.
            cells: (N, 6, 3) classes of kind, size and count.
            organs: (N,) indices of organs.

        Returns:
            The weighted sum of the cross-entropies, and the share of findings whose kind, size and count are all
            predicted correctly.
        """
        count, targets = len(features), cells.flatten(0, 1)
        read, organ = self.read(features)
        predictions = [logits.flatten(0, 1) for logits in read]
        terms = [functional.cross_entropy(logits, targets[:, i]) for i, logits in enumerate(predictions)]
        terms.append(0.3 * functional.cross_entropy(organ, organs))
        token = torch.arange(_GRID * _GRID).repeat(count)
        row, column = self.position(features).flatten(0, 1).split(_GRID, dim=-1)
        terms.append(0.3 * functional.cross_entropy(row, token // _GRID))
        terms.append(0.3 * functional.cross_entropy(column, token % _GRID))
        is_finding = targets[:, 0] > 0
        is_right = torch.stack([logits.argmax(-1) == targets[:, i] for i, logits in enumerate(predictions)]).all(dim=0)
        return torch.stack(terms).sum(), is_right[is_finding].float().mean().item()


class Beliefs(NamedTuple):
    """Probabilities of what one image shows, from 0 to 1."""

    kinds: Sequence[Sequence[float]]
    """(6, kinds + 1) for each cell of :data:`CELLS`; 0 is an empty cell."""
    sizes: Sequence[Sequence[float]]
    """(6, sizes + 1)."""
    counts: Sequence[Sequence[float]]
    """(6, 4)."""
    organs: Sequence[float]

    def probability(self, claim: Claim) -> float:
        """Of a claim to be true, as if cells, and the kind, size and number in a cell, were independent."""
        if claim.topic == "organ":
            return self.organs[ALL_ORGANS.index(claim.value)]
        if claim.topic == "modality":
            return sum(share for organ, share in zip(ALL_ORGANS, self.organs) if MODALITY_OF[organ] == claim.value)
        if claim.finding is not None:
            finding = claim.finding
            cell = CELLS.index((finding.side, finding.level))
            if finding.count >= CLASSES[2]:
                return 0.0
            kind, size = 1 + ALL_KINDS.index(finding.kind), 1 + SIZES.index(finding.size)
            return self.kinds[cell][kind] * self.sizes[cell][size] * self.counts[cell][finding.count]
        if claim.topic == "absent":
            return math.prod(1 - kinds[1 + ALL_KINDS.index(claim.value)] for kinds in self.kinds)
        # Cells of the part that is clear, or all of them.
        return math.prod(
            kinds[0] for cell, kinds in zip(CELLS, self.kinds) if claim.topic == "none" or claim.value in cell
        )


class Sight(nn.Module):
    """A tower with its probe."""

    def __init__(self, tower: VisionTower, probe: Probe) -> None:
        super().__init__()
        self.tower, self.probe = tower, probe

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> list[Beliefs]:
        """What each image shows, independently of the others."""
        cells, organ = self.probe.read(self.tower(images))
        tables = [logits.double().softmax(-1).tolist() for logits in (*cells, organ)]
        return [Beliefs(*rows) for rows in zip(*tables)]

    def save(self, folder: Path) -> None:
        """Save tower and probe."""
        self.tower.save(folder)
        save_file(self.probe.state_dict(), folder / _PROBE)


def load_sight(folder: Path) -> Sight:
    """Load what :meth:`Sight.save` wrote, in float32."""
    tower = load_tower(folder)
    probe = Probe(tower.width)
    probe.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / _PROBE).items()})
    return Sight(tower, probe).eval()
