"""Bias controls: what the model is shown, and results computed by hand.

Run: pytest tests/evaluation/test_controls.py
"""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.types import Sample
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.evaluation.controls import make_controls, rotated, summarise_controls
from medvqa_rl.evaluation.measures.visual_claims import claims_to_see
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import proportion_interval
from tests.records import make_record

CONFIG = EvalConfig(bootstrap=100)


def image(key: str) -> MemoryImage:
    return MemoryImage(key, Image.new("RGB", (3 + ord(key[-1]) % 3, 2), (ord(key[-1]), 0, 0)))


SAMPLES = [
    Sample("1", "Which?", "B", "choice", (image("x"),), ("mass", "cyst", "stone")),
    Sample("2", "Which?", "A", "choice", (image("x"),), ("mass", "cyst")),
    Sample("3", "Is it?", "yes", "closed", (image("y"), image("z"))),
    Sample("4", "Where?", "left", "open", (image("w"),)),
    Sample("5", "What is a cyst?", "a sac", "open"),
]


def controls(samples: list[Sample] = SAMPLES, seed: int = 0) -> dict[str, dict[str, Sample]]:
    return {c.name: {s.id: c.view(s) for s in c.samples} for c in make_controls(samples, seed)}


def test_controls_change_only_the_image_or_the_option_order() -> None:
    shown = controls()
    assert {name: list(samples) for name, samples in shown.items()} == {
        "blank": ["1", "2", "3", "4"],
        "shuffled": ["1", "2", "3", "4"],
        "no_image": ["1", "2", "3", "4"],
        "order_1": ["1", "2"],
        "order_2": ["1"],
    }
    for sample in SAMPLES[:4]:
        blank, shuffled, none = (shown[name][sample.id] for name in ("blank", "shuffled", "no_image"))
        assert [i.load().size for i in blank.images] == [i.load().size for i in sample.images]
        assert all((np.asarray(i.load()) == 127).all() for i in blank.images)
        assert shuffled.image_key != sample.image_key
        assert shuffled.image_key in {other.image_key for other in SAMPLES[:4]}
        assert none.images == ()
        for changed in (blank, shuffled, none):
            assert replace(changed, images=sample.images) == sample


def test_the_shuffle_is_drawn_by_address() -> None:
    many = [replace(SAMPLES[3], id=str(index), images=(image(f"{index} {index % 7}"),)) for index in range(40)]
    donors = {id: sample.image_key for id, sample in controls(many)["shuffled"].items()}
    assert donors == {id: sample.image_key for id, sample in controls(many)["shuffled"].items()}
    assert donors != {id: sample.image_key for id, sample in controls(many, seed=1)["shuffled"].items()}
    assert len(set(donors.values())) > 15


def test_one_image_cannot_be_shuffled() -> None:
    assert set(controls(SAMPLES[:2])) == {"blank", "no_image", "order_1", "order_2"}
    assert set(controls(SAMPLES[4:])) == set()


def test_rotating_moves_the_gold_along() -> None:
    once = rotated(SAMPLES[0], 1)
    assert once.options == ("cyst", "stone", "mass") and once.answer == "A"
    for shift in range(3):
        assert rotated(SAMPLES[0], shift).answer_text == "cyst"
    assert {rotated(SAMPLES[0], shift).answer for shift in range(3)} == {"A", "B", "C"}


def record(
    id: str, right: bool | None, *, key: str = "", answer: str = "", options: int = 0, gold: str = "B"
) -> EvalRecord:
    return make_record(
        sample_id=id,
        image_key=key or id,
        options=tuple("pqr"[:options]),
        gold=gold if options else "yes",
        answer=answer or None,
        is_correct=right,
        has_answer=bool(answer),
        choice=answer or None if options else None,
    )


def test_gain_from_the_image_by_hand() -> None:
    seen = [record(str(index), index < 6, answer="yes" if index < 6 else "no") for index in range(8)]
    blind = [
        record(str(index), index in (0, 1, 7), answer="yes" if index in (0, 1, 7) else "no") for index in range(8)
    ]
    blind[2] = replace(blind[2], is_correct=None)  # unscored: left out on both sides
    summary = summarise_controls(seen, {"blank": blind}, CONFIG)["blank"]
    assert (summary["n"], summary["num_clusters"]) == (7, 7)
    assert summary["accuracy"] == pytest.approx(3 / 7)
    assert summary["drop"] == pytest.approx(5 / 7 - 3 / 7)
    assert summary["drop_low"] < summary["drop"] < summary["drop_high"]
    assert summary["same_answer_rate"] == pytest.approx(3 / 7)  # 0, 1 and 6
    assert summary["unfounded_claims"] == 0.0, "no reasoning"
    claiming = [replace(one, think="The image is sharp. A mass is seen.") for one in seen[:2]]
    claiming += [replace(one, think="I do not know.") for one in seen[2:]]
    summary = summarise_controls(claiming, {"blank": blind}, CONFIG)["blank"]
    assert summary["unfounded_claims"] == pytest.approx(2 / 7)  # 0 and 1 keep their answer
    assert summary["unfounded_claims_low"] < 2 / 7 < summary["unfounded_claims_high"]
    interval = proportion_interval([True, True, False, False, False, False, True], "0134567", resamples=100)
    assert (summary["accuracy_low"], summary["accuracy_high"]) == (interval.low, interval.high)


def test_the_order_of_options_by_hand() -> None:
    """Three options, gold q. Shift 1 shows q r p (gold A), shift 2 shows r p q (gold C)."""
    base = [record(id, answer == "B", answer=answer, options=3) for id, answer in zip("stuv", ("B", "B", "A", "B"))]
    # s: always q. t: always the letter B. u: always p, wrong but consistent. v: q, then none.
    first = [record(id, a == "A", answer=a, options=3, gold="A") for id, a in zip("stuv", ("A", "B", "C", ""))]
    second = [record(id, a == "C", answer=a, options=3, gold="C") for id, a in zip("stuv", ("C", "B", "B", "C"))]
    order = summarise_controls(base, {"order_1": first, "order_2": second}, CONFIG)["option_order"]
    assert order["n"] == 4
    assert order["consistency"] == 2 / 4
    assert order["accuracy_all_orders"] == 1 / 4
    assert order["mean_accuracy"] == pytest.approx((1 + 1 / 3 + 0 + 2 / 3) / 4)
    missing = [replace(first[0], is_correct=None), *first[1:]]
    order = summarise_controls(base, {"order_1": missing, "order_2": second}, CONFIG)["option_order"]
    assert (order["n"], order["accuracy_all_orders"]) == (3, 0.0)


@pytest.mark.parametrize(
    ("text", "is_claim"),
    [
        ("The image shows a mass.", True),
        ("A mass is seen in the left lung.", True),
        ("On this chest X-ray, the right lung looks clear.", True),
        ("There are two nodules.", True),
        ("I see a fracture.", True),
        ("The modality is MRI.", True),  # the phantom world's
        ("No drusen is seen.", True),
        ("The heart appears enlarged.", True),
        ("Pneumonia often follows influenza, so the answer is yes.", False),
        ("The question asks for the organ. So the answer is brain B.", False),
        ("The image is sharp.", False),
        ("", False),
    ],
)
def test_claims_to_see_are_recognised(text: str, is_claim: bool) -> None:
    assert claims_to_see(text) is is_claim
