"""Dividing a table by image or patient loses no row and puts no group into two splits.

Run: pytest tests/data/test_division.py
"""

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medvqa_rl.data.division import Division, Entry, Whole, divide, equal_images, read_whole, write_divided
from medvqa_rl.data.reading.cells import image_cells

TABLE = Path("mine.csv")


def table(number: int = 200, *, per_image: int = 3, per_patient: int = 6) -> list[dict[str, Any]]:
    return [
        {"image": f"{n // per_image}.png", "question": f"q{n}", "answer": "yes", "patient": f"p{n // per_patient}"}
        for n in range(number)
    ]


def whole(rows: list[dict[str, Any]]) -> Whole:
    """The rows as a spreadsheet counts them: the header is row 1."""
    entries = (
        Entry(number, row, row, tuple(map(str, image_cells(row, {})))) for number, row in enumerate(rows, start=2)
    )
    return Whole(TABLE, tuple(entries), "", {})


def splits_of(division: Division, key: str) -> dict[str, set[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for row, place in zip(division.rows, division.splits):
        found[row[key]].add(place)
    return found


def test_no_image_is_in_two_splits_and_shares_are_kept() -> None:
    division = divide(whole(table(300)), val=0.1, test=0.2)
    assert all(len(places) == 1 for places in splits_of(division, "image").values())
    counts = division.counts()
    # Groups have 3 rows, so shares are exact to one and a half.
    assert counts == {"train": 210, "val": 30, "test": 60} and division.groups == 100


def test_no_patient_is_in_two_splits() -> None:
    rows = table(300)
    by_patient = divide(whole(rows), by="patient")
    assert all(len(places) == 1 for places in splits_of(by_patient, "patient").values())
    assert by_patient.groups == 50
    by_image = divide(whole(rows))
    assert any(len(places) > 1 for places in splits_of(by_image, "patient").values())


def test_rows_with_several_images_link_them() -> None:
    rows = [{"image": f"{n}.png|{n + 1}.png", "question": "q"} for n in range(0, 9)]
    assert divide(whole([*rows, *table(60)])).groups == 11  # of 20 images, 0 to 9 are one chain
    chain = divide(whole([*rows, *({"image": f"x{n}.png"} for n in range(30))]))
    assert chain.groups == 31 and len(set(chain.splits[:9])) == 1


def test_slices_of_one_volume_stay_together() -> None:
    rows = [{"image": f"{n // 10}.nii.gz#slice={n % 10}", "question": "q"} for n in range(300)]
    division = divide(whole(rows))
    assert division.groups == 30
    assert all(len(set(division.splits[start : start + 10])) == 1 for start in range(0, 300, 10))


def test_equal_images_stay_together(tmp_path: Path) -> None:
    for n in range(40):
        pixels = np.random.default_rng(n % 20).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    rows = table(40, per_image=1)
    found, equal = equal_images(whole(rows), tmp_path, workers=2, progress=lambda done, total: None)
    assert sorted(equal) == sorted((f"{n}.png", f"{n + 20}.png") for n in range(20)) and not found.bad
    division = divide(whole(rows), equal=equal, val=0.2, test=0.2)
    assert division.groups == 20 and division.splits[:20] == division.splits[20:]
    for n in (3, 12):
        (tmp_path / f"{n}.png").write_bytes(b"damaged")
    found, _ = equal_images(whole(rows), tmp_path, workers=2, progress=lambda done, total: None)
    assert len(found.entries) == 38 and sorted(found.bad) == [5, 14]
    with pytest.raises(ValueError) as error:
        found.checked(0.0)
    lines = str(error.value).split("\n")
    assert lines[0] == "2 of 40 rows of mine.csv cannot be used:"
    assert lines[1].startswith(f"row 5: The image {tmp_path / '3.png'} cannot be decoded") and "row 14: " in lines[2]
    assert lines[3] == "Fix or remove them, or leave them out with --max-dropped 0.05."
    assert found.checked(0.05) is found  # as the message says


@settings(max_examples=40, deadline=None)
@given(st.integers(40, 200), st.integers(1, 4), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(
    number: int, per_image: int, seed: int, shuffler: random.Random
) -> None:
    rows = table(number, per_image=per_image)
    before = divide(whole(rows), seed=seed, by="patient")
    order = list(range(number))
    shuffler.shuffle(order)
    after = divide(whole([rows[index] for index in order]), seed=seed, by="patient")
    assert [before.splits[index] for index in order] == list(after.splits)
    assert set(before.counts().values()) != {0}


def test_seeds_change_the_split() -> None:
    rows = table(300)
    assert divide(whole(rows)).splits == divide(whole(rows)).splits
    assert divide(whole(rows)).splits != divide(whole(rows), seed=1).splits


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"val": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({}, {"by": "hospital"}, "30 rows of mine.csv have no hospital.*: rows 2, 3,"),
        ({"patient": "  "}, {"by": "patient"}, "1 row of mine.csv has no patient.*: row 9. "),
    ],
)
def test_invalid_tables_and_shares_are_refused(changes: dict[str, str], options: dict[str, Any], message: str) -> None:
    rows = table(30)
    rows[7] |= changes
    with pytest.raises(ValueError, match=message):
        divide(whole(rows), **options)


def test_few_groups_still_fill_every_split() -> None:
    counts = divide(whole(table(40, per_image=10))).counts()
    assert sorted(counts.values()) == [10, 10, 20] and counts["train"] == 20
    with pytest.raises(ValueError, match="form 2 such groups, too few for a train split"):
        divide(whole(table(20, per_image=10)))
    with pytest.raises(ValueError, match="form 1 such group, too few for a train split"):
        divide(whole(table(10, per_image=10)))
    assert divide(whole(table(20, per_image=10)), val=0.0).counts() == {"train": 10, "val": 0, "test": 10}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_tables_survive_a_round_trip(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    rows = [{**row, "question": 'Größe, "left"?\nor right'} for row in table(30)]
    source, first = tmp_path / "in.jsonl", tmp_path / f"first{suffix}"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    division = divide(read_whole(source))
    write_divided(division, first)
    again = read_whole(first)
    assert [{**row, "split": place} for row, place in zip(rows, division.splits)] == [
        dict(row) for row in (entry.row for entry in again.entries)
    ]
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="already exists"):
        write_divided(division, first)
    with pytest.raises(ValueError, match=r"\.xlsx.*end its name in"):
        write_divided(division, tmp_path / "x.xlsx")


def test_all_bad_rows_are_listed_as_the_spreadsheet_numbers_them(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    good = "".join(f"{n}.png,q,yes\n" for n in range(5))
    path.write_text(f"image,question,answer\n{good}\nb.png,too,many,cells\n,q,no\n" + '"[""broken",q,no\n')
    found = read_whole(path)
    assert found.bad == {
        8: ("wrong number of cells", ""),
        9: ("no image", ""),
        10: ("image is not a JSON list", '["broken'),
    }
    with pytest.raises(ValueError) as error:
        found.checked(0.37)
    assert str(error.value).split("\n") == [
        f"3 of 8 rows of {path} cannot be used:",
        "row 8: wrong number of cells",
        "row 9: no image",
        'row 10 (["broken): image is not a JSON list',
        "Fix or remove them, or leave them out with --max-dropped 0.38, or keep those without an image with "
        "--allow-text-only.",
    ]
    assert len(found.checked(0.38).entries) == 5
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "2.png")
    looked_up = read_whole(path, tmp_path / "images")
    assert [entry.images for entry in looked_up.entries] == [("2.png",)]
    assert looked_up.bad[2] == ("missing image", "0.png") and len(looked_up.bad) == 7
    path.write_text("image,question,answer\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_whole(path)


def test_images_inside_the_table_are_told_apart(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = []
    for n in range(40):
        Image.new("L", (4, 4), n % 20).save(tmp_path / "one.png")
        images.append({"bytes": (tmp_path / "one.png").read_bytes(), "path": f"{n}.png"})
    parquet.write_table(pyarrow.table({"image": images, "question": ["q"] * 40}), tmp_path / "in.parquet")
    found = read_whole(tmp_path / "in.parquet")
    division = divide(found, val=0.2, test=0.2)
    assert division.groups == 20 and division.splits[:20] == division.splits[20:]
    write_divided(division, tmp_path / "out.parquet")
    again = read_whole(tmp_path / "out.parquet", cache_dir=tmp_path / "cache")
    assert [entry.images for entry in again.entries] == [entry.images for entry in found.entries]
    assert len([*(tmp_path / "cache" / "images" / "own").iterdir()]) == 20


def test_rows_without_an_image_are_divided_by_their_question(tmp_path: Path) -> None:
    rows = [{"image": "", "question": f"Question {n // 2}?", "answer": "yes"} for n in range(100)]
    path = tmp_path / "questions.csv"
    path.write_text("image,question,answer\n" + "".join(f",{row['question']},yes\n" for row in rows))
    assert set(read_whole(path).bad.values()) == {("no image", "")}
    division = divide(read_whole(path, allow_text_only=True), val=0.1, test=0.2)
    assert division.groups == 50 and division.counts() == {"train": 70, "val": 10, "test": 20}
    assert all(len(places) == 1 for places in splits_of(division, "question").values())
