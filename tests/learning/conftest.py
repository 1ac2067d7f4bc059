"""Makes the toy runs of toy.py importable here and in the processes that tests start; a checkpoint for 4 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from medvqa_rl.models.families import family_for
from medvqa_rl.models.processor import Processor

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
            config.vision_config.update({"hidden_size" if arch == "qwen2_vl" else "out_hidden_size": 64})
            folder = tmp_path_factory.mktemp(f"wide-{arch}")
            torch.manual_seed(0)
            AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
            family = family_for(arch)
            assert family is not None
            Processor.from_folder(tiny_folder(arch), family).save(folder)
            made[arch] = str(folder)
        return made[arch]

    return write


@pytest.fixture
def stock_logps(model_inputs: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., Any]:
    """Log-probabilities and entropies by the stock forward: ``stock_logps(model, groups, temperature)``.

    Each is a list with a tensor (Tc,) per completion, computed alone and without padding.
    """

    def compute(model: Any, groups: Any, temperature: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logps, entropies = [], []
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor(completion.token_ids)
                logits = model(**model_inputs(model, group.prompt, completion.token_ids)).logits[0].float()
                table = torch.log_softmax(logits[-len(ids) - 1 : -1] / temperature, dim=-1)
                logps.append(table.gather(-1, ids[:, None])[:, 0])
                entropies.append(-(table.exp() * table).sum(-1))
        return logps, entropies

    return compute
