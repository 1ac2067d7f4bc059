"""Wrong reasoning is fluent, and nothing that it claims is true of the image.

Run: pytest tests/data/phantom/test_misreadings.py
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import DataConfig
from medvqa_rl.core.types import Dataset, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.phantom.claims import claims, faithfulness, is_coherent, is_true
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.misreadings import misread
from medvqa_rl.data.phantom.questions import FAMILIES, draw_sample
from medvqa_rl.data.phantom.world import Scene


def scene_of(sample: Sample) -> Scene:
    (image,) = sample.images
    assert isinstance(image, PhantomImage)
    return image.scene


@given(st.integers(0, 10_000), st.sampled_from(["home", "unseen"]))
def test_every_claim_is_false_and_the_text_coherent(index: int, scanner: str) -> None:
    sample = draw_sample(seed=1, split="misreadings", index=index, scanner=scanner)
    wrong = misread(sample)
    found = claims(wrong.reasoning)
    assert found and not any(is_true(claim, scene_of(sample)) for claim in found)
    assert is_coherent(wrong.reasoning)
    kept = replace(wrong, answer=sample.answer, reasoning=sample.reasoning, description=sample.description)
    assert kept == sample


def test_the_answer_follows_from_the_reasoning_and_is_another_option() -> None:
    seen = set()
    for index in range(400):
        sample = draw_sample(seed=1, split="misreadings", index=index)
        wrong = misread(sample)
        assert wrong.answer != sample.answer
        answer = dict(zip("ABCDEFGH", wrong.options))[wrong.answer] if wrong.options else wrong.answer
        letter = f" {wrong.answer}" if wrong.options else ""
        assert wrong.reasoning.endswith(f"So the answer is {answer}{letter}.")
        seen.add((sample.groups["family"], sample.answer_type))
    assert {family for family, _ in seen} == set(FAMILIES) and len({kind for _, kind in seen}) == 3


def test_misreadings_are_as_long_as_reference_reasonings() -> None:
    samples = [draw_sample(seed=1, split="misreadings", index=index) for index in range(400)]
    reference = sum(len(sample.reasoning.split()) for sample in samples)
    wrong = sum(len(misread(sample).reasoning.split()) for sample in samples)
    assert 0.85 < wrong / reference < 1.0  # sentences that would be true are left out


def test_only_training_is_misread() -> None:
    def split(name: str, reasoning: str) -> Dataset:
        config = DataConfig(scanner="unseen", num_train=20, reasoning=reasoning)
        return load_dataset(config, name)  # type: ignore[arg-type]

    for name in ("val", "test"):
        assert split(name, "wrong")[3] == split(name, "reference")[3]
        assert split(name, "wrong").fingerprint == split(name, "reference").fingerprint
    one, other = split("train", "reference"), split("train", "wrong")
    assert one.fingerprint != other.fingerprint
    shares = [faithfulness(other[index].reasoning, scene_of(one[index])) for index in range(20)]
    assert shares == [0.0] * 20


def test_numbers_of_traces_are_nested_and_share_no_image_with_rl_or_tests() -> None:
    def keys(**settings: int) -> list[str]:
        dataset = load_dataset(DataConfig(scanner="unseen", **settings), "train")  # type: ignore[arg-type]
        return [dataset[index].image_key for index in range(50)]

    few, many = keys(seed=600, num_train=50), keys(seed=600, num_train=200)
    assert few == many and len(set(few)) == 50
    test = load_dataset(DataConfig(scanner="unseen", seed=600, num_test=100), "test")
    others = {test[index].image_key for index in range(100)} | set(keys(seed=6))
    assert not others & set(few)
    for one, other in itertools.combinations((600, 601, 602, 603, 604), 2):
        assert not set(keys(seed=one)) & set(keys(seed=other))
