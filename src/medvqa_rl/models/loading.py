"""Load policies as the settings describe.

A policy is a plain Hugging Face model, or a PEFT model around it, with the untrained parts frozen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from pydantic import BaseModel, TypeAdapter
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import checkpoint_path, refuse_missing_folder, snapshot
from medvqa_rl.core.files import read_json
from medvqa_rl.core.progress import waiting
from medvqa_rl.core.text import printable
from medvqa_rl.models.dimensions import uses_bfloat16
from medvqa_rl.models.families import family_for, family_of, supported
from medvqa_rl.models.families.family import Family
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.prefix.group_attention import use_group_attention
from medvqa_rl.models.processor import Processor, trained_wording
from medvqa_rl.models.quantized import loading_arguments, refuse_stored, use_unpacked
from medvqa_rl.models.untrusted import FILE_ERRORS, check_size

ADAPTER_FILE = "adapter_model.safetensors"
_TEXTS = ("*.json", "*.txt", "*.jinja")
_HUB_FILES = (*_TEXTS, "*.safetensors")


@dataclass
class Policy:
    """The trained model with its processor."""

    model: nn.Module
    """The ``...ForConditionalGeneration`` of a family, or a ``PeftModel`` around one."""
    processor: Processor
    device: torch.device
    config: ModelConfig

    @property
    def family(self) -> Family:
        """The model's architecture."""
        return self.processor.family

    @property
    def vision_is_frozen(self) -> bool:
        """True if neither the vision tower nor the projector is trained, so that image features can be cached."""
        return self.family.vision_is_frozen(self.model)

    @property
    def is_lora(self) -> bool:
        """True if LoRA adapters are trained instead of the language model's weights."""
        return isinstance(self.model, PeftModel)


def load_policy(config: ModelConfig) -> Policy:
    """Load the configured model, add LoRA if configured, and freeze what is not trained.

    Raises:
        ValueError: the folder, Hub repository or adapter is missing, has another architecture, or its weights do not
            fit the model.
    """
    device = resolve_device(config.device)
    with waiting(f"loading {config.path}"):
        folder = resolve_folder(config.path, config.revision)
        settings, family = _read_architecture(folder)
        if family.is_bidirectional and config.attention == "flash_attention_2":
            raise ValueError(
                "model.attention is flash_attention_2, which cannot let the tokens of an image attend to each other "
                f"as {family.title} does: set it to sdpa."
            )
        processor = _processor(folder, family, config)  # before the weights: a wrong chat template is found at once
        model = _load_weights(folder, settings, family, config, device)
        return make_policy(model, processor, config, device)


def load_processor(config: ModelConfig) -> Processor:
    """Load the processor of the configured model, without weights and without downloading any.

    Raises:
        ValueError: as :func:`load_policy`.
    """
    with waiting(f"loading the tokenizer of {config.path}"):
        folder = resolve_folder(config.path, config.revision, files=_TEXTS)
        return _processor(folder, _read_architecture(folder)[1], config)


def _processor(folder: Path, family: Family, config: ModelConfig) -> Processor:
    processor = Processor.from_folder(
        folder, family, adapter=config.adapter, min_pixels=config.min_pixels, max_pixels=config.max_pixels
    )
    processor.use(trained_wording(config.adapter, folder))
    return processor


def make_policy(
    model: nn.Module, processor: Processor, config: ModelConfig, device: torch.device | str = "cpu"
) -> Policy:
    """Turn a model in memory into a policy: LoRA, freezing, gradient checkpointing and device."""
    device = torch.device(device)
    model.requires_grad_(False)
    family = family_of(model)
    misfit = family.misfit(model)
    if misfit is not None:
        raise ValueError(misfit)
    if isinstance(family, SharedFamily):
        use_group_attention(family.text(model))
    if config.lora is not None or config.adapter is not None:
        model = _add_adapter(model, config)
    elif not config.load_in_4bit:  # 4-bit weights are for inference only
        family.text(model).requires_grad_(True)
        causal_model(model).lm_head.requires_grad_(True)
        for _, parameter, is_projector in family.vision_parameters(model):
            parameter.requires_grad_(config.train_projector if is_projector else config.train_vision)
    if config.gradient_checkpointing:
        _checkpoint_layers(family.text(model))
        for module in family.vision_modules(model) if config.train_vision else ():
            _checkpoint_layers(module)
    return Policy(model.to(device), processor, device, config)


