"""Figures for papers are vectors, the same on every call, and in colours that the colour-blind tell apart.

Run: pytest tests/report/figures/test_figures.py
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_run, write
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.report.figures.figures import write_figures
from medvqa_rl.report.figures.style import PALETTES

# Machado, Oliveira and Fernandes 2009: full deuteranopia and protanopia, on linear RGB.
DEFICIENCIES = {
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def test_curves_and_comparisons_as_vectors(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    result = CliRunner().invoke(app, ["report", str(one), str(two), "--figures", str(tmp_path / "figures")])
    assert result.exit_code == 0, result.output
    names = ["training-one", "training-two", *(f"accuracy-{run}-phantom-home-val" for run in ("one", "two"))]
    names.append("accuracy-two-against-one")
    expected = [str(tmp_path / "figures" / f"{name}.{kind}") for name in names for kind in ("pdf", "svg")]
    assert result.output.split() == expected
    for path in map(Path, expected):
        content = path.read_bytes()
        if path.suffix == ".pdf":
            assert content.startswith(b"%PDF") and b"/Subtype /Image" not in content and b"CreationDate" not in content
        else:
            tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(content).iter()}
            assert "path" in tags and "image" not in tags


def test_the_same_run_gives_the_same_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    first = [path.read_bytes() for path in write_figures([run], tmp_path / "a")]
    assert first == [path.read_bytes() for path in write_figures([run], tmp_path / "b")]


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "status.json", {})
    with pytest.raises(ValueError, match="There is nothing to plot"):
        write_figures([tmp_path], tmp_path / "figures")


def test_hundreds_of_runs_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"200 runs are given, but --figures takes at most 40"):
        write_figures([tmp_path / str(number) for number in range(200)], tmp_path / "figures")
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for run in runs:
        write(run / "status.json", {})
    with pytest.raises(ValueError, match="Two of the runs are called run"):
        write_figures(runs, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("kind", DEFICIENCIES)
def test_colours_are_told_apart(kind: str) -> None:
    """The colours that share a picture keep a distance of at least 15 in CIE Lab under the deficiency (2 is just
    visible side by side)."""
    palette = PALETTES["print"]
    for colors in ((palette.right, palette.wrong), (palette.before, palette.after), palette.series[:4]):
        seen = [_lab(np.array(DEFICIENCIES[kind]) @ _linear(color)) for color in colors]
        assert min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2)) > 15


def _linear(color: str) -> np.ndarray:
    value = np.array([int(part, 16) / 255 for part in re.findall("..", color[1:])])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of linear sRGB."""
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(matrix) @ np.clip(linear, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
