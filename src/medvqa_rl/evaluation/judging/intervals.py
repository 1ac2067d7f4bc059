"""Means and shares with 95 % intervals that resample clusters, as plain values for JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from medvqa_rl.evaluation.statistics.intervals_and_tests import cluster_bootstrap, proportion_interval


def share_interval(rows: Sequence[tuple[bool, Hashable]], *, seed: int = 0) -> dict[str, float] | None:
    """Share of true flags, as ``estimate``, ``low`` and ``high``; None without rows.

    Args:
        rows: flags with their clusters.
    """
    if not rows:
        return None
    flags, clusters = zip(*rows)
    return proportion_interval(flags, clusters, seed=seed).to_json()


def mean_interval(rows: Sequence[tuple[float, Hashable]], *, seed: int = 0) -> dict[str, float] | None:
    """Mean of values, as :func:`share_interval`."""
    if not rows:
        return None
    values, clusters = zip(*rows)
    return cluster_bootstrap(values, clusters, seed=seed).to_json()
