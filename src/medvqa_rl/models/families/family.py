"""What the rest of the package needs to know about an architecture.

A family describes models that share a structure. Its methods are stateless: they take the model, or the image
processor of a checkpoint. :class:`SharedFamily` adds what the fast path needs; :class:`Generic` is for all other
models. The defaults serve a model that transformers builds as ``model.language_model`` beside a vision tower, with one
position per token and causal attention; a family overrides what differs.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from medvqa_rl.core.types import EncodedPrompt, Sample
from medvqa_rl.models.families.parts import Readers, backbone, causal_model


class Family(ABC):
    """An architecture."""

    title: str
    """The name in messages."""
    model_types: tuple[str, ...]
    """``model_type`` in config.json."""
    processor_class: str
    """The processor of transformers that opens a saved checkpoint."""
    end_of_turn: ClassVar[str | None] = None
    """The token that ends an answer, if it is not the tokenizer's end-of-sequence token."""
    vision: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    """Modules of :func:`backbone` that turn pixels into features."""
    projector: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)
    """Those of them, or modules inside, between the vision tower and the language model."""
    is_bidirectional: ClassVar[bool] = False
    """Tokens of an image attend to each other in both directions, which flash attention cannot mask."""
    pixels_per_token: ClassVar[int | None] = None
    """Of a resized image; None if ``model.min_pixels`` and ``model.max_pixels`` do not apply."""
    num_axes: ClassVar[int] = 1
    """Positions of a token: 1, or 3 for time, height and width (M-RoPE)."""
    has_vllm: ClassVar[bool] = False
    """vLLM takes the features of its images in place of pixels."""

    # Prompts

    @abstractmethod
    def load_image_processor(self, folder: Path) -> Any:
        """Load the Pillow image processor of a checkpoint folder; opens no connection."""

    @abstractmethod
    def limit_pixels(self, image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
        """Set the limits of ``model.min_pixels`` and ``model.max_pixels``; None keeps the checkpoint's own.

        Raises:
            ValueError: they contradict each other, or this family has no such limits.
        """

    def save_image_processor(self, image_processor: Any, folder: Path) -> None:
        """Save the image settings so that the stock processor opens the folder."""
        image_processor.save_pretrained(folder)
        # Without the class name AutoProcessor silently returns only a tokenizer for a folder with no config.json.
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"processor_class": self.processor_class}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @abstractmethod
    def preprocess(self, image_processor: Any, images: Sequence[Image.Image]) -> dict[str, NDArray[Any]]:
        """Preprocess the images of a prompt, at least one: arguments of the model's forward by name."""

    @abstractmethod
    def image_tokens(self, image_processor: Any) -> tuple[str, str]:
        """The image token, and the placeholder that the chat template writes for an image."""

    @abstractmethod
    def encode_images(
        self, ids: NDArray[np.int64], text: str, images: Sequence[Image.Image], readers: Readers
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        """(T,) token ids of a prompt with images, its placeholders expanded to the images' tokens, and the images as
        arguments of the model's forward by name.

        Args:
            ids: the tokens of the text, a single placeholder per image.
            text: the rendered prompt.
            images: of the prompt, at least one.
            readers: of the checkpoint.
        """

    @abstractmethod
    def expected_tokens(self, sample: Sample, readers: Readers) -> float:
        """Estimated number of image tokens of a sample, from the headers of its images."""

    @abstractmethod
    def encoding_bytes(self, sample: Sample, readers: Readers) -> int:
        """Upper bound of the memory for preprocessing a sample's images, from their headers. Images without a size in
        their header (DICOM, NIfTI, drawn ones) count as 0."""

    def positions(self, prompt: EncodedPrompt, readers: Readers) -> NDArray[np.int64]:
        """(axes, T) positions of a prompt's tokens. Completions continue at the maximum + 1, equal in all axes."""
        return np.arange(len(prompt.input_ids), dtype=np.int64)[None]

    def blocks(self, prompt: EncodedPrompt, readers: Readers) -> NDArray[np.int64] | None:
        """(T,) number of the block of a prompt's token, within which all tokens attend to each other, -1 at tokens
        that attend causally; None if all do."""
        return None

    # Parts of the model

    def text(self, model: nn.Module) -> Any:
        """The language model; it has ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``."""
        return backbone(model).language_model

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules named in :attr:`vision`."""
        return [backbone(model).get_submodule(name) for name in self.vision]

    def vision_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Name, parameter, and whether it belongs to the projector, of all parameters of :attr:`vision`."""
        for part in self.vision:
            for name, parameter in backbone(model).get_submodule(part).named_parameters(prefix=part):
                yield name, parameter, name.startswith(tuple(f"{prefix}." for prefix in self.projector))

    def tower_modules(self, model: nn.Module) -> list[str]:
        """Modules of the vision tower, named from :func:`backbone`, that PEFT trains and saves beside an adapter."""
        return [name for name in self.vision if name not in self.projector]

    def projector_modules(self, model: nn.Module) -> list[str]:
        """Modules of the projector, named from :func:`backbone`, that PEFT trains and saves beside an adapter."""
        return [*self.projector]

    def vision_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers of the vision tower."""
        layers: Sequence[nn.Module] = self.vision_modules(model)[0].encoder.layers  # type: ignore[union-attr, assignment]
        return layers

    def vision_is_frozen(self, model: nn.Module) -> bool:
        """True if neither the vision tower nor the projector is trained, so that image features can be cached."""
        return not any(parameter.requires_grad for _, parameter, _ in self.vision_parameters(model))

    def unusable(self, config: Any) -> str | None:
        """Why a checkpoint with this transformers configuration cannot be used, continuing "The checkpoint in FOLDER";
        None if it can."""
        return None

    def misfit(self, model: nn.Module) -> str | None:
        """Why a loaded model cannot be used; None if it can."""
        return None

    # Forward

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """(..., V) logits of final hidden states."""
        logits: Tensor = causal_model(model).lm_head(hidden)
        return logits
