"""The contact sheet shows images, questions and gold answers.

Run: pytest tests/data/images/test_sheet.py
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvqa_rl.core.types import Sample
from medvqa_rl.data.images.files import FileImage, MemoryImage
from medvqa_rl.data.images.fonts import Lettering
from medvqa_rl.data.images.sheet import CELL, GAP, caption, draw_sheet, save_sheet

RED = MemoryImage("red", Image.new("RGB", (40, 20), (200, 0, 0)))
GREEN = MemoryImage("green", Image.new("RGB", (10, 10), (0, 200, 0)))


def test_images_fill_their_cells_and_keep_their_ratio(tmp_path: Path) -> None:
    sheet = draw_sheet([Sample("a", "Q?", "yes", "closed", (RED,)), Sample("b", "Q?", "yes", "closed", (GREEN, RED))])
    pixels = np.asarray(sheet).astype(int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 60)
    first = red[:, : GAP + CELL]
    assert first.any(axis=1).sum() == pytest.approx(CELL / 2, abs=2)
    assert first.any(axis=0).sum() == pytest.approx(CELL, abs=2)
    green = (pixels[..., 1] > 150) & (pixels[..., 0] < 60)
    assert green.any(axis=0).sum() == green.any(axis=1).sum() == pytest.approx(CELL / 2, abs=2)
    saved = save_sheet(sheet, tmp_path / "new" / "sheet.png")
    assert np.array_equal(np.asarray(Image.open(saved)), np.asarray(sheet)) and len(list(saved.parent.iterdir())) == 1


def test_an_unreadable_image_is_replaced_by_its_error(tmp_path: Path) -> None:
    sheet = draw_sheet([Sample("a", "Q?", "yes", "closed", (FileImage("gone.png", tmp_path),))])
    assert (np.asarray(sheet)[GAP, GAP] == (0xBD, 0x4B, 0x3C)).all()
    with pytest.raises(ValueError, match="at least one"):
        draw_sheet([])


def test_captions_are_short_and_keep_the_gold_answer() -> None:
    sample = Sample("x/1", "Which finding?", "B", "choice", (RED,), ("cyst", "stone"))
    assert caption(sample).splitlines() == ["[x/1]", "Which finding?", "A: cyst", "B: stone", "Answer: B"]
    long = Sample("x" * 90, "word " * 400, "long answer " * 20, "open", (RED,))
    lines = caption(long).splitlines()
    assert len(lines) == 12 and lines[-3] == "..." and lines[-2].startswith("Answer: long answer")
    assert max(map(len, lines)) <= 46


def test_wide_characters_take_two_columns() -> None:
    lines = caption(Sample("a", "肺" * 50 + "?", "yes", "closed", (RED,))).split("\n")
    assert lines[1:] == ["肺" * 22, "肺" * 22, "肺" * 6 + "?", "Answer: yes"]


def test_characters_without_a_font_are_drawn_as_escapes() -> None:
    sample = Sample("a", "肺 or 部?", "肺", "open", (RED,))
    lines = caption(sample, Lettering(None, frozenset("肺"))).split("\n")
    assert lines == ["[a]", r"\u80ba or 部?", r"Answer: \u80ba"]
