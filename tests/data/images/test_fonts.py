"""A font that has the characters of a text, or escapes.

Run: pytest tests/data/images/test_fonts.py
"""

from pathlib import Path

import pytest
from matplotlib import font_manager

from medvqa_rl.data.images import fonts
from medvqa_rl.data.images.fonts import choose_lettering, lettering_for_pillow

ASCII = frozenset(range(128))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Fonts of a machine: file name to characters, DejaVu Sans aside."""
    files: dict[str, str] = {}
    real = fonts.code_points
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(files))
    monkeypatch.setattr(
        fonts, "code_points", lambda path: frozenset(map(ord, files[str(path)])) if str(path) in files else real(path)
    )
    return files


def test_the_default_font_is_kept_where_it_has_every_character(installed: dict[str, str]) -> None:
    assert choose_lettering(["Is it A, or B?", " \n"], ASCII).file is None
    assert lettering_for_pillow(["What is shown?"]).file is None


def test_greek_and_accents_are_drawn_with_dejavu(installed: dict[str, str]) -> None:
    lettering = lettering_for_pillow(["5 µm ≥ β, naïve"])
    assert lettering.file is not None and lettering.file.name == "DejaVuSans.ttf"
    assert lettering.notice() is None


def test_the_installed_font_with_all_characters_is_found(installed: dict[str, str]) -> None:
    installed |= {"a.ttf": "肺", "b-Bold.ttf": "肺部 x", "c.ttf": "肺部x"}
    lettering = choose_lettering(["肺部", "x"], ASCII)
    assert lettering.file == Path("c.ttf") and not lettering.missing


def test_characters_without_a_glyph_become_escapes_with_a_sentence(installed: dict[str, str]) -> None:
    installed["a.ttf"] = "部x"
    lettering = choose_lettering(["x肺部\U0002070e"], ASCII)
    assert lettering.file == Path("a.ttf")
    assert lettering.drawable("x肺部\U0002070e") == "x\\u80ba部\\U0002070e"
    assert "2 of the characters (U+80BA U+2070E" in (lettering.notice() or "")


def test_files_that_are_no_fonts_have_no_characters(tmp_path: Path) -> None:
    (tmp_path / "x.ttf").write_bytes(b"no font")
    assert not fonts.code_points(tmp_path / "x.ttf")
    assert not fonts.code_points(tmp_path / "gone.ttf")
