"""Prefetched prompts: bitwise identical runs, errors that name the bad image, no leftover threads."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import toy
from PIL import Image
from toy import ToyData, checkpoint_bytes, read_metrics, toy_config

from medvqa_rl.config import PrefetchConfig
from medvqa_rl.core.types import Sample
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.learning.batching.feed import Feed
from medvqa_rl.learning.batching.sampler import step_samples
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run.errors import UnusableSampleError
from medvqa_rl.learning.sft import train_sft
from medvqa_rl.rollout.decode import RolloutEngine

SHORT = {"steps": 3, "save_steps": 1, "log_completions_steps": 0}


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("loop", [train, train_sft])
def test_runs_are_the_same_bit_for_bit(folder, tmp_path, loop):
    """No threads, one, three with little memory, and another number after every step."""
    runs = []
    for workers, max_mib in ((0, 512), (1, 512), (3, 1)):
        config = toy_config(
            folder, tmp_path / f"{workers}", train=SHORT, prefetch={"workers": workers, "max_mib": max_mib}
        )
        runs.append(loop(config, train_set=ToyData()))
    parts = tmp_path / "parts"
    for steps, workers in ((1, 3), (2, 0), (3, 2)):
        # A schedule that does not depend on the number of steps.
        config = toy_config(
            folder,
            parts,
            train=SHORT | {"steps": steps},
            prefetch={"workers": workers},
            optimizer={"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0},
        )
        loop(config, train_set=ToyData(), resume=steps > 1)
    whole = toy_config(
        folder,
        tmp_path / "whole",
        train=SHORT,
        prefetch={"workers": 1},
        optimizer={"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0},
    )
    assert checkpoint_bytes(loop(whole, train_set=ToyData()), 3) == checkpoint_bytes(parts, 3)
    assert checkpoint_bytes(runs[0], 3) == checkpoint_bytes(runs[1], 3) == checkpoint_bytes(runs[2], 3)
    logged = [json.dumps(read_metrics(run)) for run in runs]
    assert logged[0] == logged[1] == logged[2]


@dataclass(frozen=True)
class CountedImage:
    """Counts how often it is decoded, and in which threads."""

    key: str
    loads: Counter[str]
    threads: set[str]

    def load(self) -> Image.Image:
        self.loads[self.key] += 1
        self.threads.add(threading.current_thread().name)
        return toy.ToyImage(int(self.key)).load()

    def header_pixels(self) -> None:
        return None


@dataclass(frozen=True)
class CountedData(ToyData):
    length: int = 8
    loads: Counter[str] = field(default_factory=Counter)
    threads: set[str] = field(default_factory=set)

    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), images=(CountedImage(str(index), self.loads, self.threads),))


@pytest.mark.parametrize("loop", [train, train_sft])
def test_images_are_decoded_once_per_step_in_the_threads_and_not_beyond_the_last_step(folder, tmp_path, loop):
    data = CountedData()
    loop(toy_config(folder, tmp_path / "run", train=SHORT | {"steps": 2}), train_set=data)
    assert data.loads == dict.fromkeys("01234567", 1)  # two steps of four prompts: one epoch
    assert all(name.startswith("prefetch") for name in data.threads)


def test_a_feed_follows_the_sampler(tiny_policy):
    policy, data = tiny_policy(), ToyData()
    engine = RolloutEngine(policy)
    common: dict[str, Any] = {"num_prompts": 4, "seed": 3, "rank": 1, "num_ranks": 2}
    with Feed(data, engine, PrefetchConfig(workers=2), steps=range(5, 9), **common) as feed:
        for step in range(5, 9):
            found = feed.prompts(step)
            named = step_samples(data, step, **common, cost=engine.processor.expected_tokens)
            assert [(one.sample.id, one.occurrence) for one in found] == [
                (draw.sample.id, draw.epoch) for draw in named
            ]
            for one in found:
                direct = engine.encode(one.sample)
                assert (one.prompt.input_ids == direct.input_ids).all()
                assert (one.prompt.image_inputs["pixel_values"] == direct.image_inputs["pixel_values"]).all()
        with pytest.raises(StopIteration):
            feed.prompts(9)


@dataclass(frozen=True)
class FileData(ToyData):
    """The toy samples with images on disk."""

    root: Path = Path()

    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), images=(FileImage(f"{index}.png", self.root),))


@pytest.fixture
def files(tmp_path) -> FileData:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(12):
        toy.ToyImage(index).load().save(root / f"{index}.png")
    return FileData(length=12, root=root)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loop", [train, train_sft])
def test_a_damaged_image_stops_the_run_and_completed_steps_are_saved(folder, tmp_path, files, loop, workers):
    config = toy_config(folder, tmp_path / "run", train=SHORT | {"save_steps": 0}, prefetch={"workers": workers})
    (second, *_) = step_samples(files, 1, num_prompts=4, seed=0)
    path = files.root / second.sample.images[0].key
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    sentence = rf"An image of sample '{second.sample.id}' cannot be used: The image {path} cannot be decoded \("
    with pytest.raises(UnusableSampleError, match=sentence) as failure:
        loop(config, train_set=files)
    saved, leave_out = failure.value.__notes__
    assert saved == (
        f"Step 1 and all before it are saved in {tmp_path}/run/checkpoints/step_000001: continue with "
        f"`medvqa-rl {'train' if loop is train else 'sft'} {tmp_path}/run/config.yaml --resume`."
    )
    assert f"""add 'data.skip_images=["{path.name}"]' to the command""" in leave_out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 1)
    assert not list((tmp_path / "run").glob("failed_step*"))
    path.write_bytes(whole)
    run = loop(config, train_set=files, resume=True)
    config = config.model_copy(update={"output_dir": str(tmp_path / "whole")})
    assert checkpoint_bytes(run, 3) == checkpoint_bytes(loop(config, train_set=files), 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_threads_stop_when_the_loop_fails(folder, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        assert [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
        raise error

    monkeypatch.setattr(toy, "vowels", fail)
    with pytest.raises(error):
        train(toy_config(folder, tmp_path / "run", train=SHORT, prefetch={"workers": 3}), train_set=ToyData())
