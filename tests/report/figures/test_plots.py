"""Figures are drawn from any log that a run can write; their numbers are those of the log.

Run: pytest tests/report/figures/test_plots.py
"""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

from medvqa_rl.report.figures import plots
from medvqa_rl.report.figures.panels import moving_average
from medvqa_rl.report.figures.plots import plot_before_after, plot_training, save_figure
from medvqa_rl.report.figures.style import PALETTES, Theme, spread, styled

ROWS = [
    {
        "step": step,
        "reward": 1.0 + 0.01 * step,
        "rewards/format/mean": 0.9,
        "rewards/correctness/mean": 0.5 + 0.01 * step,
        "completions/mean_length_correct": 30.0,
        "completions/mean_length_wrong": None if step == 3 else math.nan if step == 4 else 40.0,
        "kl": 0.01 * step,
        "entropy": 0.5,
        "grad_norm": 1.0,
        "frac_reward_zero_std": 0.2,
        "no_answer_rate": 0.0,
        "completions/clipped_ratio": 0.1,
    }
    for step in range(1, 25)
]
EVALS = [
    {"step": 0, "eval/accuracy": 0.3},
    {"step": 24, "eval/accuracy": 0.6, "eval/accuracy_low": 0.5, "eval/accuracy_high": 0.7},
]


def summary(accuracy: float | None, num: int = 40) -> dict[str, Any]:
    bounds = (None, None) if accuracy is None else (accuracy - 0.1, accuracy + 0.1)
    return {
        "accuracy": accuracy,
        "accuracy_low": bounds[0],
        "accuracy_high": bounds[1],
        "num_scored": num,
        "majority_baseline": 0.3,
    }


def results(accuracy: float) -> dict[str, Any]:
    modalities = {"CT": summary(accuracy), "MRI": summary(None, 0)}
    return {**summary(accuracy, 80), "by": {"modality": modalities, "family": {"kind": summary(accuracy)}}}


def corner(path: Path) -> str:
    """Colour of the top left pixel."""
    with Image.open(path) as image:
        return "#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((0, 0)))  # type: ignore[misc]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_training_is_drawn_in_both_themes(tmp_path: Path, theme: Theme) -> None:
    settings = dict(mpl.rcParams)
    path = plot_training([*ROWS, *EVALS], tmp_path / "figures" / "training.png", theme=theme)
    assert corner(path) == PALETTES[theme].background
    with Image.open(path) as image:
        assert image.size == (2400, 1080)
    assert dict(mpl.rcParams) == settings


def test_logs_with_little_in_them_are_drawn(tmp_path: Path) -> None:
    plot_training([{"step": 1, "reward": 0.0, "rewards/mine/mean": -1.0, "kl": math.inf}], tmp_path / "x.png")
    many = {f"rewards/part{index}/mean": 0.1 * index for index in range(9)}
    plot_training([{"step": step, "reward": 0.0, **many} for step in (1, 2)], tmp_path / "x.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_training(EVALS, tmp_path / "x.png")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_before_and_after_are_drawn(tmp_path: Path, theme: Theme) -> None:
    before, after = results(0.4), results(0.6)
    path = plot_before_after(before, after, tmp_path / "x.png", theme=theme)
    assert corner(path) == PALETTES[theme].background
    plot_before_after(before, after, tmp_path / "x.png", keys=("no such key",), names=("base", "tuned"), theme=theme)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(1, 15))
def test_the_moving_average_is_a_mean_of_neighbours(values: list[float], window: int) -> None:
    means = moving_average(np.array(values), window)
    half = window // 2
    expected = [np.mean(values[max(0, index - half) : index + half + 1]) for index in range(len(values))]
    np.testing.assert_allclose(means, expected, atol=1e-9)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_labels_are_spread_in_order_and_within_bounds(positions: list[float]) -> None:
    placed = spread(positions, 0.1, 0.0, 1.0)
    order = np.argsort(positions, kind="stable")
    gaps = np.diff([placed[index] for index in order])
    assert (gaps >= 0.1 - 1e-9).all()
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)
    apart = len(positions) < 2 or np.diff(sorted(positions)).min() >= 0.1
    if apart:
        np.testing.assert_allclose(placed, positions, atol=1e-12)


def test_labels_of_many_reward_parts_stay_in_their_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"rewards/part_{number:02d}/mean": 0.5 for number in range(24)}
    drawn: list[Figure] = []
    monkeypatch.setattr("medvqa_rl.report.figures.plots.save_figure", lambda figure, path: drawn.append(figure))
    plot_training([{"step": step, **parts} for step in (1, 2)], tmp_path / "x.png")
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    heights = [text.xy[1] for text in axes.texts if isinstance(text, Annotation)]
    assert len(heights) == 24 and min(np.diff(heights)) > 0 and low - 1e-9 <= heights[0] and heights[-1] <= high


def test_titles_of_panels_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    row = {"reward": 1.0, "rewards/format/mean": 1.0, "rewards/correctness/mean": 0.5, "loss": 0.1}
    row |= {"rewards/format/corr_correctness": 0.1, "completions/mean_length": 30.0}
    plot_training([{"step": step, **row} for step in (1, 2)], tmp_path / "x.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    titles = {axes.get_title("left") for axes in figure.axes} - {""}
    texts = [text for text in figure.findobj(Text) if text.get_text() in titles]
    assert len(texts) == len(titles) >= 4 and any("correctness" in title for title in titles)
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".png"])
def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path, file_limit: Any, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with pytest.raises(OSError) as caught, file_limit(500):
        save_figure(Figure(), path)
    assert caught.value.filename == str(path) and not list(tmp_path.iterdir())
    assert save_figure(Figure(), path).stat().st_size > 500


def test_names_without_a_font_are_drawn_as_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    with styled("print"):
        figure = Figure()
        axes = figure.subplots()
        axes.set_title("奖励 β")
        save_figure(figure, tmp_path / "x.png")
    assert axes.get_title(loc="left") == r"\u5956\u52b1 β"
