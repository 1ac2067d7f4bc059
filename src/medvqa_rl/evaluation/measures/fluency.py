"""Likelihood of texts under a fixed language model that is neither trained nor used as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from medvqa_rl.config import is_hub_id
from medvqa_rl.config.problems.judge import EMBEDDED_LM
from medvqa_rl.core.embedded import ASSETS, snapshot
from medvqa_rl.core.text import printable
from medvqa_rl.models.dimensions import uses_bfloat16
from medvqa_rl.models.untrusted import FILE_ERRORS, check_size, load_tokenizer

_HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*.model", "pytorch_model*.bin"]
WINDOW = 1024
"""Maximal tokens per window, even for models with a longer context."""


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of one text."""

    nll: float
    """Sum of -log p(token | previous tokens) in nats."""
    num_tokens: int
    """Number of summed tokens."""


class LanguageModel:
    """Scores texts with a frozen causal language model.

    Every token is scored, the first one given the model's BOS token (EOS if it has none). Texts longer than the
    context are split into windows that are scored independently.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, *, batch_size: int = 16) -> None:
        """
        Args:
            name: as reported in results.
            model: a causal language model from transformers.
            tokenizer: its tokenizer.
            batch_size: windows per forward pass.

        Raises:
            ValueError: the tokenizer has neither a BOS nor an EOS token.
        """
        self.name = name
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(
                f"The tokenizer of {name} (eval.perplexity_model) has neither a BOS nor an EOS token, so the first "
                "token of a text cannot be scored: choose another model."
            )
        self._start = int(start)
        # Some models have no maximal length.
        positions = getattr(model.config, "max_position_embeddings", WINDOW)
        self._window = min(int(positions), WINDOW) - 1  # one position is for the BOS token

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[Likelihood]:
        """Score each text on its own; an empty text has no tokens."""
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
        windows = [
            (index, tokens[start : start + self._window])
            for index, tokens in enumerate(ids)
            for start in range(0, len(tokens), self._window)
        ]
        windows.sort(key=lambda item: len(item[1]))  # to minimise padding
        sums = [0.0] * len(texts)
        for start in range(0, len(windows), self._batch_size):
            batch = windows[start : start + self._batch_size]
            for (index, _), nll in zip(batch, self._nll([tokens for _, tokens in batch])):
                sums[index] += nll
        return [Likelihood(nll, len(tokens)) for nll, tokens in zip(sums, ids)]

    def _nll(self, windows: Sequence[Sequence[int]]) -> list[float]:
        """Sum of -log p over the tokens of each window. Right padding is invisible to a causal model."""
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
    """Load a causal language model by folder, Hub id or as ``phantom:lm``, in float32 on CPU and bfloat16 on GPU.

    Raises:
        ValueError: there is no such model, or it is not a causal language model.
    """
    folder = ASSETS / "lm" if name == EMBEDDED_LM else Path(name)
    if not folder.is_dir() and not is_hub_id(name):
        raise ValueError(
            f"eval.perplexity_model is {name}, which is neither a folder nor a Hub id: give the folder of a causal "
            f"language model, its id, such as openai-community/gpt2, or {EMBEDDED_LM} for PhantomVQA."
        )
    dtype = torch.bfloat16 if uses_bfloat16("auto", torch.device(device).type) else torch.float32
    try:
        if not folder.is_dir():
            folder = snapshot(name, _HUB_FILES)
        check_size(folder, AutoModelForCausalLM)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        tokenizer = load_tokenizer(folder)
    except FILE_ERRORS as error:
        raise ValueError(
            f"The language model {name} (eval.perplexity_model) cannot be loaded: {printable(str(error), 400)}"
        ) from error
    return LanguageModel(name, model.to(device), tokenizer)
