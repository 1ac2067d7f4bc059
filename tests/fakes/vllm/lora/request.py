"""The stand-in's ``vllm.lora.request``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm import RELEASED


class LoRARequest(SimpleNamespace):
    """A request for an adapter; fields may be given in order, as the release takes them."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        names = RELEASED["fields"]["LoRARequest"]["names"]
        given = dict(zip(names, args)) | fields
        assert len(args) <= len(names) and not set(given) - set(names), given
        super().__init__(**({"lora_path": "", "load_inplace": False} | given))
        assert self.lora_int_id >= 1 and self.lora_path
