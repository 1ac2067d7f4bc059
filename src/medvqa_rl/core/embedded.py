"""Files of checkpoints: embedded in the package, in a folder, in the Hub's cache, or downloaded to it. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import huggingface_hub

from medvqa_rl.core.files import NO_ROOM, describe_os_error, writing
from medvqa_rl.core.network import unusable_proxy

ASSETS = Path(__file__).parents[1] / "phantom" / "assets"

CHECKPOINTS = ("base", "instruct")

SIZES = ("small", "base", "large")
"""Sizes of phantom models that the recipe knows; the embedded ones are base."""


def checkpoint_path(name: str) -> Path:
    """Return the folder of an embedded checkpoint.

    Raises:
        ValueError: the name is unknown, or the package was installed without its weights.
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"There is no phantom checkpoint '{name}': use phantom:base or phantom:instruct.")
    folder = ASSETS / name
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"The phantom checkpoint '{name}' is not installed in {folder}: run `medvqa-rl phantom build` to make it."
        )
    return folder


def refuse_missing_folder(path: str) -> None:
    """Refuse a ``model.path`` that can only be a folder, which does not exist.

    Raises:
        ValueError: it is one.
    """
    folder = Path(path).expanduser()
    if path.startswith("phantom:") or folder.is_dir():
        return
    if path.startswith((".", "~", os.sep)) or path.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(
            f"model.path is {path!r}, but there is no such folder: give the folder of a checkpoint, a Hugging Face "
            "Hub id such as Qwen/Qwen2-VL-2B-Instruct, or phantom:base or phantom:instruct for the embedded models."
        )


def local_file(path: str, revision: str | None, name: str) -> Path | None:
    """Find a file of the checkpoint ``model.path`` without opening a connection; None if it is not on this machine."""
    folder = Path(path).expanduser()
    if path.startswith("phantom:"):
        folder = ASSETS / path.removeprefix("phantom:")
    if folder.is_dir() or path.count("/") != 1:
        return folder / name if (folder / name).is_file() else None
    cached = huggingface_hub.try_to_load_from_cache(path, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def checkpoint_bytes(path: str) -> int | None:
    """Return the size of the weights of ``model.path``; None if they are not on this machine."""
    settings = local_file(path, None, "config.json")
    if settings is None:
        return None
    return sum(file.stat().st_size for file in settings.parent.glob("*.safetensors")) or None


def snapshot(
    repository: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    kind: Literal["model", "dataset"] = "model",
    is_offline: bool = False,
) -> Path:
    """Return the folder with a Hub repository's files; downloads what is missing, unless ``is_offline``.

    If the Hub cannot be reached, the files come from its cache.

    Raises:
        ValueError: files are missing, and the environment's proxy cannot be used; or there is no room for them.
        OSError, HFValidationError: as ``snapshot_download``; a connection that fails in any way is an OSError.
    """
    # The base of its HTTP client's errors, whichever client it uses; imports the client.
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    proxy = unusable_proxy()
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    try:
        with writing(cache):
            return Path(
                huggingface_hub.snapshot_download(
                    repository,
                    repo_type=kind,
                    revision=revision,
                    allow_patterns=list(patterns),
                    local_files_only=is_offline or proxy is not None,
                )
            )
    except LocalEntryNotFoundError as error:  # is an OSError too
        if is_offline or proxy is None:
            raise
        raise ValueError(
            f"{repository} is not on this machine, and the proxy in the environment's {proxy} cannot be used to "
            "download it: for SOCKS, install the package socksio and write socks5://, or unset the variable."
        ) from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ValueError(
            f"{repository} cannot be cached. {describe_os_error(error)} HF_HUB_CACHE sets the folder."
        ) from error
    except HTTPError as error:  # of its HTTP client, such as ProxyError; huggingface_hub makes only some its own
        if isinstance(error, OSError):
            raise
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
