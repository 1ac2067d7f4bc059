"""Load policies as the settings describe.

A policy is a plain Hugging Face model, or a PEFT model around it, with the untrained parts frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import checkpoint_path, refuse_missing_folder, snapshot
from medvqa_rl.core.progress import waiting
from medvqa_rl.core.text import printable
from medvqa_rl.models.adapters import add_adapter, refuse_misfits
from medvqa_rl.models.dimensions import uses_bfloat16
from medvqa_rl.models.families import family_for, family_of, supported
from medvqa_rl.models.families.family import Family
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.prefix.group_attention import use_group_attention
from medvqa_rl.models.processor import Processor, trained_wording
from medvqa_rl.models.quantized import loading_arguments, refuse_stored, use_unpacked
from medvqa_rl.models.untrusted import FILE_ERRORS, check_size

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
        if config.average_with is not None:
            _average(model, config, device)
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
        model = add_adapter(model, config)
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
    refuse_misfits(wrong, f"The weights in {folder} do not fit its config.json", "take both from the same checkpoint")
    if config.load_in_4bit:
        use_unpacked(model)
    return model


def _average(model: nn.Module, config: ModelConfig, device: torch.device) -> None:
    """Average the weights with those of ``model.average_with``, in float32: w * own + (1 - w) * other.

    The average of a fine-tuned model and the one that it was fine-tuned from often keeps most of what was gained and
    forgets less (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    Raises:
        ValueError: the other model cannot be loaded, or has other weights.
    """
    assert config.average_with is not None
    if config.adapter is not None:
        raise ValueError(
            f"model.average_with averages whole models, but {config.adapter} is a LoRA adapter: merge it first "
            "(medvqa-rl export --merge), and set model.path to the merged folder."
        )
    try:
        folder = resolve_folder(config.average_with)
        settings, family = _read_architecture(folder)
        others = dict(_load_weights(folder, settings, family, config, device).named_parameters())
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "model.average_with")) from error
    own = dict(model.named_parameters())
    misfits = {
        "missing": sorted(own.keys() - others.keys()),
        "unexpected": sorted(others.keys() - own.keys()),
        "of another shape": sorted(
            name for name in own.keys() & others.keys() if own[name].shape != others[name].shape
        ),
    }
    refuse_misfits(
        misfits,
        f"The weights of {config.average_with} (model.average_with) do not fit those of {config.path}",
        "average a model with the one that it was trained from",
    )
    with torch.no_grad():
        for name, parameter in own.items():
            mean = torch.lerp(others[name].float(), parameter.float(), config.average_weight)
            parameter.copy_(mean)


def _checkpoint_layers(module: nn.Module) -> None:
    """Recompute layers in the backward pass instead of storing their activations.

    Set per layer, because the model-wide switch also makes all input embeddings require gradients, even those of a
    frozen vision tower, which non-reentrant checkpointing does not need.
    """
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
