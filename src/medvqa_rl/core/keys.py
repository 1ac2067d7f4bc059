"""Keys of servers, from the environment alone: no other module reads them, and no file holds one. Imports no torch."""

from __future__ import annotations

import os


def read_key(variable: str | None) -> str:
    """The key of a judge's endpoint. Without a variable's name none is sent (the client wants some text).

    Args:
        variable: as ``judge.api_key_env`` names it.

    Raises:
        ValueError: the environment has no such variable, or it is empty.
    """
    if variable is None:
        return "none"
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(
            f"judge.api_key_env is {variable}, but the environment has no such variable: set it to the key (never "
            "write keys into files), or set judge.api_key_env to null for an endpoint without keys."
        )
    return key
