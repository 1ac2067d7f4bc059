"""Names of a study's cells and evaluations, and the check that stored results match their settings. Imports no torch.

A name contains a hash of the settings that differ from their defaults. A setting added in a later version, whose
default changes nothing, therefore renames nothing, and no finished cell has to be run again.

If a later version *changes* a default, however, a recipe that does not set it still leads to the old name, with
results of the old default. Using them would mix two experiments in one table. So every finished cell is compared with
the settings that it recorded, and refused if they differ: only the affected cells have to be run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medvqa_rl.config import Config, digest, leaves
from medvqa_rl.core.files import read_json
from medvqa_rl.core.text import printable


def settings_hash(config: Config, after: str = "") -> str:
    """Hash the settings, except the output folder, to eight hexadecimal digits.

    Args:
        config: the settings.
        after: name of the cell that this one starts from, if any.
    """
    name = digest(config.model_copy(update={"output_dir": "-"}))
    return (hashlib.sha256(f"{after} {name}".encode()).hexdigest() if after else name)[:8]


def check_made(
    what: str, folder: Path, record: Path, keys: Sequence[str], config: Config, *, ignore: Collection[str] = ()
) -> None:
    """Check that stored results were made with the settings that they would be used for.

    Only settings that both versions know are compared: an added setting did not affect the results, and the name
    contains every setting that is not at its default.

    Args:
        what: name of the cell or evaluation, for the message.
        folder: the folder to remove if the settings differ.
        record: JSON file with the recorded settings; a missing file passes.
        keys: that lead to the settings in it.
        config: the requested settings.
        ignore: sections and settings that may differ, besides ``output_dir``.

    Raises:
        ValueError: a setting differs.
    """
    if not record.is_file():
        return
    stored: Any = read_json(TypeAdapter(dict[str, Any]), record, f"remove the folder {folder} to run it again")
    for key in keys:
        stored = stored.get(key, {})
    if not isinstance(stored, dict):
        raise ValueError(f"The file {record} holds no settings: remove the folder {folder} to run it again.")
    then, now = leaves(stored), leaves(config.model_dump(mode="json"))
    ignored = ("output_dir", *ignore)
    for path, value in now.items():
        is_compared = path in then and not any(path == name or path.startswith(f"{name}.") for name in ignored)
        if is_compared and then[path] != value:
            before, after = (printable(json.dumps(one), 200) for one in (then[path], value))
            raise ValueError(
                f"{what} in {folder} was made with {path} = {before}, but it is now {after} (the default has changed "
                "since): remove that folder to run it again, or choose another --output."
            )
