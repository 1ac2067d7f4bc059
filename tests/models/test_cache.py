"""Caches are passed under the name that a model's forward has for them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from medvqa_rl.models.cache import cache_argument


class Old(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
        return past_key_values


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> Any:
        return cache


@pytest.mark.parametrize("model", [Old(), New()])
def test_either_name_is_found(model: nn.Module) -> None:
    assert model(None, **cache_argument(model, "cache")) == "cache"
