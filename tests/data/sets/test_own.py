"""The user's own questions in JSON Lines, CSV and parquet.

Run: pytest tests/data/sets/test_own.py
"""

import datetime
import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import Config, DataConfig
from medvqa_rl.core.answers import is_correct
from medvqa_rl.core.types import Sample
from medvqa_rl.data import load_dataset, load_splits
from medvqa_rl.data.check import check_data
from medvqa_rl.data.export import OWN_COLUMNS, export
from medvqa_rl.data.images.files import hidden
from medvqa_rl.data.reading import index
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.sets.own import read_own
from medvqa_rl.data.stored import NoSuchSplit, StoredDataset
from medvqa_rl.learning.setup import set_up
from medvqa_rl.models.dimensions import ResizedImages
from medvqa_rl.report.pages.data_page import write_data_page

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "Is there a mass?", "answer": "No", "patient": 1, "organ": "lung"},
    {"image": ["b.png", "sub/c.png"], "question": "What changed?", "answer": "the mass grew", "patient": 2},
    {"image": "d é.png", "question": "Which organ?", "answer": "B", "options": ["lung", "liver"], "patient": 1},
    {"image": "a.png", "question": "Which side?", "answer": "left", "options": ["left", "right"], "patient": 1},
    {
        "image": "a.png",
        "question": "Size?",
        "answer": "2 cm",
        "answer_type": "closed",
        "reasoning": "It is small.",
        "description": "A chest film.",
    },
]


def load(root: Path, place: Any = "train", **settings: Any) -> StoredDataset:
    dataset = load_dataset(DataConfig(name="own", path=str(root), **settings), place)
    assert isinstance(dataset, StoredDataset)
    return dataset


