"""API keys, read from the environment only: no file stores one. Imports no torch."""

from __future__ import annotations

import os


def read_key(variable: str | None) -> str:
    """Return the API key of a judge's endpoint, or a placeholder (the client requires some text) if none is set.

    Args:
        variable: name of the environment variable, ``judge.api_key_env``.

    Raises:
        ValueError: the environment has no such variable, or it is empty.
    """
    if variable is None:
        return "none"
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(
            f"judge.api_key_env is {variable}, but the environment has no such variable: set it to the key "
            "(never write keys into files), or set judge.api_key_env to null for an endpoint without keys."
        )
    return key
