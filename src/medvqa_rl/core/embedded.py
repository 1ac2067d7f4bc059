"""Where the embedded checkpoints lie in the package. Imports no torch."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "phantom" / "assets"


CHECKPOINTS = ("base", "instruct")


def checkpoint_path(name: str) -> Path:
    """Folder of an embedded checkpoint.

    Raises:
        ValueError: there is none of that name, or the package was installed without it.
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"There is no phantom checkpoint '{name}': use phantom:base or phantom:instruct.")
    folder = ASSETS / name
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"The phantom checkpoint '{name}' is not installed in {folder}: run `medvqa-rl phantom build` to make it."
        )
    return folder
