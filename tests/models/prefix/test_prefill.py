"""Prompts about the same images share their prefill, with the numbers of a prefill of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medvqa_rl.config import LoraConfig
from medvqa_rl.core.types import EncodedPrompt
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.prefix import prefill as module
from medvqa_rl.models.prefix.prefill import Shared, prefill, same_images, shared_starts
from medvqa_rl.rollout.decode import RolloutEngine
from tests.models.families.stock import stock_greedy
from tests.models.families.tiny import BUILDERS, tiny_policy

EVERY = pytest.mark.parametrize("name", BUILDERS)
IMAGE = 9


def several(samples):
    """The samples, and more questions of different lengths about the images of the first two; one of them twice."""
    one, two, *rest = samples
    more = [
        replace(one, id="one-b", question="Is there a pleural effusion in the left lung, or in the right lung?"),
        replace(two, id="two-b", question="Where?"),
        replace(one, id="one-c", question="Where is it?"),
        replace(one, id="one-d"),
    ]
    return [one, more[0], two, *rest, *more[1:]]


def prefills(policy, samples):
    """The same prompts with and without sharing."""
    prompts = [policy.processor.encode(sample) for sample in samples]
    with torch.no_grad():
        return prefill(policy, prompts, shares_images=True), prefill(policy, prompts), prompts


@EVERY
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_sharing_changes_no_key_value_or_logit(name, lora, mixed_samples):
    policy = tiny_policy(name, seed=1, lora=lora)
    policy.model.eval()
    (shared, features), (own, own_features), prompts = prefills(policy, several(mixed_samples))
    assert shared.lengths == own.lengths == [len(prompt.input_ids) for prompt in prompts]
    assert shared.next_positions.tolist() == own.next_positions.tolist()
    torch.testing.assert_close(shared.logits, own.logits, rtol=1e-4, atol=1e-5)
    for one, other in zip([*shared.keys, *shared.values], [*own.keys, *own.values], strict=True):
        for row, length in enumerate(own.lengths):
            torch.testing.assert_close(one[row, :, :length], other[row, :, :length], rtol=1e-4, atol=1e-5)
    for one, other in zip(features, own_features, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@EVERY
def test_images_and_shared_starts_are_computed_once(name, mixed_samples, monkeypatch):
    policy = tiny_policy(name)
    seen = {"images": 0, "tokens": []}
    encode, hidden_states = SharedFamily.image_features, SharedFamily.hidden_states

    def counted(family, model, prompts, device):
        seen["images"] += sum(bool(prompt.image_inputs) for prompt in prompts)
        return encode(family, model, prompts, device)

    def measured(family, model, embedded, *args, **kwargs):
        seen["tokens"].append(embedded.embeds.shape[:2])
        return hidden_states(family, model, embedded, *args, **kwargs)

    monkeypatch.setattr(SharedFamily, "image_features", counted)
    monkeypatch.setattr(SharedFamily, "hidden_states", measured)
    prompts = [policy.processor.encode(sample) for sample in several(mixed_samples)]
    with torch.no_grad():
        prefill(policy, prompts, shares_images=True)
    assert seen["images"] == 3  # of seven prompts with images
    starts = shared_starts(prompts, same_images(prompts), policy.processor.image_token_id)
    assert sorted(map(len, (start.prompts for start in starts))) == [1, 1, 2, 4]
    saved = sum((len(start.prompts) - 1) * start.length for start in starts)
    assert seen["tokens"] == [(1, sum(len(prompt.input_ids) for prompt in prompts) - saved)]


@EVERY
def test_greedy_answers_with_shared_images_equal_generate(name, mixed_samples):
    policy = tiny_policy(name, seed=2)
    engine = RolloutEngine(policy)
    for group in engine.greedy(several(mixed_samples), max_completion_length=12, batch_size=4):
        assert group.completions[0].token_ids == stock_greedy(policy, group.prompt, 12)


@pytest.mark.parametrize("broken", ["places", "start", "questions"])
def test_a_broken_prefill_is_noticed(broken, mixed_samples, monkeypatch):
    """Keys of a neighbour, a start that holds a token too many, and prompts that see each other's questions."""
    starts, places, layout = module.shared_starts, module._places, module.group_layout
    if broken == "places":
        monkeypatch.setattr(module, "_places", lambda *given: np.maximum(places(*given) - 1, 0))
    if broken == "start":
        longer = lambda *given: [start._replace(length=start.length + 1) for start in starts(*given)]  # noqa: E731
        monkeypatch.setattr(module, "shared_starts", longer)
    if broken == "questions":

        def leaking(lengths, rests, device, blocks):
            found = layout(lengths, rests, device, blocks)
            return replace(found, mask=torch.ones_like(found.mask))

        monkeypatch.setattr(module, "group_layout", leaking)
    samples = [sample for sample in several(mixed_samples) if sample.id.startswith("one")][:3]
    (shared, _), (own, _), _ = prefills(tiny_policy("qwen2_vl", seed=1), samples)
    with pytest.raises(AssertionError):
        for row, length in enumerate(own.lengths):
            for one, other in zip([*shared.keys, *shared.values], [*own.keys, *own.values], strict=True):
                torch.testing.assert_close(one[row, :, :length], other[row, :, :length], rtol=1e-4, atol=1e-5)


def encoded(ids, pixels=()):
    """A prompt with these ids; ``pixels`` fill an image."""
    image = {"pixel_values": np.array(pixels, dtype=np.float32)} if len(pixels) else {}
    return EncodedPrompt(np.array(ids, dtype=np.int64), image, "")


def test_starts_end_at_the_first_difference_and_before_the_last_token():
    prompts = [
        encoded([1, IMAGE, IMAGE, 2, 3, 4], [0.5]),
        encoded([1, IMAGE, IMAGE, 2, 5], [0.5]),
        encoded([1, IMAGE, IMAGE, 2, 3, 4], [0.25]),  # another image
        encoded([1, 2, 3, 4]),
        encoded([1, 2, 3, 4]),  # equal, but has no image to share
    ]
    owners = same_images(prompts)
    assert owners == [0, 0, 2, 3, 4]
    expected = [Shared(4, [0, 1]), Shared(5, [2]), Shared(3, [3]), Shared(3, [4])]
    assert shared_starts(prompts, owners, IMAGE) == expected
    same = [encoded([1, IMAGE, 2, 3], [0.5])] * 2
    assert shared_starts(same, same_images(same), IMAGE) == [Shared(3, [0, 1])]


def test_questions_before_their_image_share_nothing_but_the_image():
    prompts = [encoded([1, 2, IMAGE, 3], [0.5]), encoded([1, 4, IMAGE, 3], [0.5])]
    owners = same_images(prompts)
    assert owners == [0, 0]
    assert shared_starts(prompts, owners, IMAGE) == [Shared(3, [0]), Shared(3, [1])]


def test_images_that_look_alike_at_a_glance_are_told_apart():
    pixels = np.zeros(1000)
    other = pixels.copy()
    other[501] = 1.0
    assert same_images([encoded([IMAGE, 1], pixels), encoded([IMAGE, 1], other), encoded([IMAGE, 2], pixels)]) == [
        0,
        1,
        0,
    ]
