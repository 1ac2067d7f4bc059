"""A judge that sees, on this machine: tiny random models of every family against their stock forward, one by one.

Run: pytest tests/rewards/judges/test_vision.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medvqa_rl.config import JudgeConfig
from medvqa_rl.core.embedded import ASSETS
from medvqa_rl.core.types import EncodedPrompt
from medvqa_rl.data.images.files import MemoryImage, shrunk
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.rewards.judges.cache import CachedJudge, request_hash
from medvqa_rl.rewards.judges.load import load_judges
from medvqa_rl.rewards.judges.prompts import chat_prompt
from medvqa_rl.rewards.judges.protocol import JudgeRequest, SeenImage, seen
from medvqa_rl.rewards.judges.rubric import COHERENCE, CORRECTNESS, REASONING, seeing
from medvqa_rl.rewards.judges.vision import SeeingLevelJudge, SeeingModel, SeeingYesNoJudge
from tests.models.families import test_generic as generic
from tests.models.families import tiny
from tests.models.families.stock import stock_logits
from tests.rewards.judges.test_local import write_model, write_tokenizer

SEES = seeing(COHERENCE, "image")


def noise(seed: int, width: int = 40, height: int = 32) -> SeenImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return SeenImage(MemoryImage(f"noise {seed}", Image.fromarray(pixels)))


ONE, OTHER = noise(1), noise(2)
REQUESTS = [
    JudgeRequest("Which organ is shown?", ("lung", "brain"), "The image shows a lung.", images=(ONE,)),
    JudgeRequest("Is there a mass?", (), "No mass is seen. " * 3, images=(OTHER,)),
    JudgeRequest("Is there a mass?", (), "A mass is seen.", images=(ONE,)),
    JudgeRequest("Is there a mass?", (), "A mass is seen.", images=(OTHER,)),
    JudgeRequest("Which is larger?", (), "The first is.", images=(ONE, OTHER)),
    JudgeRequest("Is there a mass?", (), "A mass is seen."),
]


def seeing_model(policy: Any, **more: Any) -> SeeingModel:
    processor = policy.processor

    def apply(text: str, images: int) -> str:
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        return str(
            processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        )

    return SeeingModel(
        "tiny",
        policy.model.eval(),
        processor.tokenizer,
        chat_prompt(apply),
        **{"batch_size": 64, "policy": policy, "max_pixels": 10**6, **more},
    )


def logits_of(policy: Any, prompt: EncodedPrompt, tail: list[int]) -> torch.Tensor:
    """(T, V) logits that predict the tail, from the stock forward."""
    if isinstance(policy.family, SharedFamily):
        return stock_logits(policy, prompt, tail)
    inputs = generic.stock(policy, prompt, tail)
    logits: torch.Tensor = policy.model(**inputs).logits[0, len(prompt.input_ids) - 1 : -1]
    return logits


@torch.no_grad()
def alone(judge: SeeingYesNoJudge | SeeingLevelJudge, request: JudgeRequest) -> list[float]:
    """Log-probability of each answer from the stock forward over one prompt and answer."""
    processor, policy = judge.loaded.processor, judge.loaded.policy
    text = judge._prompt(request)
    prompt = processor.encode_text(text, [image.image for image in request.images])
    found = []
    for answer in judge.answers:
        whole = processor.encode_text(text + answer, [image.image for image in request.images])
        tail = whole.input_ids[len(prompt.input_ids) :].tolist()
        assert whole.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
        logits = logits_of(policy, prompt, tail)
        table = logits.double().log_softmax(-1)
        found.append(float(table.gather(-1, torch.tensor(tail)[:, None]).sum()))
    return found


@pytest.mark.parametrize("name", [*tiny.BUILDERS, *generic.MODELS])
def test_verdicts_equal_the_stock_forward(name: str) -> None:
    policy = tiny.tiny_policy(name) if name in tiny.BUILDERS else generic.make(name)
    judge = SeeingYesNoJudge(seeing_model(policy, batch_size=5), rubric=SEES)
    expected = [yes - no for yes, no in (alone(judge, request) for request in REQUESTS)]
    grades = judge.grade(REQUESTS)
    assert [grade.margin for grade in grades] == pytest.approx(expected, abs=1e-4)
    assert [grade.score for grade in grades] == [float(margin > 0) for margin in expected]
    margins = [round(margin, 5) for margin in expected]
    assert len(set(margins)) == len(margins), "another image is another verdict"
    assert judge.counters == {"asked": 6, "failed": 0}


def test_levels_equal_the_stock_forward() -> None:
    judge = SeeingLevelJudge(seeing_model(tiny.tiny_policy("qwen2_vl")), seeing(REASONING, "image"))
    found = [np.exp(alone(judge, request)) for request in REQUESTS[:3]]
    shares = [levels / levels.sum() for levels in found]
    grades = judge.grade(REQUESTS[:3])
    assert [grade.score for grade in grades] == [float(levels.argmax()) for levels in found]
    assert [grade.reason for grade in grades] == [
        "P(0 to 3) = " + ", ".join(f"{share:.2f}" for share in levels) for levels in shares
    ]


def test_images_that_cannot_be_decoded_are_unscored(tmp_path: Path) -> None:
    class Broken:
        key = "broken.png"

        def load(self) -> Image.Image:
            raise ValueError("broken.png is no image.")

        def header_pixels(self) -> None:
            return None

    judge = SeeingYesNoJudge(seeing_model(tiny.tiny_policy("qwen2_vl")), rubric=SEES)
    requests = [replace(REQUESTS[0], images=seen([Broken()])), REQUESTS[0]]
    for one in (judge, CachedJudge(judge, SEES, tmp_path)):
        broken, sound = one.grade(requests)
        assert math.isnan(broken.score) and broken.reason == "broken.png is no image."
        assert sound.is_scored


def test_the_cache_knows_images_by_their_pixels() -> None:
    same = replace(REQUESTS[0], images=(SeenImage(MemoryImage("copy.png", ONE.image.copy())),))
    assert request_hash(REQUESTS[0], SEES) == request_hash(same, SEES)
    assert request_hash(REQUESTS[0], SEES) != request_hash(replace(same, images=(OTHER,)), SEES)
    assert request_hash(REQUESTS[0], COHERENCE) == request_hash(replace(same, images=(OTHER,)), COHERENCE)
    described = seeing(COHERENCE, "description")
    assert len({request_hash(replace(same, description=text), described) for text in ("", "A film.")}) == 2


def test_what_is_seen_is_part_of_the_identity() -> None:
    policy = tiny.tiny_policy("qwen2_vl")
    model = seeing_model(policy)
    judges = [
        SeeingYesNoJudge(model, rubric=SEES),
        SeeingYesNoJudge(model, rubric=COHERENCE),
        SeeingYesNoJudge(replace(model, max_pixels=1000), rubric=SEES),
    ]
    assert len({judge.identity.key for judge in judges}) == 3
    assert seeing(COHERENCE, "description").hash != SEES.hash != COHERENCE.hash
    assert seeing(REASONING, "description").hash == REASONING.hash, "it is shown descriptions in any case"
    assert seeing(CORRECTNESS, "image") is CORRECTNESS and seeing(COHERENCE, "text") is COHERENCE


def test_rubrics_say_what_is_seen() -> None:
    request = JudgeRequest("Is there a mass?", (), "No.", description="A film of a chest.", images=(ONE,))
    text, described, shown = (seeing(COHERENCE, sees).render(request) for sees in ("text", "description", "image"))  # type: ignore[arg-type]
    assert "You cannot see the image. Reasoning is clinically coherent when its findings fit" in text
    assert "Image: A film of a chest.\nQuestion" in described and "findings are those of the description" in described
    assert "You are shown the image." in shown and "findings are those that the image shows" in shown
    assert "A film" not in text + shown
    assert "cannot see" not in seeing(REASONING, "image").render(request)


def test_large_images_are_shrunk() -> None:
    image = Image.new("RGB", (300, 100))
    assert shrunk(image, 30_000) is image
    small = shrunk(image, 7_500)
    assert small.size == (150, 50)
    policy = tiny.tiny_policy("qwen2_vl")
    judge = SeeingYesNoJudge(seeing_model(policy, max_pixels=28 * 28 * 4), rubric=SEES)
    request = replace(REQUESTS[0], images=(noise(3, 280, 280),))
    assert judge._encode(request).length < judge._encode(replace(request, images=(noise(3, 57, 57),))).length + 9


def test_a_model_that_reads_text_only_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocab_size=600, chat=True)
    config = JudgeConfig(model=str(write_model(tmp_path, "mistral")), device="cpu", sees="image", cache=False)
    with pytest.raises(ValueError, match=r"judge\.sees is image.* a language model that sees no images") as caught:
        load_judges(config, [COHERENCE])
    assert "model.path" not in str(caught.value)


def test_an_embedded_policy_judges_what_it_sees() -> None:
    """Its whole path from the folder: no training made it a judge."""
    config = JudgeConfig(model=str(ASSETS / "instruct"), device="cpu", sees="image", cache=False)
    judges = load_judges(config, [COHERENCE, REASONING])
    pictures = [noise(4, 112, 112), noise(5, 112, 112)]
    requests = [replace(REQUESTS[0], images=(picture,)) for picture in pictures]
    for judge in judges.values():
        one, other = judge.grade(requests)
        assert one.is_scored and (one.margin, one.reason) != (other.margin, other.reason)


def test_a_model_that_sees_is_not_loaded_to_read_text() -> None:
    config = JudgeConfig(model=str(ASSETS / "instruct"), device="cpu", cache=False)
    with pytest.raises(ValueError, match=r"is a qwen2_vl model, which sees images, but judge\.sees is text: set"):
        load_judges(config, [COHERENCE])
