"""Shared fixtures: tiny random policies of both architectures, their tokenizer, and images and samples in memory."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.types import EncodedPrompt, Sample
from medvqa_rl.models.families import family_of
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.loading import Policy, make_policy
from medvqa_rl.models.processor import Processor

ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl")
ROOT = Path(__file__).resolve().parents[1]
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about a missing package on some CPUs
SPECIAL_TOKENS = [
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
        *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
]
TAG_TOKENS = ["<think>", "</think>", "<answer>", "</answer>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "You are a helpful assistant. system user assistant Is there a pleural effusion in the left lung? "
    "Answer with the letter. Think in, then answer in. Answer with the answer only. yes no A: B: C: D: "
    "The chest X-ray shows an opacity in the right lower lobe. Which organ is seen in this image? brain liver kidney"
)


@cache
def tiny_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of about 330 tokens with Qwen2-VL's special tokens and chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator([CORPUS], trainer)

    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAG_TOKENS])
    return tokenizer


def tiny_config(arch: str) -> Qwen2VLConfig | Qwen2_5_VLConfig:
    """Hidden 32, 2 layers, 4 heads sharing 2 keys; vision depth 2; 10 padding rows in the vocabulary."""
    tokenizer = tiny_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": len(tokenizer) + 10,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,  # wide, so that tokens, positions and images all show in the logits
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    shared = {
        "text_config": text,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": 0.3}
    if arch == "qwen2_vl":
        return Qwen2VLConfig(vision_config=vision | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, **shared)
    window = {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(vision_config=vision | window, **shared)


def tiny_model(arch: str, seed: int = 0) -> Any:
    """A random model in float32 whose generation settings are plain greedy decoding."""
    torch.manual_seed(seed)
    kind = Qwen2VLForConditionalGeneration if arch == "qwen2_vl" else Qwen2_5_VLForConditionalGeneration
    model = kind(tiny_config(arch)).eval()
    model.generation_config.eos_token_id = tiny_tokenizer().eos_token_id
    model.generation_config.pad_token_id = tiny_tokenizer().pad_token_id
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint in standard form, written once per architecture and session. Do not write there."""

    @cache
    def write(arch: str) -> Path:
        folder = tmp_path_factory.mktemp(arch)
        tiny_model(arch).save_pretrained(folder)
        Processor(Qwen2VL(), tiny_tokenizer(), Qwen2VLImageProcessorPil(max_pixels=112 * 112)).save(folder)
        return folder

    return write


@pytest.fixture
def tiny_policy(tiny_folder: Callable[[str], Path]) -> Callable[..., Policy]:
    """Makes a fresh tiny policy on the CPU: ``tiny_policy("qwen2_vl", seed=1, lora=LoraConfig(rank=2))``."""

    def make(arch: str = "qwen2_vl", *, seed: int = 0, **settings: Any) -> Policy:
        model = tiny_model(arch, seed)
        folder = tiny_folder(arch)
        processor = Processor.from_folder(folder, family_of(model))
        return make_policy(model, processor, ModelConfig(path=str(folder), device="cpu", **settings), "cpu")

    return make


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in for vLLM (tests/fakes/vllm), importable under its name for the time of the test."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "fakes"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # restored after the test
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
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
    """Real data next to the project; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data is not there ({folder})")
    return folder


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


def stock_inputs(model: Any, prompt: EncodedPrompt, completion: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """What the stock model's forward takes for one prompt and completion: the independent path for comparisons."""
    ids = torch.tensor([[*prompt.input_ids.tolist(), *completion]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.image_inputs:
        is_image = ids == model.config.image_token_id
        is_image[:, len(prompt.input_ids) :] = False
        inputs["mm_token_type_ids"] = is_image.int()
        inputs["pixel_values"] = torch.from_numpy(prompt.image_inputs["pixel_values"])
        inputs["image_grid_thw"] = torch.from_numpy(prompt.image_inputs["image_grid_thw"])
    return inputs


@pytest.fixture(scope="session")
def model_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """Inputs of the stock model for one prompt: ``model(**model_inputs(model, prompt, completion_ids))``."""
    return stock_inputs
