"""What the fast path needs to know about an architecture: its image features, layers and rotary embeddings.

The defaults serve a model without a sliding window, DeepStack features or norms of its own; a family overrides what
differs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from medvqa_rl.core.types import EncodedPrompt
from medvqa_rl.models.dimensions import ImageRule, ImageSettings
from medvqa_rl.models.families.family import Family
from medvqa_rl.models.families.parts import Embedded, Readers, backbone

FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of decoder layers, as configurations in transformers name them."""


class SharedFamily(Family):
    """An architecture whose prompts and images are computed once per group."""

    image_token: ClassVar[str]
    """The token whose embeddings are replaced by image features."""
    placeholder: ClassVar[str]
    """What the chat template writes for an image."""
    has_vllm = True

    # Prompts

    def image_tokens(self, image_processor: Any) -> tuple[str, str]:
        return self.image_token, self.placeholder

    @abstractmethod
    def image_lengths(self, prompt: EncodedPrompt, readers: Readers) -> list[int]:
        """Number of image tokens of each image of a prompt."""

    # Forward

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

    @abstractmethod
    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """(image tokens, width) features of each image or tile.

        Args:
            inputs: the image inputs of all prompts, concatenated.
        """

    @abstractmethod
    def blank_features(self, model: nn.Module, device: torch.device | str) -> Tensor:
        """(image tokens, width) features of a blank image of the smallest size, computed by the vision tower."""

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


def as_shared(family: Family) -> SharedFamily:
    """A family, in code that runs for shared prompts only."""
    assert isinstance(family, SharedFamily), f"{family.title} does not share prompts"
    return family
