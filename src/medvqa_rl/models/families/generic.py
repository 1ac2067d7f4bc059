"""Any other model that transformers maps from images and text to text, through its own processor, forward and
``generate``.

Nothing is known of its attention, caches or image features, so prompts are not shared: every completion is computed
with its prompt and its images.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

from medvqa_rl.core.types import EncodedPrompt, Sample
from medvqa_rl.models.families.family import Family
from medvqa_rl.models.families.parts import Readers, adds_special_tokens, backbone, causal_model

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
"""Outputs of processors with an entry per token of the prompt; 0 is text."""
PROCESSOR_FILE = "processor_config.json"


class Generic(Family):
    """A model without a family of its own. Its image processor is the whole processor of transformers."""

    def __init__(self, model_type: str) -> None:
        self.model_types = (model_type,)
        self.title = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type].removesuffix("ForConditionalGeneration")
        self.processor_class = PROCESSOR_MAPPING_NAMES.get(model_type, "")

    # Prompts

    def load_image_processor(self, folder: Path) -> Any:
        """The stock processor, without its video processor, which needs torchvision."""
        try:
            return stock_processor(
                self.processor_class,
                AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
                AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                    folder, local_files_only=True, trust_remote_code=False
                ),
                _read_settings(folder),
            )
        except ImportError as error:
            raise ValueError(
                f"the {self.processor_class} needs a package that is missing: {str(error).strip()} Install "
                "torchvision for your build of torch if it is named"
            ) from error

    def limit_pixels(self, image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
        if min_pixels is not None or max_pixels is not None:
            raise ValueError(
                f"model.min_pixels and model.max_pixels cannot be set for {self.title}: leave them out, and change "
                "the size in its preprocessor_config.json."
            )

    def save_image_processor(self, image_processor: Any, folder: Path) -> None:
        super().save_image_processor(image_processor.image_processor, folder)
        settings = {"processor_class": self.processor_class, **image_processor.own_settings}
        (folder / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def image_tokens(self, image_processor: Any) -> tuple[str, str]:
        return image_processor.image_token, image_processor.image_token

    def preprocess(self, image_processor: Any, images: Sequence[Image.Image]) -> dict[str, NDArray[Any]]:
        return _encode(image_processor, image_processor.image_token * len(images), images)[1]

    def encode_images(
        self, ids: NDArray[np.int64], text: str, images: Sequence[Image.Image], readers: Readers
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        return _encode(readers.image_processor, text, images)

    def expected_tokens(self, sample: Sample, readers: Readers) -> float:
        return sum((source.header_pixels() or 0) / 28**2 for source in sample.images)

    def encoding_bytes(self, sample: Sample, readers: Readers) -> int:
        """As for images that are not resized, and at least for a large resized one."""
        stored = [source.header_pixels() or 0 for source in sample.images]
        return sum(84 * max(pixels, 2**22) for pixels in stored if pixels)

    # Parts of the model

    def text(self, model: nn.Module) -> Any:
        return causal_model(model).get_decoder()

    def _text_name(self, model: nn.Module) -> str:
        text = self.text(model)
        name: str = next(name for name, module in backbone(model).named_children() if module is text)
        return name

    def _tower_name(self, model: nn.Module) -> str:
        """The vision tower, by the names that transformers has for it."""
        tower = causal_model(model).get_encoder(modality="image")
        found: list[str] = [name for name, module in backbone(model).named_children() if module is tower]
        if not found:
            raise ValueError(
                f"model.train_vision and model.train_projector need to know the vision tower, and transformers names "
                f"none in {self.title}: set both to false."
            )
        return found[0]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        text = self.text(model)
        return [module for module in backbone(model).children() if module is not text]

    def vision_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
        text = f"{self._text_name(model)}."
        tower = causal_model(model).get_encoder(modality="image")
        inside = {id(parameter) for parameter in tower.parameters()} if tower is not causal_model(model) else set()
        for name, parameter in backbone(model).named_parameters():
            if not name.startswith(text):
                yield name, parameter, id(parameter) not in inside

    def tower_modules(self, model: nn.Module) -> list[str]:
        return [self._tower_name(model)]

    def projector_modules(self, model: nn.Module) -> list[str]:
        others = {self._tower_name(model), self._text_name(model)}
        return [
            name
            for name, module in backbone(model).named_children()
            if name not in others and any(True for _ in module.parameters())
        ]

    def vision_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        modules = [module for part in self.vision_modules(model) for module in part.modules()]
        return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]

    def unusable(self, config: Any) -> str | None:
        settings = config.to_dict()
        if config.is_encoder_decoder or settings.get("text_config", {}).get("is_encoder_decoder"):
            return f"is an encoder-decoder ({self.title}), which is not supported: choose a decoder-only model."
        if not self.processor_class:
            return (
                f"is a {self.title} model, for which this version of transformers names no processor: choose another."
            )
        if not {"image_token_id", "image_token_index"} & settings.keys():
            return (
                f"is a {self.title} model, which has no placeholder for images in its prompts, so it is not supported"
                ": choose a model that reads images as tokens."
            )
        return None

    def misfit(self, model: nn.Module) -> str | None:
        """If its parts are not where transformers usually has them, or its logits do not follow from its final hidden
        states."""
        whole = causal_model(model)
        try:
            self._text_name(model)
            ids = torch.tensor([[1, 2, 3]], device=whole.device)
            with torch.no_grad():
                hidden = backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
                expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            is_equal = torch.allclose(self.logits(model, hidden), expected, rtol=1e-2, atol=1e-2)
        except (AttributeError, StopIteration, TypeError):
            is_equal = False
        if is_equal:
            return None
        return (
            f"{self.title} computes its logits in a way that is not supported: choose another model.path, or open an "
            "issue with its config.json."
        )

    # Forward

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        logits = super().logits(model, hidden)
        cap = causal_model(model).config.get_text_config().to_dict().get("final_logit_softcapping")
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def alike(self, prompts: Sequence[EncodedPrompt]) -> list[int]:
        """Split prompts in order into runs that can share a batch of :meth:`stock_inputs`; the length of each run."""

        def key(prompt: EncodedPrompt) -> list[tuple[str, tuple[int, ...]]]:
            inputs = prompt.image_inputs.items()
            return [(name, () if name in PER_TOKEN else array.shape[1:]) for name, array in inputs]

        return [len(list(run)) for _, run in groupby(prompts, key)]

    def stock_inputs(
        self, model: nn.Module, prompts: Sequence[EncodedPrompt], width: int, *, is_left: bool = False
    ) -> dict[str, Tensor]:
        """Images of rows as the model's own forward takes them.

        Args:
            prompts: the prompt of each row, from one of the runs of :meth:`alike`.
            width: tokens of a row.
            is_left: rows are padded on the left.
        """
        whole = causal_model(model)
        inputs = {}
        for name in prompts[0].image_inputs:
            arrays = [prompt.image_inputs[name] for prompt in prompts]
            if name in PER_TOKEN:
                pads = [((0, 0), (width - a.shape[1], 0) if is_left else (0, width - a.shape[1])) for a in arrays]
                arrays = [np.pad(array, pad) for array, pad in zip(arrays, pads)]
            tensor = torch.from_numpy(np.concatenate(arrays)).to(whole.device)
            inputs[name] = tensor.to(whole.dtype) if tensor.is_floating_point() else tensor
        return inputs

    def separate_hidden_states(
        self, model: nn.Module, prompts: Sequence[EncodedPrompt], input_ids: Tensor, mask: Tensor
    ) -> Tensor:
        """(R, T, hidden) final hidden states of the model's own forward.

        Args:
            prompts: the prompt of each row.
            input_ids: (R, T) prompts and completions, padded on the right.
            mask: (R, T) bool, False at padding.
        """
        outputs = []
        first = 0
        for count in self.alike(prompts):
            part = slice(first, first + count)
            first += count
            output = backbone(model)(
                input_ids=input_ids[part],
                attention_mask=mask[part].long(),
                use_cache=False,
                **self.stock_inputs(model, prompts[part], input_ids.shape[1]),
            )
            outputs.append(output.last_hidden_state)
        return torch.cat(outputs)


def as_generic(family: Family) -> Generic:
    """A family, in code that runs for models without a family of their own only."""
    assert isinstance(family, Generic), f"{family.title} has a family of its own"
    return family


def stock_processor(name: str, tokenizer: Any, image_processor: Any, settings: Mapping[str, Any]) -> Any:
    """A processor of transformers around these parts, without its video processor, which would need torchvision.

    Args:
        name: of the class.
        settings: its own arguments.
    """
    kind = getattr(transformers, name)
    unchecked = type(name, (kind,), {"check_argument_for_proper_class": lambda self, part, given: type(given)})
    video = {}
    if "video_processor" in inspect.signature(kind.__init__).parameters:
        video = {"video_processor": SimpleNamespace(model_input_names=[])}
    processor = unchecked(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        **video,
        **settings,
    )
    processor.own_settings = dict(settings)
    return processor


def _read_settings(folder: Path) -> dict[str, Any]:
    """The arguments in processor_config.json, without those of the parts."""
    path = folder / PROCESSOR_FILE
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = ("processor_class", "chat_template", "auto_map")
    return {key: value for key, value in stored.items() if key not in parts and not isinstance(value, dict)}


def _encode(
    processor: Any, text: str, images: Sequence[Image.Image]
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """(T,) token ids, and the other arguments of the model's forward."""
    adds = adds_special_tokens(processor.tokenizer, text)
    output = dict(processor(text=[text], images=[list(images)], return_tensors="np", add_special_tokens=adds))
    ids = np.asarray(output.pop("input_ids")[0], dtype=np.int64)
    output.pop("attention_mask")
    inputs = {name: np.ascontiguousarray(array) for name, array in output.items()}
    for name, array in inputs.items():
        if name not in PER_TOKEN and array.shape[:2] == (1, len(ids)):
            raise ValueError(f"its processor returns {name} for every token of the prompt, which is not supported")
        if array.dtype == np.float64:
            inputs[name] = array.astype(np.float32)
    return ids, inputs
