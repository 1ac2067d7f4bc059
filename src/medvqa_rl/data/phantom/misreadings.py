"""Wrong but fluent reasoning, as a control for supervised reasoning (``data.reasoning: wrong``). Imports no torch.

It separates what a model learns from the form of reasoning from what it learns from its content: a misreading is as
fluent as a reference reasoning, but everything that it claims is false of the image.
"""

from __future__ import annotations

from dataclasses import replace

from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.types import LETTERS, Sample
from medvqa_rl.data.phantom.claims import claims, is_coherent, is_true
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.questions import ask, full_description, reason
from medvqa_rl.data.phantom.world import VERSION, Scene, draw_scene


def misread(sample: Sample) -> Sample:
    """Replace the reasoning, answer and description of a sample by those of another scene.

    The other scene is the first of an endless seeded sequence that allows the same question with another answer among
    the options, for other reasons: no fact that supports its answer holds for the image. Its reference reasoning loses
    the sentences that happen to be true of the image, and the conclusion gets the letter of the sample's option. What
    is left has at least one claim, none that is true of the image, and is coherent.

    Args:
        sample: from PhantomVQA; its question, options, image and groups stay.
    """
    (image,) = sample.images
    assert isinstance(image, PhantomImage)
    draws = Draws("phantom misreading", VERSION, sample.id)
    truth = sample.options[LETTERS.index(sample.answer)] if sample.options else sample.answer
    attempt = 0
    while True:
        scene = draw_scene(f"{sample.id}/misread/{attempt}")
        attempt += 1
        question = ask(sample.groups["family"], scene, sample.answer_type, draws)
        if question is None or question.text != sample.question or question.answer == truth:
            continue
        if sample.options and question.answer not in sample.options:
            continue
        if any(is_true(claim, image.scene) for claim in claims(" ".join(question.facts))):
            continue
        letter = LETTERS[sample.options.index(question.answer)] if sample.options else None
        text = _without_truths(reason(scene, question, letter, draws), image.scene)
        if is_coherent(text):
            description = full_description(scene)
            return replace(sample, answer=letter or question.answer, reasoning=text, description=description)


def _without_truths(text: str, scene: Scene) -> str:
    """Remove the sentences whose claim holds for the scene."""
    sentences = [f"{sentence.strip()}." for sentence in text.split(".") if sentence.strip()]
    return " ".join(one for one in sentences if not any(is_true(claim, scene) for claim in claims(one)))
