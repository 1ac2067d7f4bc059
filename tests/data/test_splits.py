"""Splits and subsets depend only on names and seeds.

Run: pytest tests/data/test_splits.py
"""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.core.randomness import address, addresses
from medvqa_rl.core.types import Sample
from medvqa_rl.data.splits import choose, connected, ids_hash, splits_of
from medvqa_rl.data.stored import StoredDataset

NAMES = [f"scan{index}.jpg" for index in range(4000)]


def test_images_are_split_in_the_given_shares() -> None:
    counts = Counter(splits_of(NAMES, 0, val=0.1, test=0.2).values())
    assert abs(counts["test"] - 800) < 100 and abs(counts["val"] - 400) < 80
    assert Counter(splits_of(NAMES, 0, val=0.0, test=0.0).values()) == {"train": 4000}


def test_splits_are_reproducible_and_differ_by_seed() -> None:
    # Second letters of val, train, train, test ...
    assert "".join(split[1] for split in splits_of(map(str, range(12)), 0).values()) == "arrerreeerrr"
    assert splits_of(NAMES, 0) != splits_of(NAMES, 1)


@given(st.lists(st.text(max_size=5), unique=True, max_size=30), st.integers(0, 40), st.integers(0, 3))
def test_a_smaller_choice_is_part_of_a_larger_one(ids: list[str], num: int, seed: int) -> None:
    chosen = choose(ids, num, seed)
    assert len(chosen) == min(num, len(ids)) and chosen == sorted(set(chosen))
    assert set(chosen) <= set(choose(ids, num + 1, seed))
    # Removing an id that was not chosen, or turning the order around, changes nothing.
    names = {ids[index] for index in chosen}
    rest = [name for name in reversed(ids) if name in names or len(name) % 2]
    assert {rest[index] for index in choose(rest, num, seed)} >= names


def test_no_limit_keeps_all() -> None:
    assert choose(["a", "b"], None, 0) == [0, 1]
    assert choose(NAMES, 10, 0) != choose(NAMES, 10, 1)


def test_images_that_share_a_case_are_connected() -> None:
    pairs = [("a", 1), ("b", 2), ("c", 1), ("c", 3), ("d", 3), ("e", "b"), ("b", 2)]
    assert connected(pairs) == {"a": "a", "b": "b", "c": "a", "d": "a", "e": "e"}
    assert connected([("a", 1), ("b", 2), ("c", 1), ("c", 2)]) == {"a": "a", "b": "a", "c": "a"}


def test_the_fingerprint_depends_on_the_samples() -> None:
    sample = Sample("1", "What?", "A", "choice", options=("mass", "cyst"))
    base = StoredDataset("x", (sample,)).fingerprint
    assert StoredDataset("y", (sample,), {"dropped": 1}).fingerprint == base
    changes = [{"id": "2"}, {"question": "Where?"}, {"answer": "B"}, {"options": ("mass", "node")}]
    others = {StoredDataset("x", (replace(sample, **change),)).fingerprint for change in changes}  # type: ignore[arg-type]
    assert len(others) == 4 and base not in others
    assert len(StoredDataset("x", (sample, sample))) == 2


@given(st.lists(st.text(max_size=8), max_size=10), st.integers(0, 3))
def test_splits_of_many_keys_equal_those_of_each(names: list[str], seed: int) -> None:
    assert splits_of(names, seed, test=0.3) == {name: splits_of([name], seed, test=0.3)[name] for name in names}
    assert addresses("a", seed, last=names) == [address("a", seed, name) for name in names]
    # As first written: the upper 53 bits of the address as a fraction.
    for name in names:
        place = (address("split by image", seed, name) >> 11) * 2.0**-53
        assert splits_of([name], seed)[name] == ("test" if place < 0.1 else "val" if place < 0.2 else "train")


def test_the_hash_of_ids_does_not_depend_on_their_order() -> None:
    assert ids_hash(["b", "a"]) == ids_hash(["a", "b"]) != ids_hash(["a", "c"])
    assert ids_hash([]) == "e3b0c44298fc1c14"  # SHA-256 of nothing
