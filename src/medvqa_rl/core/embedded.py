"""Files of checkpoints on this machine: embedded in the package, in a folder, or in the Hub's cache. No torch."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

ASSETS = Path(__file__).parents[1] / "phantom" / "assets"

CHECKPOINTS = ("base", "instruct")


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


def local_file(path: str, revision: str | None, name: str) -> Path | None:
    """Find a file of the checkpoint ``model.path`` without opening a connection; None if it is not on this machine."""
    folder = Path(path).expanduser()
    if path.startswith("phantom:"):
        folder = ASSETS / path.removeprefix("phantom:")
    if folder.is_dir() or path.count("/") != 1:
        return folder / name if (folder / name).is_file() else None
    cached = try_to_load_from_cache(path, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def checkpoint_bytes(path: str) -> int | None:
    """Return the size of the weights of ``model.path``; None if they are not on this machine."""
    settings = local_file(path, None, "config.json")
    if settings is None:
        return None
    return sum(file.stat().st_size for file in settings.parent.glob("*.safetensors")) or None
