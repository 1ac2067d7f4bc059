"""Whether a judge is worth using at all, and what runs that it rewards know of that. Imports no torch.

A calibration is remembered beside the judge's cached verdicts, under the same key: a judge with other weights, another
prompt or strictness is another judge, of which nothing is known.

```text
judges/3f2a.../calibration.json     {"is_worth_using": false, "summary": "Not worth using: ..."}
```
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medvqa_rl.core.files import read_json, write_json
from medvqa_rl.evaluation.statistics.tables import format_kappa
from medvqa_rl.rewards.judges import Judge, JudgeIdentity
from medvqa_rl.rewards.judges.cache import judge_folder


@dataclass(frozen=True)
class Worth:
    """Whether a judge agrees with labels better than chance does."""

    is_worth_using: bool | None
    """None if the labels cannot tell, as all are equal."""
    summary: str
    """One line."""


_WORTH = TypeAdapter(Worth)


def worth(row: Mapping[str, Any], source: str) -> Worth:
    """Compare the 95 % interval of kappa with 0, its value for chance.

    Args:
        row: from :func:`medvqa_rl.evaluation.judging.agreement.agreement`.
        source: what the labels are of, as in "phantom".
    """
    kappa, scored = row["kappa"], round(row["n"] * (1 - row["unscored_rate"]))
    if kappa is None:
        return Worth(False, f"Not worth using: it gave no verdict on any of {row['n']:,} texts of {source}.")
    texts = f"{scored:,} texts of {source}"
    yes, labelled = row["verdict_yes_rate"], row["label_yes_rate"]
    if labelled in (0.0, 1.0):
        return Worth(None, f"Cannot tell whether it is worth using: all {texts} have the same label.")
    if yes in (0.0, 1.0):
        word = "Yes" if yes else "No"
        return Worth(
            False, f"Not worth using: it says {word} to all {texts}, of which {100 * labelled:.0f} % are labelled Yes."
        )
    shares = f"it says Yes to {100 * yes:.0f} % of {texts}, of which {100 * labelled:.0f} % are labelled Yes"
    if math.isnan(kappa["low"]):
        return Worth(None, f"Cannot tell whether it is worth using: there is no interval of kappa, and {shares}.")
    if kappa["low"] > 0:
        return Worth(True, f"Worth using: its kappa of {format_kappa(kappa)} is above 0, which is chance; {shares}.")
    return Worth(
        False, f"Not worth using: its kappa of {format_kappa(kappa)} is not above 0, which is chance; {shares}."
    )


def remember(judges: Path, identity: JudgeIdentity, found: Worth) -> None:
    """Write a judge's calibration, in place of an earlier one.

    Args:
        judges: the folder of the caches of all judges.
    """
    write_json(judge_folder(judges, identity) / "calibration.json", asdict(found))


def recall(judges: Path, identity: JudgeIdentity) -> Worth | None:
    """The last calibration of exactly this judge; None if there is none.

    Raises:
        ValueError: its file is damaged.
    """
    path = judge_folder(judges, identity) / "calibration.json"
    return read_json(_WORTH, path, "remove it, and calibrate the judge again") if path.is_file() else None


def calibration_warnings(judges: Path, rewarding: Iterable[Judge]) -> list[str]:
    """A warning for each judge that rewards although its calibration says that it is not worth using."""
    known = [(judge.identity.name, recall(judges, judge.identity)) for judge in rewarding]
    return [
        f"Warning: by its calibration the judge {name}, which rewards, should not. {found.summary} Set judge.model to "
        "another, or calibrate it on texts of your own with `medvqa-rl judge calibrate --pairs`."
        for name, found in known
        if found is not None and found.is_worth_using is False
    ]
