"""The embedded judge that sees: its probabilities against the oracle of claims, and its verdicts by hand.

Run: pytest tests/rewards/judges/test_sight.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from medvqa_rl.cli.judge.calibrate import phantom_pairs
from medvqa_rl.config import JudgeConfig
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.data.phantom.claims import claims, is_true
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.questions import full_description
from medvqa_rl.data.phantom.reasonings import draw_reasoning
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, SIZES, Finding, Scene, draw_scene
from medvqa_rl.rewards.judges.load import load_judges
from medvqa_rl.rewards.judges.phantom.judge import DescriptionJudge, SightJudge
from medvqa_rl.rewards.judges.phantom.sight import CELLS, CLASSES, Beliefs
from medvqa_rl.rewards.judges.protocol import JudgeRequest, SeenImage, seen
from medvqa_rl.rewards.judges.rubric import COHERENCE, CORRECTNESS, REASONING, STEP, seeing

SEES = seeing(COHERENCE, "image")


def one_hot(index: int, size: int, sure: float = 1.0) -> list[float]:
    return [sure if place == index else (1 - sure) / (size - 1) for place in range(size)]


def certain(scene: Scene, sure: float = 1.0) -> Beliefs:
    """What a perfect eye believes, or one that gives the truth a share of ``sure``."""
    found = {(finding.side, finding.level): finding for finding in scene.findings}
    kinds, sizes, counts = [], [], []
    for cell in CELLS:
        finding = found.get(cell)
        kinds.append(one_hot(0 if finding is None else 1 + ALL_KINDS.index(finding.kind), CLASSES[0], sure))
        sizes.append(one_hot(0 if finding is None else 1 + SIZES.index(finding.size), CLASSES[1], sure))
        counts.append(one_hot(0 if finding is None else finding.count, CLASSES[2], sure))
    return Beliefs(kinds, sizes, counts, one_hot(ALL_ORGANS.index(scene.organ), len(ALL_ORGANS), sure))


class PerfectSight(nn.Module):
    """Believes what the scene of each image is, recognised by its pixels."""

    def __init__(self, scenes: Sequence[Scene], sure: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.known = {PhantomImage(scene, "home").load().tobytes(): certain(scene, sure) for scene in scenes}
        self.looks: list[int] = []

    def look(self, images: Sequence[Image.Image]) -> list[Beliefs]:
        self.looks.append(len(images))
        return [self.known[image.tobytes()] for image in images]


def test_certain_beliefs_agree_with_the_oracle_on_every_claim() -> None:
    """Claims of texts about other images, of which most are false, and those of the description."""
    seen_truths = set()
    for number in range(60):
        scene = draw_scene(f"sight {number}")
        beliefs = certain(scene)
        text = " ".join(draw_reasoning(0, "sight", 7 * number + more).text for more in range(7))
        text += f" {full_description(scene)} No finding is seen."
        text += f" There is a {ALL_KINDS[0]}: count four, size small, upper left."
        for claim in claims(text):
            assert beliefs.probability(claim) == float(is_true(claim, scene)), (claim, scene)
            seen_truths.add((claim.topic, is_true(claim, scene)))
    assert len(seen_truths) == 12, "every topic was true once and false once"


SCENE = Scene("s", "MRI", "brain", (Finding("cyst", "left", "upper", "small", 2),))
OTHER = Scene("t", "CT", "lungs", ())


def request(text: str, scene: Scene = SCENE, **more: Any) -> JudgeRequest:
    return JudgeRequest("?", (), text, images=seen([PhantomImage(scene, "home")]), **more)


def test_verdicts_by_hand() -> None:
    judge = SightJudge("j", PerfectSight([SCENE, OTHER], sure=0.9), SEES)  # type: ignore[arg-type]
    cyst = "There is a cyst: count two, size small, upper left."
    texts = {
        cyst: 0.9**3,
        f"{cyst} {cyst}": 0.9**3,  # said twice, it is not less likely
        "The modality is MRI.": 0.9 + 0.1 / 10,  # two organs
        f"{cyst} The organ is brain.": 0.9**4,
        "The organ is brain. The image is sharp. So the answer is skin.": 0.9,
        "The organ is skin.": 0.1 / 10,
        "The right part is clear.": 0.9**3,
        "No cyst is seen.": (1 - 0.9) * (1 - 0.1 / 16) ** 5,
        "The image is sharp.": 0.0,
    }
    grades = judge.grade([request(text) for text in texts])
    for grade, share in zip(grades, texts.values()):
        share = max(share, 1e-6)
        assert grade.margin == pytest.approx(math.log(share / (1 - share)))
        assert grade.score == float(share > 0.5)
    on_other = judge.grade([request("No finding is seen. The organ is lungs.", OTHER), request(cyst, OTHER)])
    assert [grade.score for grade in on_other] == [0.0, 0.0] and 0.9**7 < 0.5
    assert SightJudge("j", PerfectSight([OTHER]), SEES).grade([request("No finding is seen.", OTHER)])[0].score == 1  # type: ignore[arg-type]
    strict = SightJudge("j", PerfectSight([SCENE], sure=0.9), SEES, strictness=1.0)  # type: ignore[arg-type]
    assert strict.grade([request(cyst)])[0].score == 0.0 and strict.identity.key != judge.identity.key


def test_each_image_is_looked_at_once() -> None:
    sight = PerfectSight([SCENE, OTHER])
    judge = SightJudge("j", sight, SEES)  # type: ignore[arg-type]
    judge.grade([request("The organ is brain.")] * 3 + [request("The organ is lungs.", OTHER), request(" ")])
    assert sight.looks == [2] and judge.counters == {"asked": 5, "failed": 0}


def test_what_is_no_phantom_image_is_unscored() -> None:
    judge = SightJudge("j", PerfectSight([SCENE]), SEES)  # type: ignore[arg-type]
    large = SeenImage(MemoryImage("large", Image.new("RGB", (200, 100))))
    none, many, wrong, sound = judge.grade(
        [
            replace(request("The organ is brain."), images=()),
            replace(request("The organ is brain."), images=request("x").images * 2),
            replace(request("The organ is brain."), images=(large,)),
            request("The organ is brain."),
        ]
    )
    assert "has 0 images" in none.reason and "has 2 images" in many.reason and "200 x 100 pixels" in wrong.reason
    assert not (none.is_scored or many.is_scored or wrong.is_scored) and sound.score == 1.0
    assert judge.counters == {"asked": 4, "failed": 3}


def test_steps_are_valid_unless_their_own_claim_is_false() -> None:
    judge = SightJudge("j", PerfectSight([SCENE], sure=0.9), seeing(STEP, "image"))  # type: ignore[arg-type]
    before = "The organ is skin."  # false, but not the step
    steps = {
        "The organ is brain.": 0.9,
        "So the answer is skin.": 1.0,
        "The organ is skin.": 0.01,
        "No cyst is seen.": 0,
    }
    grades = judge.grade([request(f"{before} {step}", step=step) for step in steps])
    assert [grade.score for grade in grades] == [1.0, 1.0, 0.0, 0.0]
    assert grades[0].margin == pytest.approx(math.log(9))
    assert grades[1].margin == pytest.approx(math.log(1e6), rel=1e-3)
    assert judge.identity.key != SightJudge("j", PerfectSight([SCENE], sure=0.9), SEES).identity.key  # type: ignore[arg-type]


def test_a_description_makes_the_judge_exact() -> None:
    """Every verdict is the oracle's, and needs no image."""
    judges = load_judges(JudgeConfig(model="phantom:judge_sees", sees="description", cache=False), [COHERENCE, STEP])
    scenes = [draw_scene(f"described {number}") for number in range(40)]
    texts = [draw_reasoning(0, "described", number).text for number in range(40)]
    requests, expected = [], []
    for scene in scenes:
        for text in (*texts, full_description(scene), "The image is sharp."):
            requests.append(JudgeRequest("?", (), text, description=full_description(scene)))
            expected.append(float(bool(claims(text)) and all(is_true(claim, scene) for claim in claims(text))))
    assert [grade.score for grade in judges["coherence"].grade(requests)] == expected
    assert 40 < sum(expected) < len(expected) / 2
    first = replace(requests[0], step="The organ is skin.")
    assert judges["step"].grade([first])[0].score == float(scenes[0].organ == "skin")
    seeing_image = load_judges(JudgeConfig(model="phantom:judge_sees", sees="image", cache=False), [COHERENCE])
    assert seeing_image["coherence"].identity.key != judges["coherence"].identity.key


