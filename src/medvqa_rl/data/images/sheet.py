"""Contact sheets: one picture with images, questions and gold answers. Imports no torch."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from medvqa_rl.core.files import write_whole
from medvqa_rl.core.types import LETTERS, Sample
from medvqa_rl.data.images.fonts import Lettering, lettering_for_pillow, load_font

CELL, GAP, LINE, COLUMNS = 300, 16, 17, 4
_WIDTH = 44
"""Characters per line."""
_LINES = 12
_WIDE = re.compile(
    "[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\U00020000-\U0003fffd]"
)
"""Characters as wide as two Latin ones (Unicode's East Asian width, by block)."""


def draw_sheet(samples: Sequence[Sample]) -> Image.Image:
    """Draw samples in rows of four: images side by side, with question, options and gold answer below.

    If an image cannot be decoded, the error message is drawn instead.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("There are no samples to draw: ask for at least one.")
    lettering = caption_lettering(samples)
    font = load_font(lettering)
    captions = [caption(sample, lettering) for sample in samples]
    columns = min(COLUMNS, len(samples))
    rows = [range(start, min(start + columns, len(samples))) for start in range(0, len(samples), columns)]
    heights = [CELL + GAP // 2 + LINE * max(captions[index].count("\n") + 1 for index in row) + GAP for row in rows]
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, sum(heights) + GAP), "white")
    canvas = ImageDraw.Draw(sheet)
    top = GAP
    for row, height in zip(rows, heights):
        for column, index in enumerate(row):
            left = GAP + column * (CELL + GAP)
            _draw_images(sheet, canvas, samples[index], left, top, font, lettering)
            canvas.multiline_text(
                (left, top + CELL + GAP // 2), captions[index], fill="#222222", font=font, spacing=LINE - 14
            )
        top += height
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Save a picture as PNG, atomically."""
    with write_whole(path) as partial:
        sheet.save(partial, "PNG")
    return path


def caption_lettering(samples: Sequence[Sample]) -> Lettering:
    """The font for all captions of a sheet, and the characters that no font has."""
    texts = (text for one in samples for text in (one.id, one.question, *one.options, one.gold))
    return lettering_for_pillow(texts)


def caption(sample: Sample, lettering: Lettering = Lettering(None, frozenset())) -> str:
    """Id, question, options and gold answer in at most twelve lines; the gold answer is always included."""
    lines = [f"[{textwrap.shorten(lettering.drawable(sample.id), _WIDTH - 2, placeholder='...')}]"]
    lines += _wrap(lettering.drawable(sample.question))
    for letter, option in zip(LETTERS, sample.options):
        lines += _wrap(f"{letter}: {lettering.drawable(option)}", indent="   ")
    gold = _wrap(f"Answer: {lettering.drawable(sample.gold)}")[:2]
    if len(lines) + len(gold) > _LINES:
        lines = [*lines[: _LINES - len(gold) - 1], "..."]
    return "\n".join([*lines, *gold])


def _wrap(text: str, *, indent: str = "") -> list[str]:
    """Wrap at the width of a cell, of which wide characters take two."""
    padded = _WIDE.sub("\\g<0>\0", text)  # so that textwrap counts them twice
    return [line.replace("\0", "") for line in textwrap.wrap(padded, _WIDTH, subsequent_indent=indent)]


def _draw_images(
    sheet: Image.Image,
    canvas: ImageDraw.ImageDraw,
    sample: Sample,
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    lettering: Lettering,
) -> None:
    width = CELL // max(1, len(sample.images))
    for number, source in enumerate(sample.images):
        corner = left + number * width
        try:
            picture = source.load()
        except ValueError as error:
            canvas.rectangle((corner, top, corner + width - 2, top + CELL - 1), outline="#bd4b3c")
            message = lettering.drawable(str(error))
            text = "\n".join(textwrap.wrap(message, max(8, width // 8)))
            canvas.multiline_text((corner + 6, top + 6), text, fill="#bd4b3c", font=font)
            continue
        scale = min((width - 2) / picture.width, CELL / picture.height)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        sheet.paste(picture, (corner, top + (CELL - size[1]) // 2))
