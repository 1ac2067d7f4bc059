"""The recipe of the embedded judge that sees: a vision tower and a linear probe that read phantom images.

    medvqa-rl phantom build-judges --only judge_sees --output runs/judges

The tower starts from that of ``phantom:instruct``, which knows one scanner, and is trained on images of all scanners,
as in the first stage of the checkpoints (:mod:`medvqa_rl.phantom.seeing`). Nothing is trained on texts: claims are
compared with what the judge believes to see (:mod:`medvqa_rl.rewards.judges.phantom.sight`). The same seed gives the
same weights on the same machine and package versions.
"""

from __future__ import annotations

from pathlib import Path

import torch

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.files import write_json
from medvqa_rl.data.phantom.drawing import SCANNERS, PhantomImage
from medvqa_rl.data.phantom.world import ALL_ORGANS, draw_scene
from medvqa_rl.models.checkpoints import atomic_folder
from medvqa_rl.models.families.tower import tower_of
from medvqa_rl.models.loading import load_policy
from medvqa_rl.phantom.judge import SEEING
from medvqa_rl.phantom.seeing import labels, learn_to_see
from medvqa_rl.phantom.training import count_parameters, curve_log, refuse_existing
from medvqa_rl.rewards.judges.phantom.sight import Sight, load_sight

SEED = 2
STEPS = 1200
LEARNING_RATE = 2e-3


def build_seeing_judge(output: Path, *, steps: int = STEPS, dry_run: bool = False) -> None:
    """Train the embedded judge that sees, and measure what it reads on every scanner.

    Args:
        output: folder for the model ``judge_sees`` (bfloat16), ``judge_sees.jsonl`` (learning curve) and
            ``judge_sees.json`` (shares read right).
        steps: number of optimizer steps.
        dry_run: print the size and stop; nothing is written.

    Raises:
        ValueError: the model's folder exists.
    """
    refuse_existing(output / SEEING)
    policy = load_policy(ModelConfig(path="phantom:instruct", device="cpu", train_vision=True, train_projector=True))
    tower = tower_of(policy.model, policy.processor.image_processor)
    print(f"{SEEING}: {count_parameters(tower):,} parameters of the tower")
    if dry_run:
        return
    output.mkdir(parents=True, exist_ok=True)
    log = curve_log(output / f"{SEEING}.jsonl")
    probe = learn_to_see(policy, steps, LEARNING_RATE, SEED, log, scanners=tuple(SCANNERS))
    with atomic_folder(output / SEEING) as temporary:
        Sight(tower, probe).to(torch.bfloat16).save(temporary)
    results = examine(load_sight(output / SEEING))
    log(results)
    write_json(output / f"{SEEING}.json", results)


def examine(sight: Sight, count: int = 300) -> dict[str, float]:
    """Share of held-out images whose organ is read right, and of findings whose kind, size and count are, by
    scanner."""
    results: dict[str, float] = {}
    scenes = [draw_scene(f"build check sees/{index}") for index in range(count)]
    for scanner in SCANNERS:
        beliefs = sight.look([PhantomImage(scene, scanner).load() for scene in scenes])
        organs = [ALL_ORGANS[seen.organs.index(max(seen.organs))] for seen in beliefs]
        findings = [
            all(row.index(max(row)) == value for row, value in zip(rows, truth))
            for scene, seen in zip(scenes, beliefs)
            for truth, *rows in zip(labels(scene), seen.kinds, seen.sizes, seen.counts)
            if truth[0]
        ]
        results[f"{scanner}/organs"] = sum(o == s.organ for o, s in zip(organs, scenes)) / count
        results[f"{scanner}/findings"] = sum(findings) / len(findings)
    return results