def resolve_device(device: str) -> torch.device:
    """The device for ``model.device``; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: it is cuda and there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "model.device is cuda, but this torch sees no CUDA device: set model.device to cpu or auto, or install "
            "a CUDA build of torch and check nvidia-smi."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def resolve_folder(path: str, revision: str | None = None, *, files: Sequence[str] = _HUB_FILES) -> Path:
    """The local folder of a checkpoint: an embedded ``phantom:NAME``, a folder, or a snapshot of a Hub repository.

    Hub files come from the local cache if the Hub cannot be reached.

    Raises:
        ValueError: there is no such folder or repository, or it is neither cached nor reachable.
    """
    if path.startswith("phantom:"):
        return checkpoint_path(path.removeprefix("phantom:"))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    refuse_missing_folder(path)
    try:
        return snapshot(path, files, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"model.path is {path!r}{at}, which is not a folder here, and downloading it from the Hugging Face Hub "
            f"failed ({type(error).__name__}: {printable(str(error))}): check the spelling and the connection, log in "
            "if the repository requires it, or download it elsewhere and give its folder."
        ) from error


def _read_architecture(folder: Path) -> tuple[Any, Family]:
    """Read a checkpoint's config.json and find its family; refuse what cannot be used."""
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ValueError(
                f"{folder} holds a LoRA adapter, not a whole model: set model.adapter to it and model.path to the "
                "model it was trained on."
            )
        raise ValueError(f"{folder} has no config.json, so it is not a model's checkpoint: give the folder of one.")
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FILE_ERRORS as error:
        if b'"auto_map"' in (folder / "config.json").read_bytes():
            raise ValueError(
                f"The checkpoint in {folder} brings its own code, which is never run: choose one of the same model "
                "for transformers (the names of these often end in -hf)."
            ) from error
        raise ValueError(
            f"{folder / 'config.json'} cannot be read as a model's configuration: {printable(str(error), 400)}"
        ) from error
    family = family_for(settings.model_type)
    if family is None:
        is_text = settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        raise ValueError(
            f"The checkpoint in {folder} is a {settings.model_type} model"
            f"{', a language model that sees no images' if is_text else ''}, but only "
            f"{supported()} and, more slowly, other vision-language models of transformers are supported: choose one "
            "of these for model.path."
        )
    reason = family.unusable(settings)
    if reason is not None:
        raise ValueError(f"The checkpoint in {folder} {reason}")
    refuse_stored(folder, settings)
    return settings, family


def _load_weights(folder: Path, settings: Any, family: Family, config: ModelConfig, device: torch.device) -> Any:
    """Load a checkpoint's weights; refuse those that do not fit exactly.

    Args:
        settings: from :func:`_read_architecture`.
    """
    dtype = torch.bfloat16 if uses_bfloat16(config.dtype, device.type) else torch.float32
    if config.load_in_4bit and not isinstance(family, SharedFamily):
        raise ValueError(
            f"model.load_in_4bit is true, but {family.title} is not loaded in 4 bits: set it to false, or choose "
            f"{supported()}."
        )
    quantized = loading_arguments(folder, settings, family, dtype, device) if config.load_in_4bit else {}
    try:
        check_size(folder, AutoModelForImageTextToText)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            **quantized,
            attn_implementation=config.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # list them all below instead of raising for the first
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except FILE_ERRORS as error:
        raise ValueError(f"The weights in {folder} cannot be loaded: {printable(str(error), 400)}") from error
    model, info = loaded
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(item[0]) for item in info["mismatched_keys"]),
    }
    _refuse(wrong, f"The weights in {folder} do not fit its config.json", "take both from the same checkpoint")
    if config.load_in_4bit:
        use_unpacked(model)
    return model


def _refuse(wrong: dict[str, list[str]], what: str, remedy: str) -> None:
    """Raise a ValueError that counts the wrong weights and names the first of each kind, if there are any."""
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        for kind, names in wrong.items()
        if names
    ]
    if parts:
        raise ValueError(f"{what}: {'; '.join(parts)}. Please {remedy}.")


def _checkpoint_layers(module: nn.Module) -> None:
    """Recompute layers in the backward pass instead of storing their activations.

    Set per layer, because the model-wide switch also makes all input embeddings require gradients, even those of a
    frozen vision tower, which non-reentrant checkpointing does not need.
    """
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]


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


def _add_adapter(model: nn.Module, config: ModelConfig) -> PeftModel:
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
    _refuse(wrong, f"The adapter in {folder} does not fit the model", "set model.path to the model it was trained on")
