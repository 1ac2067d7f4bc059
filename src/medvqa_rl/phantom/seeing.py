"""The first stage of the recipe: the vision tower learns to see findings and where they lie.

A language model that has to find one lesion among sixteen image tokens learns nothing for thousands of steps, because
attending to it helps only once it is recognised and recognising it only once it is attended to. So the tower is
trained alone first, through a linear probe that is thrown away: what is in each of the six cells of the image, which
organ it is, and for every image token its own row and column, which relative positions alone do not tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from medvqa_rl.config import OptimizerConfig
from medvqa_rl.data.phantom.drawing import SIZE, render
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, LEVELS, SIDES, SIZES, Scene, draw_scene
from medvqa_rl.learning.objective.optimizer import Optimizer, lr_at
from medvqa_rl.models.loading import Policy

CELLS = tuple((side, level) for side in SIDES for level in LEVELS)
_CLASSES = (len(ALL_KINDS) + 1, len(SIZES) + 1, 4)
"""Per cell: kind, size and count, class 0 being nothing."""
_PATCH, _MERGE = 14, 2
_GRID = SIZE // (_PATCH * _MERGE)
"""Image tokens per side."""


def patches(images: NDArray[np.uint8], image_processor: Any) -> NDArray[np.float32]:
    """What ``Qwen2VLImageProcessorPil`` makes of phantom images, many at a time.

    Args:
        images: (N, 112, 112, 3) RGB.
        image_processor: for its mean and standard deviation.

    Returns:
        (N * 64, 1176) patches: blocks of 2 x 2 patches in reading order, each (channel, time, row, column).
    """
    mean, deviation = (
        np.asarray(values, np.float32) for values in (image_processor.image_mean, image_processor.image_std)
    )
    pixels = (images.astype(np.float32) / np.float32(255) - mean) / deviation
    blocks = pixels.reshape(len(images), _GRID, _MERGE, _PATCH, _GRID, _MERGE, _PATCH, 3)
    ordered = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # N, block row, block column, row, column, channel, y, x
    repeated = np.repeat(ordered[:, :, :, :, :, :, None], 2, axis=6)  # a still image is two equal frames
    flat: NDArray[np.float32] = np.ascontiguousarray(repeated).reshape(-1, 3 * 2 * _PATCH * _PATCH)
    return flat


def labels(scene: Scene) -> list[tuple[int, int, int]]:
    """For each of the six cells: classes of kind, size and count, 0 where it is empty."""
    found = {(finding.side, finding.level): finding for finding in scene.findings}
    return [
        (1 + ALL_KINDS.index(found[cell].kind), 1 + SIZES.index(found[cell].size), found[cell].count)
        if cell in found
        else (0, 0, 0)
        for cell in CELLS
    ]


class Probe(nn.Module):
    """Linear readings of the tower's image tokens."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = nn.Linear(_GRID * _GRID * hidden, len(CELLS) * sum(_CLASSES))
        self.organ = nn.Linear(hidden, len(ALL_ORGANS))
        self.place = nn.Linear(hidden, 2 * _GRID)

    def loss(self, features: Tensor, cells: Tensor, organs: Tensor) -> tuple[Tensor, float]:
        """
        Args:
            features: (N, 16, hidden) image tokens.
            cells: (N, 6, 3) classes as from :func:`labels`.
            organs: (N,) indices of organs.

        Returns:
            The sum of all cross-entropies, and the share of findings whose kind, size and count are all right.
        """
        count = len(features)
        readings = self.cells(features.flatten(1)).view(count * len(CELLS), -1).split(_CLASSES, dim=-1)
        targets = cells.flatten(0, 1)
        terms = [functional.cross_entropy(reading, targets[:, i]) for i, reading in enumerate(readings)]
        terms.append(0.3 * functional.cross_entropy(self.organ(features.mean(dim=1)), organs))
        token = torch.arange(_GRID * _GRID).repeat(count)
        row, column = self.place(features).flatten(0, 1).split(_GRID, dim=-1)
        terms.append(0.3 * functional.cross_entropy(row, token // _GRID))
        terms.append(0.3 * functional.cross_entropy(column, token % _GRID))
        is_finding = targets[:, 0] > 0
        is_right = torch.stack([reading.argmax(-1) == targets[:, i] for i, reading in enumerate(readings)]).all(dim=0)
        return torch.stack(terms).sum(), is_right[is_finding].float().mean().item()


def learn_to_see(
    policy: Policy, steps: int, rate: float, seed: int, log: Callable[[dict[str, Any]], None], *, batch: int = 64
) -> None:
    """Train the vision tower and the projector through the probe."""
    tower: Any = policy.model.model.visual  # type: ignore[union-attr]
    torch.manual_seed(seed)
    probe = Probe(tower.config.hidden_size)
    both = nn.ModuleDict({"tower": tower, "probe": probe})
    settings = OptimizerConfig(
        learning_rate=rate,
        lr_scheduler_type="cosine",
        min_lr_ratio=0.02,
        warmup_steps=min(50, steps),
        weight_decay=0.05,
        betas=(0.9, 0.98),
    )
    optimizer = Optimizer(both, settings)
    grid = torch.tensor([[1, SIZE // _PATCH, SIZE // _PATCH]]).expand(batch, -1)
    recent = deque[tuple[float, float]](maxlen=50)
    for step in range(steps):
        scenes = _scenes(batch, seed, step)
        images = np.stack([render(scene) for scene in scenes])
        pixels = torch.from_numpy(patches(images, policy.processor.image_processor))
        features = tower(pixels, grid_thw=grid).pooler_output.view(batch, _GRID * _GRID, -1)
        loss, share = probe.loss(
            features,
            torch.tensor([labels(scene) for scene in scenes]),
            torch.tensor([ALL_ORGANS.index(scene.organ) for scene in scenes]),
        )
        loss.backward()
        clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step(lr_at(step, settings, steps))
        recent.append((loss.item(), share))
        if (step + 1) % 50 == 0:
            mean_loss, mean_share = (sum(values) / len(recent) for values in zip(*recent))
            log({"stage": "seeing", "step": step + 1, "of": steps, "loss": mean_loss, "findings right": mean_share})


def _scenes(count: int, seed: int, step: int) -> Sequence[Scene]:
    """Scenes of a step, nine in ten with findings."""
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = draw_scene(f"{seed}/seeing/{step}/{index}")
        index += 1
        if scene.findings or index % 10 == 0:
            scenes.append(scene)
    return scenes
