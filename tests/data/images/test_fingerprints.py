"""Hashes of pixels and looks, overlap of splits, and the cost in image tokens.

Run: pytest tests/data/images/test_fingerprints.py
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.fft import dctn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medvqa_rl.core.types import ImageSource
from medvqa_rl.data.images.files import FileImage, MemoryImage
from medvqa_rl.data.images.fingerprints import (
    BITS,
    NEAR,
    ImageFacts,
    as_words,
    image_facts,
    measure,
    near_pairs,
    perceptual_hash,
    pixel_hash,
)
from medvqa_rl.data.overlap import find_overlap, twins
from medvqa_rl.models.dimensions import ResizedImages


def blobs(seed: int, size: tuple[int, int] = (200, 160)) -> Image.Image:
    """A smooth random picture, as little alike for two seeds as two scans."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def bits(first: Image.Image, second: Image.Image) -> int:
    left, right = (int.from_bytes(perceptual_hash(image), "big") for image in (first, second))
    return (left ^ right).bit_count()


def test_equal_pixels_have_equal_hashes(tmp_path: Path) -> None:
    image = blobs(0)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    first, second = (image_facts(FileImage(name, tmp_path)) for name in ("a.png", "b.bmp"))
    assert first.pixels == second.pixels == hashlib.sha256(b"200x160:" + image.tobytes()).digest()
    changed = image.copy()
    changed.putpixel((3, 3), (1, 2, 3))
    assert pixel_hash(changed) != first.pixels
    # The same bytes in another shape are another image.
    assert pixel_hash(Image.new("RGB", (2, 8))) != pixel_hash(Image.new("RGB", (8, 2)))


def test_the_perceptual_hash_is_the_signs_of_low_frequencies() -> None:
    image = blobs(1)
    grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX), dtype=float)
    signs = dctn(grey, norm="ortho")[:16, :16].ravel()[1:] > 0
    assert len(signs) == BITS
    assert perceptual_hash(image) == np.packbits(signs).tobytes()


def test_only_copies_are_near_duplicates() -> None:
    images = [blobs(seed) for seed in range(8)]
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60)
        copies = [
            Image.open(buffer).convert("RGB"),
            image.resize((100, 80)),
            ImageEnhance.Brightness(image).enhance(0.9),
        ]
        assert max(bits(image, copy) for copy in copies) <= NEAR
    assert min(bits(images[i], images[j]) for i in range(8) for j in range(i)) > 2 * NEAR


def test_near_pairs_equal_a_bitwise_count() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (30, 32), dtype=np.uint8)
    second = np.concatenate([first[:5] ^ np.eye(5, 32, dtype=np.uint8), rng.integers(0, 256, (9, 32), dtype=np.uint8)])
    expected = [
        (i, j, distance)
        for i in range(30)
        for j in range(14)
        if (distance := int(np.unpackbits(first[i] ^ second[j]).sum())) <= 110
    ]
    words = [as_words(row.tobytes() for row in rows) for rows in (first, second)]
    assert expected and list(near_pairs(*words, most=110, block=40)) == expected
    assert list(near_pairs(words[0], words[1][:0])) == []


def facts(key: str, pixels: int, look: bytes = b"") -> ImageFacts:
    return ImageFacts(key, 1, 1, bytes([pixels]) * 32, look, 10.0, False)


def test_overlap_is_found_by_name_then_pixels_then_perceptual_hash() -> None:
    zero = bytes(32)
    close, far = bytes(31) + b"\x06", b"\xff" * 32
    known = [
        facts("a", 1, zero),
        facts("b", 2),
        facts("c", 3, far),
        facts("A", 1, zero),
        facts("near", 4, close),
        facts("other", 5, b"\xf0" * 32),
        facts("flat", 6),
    ]
    measured = {each.key: each for each in known}
    found = find_overlap(("train", ["a", "b", "c"]), ("test", ["b", "A", "near", "other", "flat", "unread"]), measured)
    assert [(pair.first, pair.second, pair.how, pair.bits) for pair in found.pairs] == [
        ("b", "b", "name", 0),
        ("a", "A", "pixels", 0),
        ("a", "near", "hash", 2),
    ]
    assert (found.num_first, found.num_second) == (3, 6)
    assert (found.count("name"), found.count("name", "pixels"), found.count("hash")) == (1, 2, 1)
    assert twins(["a", "A", "b", "unread"], measured) == [("a", "A")]


def test_slices_of_one_volume_are_one_image() -> None:
    found = find_overlap(("train", ["v.nii#slice=3"]), ("test", ["v.nii#slice=4", "w.nii#slice=3"]), {})
    assert [(pair.first, pair.second, pair.how) for pair in found.pairs] == [
        ("v.nii#slice=3", "v.nii#slice=4", "name")
    ]


def test_flat_and_constant_images_are_distinguished() -> None:
    constant = image_facts(MemoryImage("x", Image.new("RGB", (40, 30), (9, 8, 7))))
    assert constant.is_constant and constant.spread == 0 and constant.look == b""
    one_point = Image.new("L", (40, 30), 100)
    one_point.putpixel((5, 5), 101)
    flat = image_facts(MemoryImage("y", one_point))
    assert not flat.is_constant and 0 < flat.spread < 2 and flat.look == b""
    seen = image_facts(MemoryImage("z", blobs(0)))
    assert not seen.is_constant and len(seen.look) == 32 and (seen.width, seen.height) == (200, 160)
    assert seen.spread == pytest.approx(np.asarray(blobs(0).convert("L")).std(), rel=1e-5)


def test_measuring_preserves_order_and_reports_unreadable_images(tmp_path: Path) -> None:
    sources: list[ImageSource] = [MemoryImage(str(number), blobs(number, (30, 20))) for number in range(30)]
    sources[7] = FileImage("gone.png", tmp_path)
    measured = list(measure(iter(sources), workers=3))
    assert [source for source, _ in measured] == sources
    problem = measured.pop(7)[1]
    assert isinstance(problem, str) and "gone.png" in problem
    assert all(isinstance(result, ImageFacts) and result.key == source.key for source, result in measured)


BUDGETS = [
    ResizedImages(),
    ResizedImages(min_pixels=28 * 28, max_pixels=112 * 112),
    ResizedImages(min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28),
]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(BUDGETS))
def test_token_counts_equal_those_of_the_processor(width: int, height: int, budget: ResizedImages) -> None:
    size = {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels}
    processor = Qwen2VLImageProcessorPil(size=size)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match=f"{width} x {height}.*200"):
            budget.tokens(width, height)
        return
    patches = processor.get_number_of_image_patches(height, width, {"size": size})
    assert budget.tokens(width, height) == patches // 4


@pytest.mark.parametrize("size", [(112, 112), (333, 71), (20, 500), (640, 480)])
def test_token_counts_are_those_of_processed_images(size: tuple[int, int]) -> None:
    budget = BUDGETS[1]
    limits = {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels}
    grid = Qwen2VLImageProcessorPil(size=limits)(blobs(0, size))["image_grid_thw"]
    _, down, across = (int(value) for value in np.asarray(grid).reshape(-1))
    assert budget.resized(*size) == (14 * across, 14 * down)
    assert budget.tokens(*size) == across * down // 4
