"""The page holds everything it shows, and no text can break out of it.

Run: pytest tests/report/pages/test_page.py
"""

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvqa_rl.config import Config, RewardsConfig
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.report.pages.page import Comparison, DemoPage, FigureFile, ShownGroup, shown_group, write_demo_page
from medvqa_rl.rewards import Rewards

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
GAIN = {"n": 80, "num_clusters": 79, "gain": 0.2, "gain_low": 0.12, "gain_high": 0.28, "improved": 20, "worsened": 4}


def summary(accuracy: float | None, num: int = 40) -> dict[str, Any]:
    low, high = (None, None) if accuracy is None else (accuracy - 0.1, accuracy + 0.1)
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "num_scored": num,
        "majority_baseline": 0.3,
    }


def results(accuracy: float) -> dict[str, Any]:
    modalities = {"CT": summary(accuracy), EVIL: summary(None, 0), "MRI": summary(math.nan, 0)}
    return {**summary(accuracy, 80), "by": {"modality": modalities, "answer_type": {"choice": summary(accuracy)}}}


def group(image: Image.Image | None) -> ShownGroup:
    images = () if image is None else (MemoryImage("x", image),)
    sample = Sample("1", f"Which? {EVIL}", "B", "choice", images, (EVIL, "cyst"), groups={"modality": EVIL})
    texts = (f"<think>{EVIL}</think><answer>B</answer>", f"{EVIL}\ud800", "")
    completions = [Completion((1, 2, 3), text, text == "") for text in texts]
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), None, None, "")
    made = Group(sample, prompt, completions)
    scores = Rewards(RewardsConfig()).score([made], step=0)
    scores.parts["correctness"][0, 2] = math.nan
    return shown_group(made, scores, np.array([[1.25, -0.5, 0.0]]), 0, caption=EVIL)


def page(**changes: Any) -> DemoPage:
    comparison = Comparison("New scanner", results(0.4), results(0.6), GAIN, note=EVIL)
    old = Comparison("Old scanner", results(0.7), results(0.7), {**GAIN, "gain_low": math.nan})
    whole = DemoPage(
        title="A demo",
        lead=EVIL,
        comparisons=[comparison, old],
        groups=[group(Image.new("RGB", (8, 8), "red"))],
        facts={"seconds": "200", EVIL: EVIL},
        settings={**Config().model_dump(), "evil": {EVIL: EVIL}},
    )
    return replace(whole, **changes)


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(write_demo_page(tmp_path / "deep" / "page.html", page()).read_text(encoding="utf-8"))


def test_no_text_can_break_out_of_the_page(reader: Reader) -> None:
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "iframe", "object", "link", "base", "form"}
    assert not any(key.startswith("on") for _, attributes in reader.tags for key in attributes)
    assert reader.open == []
    assert reader.text.count(EVIL) >= 10


def test_the_page_loads_nothing(reader: Reader) -> None:
    for name, attributes in reader.tags:
        sources = [attributes[key] for key in ("src", "srcset", "href", "data", "action") if key in attributes]
        assert all((source or "").startswith("data:image/") for source in sources), name
        assert "url(" not in (attributes.get("style") or ""), name
    policy = [attributes["content"] for _, attributes in reader.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_numbers_are_on_the_page(reader: Reader) -> None:
    text = re.sub(r"\s+", " ", reader.text)
    assert "40.0 → 60.0 % right" in text
    assert "+20.0 points, 95 % interval +12.0 to +28.0" in text
    assert "Before 30.0 to 50.0, after 50.0 to 70.0 · 80 questions about 79 images · 20 improved, 4 worsened" in text
    assert "95 % interval – to +28.0" in text
    assert "By modality" in text and "By answer type" in text and "By family" not in text
    assert "nan" not in text.replace(EVIL, "").lower()
    assert "right advantage +1.25 reward 2 (format 1, correctness 1) 3 tokens" in text
    assert "wrong advantage −0.50 reward 0 (format 0, correctness 0) 3 tokens" in text
    assert "correctness unscored" in text and "3 tokens, cut off" in text
    assert "1 of 3 right" in text
    assert "rollout.num_generations8" in text.replace(" ", "")
    assert "Research software, not for clinical use" in text


def test_images_are_inside_and_large_ones_are_reduced(tmp_path: Path) -> None:
    big = group(Image.new("RGB", (1200, 900), "red"))
    html = write_demo_page(tmp_path / "page.html", page(groups=[big, group(None)])).read_text(encoding="utf-8")
    (source,) = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', html)
    with Image.open(io.BytesIO(base64.b64decode(source))) as image:
        assert image.size == (320, 240)


def test_figures_are_inside_in_both_themes(tmp_path: Path) -> None:
    for name, color in (("light.png", "white"), ("dark.png", "black")):
        Image.new("RGB", (4, 4), color).save(tmp_path / name)
    figures = [
        FigureFile("Curves", tmp_path / "light.png", tmp_path / "dark.png", "A caption"),
        FigureFile("One", tmp_path / "light.png"),
    ]
    html = write_demo_page(tmp_path / "page.html", page(figures=figures, groups=())).read_text(encoding="utf-8")
    light, dark = (base64.b64encode((tmp_path / name).read_bytes()).decode() for name in ("light.png", "dark.png"))
    assert html.count(light) == 2 and html.count(dark) == 1
    assert html.count('prefers-color-scheme: dark)"') == 1
    assert "A caption" in html


def test_the_page_is_replaced_whole(tmp_path: Path) -> None:
    out = write_demo_page(tmp_path / "page.html", page())
    write_demo_page(out, page(title="Another"))
    assert "Another" in out.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one comparison"):
        write_demo_page(tmp_path / "page.html", page(comparisons=()))
