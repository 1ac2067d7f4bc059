"""Rescale, windows and palettes of DICOM elements in memory.

Run: pytest tests/data/images/test_dicom_values.py
"""

from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from medvqa_rl.data.images.dicom_values import brightness, colours, merge_functional_groups  # noqa: E402

STORED = np.array([[0, 500, 1024, 1074, 1500]], np.uint16)


def elements(**values: Any) -> Any:
    data = pydicom.Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return data


def group(**values: Any) -> Any:
    return elements(**{name: [elements(**item)] for name, item in values.items()})


def rescale(slope: float, intercept: float) -> dict[str, str]:
    return {"RescaleSlope": str(slope), "RescaleIntercept": str(intercept)}


def linear(values: np.ndarray, center: float, width: float) -> np.ndarray:
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def test_shared_groups_replace_the_top_level() -> None:
    data = elements(**rescale(7, 7), WindowCenter="1", WindowWidth="2", VOILUTFunction="SIGMOID")
    data.SharedFunctionalGroupsSequence = [
        group(
            PixelValueTransformationSequence=rescale(1, -1024),
            FrameVOILUTSequence={"WindowCenter": ["50", "0"], "WindowWidth": ["100", "9"]},
        )
    ]
    merge_functional_groups(data, 3)
    np.testing.assert_allclose(brightness(STORED, data, None), linear(STORED - 1024.0, 50, 100))
    np.testing.assert_allclose(brightness(STORED, data, (0, 2000)), linear(STORED - 1024.0, 0, 2000))


def test_groups_of_a_frame_override_shared_ones() -> None:
    window = {"WindowCenter": "50", "WindowWidth": "100", "VOILUTFunction": "SIGMOID"}
    data = elements(
        SharedFunctionalGroupsSequence=[
            group(PixelValueTransformationSequence=rescale(1, 0), FrameVOILUTSequence=window)
        ],
        PerFrameFunctionalGroupsSequence=[
            elements(),
            group(
                PixelValueTransformationSequence=rescale(2, -10),
                FrameVOILUTSequence={"WindowCenter": "1000", "WindowWidth": "801"},
            ),
        ],
    )
    merge_functional_groups(data, 1)
    np.testing.assert_allclose(brightness(STORED, data, None), linear(STORED * 2.0 - 10, 1000, 801))
    with pytest.raises(RuntimeError, match="2 frames only, so none for frame 2"):
        merge_functional_groups(data, 2)


def test_real_world_values_serve_given_windows_where_there_is_no_rescale() -> None:
    line = {"RealWorldValueSlope": 0.5, "RealWorldValueIntercept": -100.0}
    data = elements(SharedFunctionalGroupsSequence=[group(RealWorldValueMappingSequence=line)])
    data.WindowCenter, data.WindowWidth = "1000", "1001"
    merge_functional_groups(data, 0)
    np.testing.assert_allclose(brightness(STORED, data, (400, 500)), linear(STORED * 0.5 - 100, 400, 500))
    # The file's own window is in stored units.
    np.testing.assert_allclose(brightness(STORED, data, None), linear(STORED * 1.0, 1000, 1001))
    data.update(elements(**rescale(1, -1024)))
    np.testing.assert_allclose(brightness(STORED, data, (400, 500)), linear(STORED - 1024.0, 400, 500))


def test_real_world_values_by_table() -> None:
    table = {"RealWorldValueFirstValueMapped": 500, "RealWorldValueLUTData": [10.0, 20.0, 40.0]}
    data = group(RealWorldValueMappingSequence=table)
    values = np.array([[0, 500, 501, 502, 900]], np.uint16)
    mapped = np.array([[10.0, 10, 20, 40, 40]])
    np.testing.assert_allclose(brightness(values, data, (25, 50)), linear(mapped, 25, 50))


@pytest.mark.parametrize(("bits", "scale"), [(8, 1), (16, 257)])
def test_palettes_use_the_range_of_their_descriptor(bits: int, scale: int) -> None:
    """Entries of 8 bits may be stored in 16, and a dark image stays dark."""
    data = elements(BitsStored=8, PhotometricInterpretation="PALETTE COLOR")
    for number, name in enumerate(("Red", "Green", "Blue")):
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [3, 0, bits])
        entries = np.array([0, 10 + number, 200], np.uint16) * scale
        setattr(data, f"{name}PaletteColorLookupTableData", entries.tobytes())
    dark = np.array([[0, 1]], np.uint8)
    assert colours(dark, data).tolist() == [[[0, 0, 0], [10, 11, 12]]]
    data.AlphaPaletteColorLookupTableData = bytes(6)
    assert colours(dark, data).shape == (1, 2, 3)


def test_colours_of_more_than_8_bits_use_the_range_of_the_stored_bits() -> None:
    data = elements(BitsStored=12, PhotometricInterpretation="RGB")
    pixels = np.array([[[0, 1000, 2000]]], np.uint16)
    assert colours(pixels, data).tolist() == [[[0, round(1000 / 4095 * 255), round(2000 / 4095 * 255)]]]
