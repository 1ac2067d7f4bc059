"""Fonts of this machine that can draw a text, for pictures with questions in any language. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ImageFont


@dataclass(frozen=True)
class Lettering:
    """A font, and the characters of a text that it has no glyphs for."""

    file: Path | None
    """None if the default font of the picture has every character."""
    missing: frozenset[str]

    def drawable(self, text: str) -> str:
        """Replace characters without a glyph by escapes such as ``\\u80ba``, which would else be drawn as boxes."""
        return "".join(c.encode("ascii", "backslashreplace").decode("ascii") if c in self.missing else c for c in text)

    def notice(self) -> str | None:
        """A sentence about missing characters, or None."""
        if not self.missing:
            return None
        some = " ".join(f"U+{ord(c):04X}" for c in sorted(self.missing)[:3])
        return (
            f"No installed font has {len(self.missing)} of the characters ({some} ...), so they are drawn as escapes: "
            "install one, such as fonts-noto-cjk for Chinese, and draw the picture again."
        )


def choose_lettering(texts: Iterable[str], default: frozenset[int]) -> Lettering:
    """Choose the font with the most characters of the texts: the default one, DejaVu Sans, or any installed one.

    Args:
        texts: to be drawn with one font.
        default: code points of the picture's default font.
    """
    # Blanks and control characters are not drawn.
    characters = frozenset(c for text in texts for c in text if c.isprintable() and c != " ")
    best = Lettering(None, frozenset(c for c in characters if ord(c) not in default))
    if not best.missing:
        return best
    from matplotlib import get_data_path
    from matplotlib.font_manager import findSystemFonts

    candidates = [Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", *map(Path, sorted(findSystemFonts()))]
    plain = [path for path in candidates if not any(name in path.name for name in ("Bold", "Italic", "Oblique"))]
    for path in plain:
        missing = frozenset(c for c in characters if ord(c) not in code_points(path))
        if len(missing) < len(best.missing):
            best = Lettering(path, missing)
        if not missing:
            break
    return best


@cache
def code_points(path: Path) -> frozenset[int]:
    """The characters of a font file; none if it cannot be read or scaled."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(str(path))
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):  # damaged, or of a kind that FreeType does not read
        return frozenset()


@cache
def _pillow_default() -> frozenset[int]:
    """The characters of Pillow's embedded font: ASCII and little more."""
    from matplotlib.ft2font import FT2Font

    font = ImageFont.load_default(13)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return frozenset(FT2Font(font.path).get_charmap())


def lettering_for_pillow(texts: Iterable[str]) -> Lettering:
    """The lettering of a picture that Pillow draws."""
    return choose_lettering(texts, _pillow_default())


def load_font(lettering: Lettering) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load the font for Pillow, at a size of which 44 Latin letters fill a cell of a contact sheet."""
    return ImageFont.load_default(13) if lettering.file is None else ImageFont.truetype(lettering.file, 12)
