"""What images cost a model. Imports no torch."""

from __future__ import annotations

from typing import Protocol


class ImageCost(Protocol):
    """How the cost of an image follows from its size; each family of models has its own rule."""

    @property
    def rule(self) -> str:
        """In words, without a full stop."""
        ...

    def tokens(self, width: int, height: int) -> int:
        """Number of image tokens of an image.

        Raises:
            ValueError: the model rejects images of this shape.
        """
        ...
