"""Contact sheets of phantom images with their questions and gold answers.

medvqa-rl phantom draw --output sheet.png
"""

from __future__ import annotations

from pathlib import Path

from medvqa_rl.data.images import sheet
from medvqa_rl.data.phantom.questions import draw_sample


def draw_sheet(path: Path, count: int = 24, seed: int = 0, scanner: str = "home") -> Path:
    """Draw ``count`` samples and save them as PNG."""
    samples = [draw_sample(seed=seed, split="sheet", index=index, scanner=scanner) for index in range(count)]
    return sheet.save_sheet(sheet.draw_sheet(samples), path)
