"""The data check finds planted faults, and the real ones of VQA-RAD.

Run: pytest tests/data/test_check.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chi2

from medvqa_rl.config import DataConfig
from medvqa_rl.core.types import ImageSource, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.check import check_data
from medvqa_rl.data.findings import DataReport, Finding
from medvqa_rl.data.images.files import FileImage, MemoryImage
from medvqa_rl.data.reading.issues import RowIssue
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.models.dimensions import ResizedImages


def picture(seed: int, name: str = "") -> MemoryImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return MemoryImage(name or f"{seed}.png", Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC))


def sample(number: int, image: ImageSource | None = None, **changes: Any) -> Sample:
    plain = Sample(f"s{number}", f"Question {number}?", "yes", "closed", (image or picture(number),))
    return replace(plain, **changes)


def stored(*samples: Sample, **changes: Any) -> StoredDataset:
    return StoredDataset("toy", samples, **changes)


def check(train: StoredDataset, test: StoredDataset | None = None, **options: Any) -> DataReport:
    datasets = {"train": train} | ({"test": test} if test else {})
    return check_data(datasets, cost=ResizedImages(), **options)


def found(report: DataReport) -> dict[str, Finding]:
    return {finding.what: finding for finding in report.findings}


def test_a_clean_set_has_no_findings() -> None:
    report = check(stored(sample(1), sample(2)), stored(sample(3), sample(4)))
    assert report.findings == () and not report.is_wrong(strict=True)
    assert report.leaked == (0, 2)
    train, test = report.splits
    assert (train.num_rows, train.seen, len(train.images)) == (2, 2, 2)
    assert train.widths == [64, 64] and train.heights == [48, 48]
    # 64 x 48 rounds to 56 x 56 (48 / 28 = 1.7), which are 4 tokens of 28 x 28.
    assert list(test.image_tokens) == [4, 4]
    assert test.majority_answer == ("yes", 1.0) and test.majority_letter[0] == ""
    assert list(train.question_words) == [2, 2] and list(train.answer_words) == [1, 1]


def test_a_validation_split_that_cannot_choose_is_found() -> None:
    def validation(*samples: Sample) -> dict[str, Finding]:
        datasets = {"train": stored(sample(1)), "val": stored(*samples), "test": stored(sample(2))}
        return found(check_data(datasets, cost=ResizedImages(), decode=False))

    many = [sample(number, answer="no" if number == 3 else "yes") for number in range(3, 33)]
    assert validation(*many) == {}
    few = validation(*many[:29])["few validation questions"]
    assert (few.level, few.count) == ("look", 29) and "known to about 18 percentage points" in few.text
    one = validation(*(sample(number, answer=f"Yes{'.' * (number % 2)}") for number in range(3, 33)))
    assert list(one) == ["one validation answer"] and one["one validation answer"].examples == ("yes",)
    options = [
        sample(n, answer_type="choice", options=("cyst", "mass")[:: 1 - n % 2 * 2], answer="AB"[n % 2])
        for n in range(30)
    ]
    assert "one validation answer" in validation(*options)  # the text counts, not the letter


def test_gold_answers_that_the_scorer_rejects_are_found() -> None:
    report = check(stored(sample(1), sample(2, answer="")))
    assert found(report)["gold answer scores below 1"].examples == ("train: s2 ('')",)
    outside = sample(2, answer_type="choice", options=("cyst", "tumour"), answer="C")
    report = check(stored(outside))
    assert found(report)["gold answer scores below 1"].examples == ("train: s2 ('C')",)
    assert not report.splits[0].letters
    same = sample(3, answer_type="choice", options=("Cyst", "a cyst.", "tumour"), answer="B")
    report = check(stored(same, sample(4)))
    assert found(report)["gold option not unique"].count == 1 and report.is_wrong()


def test_shared_images_are_reported_by_kind() -> None:
    copy = picture(2, "renamed.png")
    smaller = MemoryImage("smaller.png", picture(3).image.resize((32, 24), Image.Resampling.BOX))
    train = stored(*(sample(number) for number in range(1, 4)))
    test = stored(sample(11, picture(1)), sample(12, copy), sample(13, smaller), sample(14))
    report = check(train, test)
    wrong = found(report)["images in train and test"]
    assert wrong.level == "wrong" and wrong.count == 2 and set(wrong.examples) == {"1.png", "renamed.png = 2.png"}
    assert "2 of the 4 images of test are also in train, 1 of them under another name" in wrong.text
    near = found(report)["near duplicates in train and test"]
    assert near.level == "look" and near.count == 1 and near.examples[0].startswith("smaller.png ~ 3.png")
    assert report.leaked == (2, 4)
    by_name = check(train, test, decode=False)
    assert found(by_name)["images in train and test"].count == 1 and by_name.leaked == (1, 4)
    assert by_name.splits[0].widths == []


def test_images_shared_with_another_data_set_are_found_by_pixels_but_not_by_name() -> None:
    train = stored(*(sample(number) for number in range(1, 5)))
    datasets = {
        "train": train,
        "test": stored(sample(11, picture(11))),
        # Number 1 has another picture under a name of ours; 2 and 11 are ours under other names.
        "other: train": stored(sample(21, picture(11, "theirs.png")), sample(22, picture(2, "again.png"))),
        "other: test": stored(sample(31, picture(91, "1.png")), sample(32, picture(2, "more.png")), sample(33)),
    }
    report = check_data(datasets, cost=ResizedImages())
    findings = found(report)
    wrong = {name: findings[name].examples for name in findings if findings[name].level == "wrong"}
    assert wrong == {
        "images in train and other: test": ("other/more.png = 2.png",),
        "images in other: train and test": ("11.png = other/theirs.png",),
        "images in other: train and other: test": ("other/more.png = other/again.png",),
    }
    assert report.leaked == (0, 1)  # of our own splits
    assert len(report.overlaps) == 4


def test_blank_images_are_found(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    flat = Image.new("L", (50, 50), 7)
    flat.putpixel((0, 0), 9)
    report = check(
        stored(
            sample(1, MemoryImage("black", Image.new("RGB", (50, 50)))),
            sample(2, MemoryImage("flat", flat)),
            sample(3, FileImage("cut.png", tmp_path)),
            sample(4, MemoryImage("strip", picture(4).image.resize((402, 2)))),
            sample(5, picture(5, "one name")),
            sample(6, picture(5, "another")),
        )
    )
    kinds = found(report)
    assert {kind: finding.level for kind, finding in kinds.items()} == {
        "unreadable image": "wrong",
        "constant image": "wrong",
        "image too narrow": "wrong",
        "flat image": "look",
        "one image, several names": "look",
    }
    assert "cut.png" in kinds["unreadable image"].examples[0]
    assert kinds["image too narrow"].examples == ("strip (402 x 2)",)
    assert kinds["one image, several names"].examples == ("train: one name = another",)
    # Questions with an unreadable or refused image have no cost.
    assert len(report.splits[0].image_tokens) == 4


def test_repeated_questions_are_found() -> None:
    image = picture(1)
    report = check(
        stored(
            sample(1, image, question="Is it large?"),
            sample(2, image, question="is it large"),
            sample(3, image, question="Is it LARGE?", answer="no"),
            sample(3, picture(2), question="Is it large?"),
        )
    )
    kinds = found(report)
    assert kinds["repeated question"].examples == ("train: s2 ('is it large')",)
    assert kinds["contradiction"].examples == ("train: s3 ('Is it LARGE?')",)
    assert kinds["repeated id"].level == "wrong" and kinds["repeated id"].count == 1


def test_repeated_questions_with_a_correct_answer_in_common_do_not_contradict() -> None:
    image = picture(1)
    several = sample(1, image, question="Q?", answer="mass", answer_type="open", alternatives=("cyst",))
    one = replace(several, id="s2", answer="cyst", alternatives=())
    assert "contradiction" not in found(check(stored(several, one)))
    assert "contradiction" in found(check(stored(several, replace(one, answer="stone"))))
    sets = [replace(one, id=f"s{n}", answer=a, answers_as="set") for n, a in enumerate(("lung, liver", "liver, lung"))]
    assert "contradiction" not in found(check(stored(*sets)))
    assert "gold answer scores below 1" in found(check(stored(replace(several, alternatives=("cyst", "")))))


def choices(counts: dict[str, int]) -> StoredDataset:
    image = picture(1)
    options = ("cyst", "stone", "tumour", "none")
    samples = [
        sample(100 * place + number, image, answer_type="choice", options=options, answer=letter)
        for place, (letter, count) in enumerate(counts.items())
        for number in range(count)
    ]
    return stored(*samples)


def test_skewed_letters_are_found_by_a_chi_squared_test() -> None:
    counts = {"A": 20, "B": 45, "C": 60, "D": 15}
    report = check(choices(counts))
    finding = found(report)["answer letters of train"]
    assert finding.level == "look" and "C is correct in 42.9 % of 140 questions with 4 options" in finding.text
    assert "A 20, B 45, C 60, D 15" in finding.text and finding.count == 140
    assert report.splits[0].majority_letter == ("C", 60 / 140)
    statistic = sum((count - 35) ** 2 / 35 for count in counts.values())
    assert chi2.sf(statistic, 3) < 0.001
    assert check(choices({"A": 30, "B": 36, "C": 40, "D": 34})).findings == ()


def test_loading_issues_are_reported_once() -> None:
    issues = (
        RowIssue(3, "all.csv", "missing image", "dropped", "x.png", 5),
        RowIssue(5, "all.csv", "stray quotes", "repaired"),
    )
    notes = {"dropped: missing image": 1, "repaired: stray quotes": 1, "neutralised: questions": 2}
    report = check(stored(sample(1), issues=issues, notes=notes), stored(sample(2), issues=issues, notes=notes))
    assert report.issues == issues
    assert report.notes == {"train: neutralised: questions": 2, "test: neutralised: questions": 2}
    dropped = found(report)["rows dropped"]
    assert dropped.count == 1 and dropped.examples == ("all.csv row 5: missing image",)
    assert not report.is_wrong() and report.is_wrong(strict=True)


def test_limits_and_progress() -> None:
    calls: list[tuple[str, int, int]] = []
    report = check(stored(*map(sample, range(9))), limit=4, progress=lambda *step: calls.append(step))
    assert report.splits[0].seen == 4 and report.splits[0].num_rows == 9
    assert calls[0] == ("train questions", 4, 4) and calls[-1] == ("images", 4, 4)


def test_the_phantom_world_is_clean() -> None:
    datasets = {split: load_dataset(DataConfig(num_val=30, num_test=30), split) for split in ("train", "val", "test")}
    report = check_data(datasets, cost=ResizedImages(), limit=60)
    assert not report.is_wrong() and report.splits[0].num_rows == 0 and report.leaked == (0, 15)


@pytest.fixture
def vqa_rad(shared_data: Path) -> dict[str, Any]:
    return {"name": "vqa_rad", "path": str(shared_data / "vqa_rad"), "num_val": None}


@pytest.mark.slow
def test_the_leak_of_vqa_rad_is_found(vqa_rad: dict[str, Any]) -> None:
    splits = ("train", "val", "test")
    official = {split: load_dataset(DataConfig(**vqa_rad, split="official"), split) for split in splits}
    report = check_data(official, cost=ResizedImages())
    assert report.leaked == (202, 203)
    assert {finding.what: finding.count for finding in report.findings if finding.level == "wrong"} == {
        "images in train and test": 181,
        "images in val and test": 21,
    }
    by_image = {split: load_dataset(DataConfig(**vqa_rad, split="image"), split) for split in splits}
    honest = check_data(by_image, cost=ResizedImages())
    assert honest.leaked is not None and honest.leaked[0] == 0 and not honest.is_wrong()
