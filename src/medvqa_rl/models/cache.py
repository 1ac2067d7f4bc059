"""Passing a KV cache to a model of any supported transformers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument with which a model's forward takes a cache.

    transformers renamed ``past_key_values`` to ``cache``; the supported range has both, and the old name warns.
    """
    takes_cache = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if takes_cache else "past_key_values": cache}
