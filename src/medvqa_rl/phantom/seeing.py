"""The first stage of the recipe: the vision tower learns to recognise and locate findings.

A language model that must find one lesion among sixteen image tokens learns nothing for thousands of steps: attending
to the lesion helps only once it is recognised, and recognising it helps only once it is attended to. So the tower is
first trained alone through a linear probe, which is then discarded. The probe predicts the content of each of the six
cells of the image, the organ, and the row and column of every image token, which relative positions alone do not
reveal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from medvqa_rl.data.phantom.drawing import render
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, LEVELS, SIDES, SIZES, Scene, draw_scene
from medvqa_rl.models.families.shared import as_shared
from medvqa_rl.models.loading import Policy
from medvqa_rl.phantom.training import Log, cosine_schedule, train

CELLS = tuple((side, level) for side in SIDES for level in LEVELS)
_CLASSES = (len(ALL_KINDS) + 1, len(SIZES) + 1, 4)
"""Number of kinds, sizes and counts per cell; class 0 means an empty cell."""
_GRID = 4
"""Image tokens per side."""


def labels(scene: Scene) -> list[tuple[int, int, int]]:
    """Classes of kind, size and count for each of the six cells, 0 if it is empty."""
    found = {(finding.side, finding.level): finding for finding in scene.findings}
    return [
        (1 + ALL_KINDS.index(found[cell].kind), 1 + SIZES.index(found[cell].size), found[cell].count)
        if cell in found
        else (0, 0, 0)
        for cell in CELLS
    ]


class Probe(nn.Module):
    """Linear classifiers on the image tokens."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = nn.Linear(_GRID * _GRID * hidden, len(CELLS) * sum(_CLASSES))
        self.organ = nn.Linear(hidden, len(ALL_ORGANS))
        self.position = nn.Linear(hidden, 2 * _GRID)

    def loss(self, features: Tensor, cells: Tensor, organs: Tensor) -> tuple[Tensor, float]:
        """
        Args:
            features: (N, 16, hidden) image tokens.
            cells: (N, 6, 3) classes from :func:`labels`.
            organs: (N,) indices of organs.

        Returns:
            The weighted sum of the cross-entropies, and the share of findings whose kind, size and count are all
            predicted correctly.
        """
        count = len(features)
        predictions = self.cells(features.flatten(1)).view(count * len(CELLS), -1).split(_CLASSES, dim=-1)
        targets = cells.flatten(0, 1)
        terms = [functional.cross_entropy(logits, targets[:, i]) for i, logits in enumerate(predictions)]
        terms.append(0.3 * functional.cross_entropy(self.organ(features.mean(dim=1)), organs))
        token = torch.arange(_GRID * _GRID).repeat(count)
        row, column = self.position(features).flatten(0, 1).split(_GRID, dim=-1)
        terms.append(0.3 * functional.cross_entropy(row, token // _GRID))
        terms.append(0.3 * functional.cross_entropy(column, token % _GRID))
        is_finding = targets[:, 0] > 0
        is_right = torch.stack([logits.argmax(-1) == targets[:, i] for i, logits in enumerate(predictions)]).all(dim=0)
        return torch.stack(terms).sum(), is_right[is_finding].float().mean().item()


def learn_to_see(policy: Policy, steps: int, rate: float, seed: int, log: Log, *, batch: int = 64) -> None:
    """Train the vision tower and the projector through the probe."""
    family, processor = as_shared(policy.family), policy.processor.image_processor
    torch.manual_seed(seed)
    probe = Probe(len(family.blank_features(policy.model, policy.device)[0]))

    def backward(step: int) -> dict[str, float]:
        scenes = _scenes(batch, seed, step)
        images = [Image.fromarray(render(scene)) for scene in scenes]
        inputs = family.preprocess(processor, images)
        encoded = family.encode(policy.model, {name: torch.from_numpy(array) for name, array in inputs.items()})
        features = torch.stack(list(encoded))
        loss, share = probe.loss(
            features,
            torch.tensor([labels(scene) for scene in scenes]),
            torch.tensor([ALL_ORGANS.index(scene.organ) for scene in scenes]),
        )
        loss.backward()
        return {"loss": loss.item(), "findings right": share}

    both = nn.ModuleList([*family.vision_modules(policy.model), probe])
    train(both, cosine_schedule(rate, warmup_steps=min(50, steps)), steps, backward, log, stage="seeing")


def _scenes(count: int, seed: int, step: int) -> Sequence[Scene]:
    """Scenes of a step; scenes without findings are mostly skipped."""
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = draw_scene(f"{seed}/seeing/{step}/{index}")
        index += 1
        if scene.findings or index % 10 == 0:
            scenes.append(scene)
    return scenes
