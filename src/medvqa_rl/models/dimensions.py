"""The numbers of a model that determine its cost, and their dtype. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol

from pydantic import BaseModel, Field

Grid = tuple[int, int]
"""Patches of an image, (rows, columns)."""


class Parameters(NamedTuple):
    """Number of parameters of each part."""

    layers: int
    """Decoder layers and the final norm."""
    embedding: int
    head: int
    """The output layer; 0 if it shares the embedding's weights."""
    tower: int
    """Patch embedding and vision layers."""
    projector: int
    """Between vision tower and language model."""

    @property
    def language(self) -> int:
        """The language model, which full fine-tuning trains."""
        return self.layers + self.embedding + self.head

    @property
    def vision(self) -> int:
        """Tower and projector."""
        return self.tower + self.projector


@dataclass(frozen=True)
class Architecture:
    """The dimensions of a model."""

    parameters: Parameters
    vocabulary: int
    """V, rows of the embedding, including padding rows."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    linears: Mapping[str, tuple[int, int]]
    """(input, output) features of each linear layer of a decoder layer."""
    patch_values: int
    """Numbers per patch, as returned by the image processor."""
    patches_per_token: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_is_gated: bool
    """The MLP has a gate."""
    tower_weights: int
    """Weights of the linear layers of all vision layers, each used once per patch."""
    projector_weights: int
    """Weights of the projector's linear layers, each used once per image token."""
    largest_projector_weight: int
    """Elements of the projector's largest tensor."""
    window: int = 0
    """Side of an attention window of the tower in patches; 0 for full attention within each image."""
    global_layers: tuple[int, ...] = ()
    """Vision layers with full attention when the others use windows."""

    @property
    def is_tied(self) -> bool:
        """The output layer shares the weights of the embedding."""
        return not self.parameters.head

    @property
    def kv_hidden(self) -> int:
        """Width of the keys (and of the values) of one layer."""
        return self.head_size * self.kv_heads

    @property
    def query_hidden(self) -> int:
        """Width of the queries of one layer."""
        return self.head_size * self.heads


class ImageSize(NamedTuple):
    """What an image of some size costs."""

    grids: tuple[Grid, ...]
    """Patches of the image, or of each of its tiles."""
    tokens: int
    """In the language model."""


Positive = Annotated[int, Field(ge=1)]


class SizeLimits(BaseModel):
    """``size`` of a preprocessor_config.json."""

    shortest_edge: Positive | None = None
    longest_edge: Positive | None = None
    height: Positive | None = None


class ImageSettings(BaseModel):
    """What is read of a preprocessor_config.json; None where it says nothing."""

    size: SizeLimits = SizeLimits()
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    patch_size: Positive | None = None
    merge_size: Positive | None = None
    min_patches: Positive | None = None
    max_patches: Positive | None = None


class ImageRule(Protocol):
    """How the cost of an image follows from its size; each family has its own."""

    @property
    def rule(self) -> str:
        """In words, without a full stop."""
        ...

    def size(self, width: int, height: int) -> ImageSize:
        """The cost of an image.

        Raises:
            ValueError: the model rejects images of this shape.
        """
        ...

    def tokens(self, width: int, height: int) -> int:
        """Number of image tokens; see :meth:`size`."""
        ...


@dataclass(frozen=True)
class ResizedImages:
    """Images that keep their aspect ratio and cost by their size, within limits."""

    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    patch_size: int = 14
    merge_size: int = 2

    @property
    def rule(self) -> str:
        side = self.patch_size * self.merge_size
        return (
            f"Images are resized to {self.min_pixels:,} to {self.max_pixels:,} pixels; each {side} x {side} pixels "
            "are one token"
        )

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels after resizing: multiples of patch_size * merge_size, with an area between
        min_pixels and max_pixels and nearly the same aspect ratio. Same arithmetic as ``smart_resize`` in
        transformers.

        Raises:
            ValueError: one side is more than 200 times the other, which the processor rejects.
        """
        if max(width, height) > 200 * min(width, height):
            raise ValueError(
                f"One side of the {width} x {height} image is more than 200 times the other, which the model rejects: "
                "crop the image."
            )
        unit = self.patch_size * self.merge_size
        rounded = (round(width / unit) * unit, round(height / unit) * unit)
        if rounded[0] * rounded[1] > self.max_pixels:
            scale = math.sqrt(width * height / self.max_pixels)
            return (
                max(unit, math.floor(width / scale / unit) * unit),
                max(unit, math.floor(height / scale / unit) * unit),
            )
        if rounded[0] * rounded[1] < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (width * height))
            return math.ceil(width * scale / unit) * unit, math.ceil(height * scale / unit) * unit
        return rounded

    def size(self, width: int, height: int) -> ImageSize:
        """The cost of an image: one token per square of patch_size * merge_size pixels.

        Raises:
            ValueError: as :meth:`resized`.
        """
        across, down = (side // self.patch_size for side in self.resized(width, height))
        return ImageSize(((down, across),), down * across // self.merge_size**2)

    def tokens(self, width: int, height: int) -> int:
        """Number of image tokens; see :meth:`size`."""
        return self.size(width, height).tokens


@dataclass(frozen=True)
class FixedImages:
    """Images that are all resized to one square, whatever their aspect ratio."""

    side: int
    patch_size: int
    image_tokens: int

    @property
    def rule(self) -> str:
        return f"Every image is resized to {self.side} x {self.side} pixels and takes {self.image_tokens} tokens"

    def size(self, width: int, height: int) -> ImageSize:
        """The cost of an image."""
        patches = self.side // self.patch_size
        return ImageSize(((patches, patches),), self.image_tokens)

    def tokens(self, width: int, height: int) -> int:
        """Number of image tokens."""
        return self.image_tokens


def uses_bfloat16(dtype: str, device_type: str) -> bool:
    """True for bfloat16, False for float32: ``auto`` is bfloat16 on a GPU and float32 on a CPU.

    Args:
        dtype: auto, float32 or bfloat16.
        device_type: cpu or cuda.
    """
    return dtype == "bfloat16" or (dtype == "auto" and device_type == "cuda")
