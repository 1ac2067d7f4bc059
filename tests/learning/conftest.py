"""Makes the toy runs of toy.py importable here and in the processes that tests start; a checkpoint for 4 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from medvqa_rl.models.qwen_vl import Processor

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def wide_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of a tiny random checkpoint whose layers are whole blocks of 64 wide."""
    made: dict[str, str] = {}

    def write(arch: str = "qwen2_vl") -> str:
        if arch not in made:
            config: Any = AutoConfig.from_pretrained(tiny_folder(arch))
            # Keys are 32 wide, so that bitsandbytes could repack them for its kernel on a CPU.
            config.text_config.update({"hidden_size": 64, "intermediate_size": 128})
            config.text_config.update({"num_attention_heads": 8, "num_key_value_heads": 4})
            config.vision_config.update({"out_hidden_size" if arch == "qwen2_5_vl" else "hidden_size": 64})
            folder = tmp_path_factory.mktemp(f"wide-{arch}")
            torch.manual_seed(0)
            AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
            Processor.from_folder(tiny_folder(arch)).save(folder)
            made[arch] = str(folder)
        return made[arch]

    return write
