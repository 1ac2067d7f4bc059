"""How likely a text is under a fixed language model, which is neither trained here nor judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from medvqa_rl.config import is_hub_id
from medvqa_rl.config.problems.judge import EMBEDDED_LM
from medvqa_rl.core.embedded import ASSETS
from medvqa_rl.models.dtype import uses_bfloat16

_HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*.model", "pytorch_model*.bin"]
WINDOW = 1024
"""Tokens of a window at most, also for models that could read more."""


@dataclass(frozen=True)
class Likelihood:
    """Of one text."""

    nll: float
    """Sum of -log p(token | tokens before) in nats."""
    num_tokens: int
    """Tokens that were summed over."""


class LanguageModel:
    """Scores texts with a frozen causal language model.

    Every token of a text is scored, the first one given the model's begin token (its end token where it has none).
    Texts longer than the model's positions are scored in windows, each beginning anew.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, *, batch_size: int = 16) -> None:
        """
        Args:
            name: what results call it.
            model: a causal language model of transformers.
            tokenizer: its tokenizer.
            batch_size: windows read together.

        Raises:
            ValueError: the tokenizer has neither a begin nor an end token.
        """
        self.name = name
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(
                f"The tokenizer of {name} (eval.perplexity_model) has neither a begin nor an end token, so the first "
                "token of a text could not be scored: choose another model."
            )
        self._start = int(start)
        # Some models have no limit of their own.
        positions = getattr(model.config, "max_position_embeddings", WINDOW)
        self._window = min(int(positions), WINDOW) - 1  # one place is the begin token's

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[Likelihood]:
        """Likelihood of each text by itself; an empty text has no tokens."""
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
        windows = [
            (place, tokens[start : start + self._window])
            for place, tokens in enumerate(ids)
            for start in range(0, len(tokens), self._window)
        ]
        windows.sort(key=lambda item: len(item[1]))  # little padding
        sums = [0.0] * len(texts)
        for start in range(0, len(windows), self._batch_size):
            some = windows[start : start + self._batch_size]
            for (place, _), nll in zip(some, self._nll([tokens for _, tokens in some])):
                sums[place] += nll
        return [Likelihood(nll, len(tokens)) for nll, tokens in zip(sums, ids)]

    def _nll(self, windows: Sequence[Sequence[int]]) -> list[float]:
        """Sums of -log p over the tokens of each window. Padding is on the right, where no token looks."""
        width = max(map(len, windows))
        device = next(self._model.parameters()).device
        ids = torch.full((len(windows), width + 1), self._start, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(windows):
            ids[row, 1 : len(tokens) + 1] = torch.tensor(tokens)
            mask[row, : len(tokens) + 1] = 1
        ids, mask = ids.to(device), mask.to(device)
        logits: Tensor = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (windows, width)
        return [float(value) for value in (losses.double() * mask[:, 1:]).sum(dim=1)]


def load_language_model(name: str, device: str | torch.device) -> LanguageModel:
    """A causal language model by folder, Hub id or as ``phantom:lm``, in float32 on a CPU and bfloat16 on a GPU.

    Raises:
        ValueError: there is no such model, or it is no causal language model.
    """
    folder = ASSETS / "lm" if name == EMBEDDED_LM else Path(name)
    if not folder.is_dir() and not is_hub_id(name):
        raise ValueError(
            f"eval.perplexity_model is {name}, which is no folder and no Hub id: give the folder of a causal language "
            f"model, its id, such as openai-community/gpt2, or {EMBEDDED_LM} for texts of the phantom world."
        )
    dtype = torch.bfloat16 if uses_bfloat16("auto", torch.device(device).type) else torch.float32
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The language model {name} (eval.perplexity_model) cannot be loaded: {error}") from error
    return LanguageModel(name, model.to(device), tokenizer)
