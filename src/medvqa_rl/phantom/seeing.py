"""The first stage of the recipe: the vision tower learns to recognise and locate findings.

A language model that must find one lesion among sixteen image tokens learns nothing for thousands of steps: attending
to the lesion helps only once it is recognised, and recognising it helps only once it is attended to. So the tower is
first trained alone through a linear probe, which is then discarded. The probe predicts the content of each of the six
cells of the image, the organ, and the row and column of every image token, which relative positions alone do not
reveal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from medvqa_rl.data.phantom.drawing import render
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, SIZES, Scene, draw_scene
from medvqa_rl.models.families.shared import as_shared
from medvqa_rl.models.loading import Policy
from medvqa_rl.phantom.training import Log, cosine_schedule, train
from medvqa_rl.rewards.judges.phantom.sight import CELLS, Probe


def labels(scene: Scene) -> list[tuple[int, int, int]]:
    """Classes of kind, size and count for each of the six cells, 0 if it is empty."""
    found = {(finding.side, finding.level): finding for finding in scene.findings}
    return [
        (1 + ALL_KINDS.index(found[cell].kind), 1 + SIZES.index(found[cell].size), found[cell].count)
        if cell in found
        else (0, 0, 0)
        for cell in CELLS
    ]


def learn_to_see(
    policy: Policy,
    steps: int,
    rate: float,
    seed: int,
    log: Log,
    *,
    batch: int = 64,
    scanners: Sequence[str] = ("home",),
    kept: Path | None = None,
) -> Probe:
    """Train the vision tower and the projector through the probe.

    Args:
        scanners: take the images of a step in turn.
        kept: see :func:`~medvqa_rl.phantom.training.train`.

    Returns:
        The probe.
    """
    family, processor = as_shared(policy.family), policy.processor.image_processor
    torch.manual_seed(seed)
    probe = Probe(len(family.blank_features(policy.model, policy.device)[0]))

    def backward(step: int) -> dict[str, float]:
        scenes = _scenes(batch, seed, step)
        images = [
            Image.fromarray(render(scene, scanners[index % len(scanners)])) for index, scene in enumerate(scenes)
        ]
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
    settings = cosine_schedule(rate, warmup_steps=min(50, steps))
    train(both, settings, steps, backward, log, kept=kept, stage="seeing")
    return probe


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
