"""LoRA adapters: new ones, and trained ones that are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from pydantic import BaseModel, TypeAdapter
from safetensors.torch import load_file
from torch import nn

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.files import read_json
from medvqa_rl.core.text import printable
from medvqa_rl.models.families import family_of
from medvqa_rl.models.untrusted import FILE_ERRORS

ADAPTER_FILE = "adapter_model.safetensors"


def _trained_alongside(model: nn.Module, config: ModelConfig) -> list[str]:
    """Modules outside the language model that are fully trained and saved with the adapter."""
    family = family_of(model)
    names = family.projector_modules(model) if config.train_projector else []
    return names + (family.tower_modules(model) if config.train_vision else [])


def _new_adapter(model: nn.Module, config: ModelConfig) -> PeftLoraConfig:
    """LoRA on linear layers of the language model only; the pattern excludes the tower's layers of the same name."""
    assert config.lora is not None
    text = family_of(model).text(model)
    linear = {name.rsplit(".", 1)[-1] for name, module in text.named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(config.lora.targets) - linear)
    if unknown or not config.lora.targets:
        raise ValueError(
            f"model.lora.targets names {', '.join(unknown) or 'nothing'}, but the linear layers of this language "
            f"model are {', '.join(sorted(linear))}: choose among these."
        )
    targets = "|".join(re.escape(name) for name in config.lora.targets)
    place = next(name for name, module in model.named_modules() if module is text).rpartition(".")[2]
    return PeftLoraConfig(
        r=config.lora.rank,
        lora_alpha=cast(int, config.lora.alpha),
        lora_dropout=config.lora.dropout,
        target_modules=rf".*{place}\..*\.({targets})",
        modules_to_save=_trained_alongside(model, config) or None,
        task_type="CAUSAL_LM",
    )


def add_adapter(model: nn.Module, config: ModelConfig) -> PeftModel:
    """Wrap the model with a new adapter, or with the configured trained one."""
    if config.adapter is None:
        return _wrap(model, _new_adapter(model, config), config)
    folder = Path(config.adapter).expanduser()
    settings = read_adapter(folder)
    if config.lora is not None and (settings.r, settings.lora_alpha) != (config.lora.rank, config.lora.alpha):
        raise ValueError(
            f"model.lora asks for rank {config.lora.rank} and alpha {config.lora.alpha:g}, but the adapter in "
            f"{folder} has rank {settings.r} and alpha {settings.lora_alpha:g}: leave model.lora out to "
            "continue with the adapter."
        )
    expected, saved = set(_trained_alongside(model, config)), set(settings.modules_to_save or ())
    if not expected <= saved:
        raise ValueError(
            f"The adapter in {folder} was trained without {', '.join(sorted(expected - saved))}, so "
            "model.train_vision and model.train_projector cannot be switched on for it: switch them off or "
            "start a new adapter."
        )
    try:
        wrapped = _wrap(model, settings, config)
    except FILE_ERRORS as error:
        why = printable(str(error), 400)
        raise ValueError(f"The adapter in {folder} does not fit the model {config.path!r}: {why}") from error
    fill_adapter(wrapped, folder)
    return wrapped


def _wrap(model: nn.Module, settings: PeftLoraConfig, config: ModelConfig) -> PeftModel:
    """Add the adapter to the model; its saved settings name the base model by ``model.path``, not by its folder."""
    settings.base_model_name_or_path = None
    wrapped = get_peft_model(cast(Any, model), settings)
    settings.base_model_name_or_path, settings.revision = config.path, config.revision
    return cast(PeftModel, wrapped)


class _AdapterFile(BaseModel):
    """Settings in adapter_config.json that are used before PEFT checks them; it has more."""

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    modules_to_save: list[str] | None = None


_ADAPTER = TypeAdapter(_AdapterFile)


def read_adapter(folder: Path) -> PeftLoraConfig:
    """Read the settings of a saved LoRA adapter.

    Raises:
        ValueError: they are missing, damaged, or those of another kind of adapter.
    """
    if not (folder / "adapter_config.json").exists() or not (folder / ADAPTER_FILE).exists():
        raise ValueError(
            f"model.adapter is {str(folder)!r}, but that folder does not hold adapter_config.json and {ADAPTER_FILE}: "
            "give the folder of a checkpoint that was trained with model.lora."
        )
    read_json(_ADAPTER, folder / "adapter_config.json", "copy the adapter again, or give another")
    try:
        settings = PeftLoraConfig.from_pretrained(str(folder))
    except FILE_ERRORS as error:
        why = printable(str(error), 400)
        raise ValueError(f"{folder / 'adapter_config.json'} cannot be read: {why}") from error
    if not isinstance(settings, PeftLoraConfig):
        raise ValueError(f"The adapter in {folder} is of type {settings.peft_type}, but only LoRA is supported.")
    settings.inference_mode = False
    return settings


def fill_adapter(model: PeftModel, folder: Path, name: str = "default") -> None:
    """Load an adapter's weights into the named adapter of the model.

    Raises:
        ValueError: the weights do not fit exactly.
    """
    try:
        result: Any = set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILE), adapter_name=name)
    except FILE_ERRORS as error:
        raise ValueError(
            f"The adapter in {folder} does not fit the model: {printable(str(error), 400)} It was trained on another "
            "model: set model.path to the one in its adapter_config.json."
        ) from error
    own = (".lora_A.", ".lora_B.", "modules_to_save.")
    missing = sorted(key for key in result.missing_keys if any(part in key for part in own) and name in key.split("."))
    wrong = {"missing": missing, "unexpected": sorted(result.unexpected_keys)}
    remedy = "set model.path to the model it was trained on"
    refuse_misfits(wrong, f"The adapter in {folder} does not fit the model", remedy)


def refuse_misfits(wrong: dict[str, list[str]], what: str, remedy: str) -> None:
    """Raise a ValueError that counts the wrong weights and names the first of each kind, if there are any."""
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        for kind, names in wrong.items()
        if names
    ]
    if parts:
        raise ValueError(f"{what}: {'; '.join(parts)}. Please {remedy}.")
