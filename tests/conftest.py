"""Shared fixtures: tiny random policies of both architectures, their tokenizer, and images and samples in memory."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medvqa_rl.config import ModelConfig
from medvqa_rl.core import network
from medvqa_rl.core.types import Sample
from medvqa_rl.models.families import family_of
from medvqa_rl.models.loading import Policy, make_policy
from medvqa_rl.models.processor import Processor
from tests.models.families.stock import stock_inputs
from tests.models.families.tiny import BUILDERS, random_model
from tests.skips import (  # noqa: F401  # pytest finds the hooks here
    REAL_DATA,
    pytest_collection_modifyitems,
    pytest_make_collect_report,
    pytest_report_header,
    pytest_runtest_makereport,
)

ROOT = Path(__file__).resolve().parents[1]
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about a missing package on some CPUs


@contextmanager
def limit_files(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writes fail as on a full disk, in every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores the signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def network_stays_on() -> Iterator[None]:
    """The guard against connections cannot be removed again, so a test that installs it would change later ones."""
    yield
    assert not network.is_off(), "turn the network off in a process of its own"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint in standard form, written once per architecture and session. Do not write there."""

    @cache
    def write(arch: str) -> Path:
        folder = tmp_path_factory.mktemp(arch)
        model = random_model(arch)
        model.save_pretrained(folder)
        parts = BUILDERS[arch]()
        Processor(family_of(model), parts.tokenizer, parts.image_processor).save(folder)
        return folder

    return write


@pytest.fixture
def tiny_policy(tiny_folder: Callable[[str], Path]) -> Callable[..., Policy]:
    """Makes a fresh tiny policy on the CPU: ``tiny_policy("qwen2_vl", seed=1, lora=LoraConfig(rank=2))``."""

    def make(arch: str = "qwen2_vl", *, seed: int = 0, **settings: Any) -> Policy:
        model = random_model(arch, seed)
        folder = tiny_folder(arch)
        processor = Processor.from_folder(folder, family_of(model))
        return make_policy(model, processor, ModelConfig(path=str(folder), device="cpu", **settings), "cpu")

    return make


@pytest.fixture
def file_limit() -> Callable[[int], AbstractContextManager[None]]:
    return limit_files


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in for vLLM (tests/fakes/vllm), importable under its name for the time of the test."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "fakes"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # restored after the test
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    import vllm

    yield vllm
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "vllm_server", "released")]:
        del sys.modules[name]


@pytest.fixture
def serve_vllm(fake_vllm: Any) -> Iterator[Callable[..., Any]]:
    """Starts servers over the stand-in that run until the test ends: ``serve_vllm(folder, max_pixels=784)``."""
    from vllm_server import FakeServer, serving

    with ExitStack() as stack:
        yield lambda folder, **given: stack.enter_context(serving(FakeServer(str(folder), **given)))


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A proxy on this machine (tests/fakes/proxy.py), which the environment names for every connection."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "fakes"))
    from proxy import Proxy

    running = Proxy()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, running.url)
        monkeypatch.setenv(name.upper(), running.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data next to the project. Tests that ask for it are deselected where there is none (skips.py)."""
    return REAL_DATA


@dataclass
class MemoryImage:
    """An image source in memory that counts how often it is decoded."""

    key: str
    image: Image.Image
    loads: int = 0

    def load(self) -> Image.Image:
        self.loads += 1
        return self.image

    def header_pixels(self) -> None:
        return None


def draw_image(width: int = 56, height: int = 56, *, seed: int = 0) -> MemoryImage:
    """A colour gradient whose direction and phase depend on the seed."""
    y, x = np.mgrid[0:height, 0:width]
    phase = (x * (1 + seed % 3) + y * (1 + seed % 5)) * 4 + 37 * seed
    pixels = np.stack([phase, phase // 2 + 80, 255 - phase], axis=-1) % 256
    return MemoryImage(f"image-{seed}-{width}x{height}", Image.fromarray(pixels.astype(np.uint8), "RGB"))


def build_sample(
    id: str = "sample",
    *,
    images: tuple[MemoryImage, ...] | None = None,
    question: str = "Is there an effusion?",
    options: tuple[str, ...] = (),
    answer: str = "yes",
) -> Sample:
    """A question about one 56 x 56 image by default; a choice question if options are given."""
    return Sample(
        id=id,
        question=question,
        answer=answer if not options else "A",
        answer_type="choice" if options else "closed",
        images=(draw_image(),) if images is None else images,
        options=options,
    )


@pytest.fixture(scope="session")
def make_image() -> Callable[..., MemoryImage]:
    """Draws an image in memory: ``make_image(width, height, seed=0)``."""
    return draw_image


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """Builds a sample in memory: ``make_sample("id", images=(...), question=..., options=(...))``."""
    return build_sample


@pytest.fixture
def mixed_samples() -> list[Sample]:
    """Prompts of different lengths: one image, two images of different sizes, text only, a choice question."""
    two = (draw_image(84, 56, seed=2), draw_image(56, 112, seed=3))
    return [
        build_sample("one", images=(draw_image(56, 56, seed=1),)),
        build_sample("two", images=two, question="Which organ is seen?"),
        build_sample("none", images=(), question="Is the liver in the abdomen or in the chest?"),
        build_sample("choice", images=(draw_image(112, 84, seed=4),), options=("left lung", "right lung")),
    ]


@pytest.fixture(scope="session")
def model_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """Inputs of the stock model for one prompt: ``model(**model_inputs(model, prompt, completion_ids))``."""
    return stock_inputs
