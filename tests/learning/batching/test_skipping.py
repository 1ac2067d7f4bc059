"""Damaged images are left out of training, and every other draw stays the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from toy import ToyData, toy_config

from medvqa_rl.config.yaml import build_config
from medvqa_rl.learning.batching.skipping import without_images
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run.errors import UnusableSampleError


@given(length=st.integers(1, 12), skipped=st.sets(st.integers(0, 11)))
def test_the_next_usable_question_takes_the_place(length, skipped):
    base, skipped = ToyData(length), {index for index in skipped if index < length}
    names = [f"image-{index}" for index in sorted(skipped)]
    if len(skipped) == length:
        with pytest.raises(ValueError, match="leaves out the images of all training questions"):
            without_images(base, names)
        return
    data = without_images(base, names)
    assert (len(data), data.fingerprint) == (length, base.fingerprint)
    for index in range(length):
        if index not in skipped:
            assert data[index] == base[index]
            continue
        used = next(later % length for later in range(index, index + length) if later % length not in skipped)
        assert data[index] == replace(base[used], id=f"toy-{used} in place of toy-{index}")
    if skipped:
        assert data.notes == {"questions replaced because of data.skip_images": len(skipped)}


def test_a_name_without_a_question_is_refused():
    with pytest.raises(ValueError, match="names 'image-7', but no training question is about it"):
        without_images(ToyData(3), ["image-1", "image-7"])
    with pytest.raises(ValueError, match=r"data\.name is phantom, which reads no files: remove data\.skip_images"):
        build_config({"data": {"skip_images": ["a.png"]}})


@dataclass(frozen=True)
class Broken(toy.ToyImage):
    def load(self):
        raise ValueError("The image cannot be decoded.")


@dataclass(frozen=True)
class DamagedData(ToyData):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return replace(sample, images=(Broken(index),)) if index == 6 else sample


def test_a_resumed_run_leaves_a_damaged_image_out_and_says_so(tiny_folder, tmp_path):
    config = toy_config(tiny_folder("qwen2_vl"), tmp_path / "run", train={"steps": 3, "log_completions_steps": 1})
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"warmup_steps": 0})})
    with pytest.raises(UnusableSampleError) as failure:
        train(config, train_set=DamagedData(12))  # one epoch
    assert failure.value.images == ("image-6",)
    data = config.data.model_copy(update={"skip_images": ("image-6",)})
    run = train(config.model_copy(update={"data": data}), train_set=DamagedData(12), resume=True)
    (resume,) = [json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines()]
    assert resume["settings"] == {"data.skip_images": [[], ["image-6"]]}
    first = f"From step {resume['step'] + 1} on, other questions take the place of those about 1 skipped image."
    assert resume["promise"].startswith(first)
    lines = [json.loads(line) for path in run.glob("samples/*") for line in path.read_text().splitlines()]
    drawn = {line["sample_id"] for line in lines}
    assert drawn == {f"toy-{index}" for index in range(12) if index != 6} | {"toy-7 in place of toy-6"}
