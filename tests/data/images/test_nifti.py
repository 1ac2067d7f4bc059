"""NIfTI volumes that the test writes: slices, orientation, scaling, damage.

Run: pytest tests/data/images/test_nifti.py
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medvqa_rl.data.images import files as images
from medvqa_rl.data.images.files import FileImage

nibabel = pytest.importorskip("nibabel")
VOLUME = (np.arange(3 * 4 * 5, dtype=np.int16) ** 2).reshape(3, 4, 5)  # right, anterior, superior; no two slices alike


def write(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> FileImage:
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)
    return FileImage(path.name, path.parent)


def grey(source: FileImage) -> np.ndarray:
    image = source.load()
    assert image.mode == "RGB"
    return np.asarray(image)[:, :, 0]


def levels(plane: np.ndarray) -> np.ndarray:
    return np.rint((plane - plane.min()) / (plane.max() - plane.min()) * 255)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_the_middle_axial_slice_in_radiological_view(tmp_path: Path, name: str) -> None:
    scan = write(tmp_path / name, VOLUME)
    pixels = grey(scan)
    assert pixels.shape == (4, 3)  # anterior at the top, the patient's right on the left
    expected = np.array([[VOLUME[x, y, 2] for x in (2, 1, 0)] for y in (3, 2, 1, 0)])
    np.testing.assert_array_equal(pixels, levels(expected))
    scan.check()


def test_cifti_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    scalars = nibabel.cifti2.ScalarAxis(["a"])
    surface = nibabel.cifti2.BrainModelAxis.from_mask(np.ones(5), name="CortexLeft")
    nibabel.save(nibabel.Cifti2Image(np.zeros((1, 5)), (scalars, surface)), tmp_path / "x.dscalar.nii")
    scan = FileImage("x.dscalar.nii", tmp_path)
    for read in (scan.load, scan.check):
        with pytest.raises(ValueError, match=r"x\.dscalar\.nii is a CIFTI-2 file, .* no slices"):
            read()


def test_axes_and_slices_by_number(tmp_path: Path) -> None:
    write(tmp_path / "x.nii", VOLUME)
    sagittal = grey(FileImage("x.nii#axis=0&slice=0", tmp_path))
    np.testing.assert_array_equal(
        sagittal, levels(np.array([[VOLUME[0, y, z] for y in (3, 2, 1, 0)] for z in range(5)[::-1]]))
    )
    coronal = grey(FileImage("x.nii#axis=1&slice=3", tmp_path))
    np.testing.assert_array_equal(
        coronal, levels(np.array([[VOLUME[x, 3, z] for x in (2, 1, 0)] for z in range(5)[::-1]]))
    )
    for fragment, message in (("slice=5", "5 axial slices"), ("axis=3", "no axis 3"), ("volume=1", "1 volumes")):
        with pytest.raises(ValueError, match=rf"x\.nii cannot be read.*{message}"):
            FileImage(f"x.nii#{fragment}", tmp_path).load()


def test_the_orientation_of_the_file_does_not_change_the_image(tmp_path: Path) -> None:
    whole = nibabel.Nifti1Image(VOLUME, np.eye(4))
    for code in ("LPS", "ASR", "SLA", "PIR"):
        target = nibabel.orientations.axcodes2ornt(code)
        turned = whole.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(whole.affine), target))
        nibabel.save(turned, tmp_path / f"{code}.nii")
        write(tmp_path / "plain.nii", VOLUME)
        for fragment in ("axis=0&slice=1", "axis=1&slice=0", "axis=2&slice=4"):
            expected = grey(FileImage(f"plain.nii#{fragment}", tmp_path))
            np.testing.assert_array_equal(grey(FileImage(f"{code}.nii#{fragment}", tmp_path)), expected)


def test_values_are_scaled_and_windowed(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.header.set_slope_inter(2, -50)
    nibabel.save(image, tmp_path / "x.nii")
    stored = np.asarray(nibabel.load(tmp_path / "x.nii").dataobj)[::-1, ::-1, 2].T
    expected = np.rint(255 * np.clip((stored - 9.5) / 40 + 0.5, 0, 1))
    np.testing.assert_array_equal(grey(FileImage("x.nii#window=10,41", tmp_path)), expected)


def test_a_volume_of_a_series_and_a_flat_file(tmp_path: Path) -> None:
    series = np.stack([VOLUME, VOLUME[::-1]], axis=-1)
    write(tmp_path / "x.nii", series)
    first, second = (grey(FileImage(f"x.nii#volume={number}", tmp_path)) for number in (0, 1))
    np.testing.assert_array_equal(first, second[:, ::-1])
    flat = write(tmp_path / "flat.nii", VOLUME[:, :, 0])
    assert grey(flat).shape == (4, 3)
    assert grey(FileImage("flat.nii#axis=0", tmp_path)).shape == (1, 4)  # one line of pixels, not the whole image


def test_thick_slices_are_drawn_in_millimetres(tmp_path: Path) -> None:
    write(tmp_path / "x.nii", VOLUME, np.diag([1.0, 1.0, 4.0, 1.0]))
    assert FileImage("x.nii#axis=0", tmp_path).load().size == (4, 20)
    assert FileImage("x.nii#axis=2", tmp_path).load().size == (3, 4)


def test_unsupported_volumes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(ValueError, match=r"rgb\.nii holds colours"):
        write(tmp_path / "rgb.nii", colours).load()
    (tmp_path / "x.nii.gz").write_bytes(b"no volume")
    with pytest.raises(ValueError, match=r"x\.nii\.gz cannot be read as NIfTI"):
        FileImage("x.nii.gz", tmp_path).check()
    with pytest.raises(ValueError, match=r"gone\.nii does not exist"):
        FileImage("gone.nii", tmp_path).load()
    scan = write(tmp_path / "big.nii", VOLUME)
    monkeypatch.setattr(images, "MAX_PIXELS", 19)
    with pytest.raises(ValueError, match="at most 19 pixels"):
        scan.check()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["d.nii", "d.nii.gz"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0.3, 1.0),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_a_value_error(
    tmp_path: Path, name: str, damage: list[tuple[float, int]], length: float
) -> None:
    write(tmp_path / name, VOLUME)
    content = bytearray((tmp_path / name).read_bytes())
    for place, value in damage:
        content[int(place * len(content))] = value
    (tmp_path / name).write_bytes(content[: int(length * len(content))])
    try:
        assert FileImage(name, tmp_path).load().mode == "RGB"
    except ValueError as error:
        assert name in str(error)


def test_a_missing_nibabel_is_reported_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = write(tmp_path / "x.nii", VOLUME)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ValueError, match=r"x\.nii is a NIfTI file, and nibabel is not installed: pip install"):
        scan.load()
