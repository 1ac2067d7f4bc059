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

from medvqa_rl.data.division import Division, divide, equal_images, images_in, read_whole, write_divided

TABLE = Path("mine.csv")


def table(number: int = 200, *, per_image: int = 3, per_patient: int = 6) -> list[dict[str, Any]]:
    return [
        {"image": f"{n // per_image}.png", "question": f"q{n}", "answer": "yes", "patient": f"p{n // per_patient}"}
        for n in range(number)
    ]


def splits_of(division: Division, key: str) -> dict[str, set[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for row, place in zip(division.rows, division.splits):
        found[row[key]].add(place)
    return found


def test_no_image_is_in_two_splits_and_shares_are_kept() -> None:
    division = divide(table(300), TABLE, val=0.1, test=0.2)
    assert all(len(places) == 1 for places in splits_of(division, "image").values())
    counts = division.counts()
    # Groups have 3 rows, so shares are exact to one and a half.
    assert counts == {"train": 210, "val": 30, "test": 60} and division.groups == 100


def test_no_patient_is_in_two_splits() -> None:
    rows = table(300)
    by_patient = divide(rows, TABLE, by="patient")
    assert all(len(places) == 1 for places in splits_of(by_patient, "patient").values())
    assert by_patient.groups == 50
    by_image = divide(rows, TABLE)
    assert any(len(places) > 1 for places in splits_of(by_image, "patient").values())


def test_rows_with_several_images_link_them() -> None:
    rows = [{"image": f"{n}.png|{n + 1}.png", "question": "q"} for n in range(0, 9)]
    assert divide([*rows, *table(60)], TABLE).groups == 11  # of 20 images, 0 to 9 are one chain
    chain = divide([*rows, *({"image": f"x{n}.png"} for n in range(30))], TABLE)
    assert chain.groups == 31 and len(set(chain.splits[:9])) == 1


def test_slices_of_one_volume_stay_together() -> None:
    rows = [{"image": f"{n // 10}.nii.gz#slice={n % 10}", "question": "q"} for n in range(300)]
    division = divide(rows, TABLE)
    assert division.groups == 30
    assert all(len(set(division.splits[start : start + 10])) == 1 for start in range(0, 300, 10))


def test_equal_images_stay_together(tmp_path: Path) -> None:
    for n in range(40):
        pixels = np.random.default_rng(n % 20).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    rows = table(40, per_image=1)
    equal = equal_images(rows, TABLE, tmp_path, workers=2, progress=lambda done, total: None)
    assert sorted(equal) == sorted((f"{n}.png", f"{n + 20}.png") for n in range(20))
    division = divide(rows, TABLE, equal=equal, val=0.2, test=0.2)
    assert division.groups == 20 and division.splits[:20] == division.splits[20:]
    (tmp_path / "3.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"3\.png cannot be decoded"):
        equal_images(rows, TABLE, tmp_path, workers=2, progress=lambda done, total: None)


@settings(max_examples=40, deadline=None)
@given(st.integers(40, 200), st.integers(1, 4), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(
    number: int, per_image: int, seed: int, shuffler: random.Random
) -> None:
    rows = table(number, per_image=per_image)
    before = divide(rows, TABLE, seed=seed, by="patient")
    order = list(range(number))
    shuffler.shuffle(order)
    after = divide([rows[index] for index in order], TABLE, seed=seed, by="patient")
    assert [before.splits[index] for index in order] == list(after.splits)
    assert set(before.counts().values()) != {0}


def test_seeds_change_the_split() -> None:
    rows = table(300)
    assert divide(rows, TABLE).splits == divide(rows, TABLE).splits
    assert divide(rows, TABLE).splits != divide(rows, TABLE, seed=1).splits


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"val": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({}, {"by": "hospital"}, "Row 0 of mine.csv has no hospital"),
        ({"patient": "  "}, {"by": "patient"}, "Row 7 of mine.csv has no patient"),
        ({"image": " | "}, {}, "Row 7 of mine.csv names no image"),
        ({"image": '["broken'}, {}, "Row 7 of mine.csv names no image"),
    ],
)
def test_invalid_tables_and_shares_are_refused(changes: dict[str, str], options: dict[str, Any], message: str) -> None:
    rows = table(30)
    rows[7] |= changes
    with pytest.raises(ValueError, match=message):
        divide(rows, TABLE, **options)


def test_few_groups_still_fill_every_split() -> None:
    counts = divide(table(40, per_image=10), TABLE).counts()
    assert sorted(counts.values()) == [10, 10, 20] and counts["train"] == 20
    with pytest.raises(ValueError, match="form 2 such groups, too few for a train split"):
        divide(table(20, per_image=10), TABLE)
    with pytest.raises(ValueError, match="form 1 such group, too few for a train split"):
        divide(table(10, per_image=10), TABLE)
    assert divide(table(20, per_image=10), TABLE, val=0.0).counts() == {"train": 10, "val": 0, "test": 10}


def test_image_cells_are_read_as_by_the_loader() -> None:
    for value in ('["a.png", "b.png"]', "a.png| b.png", ["a.png", "b.png"]):
        assert images_in({"image": value}, 0, TABLE) == images_in({"images": value}, 0, TABLE) == ("a.png", "b.png")
    assert images_in({"image": None, "images": "c.png"}, 0, TABLE) == ("c.png",)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_tables_survive_a_round_trip(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    rows = [{**row, "question": 'Größe, "left"?\nor right'} for row in table(30)]
    source, first = tmp_path / "in.jsonl", tmp_path / f"first{suffix}"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    division = divide(read_whole(source), source)
    write_divided(division, first)
    again = read_whole(first)
    assert [{**row, "split": place} for row, place in zip(rows, division.splits)] == [dict(row) for row in again]
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="already exists"):
        write_divided(division, first)
    with pytest.raises(ValueError, match=r"\.xlsx.*end its name in"):
        write_divided(division, tmp_path / "x.xlsx")


def test_a_table_with_damaged_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("image,question,answer\na.png,q,yes\nb.png,too,many,cells\n")
    with pytest.raises(ValueError, match=r"1 row of .*in\.csv cannot be read: row 1 \(wrong number of cells\)"):
        read_whole(path)
    path.write_text("image,question,answer\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_whole(path)
