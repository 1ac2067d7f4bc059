"""The page about a data set holds what was found, loads nothing, and no text breaks out of it.

Run: pytest tests/report/pages/test_data_page.py
"""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvqa_rl.core.types import Sample
from medvqa_rl.data.check import check_data
from medvqa_rl.data.export import export
from medvqa_rl.data.images.files import FileImage, MemoryImage
from medvqa_rl.data.images.sheet import draw_sheet, save_sheet
from medvqa_rl.data.reading.issues import RowIssue
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.models.dimensions import ResizedImages
from medvqa_rl.report.pages.data_page import MAX_ISSUES, histograms, write_data_page
from medvqa_rl.rollout.vllm.server import as_url

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


class Reader(HTMLParser):
    """Collects tags and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(tmp_path: Path, train: StoredDataset, test: StoredDataset) -> tuple[str, Reader]:
    report = check_data({"train": train, "test": test}, cost=ResizedImages(max_pixels=112 * 112))
    out = write_data_page(tmp_path / "new" / "page.html", report, "of a model")
    reader = Reader()
    html = out.read_text(encoding="utf-8")
    reader.feed(html)
    assert not list(out.parent.glob("*.partial"))
    return html, reader


def picture(seed: int, name: str) -> MemoryImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return MemoryImage(name, Image.fromarray(pixels).resize((600, 450)))


def choice(number: int, image: MemoryImage | FileImage) -> Sample:
    return Sample(f"{EVIL}{number}", f"{EVIL}?", "B", "choice", (image,), (EVIL, "cyst"), groups={EVIL: EVIL})


def test_everything_found_is_on_the_page_and_escaped(tmp_path: Path) -> None:
    issues = tuple(RowIssue(row, EVIL, "missing image", "dropped", EVIL) for row in range(MAX_ISSUES + 5))
    train = StoredDataset(
        "toy/official/train", [choice(n, picture(n, f"{n}{EVIL}")) for n in range(12)], issues=issues
    )
    shared = [choice(1, picture(1, "copy.png")), choice(2, picture(2, f"2{EVIL}"))]
    missing = [choice(3, FileImage("gone.png", tmp_path))]
    html, reader = page(tmp_path, train, StoredDataset("toy/official/test", shared + missing))
    names = {tag for tag, _ in reader.tags}
    assert "script" not in names and "link" not in names
    assert all(not attribute.startswith("on") for _, attributes in reader.tags for attribute in attributes)
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(sources) == 3 and all(str(source).startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"(?:src|href)=[\"']?http|url\(", html)
    assert "default-src 'none'" in html
    for text in ("2 of 3", "copy.png = 1", "gone.png", "equal pixels", f"{MAX_ISSUES + 5} rows dropped", "and 5 more"):
        assert text in " ".join(reader.text.split()), text
    assert "49" not in re.findall(r"alert\(1\)>[^&]*&(\d+)", reader.text) and "{{ 7 * 7 }}" in reader.text
    assert "Answer letters" in reader.text and "100.0 % (12)" in reader.text


def test_a_clean_set_says_so(tmp_path: Path) -> None:
    train, test = (
        StoredDataset(
            f"toy/{name}", [Sample("a", "Where is it?", "left lung", "open", (picture(seed, f"{seed}.png"),))]
        )
        for seed, name in enumerate(("train", "test"))
    )
    _, reader = page(tmp_path, train, test)
    assert "No problems found" in reader.text and "Shared images" not in reader.text
    assert "0 of 1" in " ".join(reader.text.split())
    # 600 x 450 within 112 x 112 pixels: scaled by 0.216 to 129 x 97, cut down to 112 x 84, 4 x 3 tokens.
    assert "median 12 tokens" in reader.text


def test_bars_count_every_value_and_share_their_scale() -> None:
    train, test, none = histograms("x", [[1, 2, 2, 100], [10, 10], []], "words")
    assert sum(train.counts) == 4 and sum(test.counts) == 2 and none.counts == ()
    assert len(train.counts) == len(test.counts) and max(train.heights) == 1.0
    assert train.summary == "median 2 words, 1 to 100" and none.summary == "none"
    # The scale is one of ratios: 10 is half way from 1 to 100.
    assert test.median == pytest.approx(0.5, abs=0.01)
    assert [label for _, label in train.ticks] == ["1", "10", "100"]
    (single,) = histograms("x", [[7, 7, 7]], "words")
    assert sum(single.counts) == 3


def test_names_in_metadata_reach_no_page_sheet_or_export(tmp_path: Path) -> None:
    """The shared image is shown on the page, small and large; its bytes are searched in every output."""
    name, out, samples = b"DOE^JANE", tmp_path / "out", []
    exif = Image.Exif()
    exif[0x010E] = name.decode()
    for side in (16, 600):
        path = tmp_path / f"{side}.jpg"
        source = picture(side, "")
        source.image.resize((side, side)).save(path, exif=exif, comment=name, icc_profile=name, xmp=name)
        assert path.read_bytes().count(name) == 4
        samples.append(Sample(str(side), "Where?", "left", "open", (FileImage(path.name, tmp_path),)))
    splits = [StoredDataset(split, samples) for split in ("train", "test")]
    html, _ = page(out, *splits)
    found = [base64.b64decode(code) for code in re.findall(r"data:image/\w+;base64,([^\"]+)", html)]
    assert len(found) == 2 and {data[:2] for data in found} == {b"\x89P", b"\xff\xd8"}
    found += [base64.b64decode(as_url(sample.images[0]).partition(",")[2]) for sample in samples]
    save_sheet(draw_sheet(samples), out / "sheet.png")
    for form in ("jsonl", "csv", "parquet"):
        export(splits[0], out, form, form=form)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) == 1 + 1 + 3 + 2
    assert not any(name in data for data in [*found, *(path.read_bytes() for path in files)])
