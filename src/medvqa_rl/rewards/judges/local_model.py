"""Load a causal language model as a judge, from a folder, the Hub or the package, with the prompt that fits it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from medvqa_rl.config import JudgeConfig, is_hub_id
from medvqa_rl.config.problems.judge import EMBEDDED_JUDGES
from medvqa_rl.core.embedded import ASSETS, snapshot
from medvqa_rl.core.text import printable
from medvqa_rl.models.dimensions import uses_bfloat16
from medvqa_rl.models.families import family_for
from medvqa_rl.models.fingerprint import weights_fingerprint
from medvqa_rl.models.untrusted import FILE_ERRORS, check_size, load_tokenizer
from medvqa_rl.rewards.judges.prompts import BIOGPT, BIOMISTRAL, PHANTOM, JudgePrompt, chat_prompt

FIXED = {"date_string": "1 January 2026", "enable_thinking": False}
"""Arguments of chat templates: those that insert today's date or open a thinking section would change the prompt, or
prevent a reply."""
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "pytorch_model*.bin"]


@dataclass
class JudgeModel:
    """A causal language model with its tokenizer and prompt. Several judges, one per rubric, can share it."""

    name: str
    """As in the settings."""
    model: Any
    """A ``PreTrainedModel`` with a language-model head, in evaluation mode on its device."""
    tokenizer: Any
    prompt: JudgePrompt
    batch_size: int = 32
    """Prompts per forward pass."""

    @cached_property
    def fingerprint(self) -> str:
        return weights_fingerprint(self.model)

    @cached_property
    def special(self) -> list[str]:
        """Strings that no text may contain, longest first."""
        return sorted({*self.tokenizer.all_special_tokens, *self.prompt.marks}, key=len, reverse=True)

    @property
    def limit(self) -> float:
        """The model's context length in tokens; infinite if its config names none."""
        limit: float = getattr(self.model.config.get_text_config(), "max_position_embeddings", math.inf)
        return limit

    def encode(self, text: str) -> list[int]:
        """Tokenize a prompt, without the end token that some tokenizers append to every text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=self.prompt.adds_special_tokens)["input_ids"]
        ends = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id}
        while ids and ids[-1] in ends:
            ids = ids[:-1]
        return ids


def load_judge_model(config: JudgeConfig) -> JudgeModel:
    """Load a judge's model from a folder, the Hub, or the package.

    Raises:
        ValueError: it does not exist, is not a causal language model, or has no matching prompt.
    """
    device = device_of(config)
    folder = folder_of(config)
    try:
        tokenizer = load_tokenizer(folder)
        check_size(folder, AutoModelForCausalLM)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16 if uses_bfloat16(config.dtype, device.type) else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
        )
    except ImportError as error:
        raise ValueError(
            f"The judge {config.model!r} needs a package that is missing ({str(error).strip().splitlines()[0]}): "
            "install the extra with `pip install 'medvqa-rl[judge]'`."
        ) from error
    except FILE_ERRORS as error:
        kind = _model_type(folder)
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family_for(kind) is not None:
            raise ValueError(
                f"The judge {config.model!r} is a {kind} model, which sees images, but judge.sees is {config.sees}: "
                "set judge.sees=image, or judge.model to a language model."
            ) from error
        raise ValueError(
            f"The judge {config.model!r} cannot be loaded as a causal language model: {printable(str(error), 400)}"
        ) from error
    prompt = _prompt(config, model, tokenizer)
    return JudgeModel(config.model, model.to(device).eval(), tokenizer, prompt, config.batch_size)


def _model_type(folder: Path) -> str:
    """As config.json names it; empty if it cannot be read."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def device_of(config: JudgeConfig) -> torch.device:
    """The judge's device.

    Raises:
        ValueError: there is no such device.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"judge.device is {name}, but this torch sees {torch.cuda.device_count()} CUDA devices: set judge.device "
            "to cpu or auto, or to one of them."
        )
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def folder_of(config: JudgeConfig) -> Path:
    """The folder of the judge's files; downloads them from the Hub if needed.

    Raises:
        ValueError: there is no such folder, or the Hub did not deliver it.
    """
    if config.model.startswith("phantom:"):
        folder = ASSETS / config.model.removeprefix("phantom:")
        if config.model not in EMBEDDED_JUDGES or not (folder / "model.safetensors").is_file():
            raise ValueError(
                f"There is no embedded judge {config.model!r}: use {' or '.join(EMBEDDED_JUDGES)}, which "
                "`medvqa-rl phantom build-judges` makes."
            )
        return folder
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(config.model):
        raise ValueError(
            f"judge.model is {config.model!r}, but there is no such folder: give the folder of a causal language "
            f"model, a Hugging Face Hub id such as microsoft/biogpt, or {' or '.join(EMBEDDED_JUDGES)}."
        )
    try:
        return snapshot(config.model, _HUB_FILES, revision=config.revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"judge.model is {config.model!r}, which is no folder here, and the Hugging Face Hub did not deliver it "
            f"({type(error).__name__}: {printable(str(error))}): check the spelling and the connection, or download "
            "it elsewhere and give its folder."
        ) from error


def _prompt(config: JudgeConfig, model: Any, tokenizer: Any) -> JudgePrompt:
    """The prompt named in the settings, or the one that fits the model."""
    name = config.template
    if name == "auto" and config.model.startswith("phantom:"):
        name = "phantom"
    elif name == "auto" and model.config.model_type == "biogpt":
        name = "biogpt"
    elif name == "auto" and tokenizer.chat_template:
        name = "chat"
    elif name == "auto" and model.config.model_type == "mistral":
        name = "biomistral"
    if name == "auto" or (name == "chat" and not tokenizer.chat_template):
        raise ValueError(
            f"The judge {config.model!r} ({model.config.model_type}) has no chat template: set judge.template to "
            "biogpt (the model continues a text) or biomistral (Mistral's instruction format)."
        )
    if name == "chat":
        return chat_prompt(
            lambda text, images: tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, **FIXED
            )
        )
    return {"biogpt": BIOGPT, "biomistral": BIOMISTRAL, "phantom": PHANTOM}[name]
