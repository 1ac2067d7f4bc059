"""Reinforcement-learning fine-tuning of vision-language models for medical visual question answering.

The names below are the Python interface (docs/python.md); each is imported when it is first used, so that
``import medvqa_rl`` takes no time and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from medvqa_rl.api import Run, evaluate, load_dataset, sft, train
    from medvqa_rl.config import Config
    from medvqa_rl.config.errors import MedVQAError
    from medvqa_rl.core.types import Sample
    from medvqa_rl.evaluation.evaluate import Evaluation

__all__ = [
    "Config",
    "Evaluation",
    "MedVQAError",
    "Run",
    "Sample",
    "__version__",
    "evaluate",
    "load_dataset",
    "sft",
    "train",
]

_MODULES = {
    "Config": "config",
    "Evaluation": "evaluation.evaluate",
    "MedVQAError": "config.errors",
    "Sample": "core.types",
}
"""The modules of the names that are not in ``api``."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
