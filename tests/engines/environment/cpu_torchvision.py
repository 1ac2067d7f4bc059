"""Let torchvision's Python part import beside a torch that its compiled part was not built for.

Package registries have torchvision for CUDA. Without its compiled part, its import fails as two operators are not
declared. vLLM needs no operator of torchvision, but imports it. Python runs this file at each start.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

declared: list[Any] = []
"""Keeps the declarations, which end with the object that made them."""


class Declare:
    """Declares the operators at the first import of torchvision, unless its compiled part loads."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        spec = PathFinder.find_spec(name)
        if spec is None or spec.origin is None:
            return
        try:
            torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                library.define(operator)
            declared.append(library)


sys.meta_path.insert(0, Declare())
