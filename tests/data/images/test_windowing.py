"""Windows against the standard's own numbers; fragments of names.

Run: pytest tests/data/images/test_windowing.py
"""

import math
from pathlib import Path

import numpy as np
import pytest

from medvqa_rl.data.images.windowing import grey_levels, medical_kind, read_fragment, split_fragment, stretch, window


def test_the_linear_window_follows_the_standard() -> None:
    # The examples of DICOM PS3.3 C.11.2.1.2.1, output 0 to 255.
    x = np.arange(-200, 4300, dtype=np.float64)
    wide = 255 * window(x, 2048, 4096)
    np.testing.assert_allclose(wide[x <= 0], 0)
    np.testing.assert_allclose(wide[x > 4095], 255)
    np.testing.assert_allclose(wide[(x > 0) & (x <= 4095)], ((x[(x > 0) & (x <= 4095)] - 2047.5) / 4095 + 0.5) * 255)
    np.testing.assert_allclose(window(x, 0, 1), np.where(x <= -0.5, 0, 1))
    narrow = window(np.array([-51.0, -50, 49, 50]), 0, 100)  # slope (x + 0.5) / 99 + 0.5
    np.testing.assert_allclose(narrow, [0, 0, 1, 1])


def test_the_other_windows_by_hand() -> None:
    np.testing.assert_allclose(window(np.array([-50.0, 0, 25, 50, 99]), 0, 100, "LINEAR_EXACT"), [0, 0.5, 0.75, 1, 1])
    sigmoid = window(np.array([40.0, 140, -1e9]), 40, 400, "SIGMOID")
    np.testing.assert_allclose(sigmoid, [0.5, 1 / (1 + math.exp(-1)), 0], atol=1e-12)


@pytest.mark.parametrize(("width", "function"), [(0.5, "LINEAR"), (0, "LINEAR_EXACT"), (-1, "SIGMOID")])
def test_windows_without_width_are_refused(width: float, function: str) -> None:
    with pytest.raises(ValueError, match="width"):
        window(np.zeros(1), 0, width, function)


def test_stretching_leaves_padding_out_of_the_range() -> None:
    values = np.array([-2000.0, 10, 20, 30, np.nan])
    valid = values > -100
    np.testing.assert_allclose(stretch(values, valid), [0, 0, 0.5, 1, 0])
    np.testing.assert_array_equal(grey_levels(stretch(np.array([1.0, 2.0, 3.0]))), [0, 128, 255])
    assert stretch(np.full((2, 2), 7)).max() == 0
    assert stretch(np.zeros((0,))).size == 0


def test_fragments_and_kinds_of_names() -> None:
    assert split_fragment("a#1.png") == ("a#1.png", None)
    assert split_fragment("a.dcm") == ("a.dcm", None)
    assert split_fragment("IM#1#frame=2&window=40,400") == ("IM#1", "frame=2&window=40,400")
    assert split_fragment("IM#slice=2") == ("IM#slice=2", None)
    assert split_fragment("b/c.NII.GZ#slice=3") == ("b/c.NII.GZ", "slice=3")
    for kind, names in {
        "dicom": ["x.dcm#frame=1", "x.DICOM", "x.IMA", "x.dcm.gz#window=1,2"],
        "nifti": ["x.nii", "x.nii.gz"],
        None: ["x.gz", "x.png", "IM0001"],
    }.items():
        assert [medical_kind(name) for name in names] == [kind] * len(names)


def test_fragments_are_parsed_or_refused_with_a_clear_error() -> None:
    path, allowed = Path("x.dcm"), ("frame", "window")
    assert read_fragment("frame=2&window=-40,400.5", allowed, path) == {"frame": (2.0,), "window": (-40.0, 400.5)}
    assert read_fragment(None, allowed, path) == read_fragment("", allowed, path) == {}
    for wrong in ("slice=1", "frame=-1", "frame=1.5", "frame=x", "frame", "window=3", "window=0,0", "window=0,nan"):
        with pytest.raises(ValueError, match=r"x\.dcm.*frame=NUMBER, window=CENTER,WIDTH"):
            read_fragment(wrong, allowed, path)
    with pytest.raises(ValueError, match="each once"):
        read_fragment("frame=1&frame=2", allowed, path)
