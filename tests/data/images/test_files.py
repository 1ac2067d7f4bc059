"""Any file becomes an RGB image or a ValueError that names it.

Run: pytest tests/data/images/test_files.py
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from medvqa_rl.data.images.files import MAX_PIXELS, FileImage, MemoryImage, shrink

GRADIENT = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)


def saved(folder: Path, image: Image.Image, name: str = "x.png", **options: object) -> FileImage:
    image.save(folder / name, **options)  # type: ignore[arg-type]
    return FileImage(name, folder)


def pixels(source: FileImage | MemoryImage) -> np.ndarray:
    image = source.load()
    assert image.mode == "RGB"
    return np.asarray(image)


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    source = saved(tmp_path, Image.fromarray(GRADIENT))
    assert source.key == "x.png"
    np.testing.assert_array_equal(pixels(source), np.repeat(GRADIENT[:, :, None], 3, axis=2))


def test_16_bit_images_are_stretched_from_their_own_range(tmp_path: Path) -> None:
    twelve_bit = 100 + GRADIENT.astype(np.uint16) * 15
    np.testing.assert_array_equal(pixels(saved(tmp_path, Image.fromarray(twelve_bit)))[:, :, 0], GRADIENT)
    flat = saved(tmp_path, Image.fromarray(np.full((4, 4), 700, np.uint16)), "flat.png")
    np.testing.assert_array_equal(pixels(flat), 0)
    floats = Image.fromarray(np.array([[0.0, 0.5], [1.0, np.nan]], np.float32))
    np.testing.assert_array_equal(pixels(saved(tmp_path, floats, "f.tiff"))[:, :, 1], [[0, 128], [255, 0]])


def test_transparency_is_composited_over_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert 126 <= int(pixels(saved(tmp_path, half))[0, 0, 0]) <= 128
    clear = Image.new("LA", (1, 1), (0, 0))
    assert pixels(saved(tmp_path, clear))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([10, 20, 30] * 256)
    assert pixels(saved(tmp_path, palette))[0, 0].tolist() == [10, 20, 30]
    assert pixels(saved(tmp_path, palette, "t.png", transparency=3))[0, 0].tolist() == [255, 255, 255]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 255], [0, 255], [0, 255]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright = pixels(saved(tmp_path, image, exif=exif))
    np.testing.assert_array_equal(upright[:, :, 0], [[0, 0, 0], [255, 255, 255]])


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("L", (3, 3), value) for value in (40, 200)]
    source = saved(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(source), 40)


def test_multi_picture_jpegs_are_decoded(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT)
    source = saved(tmp_path, image, "x.jpg", format="MPO", save_all=True, append_images=[image])
    assert pixels(source).shape == (32, 48, 3)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    assert pixels(saved(tmp_path, Image.new("CMYK", (8, 8)), "x.jpg")).min() > 250


def test_memory_images_keep_their_key() -> None:
    source = MemoryImage("a/b.png", Image.new("L", (2, 2), 9))
    assert source.key == "a/b.png"
    assert pixels(source)[0, 0].tolist() == [9, 9, 9]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return header + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GRADIENT).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot be decoded"),
        (b"<html>not found</html>", "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (png_header(30_000, 30_000), "30000 x 30000"),
        (png_header(9_000, 9_000), f"at most {MAX_PIXELS:,}"),
        (png_header(10, 10), "cannot be decoded"),
        (jpeg()[:-100], "truncated"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_reported_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "scan 7.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"scan 7\.jpg") as caught:
        FileImage("scan 7.jpg", tmp_path).load()
    assert message in str(caught.value) or "exceeds limit" in str(caught.value)


def test_the_check_reads_headers(tmp_path: Path) -> None:
    saved(tmp_path, Image.fromarray(GRADIENT)).check()
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:-100])
    FileImage("cut.jpg", tmp_path).check()
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("empty.jpg", "missing.jpg", "."):
        with pytest.raises(ValueError, match="image"):
            FileImage(name, tmp_path).check()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.0, 1.0),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_a_value_error(
    tmp_path: Path, kind: str, damage: list[tuple[float, int]], length: float
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(GRADIENT).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for place, value in damage:
        data[int(place * len(data))] = value
    (tmp_path / "damaged").write_bytes(data[: max(1, int(length * len(data)))])
    try:
        assert FileImage("damaged", tmp_path).load().mode == "RGB"
    except ValueError as error:
        assert "damaged" in str(error)


def test_shrinking_keeps_the_ratio_and_the_limit() -> None:
    image = Image.new("RGB", (400, 300))
    assert shrink(image, 120_000) is image
    assert shrink(image, 30_000).size == (200, 150)  # a quarter of the area, half of each side
    assert shrink(image, 1).size == (1, 1)
    assert shrink(Image.new("L", (1, 1000)), 10).size == (1, 10)
    with pytest.raises(ValueError, match="at least 1"):
        shrink(image, 0)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 10_000))
@settings(max_examples=60, deadline=None)
def test_no_image_exceeds_the_limit(width: int, height: int, limit: int) -> None:
    small = shrink(Image.new("L", (width, height)), limit)
    assert small.width * small.height <= max(limit, 1) and small.width <= width and small.height <= height


def test_header_pixels_are_read_without_decoding(tmp_path: Path) -> None:
    Image.new("L", (60, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])  # the pixels are missing
    assert FileImage("a.png", tmp_path).header_pixels() == 60 * 40
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    assert FileImage("a.png", tmp_path).header_pixels() == 30 * 20  # the file has changed
    assert FileImage("gone.png", tmp_path).header_pixels() is None
    assert FileImage("x.dcm", tmp_path).header_pixels() is None


def test_fragments_after_other_images_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    for read in (FileImage("x.png#frame=1", tmp_path).load, FileImage("x.png#frame=1", tmp_path).check):
        with pytest.raises(ValueError, match=r"x\.png is not DICOM, so remove the fragment #frame=1"):
            read()


NAME = b"DOE^JANE"


def named_everywhere(folder: Path, name: str) -> FileImage:
    """An image file with a patient's name in each place that its format has for metadata."""
    exif = Image.Exif()
    exif[0x010E] = exif[0x9C9B] = NAME.decode()
    texts = PngInfo()
    texts.add_text("Patient", NAME.decode())
    texts.add_itxt("XML:com.adobe.xmp", NAME.decode())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + NAME
    options: dict[str, object] = {"exif": exif, "xmp": NAME, "icc_profile": profile, "pnginfo": texts}
    if not name.endswith(".webp"):
        options["comment"] = NAME
    source = saved(folder, Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)), name, **options)
    assert NAME in source.file.read_bytes()
    return source


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tiff", "x.gif"])
def test_decoded_images_hold_pixels_only(tmp_path: Path, name: str) -> None:
    image = named_everywhere(tmp_path, name).load()
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF"):
        buffer = io.BytesIO()
        image.save(buffer, form)
        assert NAME not in buffer.getvalue(), form
