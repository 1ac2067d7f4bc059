"""Samples and records from a program, stored as own data."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.core.types import Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.given import ARGUMENTS, shared_images, store, stored
from medvqa_rl.data.images.files import MemoryImage

QUESTION = {"question": "Is there a fracture?", "answer": "no"}


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    shape = (8, 9) if mode in ("L", "I;16") else (8, 9, 3)
    pixels = np.random.default_rng(seed).integers(0, 255, shape)
    return Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.uint8))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def pixels_of(sample: Sample) -> list[Any]:
    return [np.asarray(image.load()).tolist() for image in sample.images]


def read(folder: Path, split: Any = "train", **settings: Any) -> Any:
    config = DataConfig(cache_dir=str(folder / "cache"), **settings)
    return load_dataset(stored(folder, config), split)


def row(**columns: Any) -> dict[str, Any]:
    return {**QUESTION, **columns}


def test_every_form_of_an_image_is_stored(tmp_path: Path) -> None:
    image = picture(1)
    file = tmp_path / "scan one.png"
    image.save(file)
    address = f"data:image/png;base64,{base64.b64encode(encoded(image)).decode()}"
    images = [
        *({"image": image}, {"images": [image]}, {"image": file}, {"image": str(file)}, {"image": encoded(image)}),
        *({"image": {"bytes": encoded(image), "path": None}}, {"image": {"bytes": None, "path": str(file)}}),
        *({"image": address}, {"image_path": str(file)}, {"Bild": image}, {"image_1": image}),
    ]
    rows = [row(id=str(index), patient=str(index), **columns) for index, columns in enumerate(images)]
    store({"train": rows}, tmp_path / "data", DataConfig())
    names = [path.name for path in (tmp_path / "data" / "images").iterdir()]
    assert len(names) == 2, "equal images are one file: those in memory, and those in files"
    for index, one in enumerate(rows):  # one at a time, since a table has one column of images
        folder = tmp_path / str(index)
        store({"train": [one]}, folder, DataConfig())
        (sample,) = read(folder).samples
        assert pixels_of(sample) == [np.asarray(image).tolist()], one


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_pixels_are_those_that_the_model_would_have_seen(mode: str, tmp_path: Path) -> None:
    image = picture(2, mode)
    store({"train": [row(image=image)]}, tmp_path, DataConfig())
    assert pixels_of(read(tmp_path)[0]) == [np.asarray(MemoryImage("", image).load()).tolist()]


def test_metadata_of_images_in_memory_is_dropped(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(encoded(picture(1))))
    image.info["icc_profile"] = b"Patient Miller"  # Pillow writes it into every PNG
    store({"train": [row(image=image)]}, tmp_path, DataConfig())
    (file,) = (tmp_path / "images").iterdir()
    assert not Image.open(file).info


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    samples = [
        Sample(
            id="a",
            question="Which organ?",
            answer="B",
            answer_type="choice",
            images=(MemoryImage("x", picture(1)), MemoryImage("y", picture(2))),
            options=("lung", "heart", "no"),
            reasoning="The heart is in the middle.",
            groups={"modality": "CT", "scanner": "home"},
            description="A heart.",
            columns={"site": "north", "age": 7},
            alternatives=("C",),
        ),
        Sample(id="b", question="Where?", answer="left", answer_type="open", images=(MemoryImage("z", picture(3)),)),
        Sample(id="c", question="True?", answer="yes", answer_type="closed", images=(MemoryImage("z", picture(3)),)),
    ]
    store({"train": samples}, tmp_path, DataConfig())
    again = read(tmp_path).samples
    for before, after in zip(samples, again, strict=True):
        same = ("question", "answer", "answer_type", "options", "reasoning", "description", "alternatives")
        assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]
        assert after.id == f"own/data/{before.id}" and pixels_of(before) == pixels_of(after)
    assert again[0].groups == {"modality": "CT"}
    assert again[0].columns == {"site": "north", "age": 7, "scanner": "home", "split": "train"}
    # And once more, from the loaded samples.
    store({"train": again}, tmp_path / "second", DataConfig())
    assert [sample.answer for sample in read(tmp_path / "second").samples] == ["B", "left", "yes"]


def test_a_hugging_face_dataset_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [picture(1), picture(2)],
        "question": ["Is it?", "Which?"],
        "answer": ["yes", "B"],
        "options": [None, ["lung", "heart"]],
        "split": ["validation", "validation"],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "options": datasets.List(datasets.Value("string")),
            "split": datasets.Value("string"),
        }
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    for number, given in enumerate((dataset, undecoded)):
        store({"train": given}, tmp_path / str(number), DataConfig())
        samples = read(tmp_path / str(number)).samples
        assert [(sample.answer, sample.answer_type) for sample in samples] == [("yes", "closed"), ("B", "choice")]
        assert [pixels_of(sample) for sample in samples] == [
            [np.asarray(image).tolist()] for image in (picture(1), picture(2))
        ]


def test_a_data_frame_is_read(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([row(image=picture(1), age=7), row(image=picture(2), age=None)])
    store({"train": frame}, tmp_path, DataConfig())
    assert [sample.columns["age"] for sample in read(tmp_path).samples] == [7, None]


def test_messages_of_trl_are_read(tmp_path: Path) -> None:
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "Is it?"}]
    rows = [
        {"prompt": [{"role": "user", "content": content}], "solution": "yes"},
        {"prompt": [{"role": "user", "content": "Is it?"}], "images": [picture(2)], "solution": "no"},
    ]
    for number, one in enumerate(rows):
        store({"train": [one]}, tmp_path / str(number), DataConfig())
        (sample,) = read(tmp_path / str(number)).samples
        assert sample.question == "Is it?" and sample.answer == one["solution"]
        assert pixels_of(sample) == [np.asarray(picture(number + 1)).tolist()]


def test_other_columns_reach_reward_functions_as_json(tmp_path: Path) -> None:
    one = row(
        image=picture(1), weight=np.float32(0.5), box=np.array([1, 2]), nothing=float("nan"), path_of=Path("a/b")
    )
    store({"train": [one]}, tmp_path, DataConfig())
    assert read(tmp_path)[0].columns == {
        **{"weight": 0.5, "box": [1, 2], "nothing": None, "path_of": "a/b"},
        "split": "train",
    }


def test_splits_and_ids_are_kept_apart(tmp_path: Path) -> None:
    given: Any = {
        "train": [row(image=picture(index), id=index) for index in range(3)],
        "val": [row(image=picture(9), id=0), row(image=picture(1), id=1)],
    }
    store(given, tmp_path, DataConfig())
    assert [sample.id for sample in read(tmp_path).samples] == [f"own/data/train/{index}" for index in range(3)]
    assert [sample.id for sample in read(tmp_path, "val").samples] == ["own/data/val/0", "own/data/val/1"]
    assert "1 of 2 images of the evaluation are also trained on" in shared_images(tmp_path, "train", tmp_path, "val")
    assert not shared_images(tmp_path, "train", tmp_path, "test")


def test_settings_of_other_data_sets_are_dropped(tmp_path: Path) -> None:
    config = DataConfig(
        scanner="unseen",
        home_share=0.1,
        letter_skew=0.5,
        modalities=("CT",),
        max_dropped=0.5,
        answers_as="set",
        seed=3,
    )
    found = stored(tmp_path, config)
    assert (found.scanner, found.home_share, found.letter_skew, found.modalities) == ("home", 0.0, 0.0, ())
    assert (found.max_dropped, found.answers_as, found.seed) == (0.5, "set", 3)


def test_all_evaluation_samples_are_used_unless_a_number_is_set(tmp_path: Path) -> None:
    assert stored(tmp_path, DataConfig()).num_val is None
    assert stored(tmp_path, DataConfig(num_val=3)).num_val == 3


def test_the_checks_of_own_data_apply(tmp_path: Path) -> None:
    rows = [row(image=picture(1)), row(image=picture(2), options=["lung", "heart"], answer="liver")]
    store({"train": rows}, tmp_path / "answer", DataConfig())
    with pytest.raises(ValueError, match=r"rows 2 of data\.jsonl"):
        read(tmp_path / "answer")
    store({"train": [row(image=picture(1)), row(image="gone.png")]}, tmp_path / "image", DataConfig())
    with pytest.raises(ValueError, match=r"missing image: rows 2 of data\.jsonl"):
        read(tmp_path / "image")


@dataclass(frozen=True)
class Endless:
    is_endless: bool = True

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "train_dataset is empty, but must be a list of Samples or of dicts"),
        ("data.csv", "train_dataset is a str, but must be"),
        ({"train": []}, "train_dataset is a dict, but must be"),
        (Sample("a", "q", "yes", "closed"), "train_dataset is a Sample, but must be"),
        (3, "train_dataset is a int, but must be"),
        (Endless(), "train_dataset is endless: give a part of it"),
        ([row(image=picture(1)), 7], r"train_dataset\[1\] cannot be used\. It is a int"),
        ([row(image=b"no image")], r"train_dataset\[0\] cannot be used\. An image cannot be decoded"),
        (
            [Sample("a", "q", "a, b", "open", (MemoryImage("x", picture(1)),), answers_as="set")],
            r"compared as a set, but data\.answers_as is text",
        ),
    ],
)
def test_other_values_are_refused(records: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        store({"train": records}, tmp_path, DataConfig())
    assert not (tmp_path / "data.jsonl").exists()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "damaged.png"
    file.write_bytes(encoded(picture(1))[:60])
    with pytest.raises(ValueError, match=r"train_dataset\[0\] cannot be used\. The image .*damaged\.png cannot be"):
        store({"train": [row(image=file)]}, tmp_path / "data", DataConfig())


def test_a_table_with_two_columns_of_images_is_refused_when_it_is_read(tmp_path: Path) -> None:
    store({"train": [row(bild=picture(1), photo=picture(2))]}, tmp_path, DataConfig())
    with pytest.raises(ValueError, match="can both be image"):
        read(tmp_path)


def test_resuming_needs_the_same_records(tmp_path: Path) -> None:
    rows = [row(image=picture(1)), row(image=picture(2))]
    store({"train": rows}, tmp_path, DataConfig())
    written = (tmp_path / "data.jsonl").read_bytes()
    store({"train": rows}, tmp_path, DataConfig(), resume=True)
    for other in (rows[:1], rows[::-1], [rows[0], row(image=picture(3))], [rows[0], {**rows[1], "answer": "yes"}]):
        with pytest.raises(ValueError, match="is not that of the run"):
            store({"train": other}, tmp_path, DataConfig(), resume=True)
    assert (tmp_path / "data.jsonl").read_bytes() == written


def test_dicom_and_nifti_keep_their_suffix_and_fragment(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = nibabel.Nifti1Image(np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16), np.eye(4))
    nibabel.save(volume, tmp_path / "ct.nii.gz")
    rows = [row(image=f"{tmp_path / 'ct.nii.gz'}#slice={number}", question=f"Slice {number}?") for number in (1, 3)]
    store({"train": rows}, tmp_path / "data", DataConfig())
    (file,) = (tmp_path / "data" / "images").iterdir()
    assert file.name.endswith(".nii.gz")
    first, second = read(tmp_path / "data").samples
    assert pixels_of(first) != pixels_of(second)
    lines = (tmp_path / "data" / "data.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == [[f"{file.name}#slice={number}"] for number in (1, 3)]


def test_every_split_has_an_argument() -> None:
    assert set(ARGUMENTS) == {"train", "val", "test"}
