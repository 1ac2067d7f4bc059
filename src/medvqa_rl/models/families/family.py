"""What the rest of the package needs to know about an architecture.

A family describes models that share a structure. Its methods are stateless: they take the model, or the image
processor of a checkpoint. The defaults serve a model that transformers builds as ``model.language_model`` beside a
vision tower, with one position per token and causal attention; a family overrides what differs.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from medvqa_rl.core.types import EncodedPrompt, Sample
from medvqa_rl.models.dimensions import ImageRule, ImageSettings
from medvqa_rl.models.families.parts import Embedded, Readers, backbone, causal_model

FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of decoder layers, as configurations in transformers name them."""


class Family(ABC):
    """An architecture."""

    title: str
    """The name in messages."""
    model_types: tuple[str, ...]
    """``model_type`` in config.json."""
    processor_class: str
    """The processor of transformers that opens a saved checkpoint."""
    image_token: ClassVar[str]
    """The token whose embeddings are replaced by image features."""
    placeholder: ClassVar[str]
    """What the chat template writes for an image."""
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
    shares_prompts: ClassVar[bool] = True
    """Prompts and images are computed once per group. Otherwise every completion is computed with its prompt, by the
    model's own forward and ``generate``, and the methods below that are about features and layers are not called."""

    has_vllm: ClassVar[bool] = True
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

    def image_tokens(self, image_processor: Any) -> tuple[str, str]:
        """The image token, and the placeholder that the chat template writes for an image."""
        return self.image_token, self.placeholder

    def image_lengths(self, prompt: EncodedPrompt, readers: Readers) -> list[int]:
        """Number of image tokens of each image of a prompt."""
        raise NotImplementedError

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
        inputs = self.preprocess(readers.image_processor, images)
        return self.expand(ids, text, inputs, readers), inputs

    def expand(
        self, ids: NDArray[np.int64], text: str, image_inputs: Mapping[str, NDArray[Any]], readers: Readers
    ) -> NDArray[np.int64]:
        """(T,) token ids as in :meth:`encode_images`, where they follow from the image inputs."""
        raise NotImplementedError

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

    def alike(self, prompts: Sequence[EncodedPrompt]) -> list[int]:
        """Split prompts in order into runs that can share a batch of :meth:`stock_inputs`; the length of each run."""
        raise NotImplementedError

    def stock_inputs(
        self, model: nn.Module, prompts: Sequence[EncodedPrompt], width: int, *, is_left: bool = False
    ) -> dict[str, Tensor]:
        """Images of rows as the model's own forward takes them, where prompts are not shared.

        Args:
            prompts: the prompt of each row, from one of the runs of :meth:`alike`.
            width: tokens of a row.
            is_left: rows are padded on the left.
        """
        raise NotImplementedError

    def separate_hidden_states(
        self, model: nn.Module, prompts: Sequence[EncodedPrompt], input_ids: Tensor, mask: Tensor
    ) -> Tensor:
        """(R, T, hidden) final hidden states of the model's own forward, where prompts are not shared.

        Args:
            prompts: the prompt of each row.
            input_ids: (R, T) prompts and completions, padded on the right.
            mask: (R, T) bool, False at padding.
        """
        raise NotImplementedError

    def image_features(
        self, model: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device | str
    ) -> list[Tensor | None]:
        """Encode the images of all prompts in one pass of the vision tower.

        Runs under ``no_grad`` if tower and projector are frozen: LoRA with gradient checkpointing makes even frozen
        features require gradients, and the backward pass would go through the tower for nothing.

        Returns:
            Per prompt (image tokens, width) in the order of its placeholders, or None for a prompt without images.
        """
        with_images = [prompt for prompt in prompts if prompt.image_inputs]
        if not with_images:
            return [None] * len(prompts)
        inputs = {
            name: torch.from_numpy(np.concatenate([prompt.image_inputs[name] for prompt in with_images])).to(device)
            for name in with_images[0].image_inputs
        }
        with torch.no_grad() if self.vision_is_frozen(model) else nullcontext():
            features = iter(self.encode(model, inputs))
        return [
            torch.cat([next(features) for _ in range(self.num_units(prompt))]) if prompt.image_inputs else None
            for prompt in prompts
        ]

    def num_units(self, prompt: EncodedPrompt) -> int:
        """Number of images, or of tiles, of a prompt with images that :meth:`encode` returns features of."""
        return len(prompt.image_inputs["pixel_values"])

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """(image tokens, width) features of each image or tile.

        Args:
            inputs: the image inputs of all prompts, concatenated.
        """
        raise NotImplementedError

    def blank_features(self, model: nn.Module, device: torch.device | str) -> Tensor:
        """(image tokens, width) features of a blank image of the smallest size, computed by the vision tower."""
        raise NotImplementedError

    def embed(self, model: nn.Module, input_ids: Tensor, mask: Tensor, features: Sequence[Tensor | None]) -> Embedded:
        """Embed padded prompts, with image features at their placeholders.

        Args:
            model: the model.
            input_ids: (R, T) token ids; may continue beyond the prompts with sampled tokens.
            mask: (R, T) bool, True at tokens of prompts. Image tokens are placeholders only there, so sampled tokens
                cannot shift the features.
            features: per prompt in row order (image tokens, width) or None, from :meth:`image_features`.
        """
        embeds: Tensor = self.text(model).embed_tokens(input_ids)
        present = [feature for feature in features if feature is not None]
        if not present:
            return Embedded(embeds, {})
        placeholders = (input_ids == backbone(model).config.image_token_id) & mask
        return self.insert(embeds, placeholders, torch.cat(present).to(embeds.dtype))

    def insert(self, embeds: Tensor, placeholders: Tensor, features: Tensor) -> Embedded:
        """Replace the embeddings at the (R, T) placeholders by (image tokens, width) features."""
        return Embedded(embeds.masked_scatter(placeholders.unsqueeze(-1), features), {})

    def hidden_states(self, model: nn.Module, embedded: Embedded, position_ids: Tensor, **arguments: Any) -> Tensor:
        """(R, T, hidden) final hidden states of the language model.

        Args:
            position_ids: (axes, R, T).
            arguments: of the language model, such as the attention mask.
        """
        hidden: Tensor = self.text(model)(
            inputs_embeds=embedded.embeds,
            position_ids=position_ids if self.num_axes > 1 else position_ids[0],
            **embedded.arguments,
            **arguments,
        ).last_hidden_state
        return hidden

    # Costs

    @abstractmethod
    def image_rule(
        self, settings: ImageSettings, config: Mapping[str, Any], min_pixels: int | None, max_pixels: int | None
    ) -> ImageRule:
        """What images cost.

        Args:
            settings: of the checkpoint; empty for the published defaults.
            config: the content of its config.json; empty for the published defaults.
            min_pixels: ``model.min_pixels``.
            max_pixels: ``model.max_pixels``.
        """

    @abstractmethod
    def patches_per_token(self, config: Any) -> int:
        """Patches of the vision tower per image token.

        Args:
            config: the model's transformers configuration.
        """

    def attention_windows(self, config: Any) -> dict[str, Any]:
        """``window`` and ``global_layers`` of :class:`Architecture`, if the vision tower attends in windows.

        Args:
            config: the model's transformers configuration.
        """
        return {}

    # vLLM

    def vllm_images(self, prompt: EncodedPrompt, features: Tensor) -> dict[str, Tensor]:
        """The images of a prompt as vLLM takes features instead of pixels.

        Args:
            features: (image tokens, width) of all its images.
        """
        return {"image_embeds": features}

    def vllm_processor_arguments(self, image_processor: Any) -> dict[str, Any]:
        """Arguments (``mm_processor_kwargs``) that make vLLM resize images as training does."""
        return {}

    # Layers

    def layer_types(self, model: nn.Module) -> list[str]:
        """The type of each decoder layer, :data:`FULL` or :data:`SLIDING`."""
        return [FULL] * len(self.text(model).layers)

    def window(self, model: nn.Module) -> int | None:
        """Number of tokens that a token attends to in layers with a sliding window, itself included; None if there are
        no such layers. Only for families with one position per token, because windows are measured in positions."""
        return None

    def rotary(
        self, model: nn.Module, count: int, device: torch.device | str, layer_type: str
    ) -> tuple[Tensor, Tensor]:
        """(count, D) cosines and sines of the text positions 0, 1 ... in layers of a type, from the model's own rotary
        embedding."""
        text = self.text(model)
        positions = torch.arange(count, device=device)[None]
        if self.num_axes > 1:
            positions = positions.expand(self.num_axes, 1, -1)
        cosines, sines = text.rotary_emb(text.embed_tokens.weight[:1], positions)
        return cosines[0], sines[0]

    def layer(self, layer: Any, hidden: Tensor, attention: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """A decoder layer, (n, hidden) -> (n, hidden), with the attention between its projections replaced.

        Args:
            attention: takes the layer's ``self_attn`` and its normed input.
        """
        hidden = hidden + attention(layer.self_attn, layer.input_layernorm(hidden))
        output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return output

    def queries_and_keys(self, attention: Any, hidden: Tensor) -> Tensor:
        """(n, heads + key-value heads, D) queries and keys of new tokens, before rotation.

        Args:
            attention: a layer's ``self_attn``.
            hidden: (n, hidden) its input.
        """
        states = torch.cat((attention.q_proj(hidden), attention.k_proj(hidden)), dim=-1)
        return states.view(len(hidden), -1, attention.head_dim)
