"""A contact sheet of the phantom world: images with a question and its answer.

medvqa-rl phantom draw --output sheet.png
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from medvqa_rl.core.types import Sample
from medvqa_rl.data.phantom.drawing import SIZE, PhantomImage
from medvqa_rl.data.phantom.questions import draw_sample

_SCALE, _GAP, _TEXT_HEIGHT, _COLUMNS = 2, 14, 84, 6


def draw_sheet(path: Path, count: int = 24, seed: int = 0, scanner: str = "home") -> Path:
    """Draw `count` samples of the test split in rows of six and save them as PNG.

    Raises:
        ValueError: the scanner is not one of the world's.
    """
    samples = [draw_sample(seed=seed, split="sheet", index=index, scanner=scanner) for index in range(count)]
    cell_width, cell_height = SIZE * _SCALE + _GAP, SIZE * _SCALE + _GAP + _TEXT_HEIGHT
    rows = -(-count // _COLUMNS)
    sheet = Image.new("RGB", (cell_width * _COLUMNS + _GAP, cell_height * rows + _GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, sample in enumerate(samples):
        left = _GAP + number % _COLUMNS * cell_width
        top = _GAP + number // _COLUMNS * cell_height
        image = sample.images[0]
        assert isinstance(image, PhantomImage)
        picture = image.load().resize((SIZE * _SCALE, SIZE * _SCALE), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left, top))
        canvas.multiline_text((left, top + SIZE * _SCALE + 4), _caption(sample), fill="#222222", font=font, spacing=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _caption(sample: Sample) -> str:
    lines = textwrap.wrap(sample.question, 36)
    if sample.options:
        lines += textwrap.wrap("  ".join(f"{letter}: {text}" for letter, text in zip("ABCD", sample.options)), 36)
    return "\n".join([*lines[:4], f"Answer: {sample.answer}"])
