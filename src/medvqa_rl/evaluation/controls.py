"""Bias controls: the same questions with another image, without one, or with their options in another order.

An answer that stays correct without its image was guessed from the text; one that changes with the order of the
options was chosen by its letter. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from PIL import Image

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.types import LETTERS, ImageSource, Sample
from medvqa_rl.evaluation.answering import View
from medvqa_rl.evaluation.measures.visual_claims import claims_to_see
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import Interval, proportion_interval
from medvqa_rl.evaluation.statistics.summary import paired_gain

IMAGE_CONTROLS = ("blank", "shuffled", "no_image")
GREY = (127, 127, 127)


@dataclass(frozen=True)
class BlankImage:
    """A grey image of the same size as another."""

    source: ImageSource

    @property
    def key(self) -> str:
        return f"blank:{self.source.key}"

    def load(self) -> Image.Image:
        return Image.new("RGB", self.source.load().size, GREY)

    def header_pixels(self) -> int | None:
        return self.source.header_pixels()


@dataclass(frozen=True)
class Control:
    """One pass over some of the questions."""

    name: str
    samples: Sequence[Sample]
    """The questions that the control applies to, unchanged."""
    view: View
    """Returns what is shown in their place."""


def make_controls(samples: Sequence[Sample], seed: int) -> list[Control]:
    """Return the controls that apply to the questions.

    ``blank``: every image grey; ``shuffled``: the images of a random question about other images; ``no_image``: the
    question alone. ``order_1``, ``order_2`` ...: the options of choice questions rotated by that many positions, so
    that over all orders each option appears at every letter (CircularEval, Liu et al. 2023, arXiv 2307.06281).
    """
    controls = []
    with_images = [sample for sample in samples if sample.images]
    if with_images:
        controls.append(Control("blank", with_images, blank))
        if len({sample.image_key for sample in with_images}) > 1:
            donors = {sample.id: _donor(sample, with_images, seed) for sample in with_images}
            controls.append(Control("shuffled", with_images, lambda sample: replace(sample, images=donors[sample.id])))
        controls.append(Control("no_image", with_images, lambda sample: replace(sample, images=())))
    choices = [sample for sample in samples if sample.answer_type == "choice"]
    for shift in range(1, max((len(sample.options) for sample in choices), default=1)):
        some = [sample for sample in choices if shift < len(sample.options)]
        controls.append(Control(f"order_{shift}", some, lambda sample, shift=shift: rotated(sample, shift)))  # type: ignore[misc]
    return controls


def blank(sample: Sample) -> Sample:
    """The question with grey images of the same sizes."""
    return replace(sample, images=tuple(BlankImage(image) for image in sample.images))


def _donor(sample: Sample, samples: Sequence[Sample], seed: int) -> tuple[ImageSource, ...]:
    """The images of a random question about other images."""
    draws = Draws("shuffled image", seed, sample.id)
    while True:
        donor = draws.pick(samples)
        if donor.image_key != sample.image_key:
            return donor.images


def rotated(sample: Sample, shift: int) -> Sample:
    """Rotate the options of a choice question to the left; the first ones come last."""
    options = sample.options[shift:] + sample.options[:shift]
    position = (LETTERS.index(sample.answer) - shift) % len(options)
    return replace(sample, options=options, answer=LETTERS[position])


def summarise_controls(
    records: Sequence[EvalRecord], controls: Mapping[str, Sequence[EvalRecord]], config: EvalConfig
) -> dict[str, Any]:
    """Summarise the controls.

    Returns:
        For each image control ``n``, ``accuracy`` with its interval, ``drop``: the accuracy of the same questions with
        their image minus that (positive if the image helps) with its paired interval and ``permutation_p``, and
        ``same_answer_rate``: how often the answer is the same as with the image, and ``unfounded_claims`` with its
        interval: how often it is the same although the reasoning with the image claims to see something
        (:func:`medvqa_rl.evaluation.measures.visual_claims.claims_to_see`). ``option_order``: see
        :func:`order_summary`; absent without choice questions.
    """
    by_id = {record.sample_id: record for record in records}
    summary: dict[str, Any] = {}
    for name in IMAGE_CONTROLS:
        seen = [(by_id[record.sample_id], record) for record in controls.get(name, ())]
        pairs = [(one, other) for one, other in seen if one.is_scored and other.is_scored]
        if pairs:
            summary[name] = _image_summary(pairs, config)
    orders = {int(name.removeprefix("order_")): rows for name, rows in controls.items() if name.startswith("order_")}
    if orders:
        summary["option_order"] = order_summary(records, orders, config)
    return summary


def _image_summary(pairs: Sequence[tuple[EvalRecord, EvalRecord]], config: EvalConfig) -> dict[str, Any]:
    with_image, without = [one for one, _ in pairs], [other for _, other in pairs]
    interval = _share([bool(record.is_correct) for record in without], without, config)
    gain = paired_gain(without, with_image, config)
    is_same = [_comparable(one) == _comparable(other) for one, other in pairs]
    claiming = [claims_to_see(record.think or "") and record.has_answer for record in with_image]
    unfounded = _share([same and claims for same, claims in zip(is_same, claiming)], without, config)
    return {
        "n": len(pairs),
        "num_clusters": gain["num_clusters"],
        "accuracy": interval.estimate,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "drop": gain["gain"],
        "drop_low": gain["gain_low"],
        "drop_high": gain["gain_high"],
        "permutation_p": gain["permutation_p"],
        "same_answer_rate": mean(map(float, is_same)),
        "unfounded_claims": unfounded.estimate,
        "unfounded_claims_low": unfounded.low,
        "unfounded_claims_high": unfounded.high,
    }


def _comparable(record: EvalRecord) -> str | None:
    """The answer in a form that can be compared with another answer to the same options."""
    return record.choice if record.answer_type == "choice" else record.answer


def _share(flags: Sequence[bool], records: Sequence[EvalRecord], config: EvalConfig) -> Interval:
    return proportion_interval(
        flags,
        [record.image_key for record in records],
        resamples=config.bootstrap,
        seed=config.seed,
        method=config.interval,
    )


def order_summary(
    records: Sequence[EvalRecord], orders: Mapping[int, Sequence[EvalRecord]], config: EvalConfig
) -> dict[str, Any]:
    """Measure the effect of the option order, over the choice questions that are scored in every order.

    Args:
        records: with the options in their original order.
        orders: records by the number of positions that the options were rotated by.
        config: of the bootstrap.

    Returns:
        ``n``; ``consistency``: share of the questions for which the same option, by content, is named in every
        order; ``accuracy_all_orders``: share answered correctly in every order; both with intervals;
        ``mean_accuracy`` over all orders.
    """
    by_question: dict[str, dict[int, EvalRecord]] = {}
    for record in records:
        if record.answer_type == "choice":
            by_question[record.sample_id] = {0: record}
    for shift, rows in orders.items():
        for record in rows:
            by_question[record.sample_id][shift] = record
    complete = [
        versions
        for versions in by_question.values()
        if len(versions) == len(versions[0].options) and all(record.is_scored for record in versions.values())
    ]
    if not complete:
        return {"n": 0, "consistency": math.nan, "accuracy_all_orders": math.nan, "mean_accuracy": math.nan}
    first = [versions[0] for versions in complete]
    named = [{_option(record, shift) for shift, record in versions.items()} for versions in complete]
    consistency = _share([len(options) == 1 and None not in options for options in named], first, config)
    all_right = _share([all(record.is_correct for record in v.values()) for v in complete], first, config)
    return {
        "n": len(complete),
        "consistency": consistency.estimate,
        "consistency_low": consistency.low,
        "consistency_high": consistency.high,
        "accuracy_all_orders": all_right.estimate,
        "accuracy_all_orders_low": all_right.low,
        "accuracy_all_orders_high": all_right.high,
        "mean_accuracy": mean(mean(float(bool(record.is_correct)) for record in v.values()) for v in complete),
    }


def _option(record: EvalRecord, shift: int) -> int | None:
    """Position of the named option in the original order."""
    return None if record.choice is None else (LETTERS.index(record.choice) + shift) % len(record.options)
