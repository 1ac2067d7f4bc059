"""The verb init: one's own questions checked and divided, settings sized to a GPU, and nothing written by halves."""

from __future__ import annotations

import csv
import errno
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.init import project as init_command
from medvqa_rl.cli.init.project import run_init
from medvqa_rl.config import Config, DataConfig
from medvqa_rl.config.yaml import load_config
from medvqa_rl.data import load_dataset
from medvqa_rl.data.export import export
from medvqa_rl.learning.estimate.architecture import find_architecture
from medvqa_rl.learning.estimate.estimate import Assumptions, estimate
from medvqa_rl.learning.estimate.hardware import GIB, Machine, Rates

ROWS = 60


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom questions as somebody's own table and images."""
    folder = tmp_path_factory.mktemp("own")
    export(load_dataset(DataConfig(), "train"), folder, "questions", form="csv", limit=ROWS)
    return folder


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """A table of rows without an image get one of their own, 8 x 8 pixels of noise-like stripes."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number, row in enumerate(rows):
        image = Image.new("L", (32, 32))
        image.putdata([(7 * number + 11 * place * (number + 1)) % 256 for place in range(32 * 32)])
        image.save(images / f"{number}.png")
        row["image"] = f"{number}.png"
    table = folder / "questions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table, images


def test_a_csv_export_is_read_as_own_data(phantom: Path, tmp_path: Path) -> None:
    (phantom / "data.csv").write_bytes((phantom / "questions.csv").read_bytes())
    config = DataConfig(name="own", path=str(phantom), split="image", num_val=None, cache_dir=str(tmp_path))
    read = {}
    for split in ("train", "val", "test"):
        dataset = load_dataset(config, split)
        read |= {
            sample.id.removeprefix("own/data/"): sample for sample in map(dataset.__getitem__, range(len(dataset)))
        }
    (phantom / "data.csv").unlink()
    source = load_dataset(DataConfig(), "train")
    assert len(read) == ROWS
    for index in range(ROWS):
        drawn = source[index]
        own = read[drawn.id]
        assert (own.question, own.options, own.answer, own.answer_type) == (
            drawn.question,
            drawn.options,
            drawn.answer,
            drawn.answer_type,
        )
        assert own.reasoning == drawn.reasoning
        assert own.groups == {name: drawn.groups[name] for name in ("modality", "organ", "family")}
        assert own.images[0].load().tobytes() == drawn.images[0].load().tobytes()


def test_a_project_is_divided_sized_and_says_what_to_run(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table, images = phantom / "questions.csv", phantom / "images"
    arguments = ["init", "mine", "--data", str(table), "--images", str(images), "--gpu-memory", "24"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Sized for a 24 GiB GPU (as given)" in result.output
    commands = [line.strip() for line in result.output.splitlines() if line.startswith("  medvqa-rl")]
    assert commands == [
        "medvqa-rl train mine/config.yaml --dry-run",
        "medvqa-rl eval mine/config.yaml --output mine/before",
        "medvqa-rl train mine/config.yaml",
        "medvqa-rl eval mine/run --prompts think_answer,direct",
        "medvqa-rl report mine/run --evals mine/before",
    ]
    rows = read_rows(tmp_path / "mine" / "data.csv")
    assert [row["id"] for row in rows] == [row["id"] for row in read_rows(table)]
    splits = {split: {row["image"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert all(splits.values())
    assert not splits["train"] & splits["val"] and not splits["test"] & (splits["train"] | splits["val"])
    config = load_config(tmp_path / "mine" / "config.yaml", purpose="train").config
    assert config.model.lora is not None and config.model.lora.rank == 8
    assert Path(config.output_dir) == tmp_path / "mine" / "run"
    datasets = [load_dataset(config.data, split) for split in ("train", "val", "test")]
    assert sum(map(len, datasets)) == ROWS
    # By the arithmetic of the verb estimate, for images no smaller than these.
    machine = Machine("", Rates(1, 1), 24 * GIB, True, "")
    model = find_architecture(config.model, None)
    assert estimate(config, model, machine, Assumptions(60, (112, 112), 1)).peak < 0.85 * 24 * GIB
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "mine already exists and is not overwritten" in result.output
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_less_memory_first_costs_time_then_changes_the_method(phantom: Path, tmp_path: Path) -> None:
    table, images = phantom / "questions.csv", phantom / "images"
    written: dict[float, Config] = {}
    for memory in (80.0, 12.0, 8.0):
        run_init(tmp_path / f"{memory:g}", table=table, images=images, gpu_memory=memory)
        written[memory] = load_config(tmp_path / f"{memory:g}" / "config.yaml").config
    roomy, tight = written[80.0], written[8.0]
    assert roomy.train.prompts_per_micro_batch >= 4 and not roomy.model.gradient_checkpointing
    assert tight.model.gradient_checkpointing
    assert roomy.rollout.max_completion_length == tight.rollout.max_completion_length == 256
    batches = [config.train.prompts_per_micro_batch for config in written.values()]
    assert batches == sorted(batches, reverse=True) and batches[0] > batches[-1]
    with pytest.raises(ValueError, match=r"needs at least \d+\.\d GiB of GPU memory .* but there are 3.0 GiB"):
        run_init(tmp_path / "small", table=table, images=images, gpu_memory=3.0)
    assert not (tmp_path / "small").exists()


def test_without_a_gpu_the_settings_are_for_the_embedded_model(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(init_command, "find_gpu", lambda: (None, ""))
    assert run_init(tmp_path / "mine", table=phantom / "questions.csv", images=phantom / "images")
    printed = capsys.readouterr().out
    assert "torch finds no GPU on this machine" in printed
    assert "--prompts" not in printed  # the embedded model knows one
    config = load_config(tmp_path / "mine" / "config.yaml", purpose="train").config
    assert (config.model.path, config.model.device, config.data.name) == ("phantom:instruct", "cpu", "own")
    assert config.network == "off"
    lines = (tmp_path / "mine" / "config.yaml").read_text().splitlines()
    assert {line.index(" # ") for line in lines if " # " in line} == {34}
    monkeypatch.setattr(init_command, "find_gpu", lambda: (39.5, "NVIDIA A100-PCIE-40GB"))
    run_init(tmp_path / "gpu", table=phantom / "questions.csv", images=phantom / "images")
    assert "Sized for a 40 GiB GPU (NVIDIA A100-PCIE-40GB)" in capsys.readouterr().out


def test_errors_name_the_users_table_and_no_setting_that_init_does_not_take(tmp_path: Path) -> None:
    rows = closed(80)
    for number in (3, 20, 41, 50, 60, 61):
        rows[number]["answer"] = ""
    table, images = write_rows(tmp_path / "own", rows)
    with pytest.raises(ValueError) as error:
        run_init(tmp_path / "mine", table=table, images=images)
    assert str(error.value).split("\n") == [
        f"6 of 80 rows of {table} cannot be used:",
        "rows 4, 21, 42, 51, 61, 62: empty answer",
        "Fix or remove them, or leave them out with --max-dropped 0.08.",
    ]
    command = ["init", str(tmp_path / "mine"), "--data", str(table), "--images", str(images), "--gpu-memory", "24"]
    result = CliRunner().invoke(app, [*command, "--max-dropped", "0.08"])  # as the message says
    assert result.exit_code == 0 and "Left out:\nrows 4, 21, 42, 51, 61, 62: empty answer" in result.output
    assert len((tmp_path / "mine" / "data.jsonl").read_text().splitlines()) == 74
    for row in rows:
        del row["question"]
    other, images = write_rows(tmp_path / "other", rows)
    with pytest.raises(ValueError) as error:
        run_init(tmp_path / "yours", table=other, images=images)
    assert f"The table {other} has no column question; it has answer, image: " in str(error.value)
    assert "--columns question=COLUMN" in str(error.value)


def closed(count: int, answer: str = "") -> list[dict[str, Any]]:
    return [
        {"question": f"Is there a nodule in region {number}?", "answer": answer or ("yes", "no")[number % 2]}
        for number in range(count)
    ]


def choices(count: int, letter: str = "") -> list[dict[str, Any]]:
    return [
        {
            "question": f"Which is seen in region {number}?",
            "options": [f"cyst {number}", f"mass {number}"],
            "answer": letter or "AB"[number % 2],
        }
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (closed(49), r"questions.jsonl has 49 usable questions, but training and testing need at least 50"),
        (closed(50, "yes"), r"All 50 answers in .* are 'yes', so always giving that answer is always right"),
        (choices(50, "A"), r"The right option in .* is always A, so .*: shuffle the options"),
        (
            [{"question": f"What is seen in region {n}?", "answer": f"mass {n}"} for n in range(50)],
            r"All questions in .* are open-ended, .* --open-correctness token_f1",
        ),
    ],
)
def test_questions_that_teach_nothing_are_refused_in_a_sentence(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    table, images = write_rows(tmp_path / "own", rows)
    with pytest.raises(ValueError, match=message):
        run_init(tmp_path / "mine", table=table, images=images, gpu_memory=24)
    assert not (tmp_path / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_open_questions_are_taken_where_it_is_said_how_they_are_compared(tmp_path: Path) -> None:
    rows = [{"question": f"What is seen in region {n}?", "answer": f"mass {n}"} for n in range(50)]
    table, images = write_rows(tmp_path / "own", rows)
    run_init(tmp_path / "mine", table=table, images=images, gpu_memory=24, open_correctness="token_f1")
    assert load_config(tmp_path / "mine" / "config.yaml").config.rewards.open_correctness == "token_f1"


def test_enough_questions_with_different_answers_are_taken(tmp_path: Path) -> None:
    table, images = write_rows(tmp_path / "own", [*closed(25), *choices(25)])
    assert run_init(tmp_path / "mine", table=table, images=images, gpu_memory=24)


def test_wrong_data_is_shown_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, images = write_rows(tmp_path / "own", closed(60))
    Image.new("L", (32, 32), 128).save(images / "3.png")
    assert not run_init(tmp_path / "mine", table=table, images=images, gpu_memory=24)
    out = capsys.readouterr().out
    assert "constant image" in out and "nothing was written: fix the data" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_a_split_of_ones_own_is_kept_and_patients_stay_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = closed(60)
    for number, row in enumerate(rows):
        row["split"] = "test" if number < 20 else "val" if number < 30 else "train"
    table, images = write_rows(tmp_path / "own", rows)
    run_init(tmp_path / "mine", table=table, images=images, gpu_memory=24)
    kept = [json.loads(line) for line in (tmp_path / "mine" / "data.jsonl").open()]
    assert [row["split"] for row in kept] == [row["split"] for row in rows]
    for change, message in (
        (("train", ""), "is '' in row 60: give train, val or test in every row"),
        (("val", "test"), "has no row for val: give"),
    ):
        changed = [
            {**row, "split": change[1] if row["split"] == change[0] and (change[1] or n == 59) else row["split"]}
            for n, row in enumerate(rows)
        ]
        table.write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(ValueError, match=message):
            run_init(tmp_path / "other", table=table, images=images, gpu_memory=24)
    table.write_text("".join(json.dumps({**row, "split": "\x89PNG\x1b[2J" * 9000}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="in row 1: give") as error:
        run_init(tmp_path / "other", table=table, images=images, gpu_memory=24)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()
    rows = closed(60)
    for number, row in enumerate(rows):
        row["Patient ID\x1b"] = f"p{number // 6}"
    table, images = write_rows(tmp_path / "patients", rows)
    run_init(tmp_path / "theirs", table=table, images=images, gpu_memory=24)
    assert "Rows with the same Patient ID stay in one split." in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "theirs" / "data.jsonl").open()]
    places = {(row["Patient ID\x1b"], row["split"]) for row in found}
    assert len(places) == 10 and {split for _, split in places} == {"train", "val", "test"}
    for number, row in enumerate(rows):
        row["case"] = row.pop("Patient ID\x1b")
        row["split"] = ("train", "val", "test")[number % 3]
    table, images = write_rows(tmp_path / "cases", [{k: v for k, v in row.items() if k != "split"} for row in rows])
    run_init(tmp_path / "unsure", table=table, images=images, gpu_memory=24)
    assert "Warning: case may identify patients" in capsys.readouterr().out
    table, images = write_rows(tmp_path / "split", [{**row, "mrn": row["case"]} for row in rows])
    assert not run_init(tmp_path / "leaky", table=table, images=images, gpu_memory=24)
    assert "memorisation: divide the table with" in " ".join(re.findall(r"[\w:]+", capsys.readouterr().out))


@pytest.mark.parametrize(
    ("table", "images", "message"),
    [
        ("none.csv", "images", "The table .*none.csv does not exist"),
        ("questions.csv", "pictures", "The folder .*pictures does not exist: give the folder of the images"),
    ],
)
def test_missing_files_are_named(phantom: Path, tmp_path: Path, table: str, images: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_init(tmp_path / "mine", table=phantom / table, images=phantom / images, gpu_memory=24)


def test_a_full_disk_names_the_project_and_leaves_nothing(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(division: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(init_command, "write_divided", fill_up)
    with pytest.raises(OSError) as error:
        run_init(tmp_path / "mine", table=phantom / "questions.csv", images=phantom / "images", gpu_memory=24)
    assert error.value.filename == str(tmp_path / "mine") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "limit"),
    [("Qwen/Qwen3-VL-2B-Instruct", 524288), ("Qwen/Qwen2-VL-2B-Instruct", 401408), ("google/medgemma-4b-it", None)],
)
def test_the_config_fits_the_family_of_the_model(model: str, limit: int | None, phantom: Path, tmp_path: Path) -> None:
    table, images = phantom / "questions.csv", phantom / "images"
    assert run_init(tmp_path / "mine", table=table, images=images, gpu_memory=80.0, model=model)
    config = load_config(tmp_path / "mine" / "config.yaml", purpose="train").config
    assert (config.model.path, config.model.max_pixels) == (model, limit)


def test_an_unknown_model_is_refused_before_anything_is_read(phantom: Path, tmp_path: Path) -> None:
    table, images = phantom / "questions.csv", phantom / "images"
    with pytest.raises(ValueError, match=r"--model is 'no/model', whose config\.json is not on this machine"):
        run_init(tmp_path / "mine", table=table, images=images, gpu_memory=80.0, model="no/model")
    assert not (tmp_path / "mine").exists()


def form(folder: Path, name: str) -> tuple[Path, Path | None]:
    """The questions of :func:`closed` in another form."""
    table, images = write_rows(folder, rows := closed(60))
    if name == "semicolons":
        lines = [f'{row["image"]};"{row["question"]}";{row["answer"]}' for row in rows]
        table = folder / "fragen.csv"
        table.write_text("\n".join(["\ufeffBild;Frage;Antwort", *lines]), encoding="utf-8")
    elif name == "excel":
        openpyxl = pytest.importorskip("openpyxl")
        book, table = openpyxl.Workbook(), folder / "fragen.xlsx"
        for cells in (
            ["Dateiname", "Frage ", "ANTWORT"],
            *([*map(row.get, ("image", "question", "answer"))] for row in rows),
        ):
            book.active.append(cells)
        book.save(table)
    elif name == "llava":
        chats = [
            [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"]}] for row in rows
        ]
        records = [{"image": row["image"], "conversations": chat} for row, chat in zip(rows, chats)]
        table.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif name == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = folder / "hub.parquet"
        held = [{**row, "image": {"bytes": (images / row["image"]).read_bytes(), "path": None}} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(held), table)
        return table, None
    return table, images


FORMS = {
    "semicolons": "fragen.csv: 60 rows, separated by semicolons; image is 'Bild', question is 'Frage', answer is "
    "'Antwort'.",
    "excel": "fragen.xlsx: 60 rows, sheet 'Sheet'; image is 'Dateiname', question is 'Frage', answer is 'ANTWORT'.",
    "llava": "questions.jsonl: 60 rows of LLaVA/ShareGPT conversations.",
    "parquet": "hub.parquet: 60 rows. The images are in the table.",
}


@pytest.mark.parametrize("name", FORMS)
def test_the_first_line_says_what_was_recognised(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table, images = form(tmp_path / "own", name)
    arguments = ["init", str(tmp_path / "mine"), "--data", str(table), "--gpu-memory", "24"]
    result = CliRunner().invoke(app, [*arguments, *(["--images", str(images)] if images else [])])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == FORMS[name]
    config = load_config(tmp_path / "mine" / "config.yaml", purpose="train").config
    datasets = [load_dataset(config.data, split) for split in ("train", "val", "test")]
    samples = [data[index] for data in datasets for index in range(len(data))]
    found = {(sample.question, sample.answer) for sample in samples}
    assert found == {(row["question"], row["answer"]) for row in closed(60)}
    assert {sample.images[0].load().size for sample in samples[:2]} == {(32, 32)}


def test_columns_are_named_on_the_command_line_and_kept_in_the_config(tmp_path: Path) -> None:
    rows = [{**row, "label": "x", "solution": row["answer"]} for row in closed(60)]
    table, images = write_rows(tmp_path / "own", rows)
    for row in rows:
        row["scan, left"] = row.pop("image")
        del row["answer"]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["init", str(tmp_path / "mine"), "--data", str(table), "--images", str(images), "--gpu-memory", "24"]
    result = CliRunner().invoke(app, arguments)
    assert (
        result.exit_code == 2 and "'label' and 'solution'" in result.output and "can both be answer" in result.output
    )
    given = '"image=scan, left",answer=solution'
    for columns, message in (
        ("answer=solution", "has no column image; it has question, label, solution, scan, left"),
        (f"{given},question=Frage", "has no column 'Frage', which is to be question; it has question, label"),
        ("bild=solution", "--columns has 'bild=solution': write NAME=COLUMN"),
        ("answer", "--columns has 'answer': write NAME=COLUMN"),
        ("answer=a,answer=b", "--columns has 'answer=b': write NAME=COLUMN"),
    ):
        result = CliRunner().invoke(app, [*arguments, "--columns", columns])
        assert result.exit_code == 2 and message in result.output, result.output
    result = CliRunner().invoke(app, [*arguments, "--columns", given])
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "mine" / "config.yaml", purpose="train").config
    assert config.data.columns.given == {"image": "scan, left", "answer": "solution"}
    assert sum(len(load_dataset(config.data, split)) for split in ("train", "val", "test")) == 60
    divided = ["data", "split", str(table), "--columns", given, "--output", str(tmp_path / "ours" / "data.jsonl")]
    result = CliRunner().invoke(app, divided)
    assert result.exit_code == 0 and "data.columns.image='scan, left' data.columns.answer=solution" in result.output


def test_all_bad_rows_and_images_are_listed_at_once(tmp_path: Path) -> None:
    table, images = write_rows(tmp_path / "own", rows := closed(60))
    (images / "3.png").write_bytes(b"damaged")
    (images / "5.png").unlink()
    rows[7]["answer"] = None
    rows[9]["image"] = "/etc/passwd"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["init", str(tmp_path / "mine"), "--data", str(table), "--images", str(images), "--gpu-memory", "24"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    lines = result.output.split("error: ")[1].strip().split("\n")
    assert lines[0] == f"4 of 60 rows of {table} cannot be used:"
    assert lines[1].startswith(f"row 4: The image {images / '3.png'} cannot be decoded")
    assert lines[2:] == [
        "row 6 (5.png): missing image",
        "row 8: no answer",
        "row 10 (/etc/passwd): image path leaves the folder",
        "Fix or remove them, or leave them out with --max-dropped 0.07.",
    ]
    result = CliRunner().invoke(app, [*arguments, "--max-dropped", "0.07"])
    assert result.exit_code == 0 and "row 8: no answer" in result.output
    assert ".mine-" not in result.output


def test_a_folder_written_by_save_to_disk_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, images = write_rows(tmp_path / "own", rows := closed(60))
    held = [{**row, "image": {"bytes": (images / row["image"]).read_bytes(), "path": None}} for row in rows]
    for split in ("train", "test"):  # as datasets writes it: two files in the stream format, and a list of them
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        for number, some in enumerate((held[:37], held[37:])):
            table = pyarrow.Table.from_pylist(some)
            with pyarrow.ipc.new_stream(str(folder / f"data-0000{number}-of-00002.arrow"), table.schema) as stream:
                stream.write_table(table)
        files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
        (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": split}))
    with pytest.raises(ValueError, match=r"holds the splits test, train: give one of them, such as .*saved/train, or"):
        run_init(tmp_path / "mine", table=tmp_path / "saved", images=None, gpu_memory=24)
    with pytest.raises(ValueError, match="is a folder that save_to_disk did not write: give your questions as CSV"):
        run_init(tmp_path / "mine", table=images, images=None, gpu_memory=24)
    assert run_init(tmp_path / "mine", table=tmp_path / "saved" / "train", images=None, gpu_memory=24)
    config = load_config(tmp_path / "mine" / "config.yaml", purpose="train").config
    assert sum(len(load_dataset(config.data, split)) for split in ("train", "val", "test")) == 60
    both = DataConfig(name="own", path=str(tmp_path / "saved"), num_val=None, cache_dir=str(tmp_path / "cache"))
    assert len(load_dataset(both, "test")) == 60 and len(load_dataset(both, "train")) < 60  # a tenth validates
    (tmp_path / "saved" / "test" / "data-00001-of-00002.arrow").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"saved/test was not written by save_to_disk, or is damaged"):
        load_dataset(both, "test")


def test_questions_without_an_image_are_listed_or_kept(tmp_path: Path) -> None:
    table, images = write_rows(tmp_path / "own", rows := closed(80))
    for row in rows[::4]:
        row["image"] = ""
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["init", str(tmp_path / "mine"), "--data", str(table), "--images", str(images)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.output.endswith(
        "or leave them out with --max-dropped 0.25, or keep those without an image with --allow-text-only.\n"
    )
    result = CliRunner().invoke(app, [*arguments, "--allow-text-only"])
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "mine" / "config.yaml", purpose="train").config
    datasets = [load_dataset(config.data, split) for split in ("train", "val", "test")]
    inputs = Counter(dataset[index].groups["input"] for dataset in datasets for index in range(len(dataset)))
    assert inputs == {"image": 60, "text": 20}
    split = ["data", "split", str(table), "--output", str(tmp_path / "ours" / "data.jsonl"), "--allow-text-only"]
    result = CliRunner().invoke(app, split)
    assert result.exit_code == 0 and "data.allow_text_only=true" in result.output