@pytest.fixture
def folder(tmp_path: Path, write_images: Callable[..., None]) -> Path:
    write_images(tmp_path / "images", "a.png", "b.png", "sub/c.png", "d é.png")
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows in the form of the file's ending; in CSV the lists once with bars and once as JSON."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {name: [row.get(name) for row in rows] for name in names}
        if any(isinstance(value, list) for value in columns.get("image", [])):
            values = [value if isinstance(value, list) else [value] for value in columns.pop("image")]
            columns["images"] = values
        parquet.write_table(pyarrow.table(columns), path)
        return
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            flat = {n: "|".join(v) if n == "image" and isinstance(v, list) else v for n, v in row.items()}
            writer.writerow({n: json.dumps(v) if isinstance(v, list) else v for n, v in flat.items()})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_all_formats_give_the_same_samples(
    folder: Path, suffix: str, wrong_gold: Callable[[StoredDataset], list[str]]
) -> None:
    write(folder / f"train{suffix}", ROWS)
    write(folder / f"val{suffix}", ROWS[:1])
    dataset = load(folder)
    assert wrong_gold(dataset) == []
    assert (dataset.name, dataset.issues) == (f"own/{folder.name}/train", ())
    samples = dataset.samples
    assert [sample.answer_type for sample in samples] == ["closed", "open", "choice", "choice", "closed"]
    assert [sample.answer for sample in samples] == ["No", "the mass grew", "B", "A", "2 cm"]
    assert [tuple(image.key for image in sample.images) for sample in samples] == [
        ("a.png",),
        ("b.png", "sub/c.png"),
        ("d é.png",),
        ("a.png",),
        ("a.png",),
    ]
    assert samples[2].options == ("lung", "liver") and samples[0].groups == {"organ": "lung"}
    assert samples[4].description == "A chest film." and samples[3].description == ""
    assert samples[4].reasoning == "It is small." and samples[1].id == "own/train/1"
    assert all(image.load().size == (8, 8) for sample in samples for image in sample.images)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_columns_reach_the_samples(folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MIN_BYTES", 0)
    row = {"image": "a.png", "question": "Is there air?", "answer": "no", "organ": "lung"}
    others = {"difficulty": 3, "weight": 0.5, "keywords": ["a", "b"], "report": {"text": "ä", "n": None}, "none": None}
    if suffix == ".parquet":
        typed = {"day": datetime.date(2020, 1, 2), "thumbnail": b"\x89"}
        read = others | {"day": "2020-01-02"}
    else:
        typed, read = {}, others
    write(folder / f"train{suffix}", [row | others | typed, row | {"question": "What?", "difficulty": 4}])
    for _ in range(2):  # parsed, then from the index
        first, second = load(folder, cache_dir=str(folder / "cache")).samples
        assert first.columns == read and first.groups == {"organ": "lung"}
        assert second.columns["difficulty"] == 4


def test_other_columns_belong_to_the_fingerprint(folder: Path) -> None:
    row = {"image": "a.png", "question": "Is there air?", "answer": "no"}
    found = []
    for changes in ({}, {"level": 1}, {"level": 2}, {"organ": "lung"}):
        write(folder / "train.jsonl", [row | changes])
        found.append(load(folder).fingerprint)
    assert found[0] == found[3] and len(set(found)) == 3


def test_patients_and_images_stay_in_one_split(folder: Path, write_images: Callable[..., None]) -> None:
    rows = []
    for patient in range(40):
        names = [f"p{patient}/{index}.png" for index in range(3)]
        write_images(folder / "images", *names)
        # A row without the patient's number is tied to the others by its image.
        rows += [{"image": names[:2], "question": "Q?", "answer": "yes", "patient": f"p{patient}"}]
        rows += [{"image": names[0], "question": f"Q{i}?", "answer": "no"} for i in range(2)]
        rows += [{"image": names[2], "question": "Third?", "answer": "no", "patient": f"p{patient}"}]
    write(folder / "data.jsonl", rows)
    parts: list[set[str]] = []
    count = 0
    for place in ("train", "val", "test"):
        dataset = load(folder, place, split="image")
        count += len(dataset)
        parts.append({image.key.split("/")[0] for sample in dataset.samples for image in sample.images})
    assert count == 160
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40


def test_one_file_with_a_column_of_splits(folder: Path) -> None:
    rows = [{**row, "split": place} for row in ROWS for place in ("train", "test")]
    write(folder / "data.csv", [*rows, {**ROWS[0], "split": "dev", "question": "Other?"}])
    assert len(load(folder, "test", max_dropped=0.2)) == 5
    dataset = load(folder, "train", max_dropped=0.2)
    assert [(issue.row, issue.reason, issue.detail) for issue in dataset.issues] == [(10, "unknown split", "dev")]


def test_without_validation_rows_a_tenth_of_the_training_images_is_taken(folder: Path, write_images: Any) -> None:
    names = [f"{index}.png" for index in range(50)]
    write_images(folder / "images", *names)
    write(folder / "train.jsonl", [{"image": name, "question": "Q?", "answer": "yes"} for name in names])
    train, val = load(folder, "train"), load(folder, "val")
    assert len(train) + len(val) == 50 and 0 < len(val) < 15
    with pytest.raises(ValueError, match=r"has no test split \(train only\): set data\.split=image"):
        load(folder, "test")


def test_a_table_without_validation_rows_says_how_to_make_them(tmp_path: Path, write_images: Any) -> None:
    folder = tmp_path / "my data"
    names = [f"{index}.png" for index in range(20)]
    write_images(folder / "images", *names)
    rows = [{"image": name, "question": "Is there a mass?", "answer": "yes"} for name in names]
    write(folder / "data.csv", [{**row, "split": "test" if row["image"] == "7.png" else "train"} for row in rows])
    with pytest.raises(NoSuchSplit) as caught:
        load(folder, "val")
    message = str(caught.value)
    assert "has no val split (train, test only): set data.split=image to make splits that share no image" in message
    command = shlex.split(message.partition("`medvqa-rl ")[2].partition("`")[0])
    assert command[:3] == ["data", "split", str(folder / "data.csv")]
    assert CliRunner().invoke(app, command).exit_code == 0  # the command works as it is written
    new = Path(command[-1]).parent
    loaded = load_splits(DataConfig(name="own", path=str(new), image_folder=str(folder / "images"), num_val=None))
    assert list(loaded) == ["train", "val", "test"]
    config = Config.model_validate({"data": {"name": "own", "path": str(folder)}, "train": {"eval_steps": 1}})
    with pytest.raises(NoSuchSplit) as refused:
        set_up(config, None, None)
    assert refused.value.__notes__ == ["To train without validation, set train.eval_steps=0."]


BAD: list[tuple[str, dict[str, Any]]] = [
    ("missing image", {"image": "none.png"}),
    ("no image", {"image": None}),
    ("no image", {"image": []}),
    ("image path leaves the folder", {"image": "../secret.png"}),
    ("image path leaves the folder", {"image": "/etc/passwd"}),
    ("image path leaves the folder", {"image": "sub/../../secret.png"}),
    ("image path leaves the folder", {"image": "..\\secret.png"}),
    ("image path leaves the folder", {"image": "link.png"}),
    ("image path leaves the folder", {"image": "away/secret.png"}),
    ("missing image", {"image": "broken.png"}),
    ("missing image", {"image": "circle.png"}),
    ("missing image", {"image": "sub"}),
    ("missing image", {"image": "a.png/b.png"}),
    ("empty image file", {"image": "empty.png"}),
    ("image is not a list or text", {"image": 3}),
    ("image is not a JSON list", {"image": '["a.png"'}),
    ("empty question", {"question": ""}),
    ("no answer", {"answer": None}),
    ("question is not text", {"question": {"a": 1}}),
    ("unknown answer_type", {"answer_type": "essay"}),
    ("wrong number of options", {"options": ["one"]}),
    ("wrong number of options", {"options": [str(index) for index in range(30)]}),
    ("empty option", {"options": ["one", "  "]}),
    ("label outside the options", {"options": ["left", "right"], "answer": "C"}),
    ("answer is none of the options", {"options": ["left", "right"], "answer": "lefty"}),
    ("wrong number of options", {"answer_type": "choice"}),
    ("repeated row", {"id": "again", "question": "First?"}),
    ("repeated id", {"id": "0", "question": "Another?"}),
]


def test_bad_rows_are_reported_and_nothing_leaves_the_folder(folder: Path, write_images: Callable[..., None]) -> None:
    write_images(folder, "secret.png")
    write_images(folder / "elsewhere", "secret.png")
    images = folder / "images"
    (images / "link.png").symlink_to(folder / "secret.png")
    (images / "away").symlink_to(folder / "elsewhere")
    (images / "broken.png").symlink_to(images / "nowhere.png")
    (images / "circle.png").symlink_to(images / "circle.png")
    (images / "inside.png").symlink_to(images / "a.png")
    (images / "empty.png").touch()
    base = {"image": "a.png", "answer": "yes"}
    rows = [{**base, "question": "First?", "id": 0}, {**base, "question": "Q?", "image": "inside.png", "id": 1}]
    rows += [{**base, "question": f"Q{i}?", **changes} for i, (_, changes) in enumerate(BAD)]
    write(folder / "train.jsonl", rows)
    write(folder / "val.jsonl", rows[:1])
    dataset = load(folder, max_dropped=1.0)
    assert [sample.id for sample in dataset.samples] == ["own/train/0", "own/train/1"]
    reasons = {issue.row: issue.reason for issue in dataset.issues if issue.action == "dropped"}
    assert [reasons.get(number) for number in range(2, len(rows))] == [
        "empty options" if reason == "empty option" else reason for reason, _ in BAD
    ]
    assert {issue.file for issue in dataset.issues} == {"train.jsonl"}


def test_names_packed_on_a_mac_are_found(folder: Path) -> None:
    (folder / "images" / "d é.png").rename(folder / "images" / "d e\u0301.png")
    write(folder / "train.jsonl", ROWS)
    write(folder / "val.jsonl", ROWS[:1])
    dataset = load(folder)
    assert len(dataset) == 5 and dataset.notes == {"repaired: image name in another Unicode form": 1}
    assert dataset[2].images[0].load().size == (8, 8)


def test_ambiguous_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no table of questions in"):
        load(folder)
    write(folder / "train.jsonl", ROWS)
    write(folder / "train.csv", ROWS)
    with pytest.raises(ValueError, match=r"holds train\.csv and train\.jsonl: keep one"):
        load(folder)
    (folder / "train.csv").rename(folder / "data.csv")
    with pytest.raises(ValueError, match=r"holds data\.csv as well as files for the splits"):
        load(folder)
    (folder / "data.csv").unlink()
    with pytest.raises(ValueError, match="There is no folder 'scans' in"):
        load(folder, image_folder="scans")
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text("image,question\na.png,Q?\n")
    with pytest.raises(ValueError, match=r"train\.csv has no column answer; it has image, question"):
        load(folder)


def test_parquet_without_pyarrow_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: install it with pip install 'medvqa-rl\[hub\]'"):
        load(folder)


def test_images_beside_the_table(tmp_path: Path, write_images: Callable[..., None]) -> None:
    write_images(tmp_path, "x.png")
    write_images(tmp_path / "scans", "y.png")
    write(tmp_path / "test.csv", [{"images": "x.png", "question": "Q?", "answer": "yes"}])
    sample: Sample = load(tmp_path, "test")[0]
    assert sample.image_key == "x.png"
    write(tmp_path / "test.csv", [{"image": "y.png", "question": "Q?", "answer": "yes"}])
    assert load(tmp_path, "test", image_folder="scans")[0].image_key == "y.png"


def test_every_column_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    for name in (*OWN_COLUMNS, "images", "split", "patient"):
        assert f"| `{name}` |" in page


def one(folder: Path, suffix: str = ".jsonl", **row: Any) -> Sample:
    """The sample that a row becomes."""
    settings = {"answers_as": row.pop("answers_as", "text")}
    write(folder / f"train{suffix}", [{"image": "a.png", "question": "Which?", **row}])
    write(folder / f"val{suffix}", [{"image": "b.png", "question": "Which?", "answer": "x"}])
    sample: Sample = load(folder, **settings)[0]
    (folder / f"train{suffix}").unlink()
    (folder / f"val{suffix}").unlink()
    return sample


def test_options_in_the_question_are_not_asked_twice(folder: Path) -> None:
    listed = "Which side? (A) left (B) right"
    for row in (
        {"question": listed, "answer": "B"},
        {"question": listed, "answer": "B", "options": {"A": "left", "B": "Right"}},
        {"question": f"<image>{listed}", "answer": "<answer>B</answer>"},
        {"question": listed, "answer": "right", "options": "left|right"},
    ):
        sample = one(folder, **row)
        assert (sample.question, sample.answer, sample.answer_text.lower()) == ("Which side?", "B", "right")
    other = one(folder, question=listed, answer="B", options=["up", "down"])
    assert other.question == listed and other.options == ("up", "down")
    for first, answers in ((0, (0, 1)), (1, (1, 2))):
        rows = [{"image": "a.png", "question": f"{n}?", "options": ["left", "right"], "answer": n} for n in answers]
        write(folder / "test.jsonl", rows)
        dataset = load(folder, "test")
        assert [sample.answer for sample in dataset.samples] == ["A", "B"]
        assert dataset.about == (f"test.jsonl: 2 rows. Answers are numbers of options, counted from {first}.",)
    write(folder / "test.jsonl", rows[:1])
    with pytest.raises(ValueError, match=r"test\.jsonl are numbers of options, but neither 0 nor .*: write letters"):
        load(folder, "test")


def test_whole_numbers_that_became_decimals(folder: Path) -> None:
    for suffix in (".jsonl", ".csv"):
        sample = one(folder, suffix, answer=2.0, id=7.0, patient=3.0)
        assert (sample.answer, sample.id) == ("2", "own/train/7") and is_correct(sample, "two")
        sample = one(folder, suffix, answer="2.0", options=["1.0", "2.0", "3.0"])
        assert (sample.answer, sample.options) == ("B", ("1", "2", "3"))
        sample = one(folder, suffix, answer="2", options=["1.5", "2.0"])
        assert (sample.answer, sample.options) == ("B", ("1.5", "2.0")) and is_correct(sample, "2")
    write(folder / "data.csv", [{"image": n, "question": "Q?", "answer": "no", "patient": p, "split": "train"}
                                for n, p in (("a.png", "3.0"), ("b.png", 3), ("d é.png", ""))])  # fmt: skip
    rows = read_own(folder / "data.csv", ImageFolder(folder / "images"), split="", needs_split=True).rows
    assert [row.cluster for row in rows] == ["patient 3", "patient 3", "d é.png"]


@pytest.mark.parametrize(
    ("question", "given", "answer", "wrong"),
    [
        ("Is there a mass?", True, "yes", "no"),
        ("Is there a mass?", "False", "no", "yes"),
        ("Gibt es eine Läsion?", "WAHR", "ja", "falsch"),
        ("True or false: the heart is enlarged.", "False", "False", "true"),
    ],
)
def test_booleans_are_yes_or_no(folder: Path, question: str, given: Any, answer: str, wrong: str) -> None:
    sample = one(folder, question=question, answer=given)
    assert (sample.answer, sample.answer_type) == (answer, "closed")
    assert all(is_correct(sample, text) for text in (answer, str(given))) and not is_correct(sample, wrong)
    sample = one(folder, question=question, answer=given, options=[wrong, answer])
    assert sample.answer == "B" and sample.alternatives == ()


def test_text_of_windows_is_read_as_such(folder: Path) -> None:
    row = "image,question,answer\na.png,Q?,Crohn’s disease\n"
    (folder / "train.csv").write_bytes(row.encode("cp1252"))
    (folder / "val.jsonl").write_text('{"image": "b.png", "question": "Q?", "answer": "Crohn\\u0092s disease"}\n')
    for split in ("train", "val"):
        assert load(folder, split)[0].answer == "Crohn’s disease"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_list_has_several_correct_answers_or_is_a_set(folder: Path, suffix: str) -> None:
    answer = ["Lung", "spinal cord", "the lung"]
    sample = one(folder, suffix, answer=answer)
    assert sample.answers == ("Lung", "spinal cord") and sample.answers_as == "text"
    assert is_correct(sample, "lung") and not is_correct(sample, "lung, spinal cord")
    sample = one(folder, suffix, answer=answer, answers_as="set")
    assert sample.answers == ("Lung, spinal cord, the lung",) and sample.answers_as == "set"
    assert is_correct(sample, "spinal cord, lung") and not is_correct(sample, "lung")
    sample = one(folder, suffix, answer=["C", "left"], options=["left", "right", "both"])
    assert sample.answers == ("C", "A") and is_correct(sample, "left") and not is_correct(sample, "B")


def test_lists_of_answers_in_other_forms(folder: Path) -> None:
    assert one(folder, answer="lung|heart").answers == ("lung", "heart")
    assert one(folder, answer=["lung", None, " "]).answers == ("lung",)
    assert one(folder, answer="[unclear]").answers == ("[unclear]",)
    assert one(folder, answer="['lung', 'heart']").answers == ("lung", "heart")  # as pandas and Python write lists
    for answer, reason in ((["", None], "empty answer"), ("['a', b]", "answer is not a JSON list")):
        with pytest.raises(ValueError, match=reason):
            one(folder, answer=answer)


def test_fingerprints_tell_how_answers_are_compared(folder: Path) -> None:
    write(folder / "val.jsonl", ROWS[:1])
    prints = set()
    for answer in ("a, b", ["a", "b"], ["a", "c"]):
        write(folder / "train.jsonl", [{"image": "a.png", "question": "Q?", "answer": answer}])
        prints |= {load(folder, answers_as=way).fingerprint for way in ("text", "set")}
    assert len(prints) == 5, "a list and the text with commas are the same set"


def test_hidden_names_are_hashes_everywhere_and_the_questions_are_the_same(
    folder: Path, write_images: Callable[..., None]
) -> None:
    """Split and subset are chosen by the real names; ids and images, also damaged or missing ones, hide theirs."""
    names = [f"doe_{number}.png" for number in range(12)]
    write_images(folder / "images", *names)
    (folder / "images" / "doe_3.png").write_bytes(b"no image")
    rows = [{"id": name[:-4], "image": name, "question": f"{name[4:-4]}?", "answer": "no"} for name in names]
    write(folder / "train.jsonl", [*rows, {"image": "doe_gone.png", "question": "Q?", "answer": "no"}])
    settings: dict[str, Any] = {
        "max_dropped": 1.0,
        "num_val": None,
        "num_train": 8,
        "cache_dir": str(folder / "cache"),
    }
    plain, hiding = load(folder, **settings), load(folder, hide_names=True, **settings)
    assert [one.question for one in plain.samples] == [one.question for one in hiding.samples]
    digest = [hashlib.sha256(one.id.encode()).hexdigest()[:16] for one in plain.samples]
    assert [one.id for one in hiding.samples] == digest == [one.id for one in hiding.samples[:]]
    assert [one.image_key for one in hiding.samples] == [
        hashlib.sha256(one.image_key.encode()).hexdigest()[:16] for one in plain.samples
    ]
    assert "doe_gone.png" in str(plain.issues) and "gone" not in str(hiding.issues) and len(hiding.issues) == 1
    split = load_dataset(
        DataConfig(name="own", path=str(folder), hide_names=True, **settings | {"num_train": None}), "train"
    )
    report = check_data({"train": split, "test": split}, cost=ResizedImages(max_pixels=112 * 112))
    page = write_data_page(folder / "out" / "page.html", report, "of a model").read_text(encoding="utf-8")
    assert "doe" not in page and "cannot be read. data.hide_names hides its name" in page
    readable = StoredDataset("own", [one for one in split.samples if one.images[0].key != hidden("doe_3.png")])
    for form in ("jsonl", "csv"):
        assert "doe" not in export(readable, folder / "out", form, form=form).file.read_text(encoding="utf-8")  # type: ignore[arg-type]
    assert "doe" not in str(list((folder / "out").rglob("*")))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_options_in_columns_of_their_own(folder: Path, suffix: str) -> None:
    sample = one(folder, suffix, option_a="A. left", option_b="B) right", option_c="", answer="B. right")
    assert (sample.answer_type, sample.options, sample.answer) == ("choice", ("left", "right"), "B")
    sample = one(folder, suffix, A="", B="", answer="right")
    assert (sample.answer_type, sample.options, sample.answer) == ("open", (), "right")
    sample = one(folder, suffix, A="1", B="2", options="left|right", answer="right")
    assert (sample.options, sample.answer) == (("left", "right"), "B")


def test_an_empty_option_between_others_shifts_no_letters(folder: Path) -> None:
    rows = [{"image": "a.png", "question": "Which?", "A": "left", "B": "", "C": "right", "answer": "C"}]
    write(folder / "train.jsonl", rows)
    reading = read_own(folder / "train.jsonl", ImageFolder(folder / "images"), split="train", needs_split=False)
    assert not reading.rows and [issue.reason for issue in reading.issues] == ["empty option"]


TEXT_ONLY: list[dict[str, Any]] = [
    {"image": "a.png", "question": "Is there a mass?", "answer": "no"},
    {"image": "", "question": "Which drug lowers blood sugar?", "answer": "metformin"},
    {"question": "Which drug lowers BLOOD sugar?", "answer": "insulin", "id": "again"},
    {"image": None, "question": "Is fever a sign of infection?", "answer": "yes", "organ": "body"},
]


def test_questions_without_an_image_are_kept_where_the_setting_allows_them(folder: Path) -> None:
    write(folder / "train.jsonl", TEXT_ONLY)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "no image: rows 3, 5, 7 of train.jsonl" in str(error.value)
    assert str(error.value).endswith("or keep questions without an image with data.allow_text_only=true.")
    dataset = load(folder, allow_text_only=True, num_val=None)
    samples = [*dataset, *load(folder, "val", allow_text_only=True, num_val=None)]
    assert {sample.question: (len(sample.images), sample.groups["input"]) for sample in samples} == {
        "Is there a mass?": (1, "image"),
        "Which drug lowers blood sugar?": (0, "text"),
        "Which drug lowers BLOOD sugar?": (0, "text"),
        "Is fever a sign of infection?": (0, "text"),
    }
    rows = read_own(
        folder / "train.jsonl",
        ImageFolder(folder / "images"),
        split="train",
        needs_split=False,
        allow_text_only=True,
    ).rows
    assert rows[1].cluster == rows[2].cluster != rows[3].cluster, "the same question stays in one split"
    assert "input" not in load(folder, max_dropped=1.0)[0].groups
