"""Names of a study's cells and evaluations, and whether what lies under a name is what is asked for. Imports no torch.

A name holds a hash of the settings that differ from their defaults. So a setting that the program gains later, with a
default that leaves everything as it was, renames nothing, and no finished cell has to be run again.

The price: where the program's default of a setting *changes*, a recipe that does not give it leads to the name that it
led to before, under which lie results of the old default. To take them for results of the new one would mix two
experiments in one table, so every finished cell is compared with the settings that it recorded itself, and one that
was made otherwise is refused. Whoever changes a default thereby asks for those cells again, and for no others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from medvqa_rl.config import Config, digest, leaves


def settings_hash(config: Config, after: str = "") -> str:
    """Eight digits that differ where a setting differs, wherever the folder lies.

    Args:
        after: name of the cell that is started from; empty where there is none.
    """
    name = digest(config.model_copy(update={"output_dir": "-"}))
    return (hashlib.sha256(f"{after} {name}".encode()).hexdigest() if after else name)[:8]


def check_made(
    what: str, folder: Path, record: Path, place: Sequence[str], config: Config, *, but: Collection[str] = ()
) -> None:
    """Refuse results that recorded other settings than those that they would be taken for.

    Only settings that both know are compared: one that was added since had no say in what was made, and a name
    tells apart what is not at its default.

    Args:
        what: names the cell or evaluation in the error.
        folder: what would have to be removed.
        record: JSON file with the settings; nothing was made where it is missing.
        place: keys that lead to the settings in it.
        config: the settings asked for.
        but: sections, and settings, that do not matter; ``output_dir`` never does.

    Raises:
        ValueError: one of them differs.
    """
    if not record.is_file():
        return
    stored: Any = json.loads(record.read_text(encoding="utf-8"))
    for key in place:
        stored = stored.get(key, {})
    then, now = leaves(stored), leaves(config.model_dump(mode="json"))
    ignored = ("output_dir", *but)
    for path, value in now.items():
        is_compared = path in then and not any(path == name or path.startswith(f"{name}.") for name in ignored)
        if is_compared and then[path] != value:
            raise ValueError(
                f"{what} in {folder} was made with {path} = {json.dumps(then[path])}, but now it is "
                f"{json.dumps(value)} (the default has changed since): remove that folder to make it again, or choose "
                "another --output."
            )