@pytest.mark.parametrize("text", ["", "A chest radiograph.", f"{full_description(OTHER)} The organ is brain."])
def test_another_description_is_unscored(text: str) -> None:
    judge = DescriptionJudge("j", seeing(COHERENCE, "description"))
    other, own = judge.grade(
        [JudgeRequest("?", (), "The organ is lungs.", description=said) for said in (text, full_description(OTHER))]
    )
    assert "the description is not that of a phantom" in other.reason and not other.is_scored
    assert own.score == 1.0 and judge.counters == {"asked": 2, "failed": 1}


def test_the_shipped_judge_sees_and_shares_its_model() -> None:
    config = JudgeConfig(model="phantom:judge_sees", sees="image", cache=False, device="cpu")
    judges = load_judges(config, [COHERENCE, STEP, REASONING])
    pairs = phantom_pairs(90, 3, sees="image", with_policies=False)
    grades = judges["coherence"].grade([pair.request for pair in pairs])
    right = [grade.score == float(pair.is_coherent) for grade, pair in zip(grades, pairs)]
    assert sum(right) / len(right) > 0.7, "83 and 77 % of written texts, docs/judges.md"
    assert not any(grade.score for grade, pair in zip(grades, pairs) if not pair.is_coherent)
    swapped = [replace(one.request, images=other.request.images) for one, other in zip(pairs, pairs[1:] + pairs[:1])]
    assert sum(grade.score for grade in judges["coherence"].grade(swapped)) < 0.3 * sum(g.score for g in grades)
    graded = judges["reasoning"].grade([replace(pair.request, answer="B") for pair in pairs])
    assert {int(grade.score >= 1) for grade in graded} == {0, 1}
    with pytest.raises(ValueError, match="only judges reasoning, so it cannot grade correctness"):
        load_judges(config, [CORRECTNESS])
