"""What is compared when a run is resumed, besides its settings: data and judges, which must be the same, and reward
functions, which may have been repaired."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from medvqa_rl.core.files import read_json, write_json
from medvqa_rl.core.types import Dataset
from medvqa_rl.learning.run.resume import Change
from medvqa_rl.rewards.functions import RewardFunction
from medvqa_rl.rewards.judges import JudgeIdentity

RESTORE = "restore the file, or start a new run in another output_dir"


class _Data(BaseModel):
    """What is read again of a data set in data.json; it has more."""

    fingerprint: str


_DATA = TypeAdapter(dict[str, _Data])
_JUDGES = TypeAdapter(dict[str, dict[str, Any]])
_SOURCES = TypeAdapter(dict[str, str | None])


def check_data(run: Path, datasets: Mapping[str, Dataset], *, resume: bool) -> None:
    """Write data.json; when resuming, check that the data is the same.

    Raises:
        ValueError: the data has changed since the run was started.
    """
    path = run / "data.json"
    described = {
        split: {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "samples": None if data.is_endless else len(data),
            "notes": dict(data.notes),
        }
        for split, data in datasets.items()
    }
    if resume and path.exists():
        before = {split: data.fingerprint for split, data in read_json(_DATA, path, RESTORE).items()}
        changed = [split for split in described if before.get(split) != described[split]["fingerprint"]]
        if changed:
            raise ValueError(
                f"The {' and '.join(changed)} data has changed since this run was started (its fingerprint is not "
                f"that in {path}): restore the data, or start a new run in another output_dir."
            )
    else:
        write_json(path, described)


def check_rewards(
    run: Path, judges: Mapping[str, JudgeIdentity], functions: Mapping[str, RewardFunction], *, resume: bool
) -> dict[str, Change]:
    """Write judge.json if there are judges, and rewards.json if there are reward functions; when resuming, compare.

    Of a function its source counts, not what it calls, reads or closes over.

    Args:
        run: the run's folder.
        judges: by role.
        functions: by dotted path.
        resume: whether the run is resumed.

    Returns:
        The functions whose source has changed: its hash at the first start, and now.

    Raises:
        ValueError: a judge's weights or prompt have changed since the run was started.
    """
    path = run / "judge.json"
    described = {role: identity.to_json() for role, identity in judges.items()}
    if resume and path.exists():
        if read_json(_JUDGES, path, RESTORE) != described:
            raise ValueError(
                f"The judge has changed since this run was started ({path} identifies its weights and prompt): "
                "restore it, or start a new run in another output_dir."
            )
    elif described:
        write_json(path, described)
    path = run / "rewards.json"
    sources = {name: source_hash(function) for name, function in functions.items()}
    if resume and path.exists():
        before = read_json(_SOURCES, path, RESTORE)
        known = {name: (before.get(name), source) for name, source in sources.items()}
        return {name: pair for name, pair in known.items() if None not in pair and pair[0] != pair[1]}
    if sources:
        write_json(path, sources)
    return {}


def source_hash(function: RewardFunction) -> str | None:
    """Hash of a function's source without its indentation (of a callable object that of its class, of a ``partial``
    that of its function): 16 hexadecimal digits of SHA-256; None if Python does not know the source, as for code typed
    into the interpreter."""
    while isinstance(function, partial):
        function = function.func
    named = inspect.isfunction(function) or inspect.ismethod(function)
    try:
        source = inspect.getsource(function if named else type(function))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()[:16]
