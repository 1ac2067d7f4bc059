"""DICOM files that the test writes: rescaling, windows, colours, frames, damage.

Run: pytest tests/data/images/test_dicom.py
"""

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medvqa_rl.data.images import files as images
from medvqa_rl.data.images.files import FileImage

pydicom = pytest.importorskip("pydicom")
UNCOMPRESSED = "1.2.840.10008.1.2.1"  # Explicit VR Little Endian
STORAGE = "1.2.840.10008.5.1.4.1.1.7"  # Secondary Capture
VALUES = np.arange(12, dtype=np.int16).reshape(3, 4) * 100


def write(path: Path, pixels: np.ndarray, **elements: Any) -> FileImage:
    """Write pixels, (rows, columns) or (frames, rows, columns) or (rows, columns, 3), with more elements."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = STORAGE
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = UNCOMPRESSED
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = STORAGE, "1.2.3"
    data.PatientName = "Nobody^Secret"
    is_colour = pixels.shape[-1] == 3 and pixels.ndim == 3
    data.SamplesPerPixel = 3 if is_colour else 1
    data.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        data.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.Rows, data.Columns = pixels.shape[:2] if is_colour else pixels.shape[-2:]
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return FileImage(path.name, path.parent)


def grey(source: FileImage) -> np.ndarray:
    image = source.load()
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def test_values_are_rescaled_and_then_windowed(tmp_path: Path) -> None:
    scan = write(
        tmp_path / "ct.dcm", VALUES, RescaleSlope="2", RescaleIntercept="-1000", WindowCenter="0", WindowWidth="1001"
    )
    hounsfield = VALUES * 2.0 - 1000
    expected = np.rint(255 * np.clip((hounsfield + 0.5) / 1000 + 0.5, 0, 1))
    np.testing.assert_array_equal(grey(scan), expected)
    assert scan.key == "ct.dcm"
    scan.check()


def test_the_first_of_several_windows_is_taken_and_a_given_one_wins(tmp_path: Path) -> None:
    both = {"WindowCenter": [500, 40], "WindowWidth": [1001, 400], "VOILUTFunction": "LINEAR_EXACT"}
    scan = write(tmp_path / "x.dcm", VALUES, **both)
    np.testing.assert_array_equal(grey(scan), np.rint(255 * np.clip((VALUES - 500) / 1001 + 0.5, 0, 1)))
    given_one = FileImage("x.dcm#window=300,201", tmp_path)
    np.testing.assert_array_equal(grey(given_one), np.rint(255 * np.clip((VALUES - 299.5) / 200 + 0.5, 0, 1)))
    assert given_one.key != scan.key


def test_without_a_window_the_frame_is_stretched_and_padding_left_out(tmp_path: Path) -> None:
    pixels = VALUES.copy()
    pixels[0, 0] = -2000
    scan = write(tmp_path / "x.dcm", pixels, PixelPaddingValue=-2000)
    np.testing.assert_array_equal(grey(scan), np.rint(255 * np.clip((pixels - 100) / 1000, 0, 1)))


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    plain = grey(write(tmp_path / "a.dcm", VALUES))
    inverse = grey(write(tmp_path / "b.dcm", VALUES, PhotometricInterpretation="MONOCHROME1"))
    assert plain[0, 0] == 0 and inverse[0, 0] == 255
    np.testing.assert_allclose(plain.astype(int) + inverse, 255, atol=1)


def test_a_voi_table_is_applied(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [4, 0, 8]  # four entries from value 0, of 8 bits
    table.add_new("LUTData", "US", [0, 10, 200, 255])
    scan = write(tmp_path / "x.dcm", np.array([[0, 1, 2, 3, 9]], np.uint16), VOILUTSequence=[table])
    np.testing.assert_array_equal(grey(scan), [[0, 10, 200, 255, 255]])


def test_frames_are_chosen_by_number(tmp_path: Path) -> None:
    frames = np.stack([np.array([[0, level, 255, 255]], np.uint8) for level in (10, 20, 30)])
    write(tmp_path / "cine.dcm", frames, WindowCenter="127.5", WindowWidth="255", VOILUTFunction="LINEAR_EXACT")
    assert grey(FileImage("cine.dcm", tmp_path))[0, 1] == 10
    assert grey(FileImage("cine.dcm#frame=2", tmp_path))[0, 1] == 30
    with pytest.raises(ValueError, match=r"cine\.dcm .*3 frames, so there is no frame 3"):
        FileImage("cine.dcm#frame=3", tmp_path).load()


def test_enhanced_objects_are_rescaled_and_windowed_per_frame(tmp_path: Path) -> None:
    frames = []
    for intercept in ("-1024", "0"):
        frame = pydicom.Dataset()
        rescale, window = pydicom.Dataset(), pydicom.Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept = "1", intercept
        window.WindowCenter, window.WindowWidth = "50", "100"
        frame.PixelValueTransformationSequence, frame.FrameVOILUTSequence = [rescale], [window]
        frames.append(frame)
    stored = np.arange(960, 1160, dtype=np.uint16).reshape(10, 20)
    write(tmp_path / "e.dcm", np.stack([stored, stored]), PerFrameFunctionalGroupsSequence=frames)
    expected = np.rint(255 * np.clip((stored - 1024.0 - 49.5) / 99 + 0.5, 0, 1))
    for name in ("e.dcm", "e.dcm#window=50,100"):
        np.testing.assert_array_equal(grey(FileImage(name, tmp_path)), expected)
    assert grey(FileImage("e.dcm#frame=1", tmp_path)).min() == 255


def test_colours_are_preserved_and_palettes_applied(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 128, 0]], [[0, 0, 64], [9, 8, 7]]], np.uint8)
    np.testing.assert_array_equal(np.asarray(write(tmp_path / "rgb.dcm", colours).load()), colours)
    tables = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        entries = np.array([10 * (channel + 1) * 257, 100 * 257], np.uint16)
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    palette = write(
        tmp_path / "p.dcm", np.array([[0, 1]], np.uint8), PhotometricInterpretation="PALETTE COLOR", **tables
    )
    pixels = np.asarray(palette.load())
    assert pixels.tolist() == [[[10, 20, 30], [100, 100, 100]]]


def test_run_length_encoding_is_decoded(tmp_path: Path) -> None:
    scan = write(tmp_path / "x.dcm", VALUES)
    before = grey(scan)
    data = pydicom.dcmread(tmp_path / "x.dcm")
    data.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    data.save_as(tmp_path / "x.dcm")
    np.testing.assert_array_equal(grey(scan), before)


def test_large_frames_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = write(tmp_path / "x.dcm", VALUES)
    monkeypatch.setattr(images, "MAX_PIXELS", 11)
    for read in (scan.load, scan.check):
        with pytest.raises(ValueError, match=r"x\.dcm has 4 x 3 pixels, but at most 11"):
            read()


@pytest.mark.filterwarnings("ignore:Expected implicit VR")
@pytest.mark.parametrize("content", [b"", b"no DICOM at all", b"\0" * 128 + b"DICM"])
def test_files_that_are_not_images_are_reported_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan 7.dcm").write_bytes(content)
    for read in (FileImage("scan 7.dcm", tmp_path).load, FileImage("scan 7.dcm", tmp_path).check):
        with pytest.raises(ValueError, match=r"scan 7\.dcm cannot be decoded as DICOM"):
            read()
    with pytest.raises(ValueError, match="does not exist"):
        FileImage("gone.dcm", tmp_path).load()


@pytest.mark.parametrize(
    ("uid", "name"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.33", "Comprehensive SR"),
        ("1.2.840.10008.5.1.4.1.1.481.5", "RT Plan"),
        ("1.2.840.10008.5.1.4.1.1.9.1.1", "12-lead ECG Waveform"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "Encapsulated PDF"),
        ("1.2.3.4", "of an unknown kind"),
    ],
)
def test_objects_without_pixels_are_named(tmp_path: Path, uid: str, name: str) -> None:
    scan = write(tmp_path / "x.dcm", VALUES, SOPClassUID=uid)
    data = pydicom.dcmread(tmp_path / "x.dcm")
    for element in ("Rows", "Columns", "PhotometricInterpretation", "PixelData"):
        del data[element]
    data.save_as(tmp_path / "x.dcm")
    for read in (scan.load, scan.check):
        with pytest.raises(ValueError, match=rf"x\.dcm is a DICOM object without pixels \({name}\): remove its rows"):
            read()


def test_a_missing_decoder_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders import JPEGLSLosslessDecoder
    from pydicom.uid import MPEG2MPML, JPEGExtended12Bit, JPEGLSLossless

    monkeypatch.setattr(JPEGLSLosslessDecoder, "_available", {})
    scan = write(tmp_path / "x.dcm", VALUES)
    for syntax, message in (
        (JPEGLSLossless, r"compressed as JPEG-LS Lossless .*: pip install 'medvqa-rl\[dicom-compressed\]'"),
        (
            JPEGExtended12Bit,
            r"compressed as JPEG Extended .* with 16 bits, .*: pip install pylibjpeg pylibjpeg-",
        ),
        (MPEG2MPML, r"compressed as MPEG2 .*, which pydicom does not decode: convert its frames to PNG"),
    ):
        data = pydicom.dcmread(tmp_path / "x.dcm")
        data.file_meta.TransferSyntaxUID = syntax
        data.PixelData = pydicom.encaps.encapsulate([VALUES.tobytes()])
        data["PixelData"].is_undefined_length = True
        data.save_as(tmp_path / "y.dcm")
        for read in (FileImage("y.dcm", scan.root).load, FileImage("y.dcm", scan.root).check):
            with pytest.raises(ValueError, match=rf"y\.dcm is {message}"):
                read()


@pytest.mark.parametrize("name", ["IM0001", "1.2.840.113.7", "scan.IMA", "scan.dcm.gz", "scan.gz", "scan.jpg"])
@pytest.mark.parametrize("preamble", [True, False])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", UNCOMPRESSED])
def test_dicom_is_recognised_by_its_content(tmp_path: Path, name: str, preamble: bool, syntax: str) -> None:
    expected = grey(write(tmp_path / "x.dcm", VALUES))
    data = pydicom.dcmread(tmp_path / "x.dcm")
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(tmp_path / "x.dcm", implicit_vr=syntax != UNCOMPRESSED, little_endian=True)
    content = (tmp_path / "x.dcm").read_bytes()
    if not preamble:  # the data set alone, as older systems write it
        content = content[content.index(b"\x08\x00\x16\x00") :]
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    scan = FileImage(name, tmp_path)
    scan.check()
    np.testing.assert_array_equal(grey(scan), expected)
    window = FileImage(f"{name}#window=500,101", tmp_path)
    assert window.file == tmp_path / name
    np.testing.assert_array_equal(grey(window), np.rint(255 * np.clip((VALUES - 499.5) / 100 + 0.5, 0, 1)))


def test_messages_contain_no_patient_data(tmp_path: Path) -> None:
    scan = write(tmp_path / "x.dcm", VALUES, PixelData=b"\0\0")
    with pytest.raises(ValueError, match=r"x\.dcm") as caught:
        scan.load()
    assert "Secret" not in str(caught.value)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8), st.floats(0.3, 1.0))
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_a_value_error(
    tmp_path: Path, damage: list[tuple[float, int]], length: float
) -> None:
    write(tmp_path / "damaged.dcm", VALUES, WindowCenter="500", WindowWidth="900")
    content = bytearray((tmp_path / "damaged.dcm").read_bytes())
    for place, value in damage:
        content[int(place * len(content))] = value
    (tmp_path / "damaged.dcm").write_bytes(content[: int(length * len(content))])
    try:
        assert FileImage("damaged.dcm", tmp_path).load().mode == "RGB"
    except ValueError as error:
        assert "damaged.dcm" in str(error)


def test_a_missing_pydicom_is_reported_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = write(tmp_path / "x.dcm", VALUES)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"x\.dcm is a DICOM file, and pydicom is not installed: pip install"):
        scan.load()
