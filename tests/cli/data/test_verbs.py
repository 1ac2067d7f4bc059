"""The verbs `data ...`, run through the command line.

Run: pytest tests/cli/data/test_verbs.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import ModelConfig
from medvqa_rl.data.sets.vqa_rad import FILE
from medvqa_rl.models.families.costs import image_rule

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "vqa_rad_cpu.yaml")
PHANTOM = str(ROOT / "configs" / "phantom_cpu.yaml")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", *arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def row(number: int, image: str, phrase: str, **changes: Any) -> dict[str, Any]:
    return {
        "qid": str(number),
        "image_name": image,
        "question": f"Is finding {number} seen?",
        "answer": "yes",
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "image_organ": "CHEST",
        "phrase_type": phrase,
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """VQA-RAD in little, with 20 training and 4 test images, none shared."""
    (tmp_path / "images").mkdir()
    for number in range(24):
        picture = Image.effect_noise((40, 30), 90).resize((80, 60))
        picture.save(tmp_path / "images" / f"{number}.png")
    rows = [row(number, f"{number}.png", "freeform" if number < 20 else "test_freeform") for number in range(24)]
    (tmp_path / FILE).write_text(json.dumps(rows))
    return tmp_path


def test_list_names_data_sets_with_terms_and_sources() -> None:
    code, output = run("list")
    assert code == 0
    for text in ("phantom", "vqa_rad", "CC0 1.0", "https://osf.io/89kps/", "phrase_type", "nothing to download"):
        assert text in output


def test_check_exits_with_0_where_nothing_is_wrong(folder: Path) -> None:
    code, output = run("check", CONFIG, f"data.path={folder}", "data.split=official")
    assert code == 0, output
    assert "0 of the 4 test images" in output and "Nothing is wrong" in output and "fingerprint" in output


def test_check_exits_with_1_and_names_a_leak_under_another_name(folder: Path) -> None:
    (folder / "images" / "22.png").write_bytes((folder / "images" / "3.png").read_bytes())
    code, output = run("check", CONFIG, f"data.path={folder}", "data.split=official", "--html", str(folder / "x.html"))
    assert code == 1, output
    assert "1 of the 4 test images" in output and "22.png = 3.png" in output and "1 kind of fault" in output
    assert "22.png = 3.png" in (folder / "x.html").read_text()
    code, output = run("check", CONFIG, f"data.path={folder}", "data.split=official", "--no-images")
    assert code == 0 and "0 of the 4 test images" in output


def test_the_owners_split_is_told_where_it_is_not_used(folder: Path) -> None:
    rows = json.loads((folder / FILE).read_text())
    rows += [row(50 + n, f"{n}.png", "test_freeform") for n in range(6)]
    (folder / FILE).write_text(json.dumps(rows))
    code, output = run("check", CONFIG, f"data.path={folder}", "data.seed=6")
    assert code == 0, output
    assert "official split, not used here: of its 10 test images, also in train or val: 6" in output


def test_strict_counts_what_is_only_to_be_looked_at(folder: Path) -> None:
    rows = json.loads((folder / FILE).read_text())
    rows.append({**rows[5], "qid": "900"})
    rows.append(row(901, "gone.png", "freeform"))
    (folder / FILE).write_text(json.dumps(rows))
    arguments = ("check", CONFIG, f"data.path={folder}", "data.split=official")
    code, output = run(*arguments)
    assert code == 0 and "4 to review" in output and "row 26" in output and "missing image" in output
    assert run(*arguments, "--strict")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=/nowhere"], "does not exist"),
        (["data.pth=x"], "data.path"),
        (["data.path=/nowhere", "--limit", "0"], "Usage"),
    ],
)
def test_bad_settings_exit_with_2(arguments: list[str], message: str) -> None:
    code, output = run("check", CONFIG, *arguments)
    assert code == 2 and message in output


def test_the_phantom_world_is_checked_up_to_a_limit() -> None:
    code, output = run("check", PHANTOM, "--limit", "40", "data.num_val=20")
    assert code == 0 and "endless" in output and "unless --limit" in output


def test_show_draws_a_sheet(folder: Path) -> None:
    out = folder / "sheets" / "a.png"
    arguments = ("show", CONFIG, f"data.path={folder}", "--split", "test", "--count", "2", "--output", str(out))
    code, output = run(*arguments)
    assert code == 0 and str(out) in output
    with Image.open(out) as sheet:
        assert sheet.width == 2 * 316 + 16
    first = out.read_bytes()
    assert run(*arguments)[0] == 0 and out.read_bytes() == first


def test_the_budget_of_an_absent_checkpoint_is_that_of_the_published_one(shared_data: Path) -> None:
    published, where = image_rule(ModelConfig(path=str(shared_data / "qwen2_vl" / "instruct")))
    assert (published.min_pixels, published.max_pixels) == (3136, 12_845_056) and where.startswith("from ")
    assert image_rule(ModelConfig(path="some/model-nobody-has"))[0] == published


def test_the_budget_is_the_checkpoint_s_and_settings_win(tmp_path: Path) -> None:
    absent, _ = image_rule(ModelConfig(path="some/model-nobody-has"))
    assert (absent.min_pixels, absent.max_pixels) == (3136, 12_845_056)  # as published for Qwen2-VL
    content = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 784, "longest_edge": 12544}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    budget, where = image_rule(ModelConfig(path=str(tmp_path)))
    assert (budget.min_pixels, budget.max_pixels) == (784, 12544) and where.startswith("from ")
    budget, _ = image_rule(ModelConfig(path=str(tmp_path), max_pixels=6272))
    assert (budget.min_pixels, budget.max_pixels) == (784, 6272)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has \[\] .should be an object.: copy the file from the checkpoint"):
        image_rule(ModelConfig(path=str(tmp_path)))


def test_check_looks_for_shared_images_in_other_data_sets(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    Image.effect_noise((40, 30), 90).save(other / "images" / "0.png")  # a name of the first set, another image
    Image.open(folder / "images" / "3.png").save(other / "images" / "x.png")
    rows = [{"image": name, "question": "Is it?", "answer": "no"} for name in ("0.png", "x.png")]
    (other / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = tmp_path / "other.yaml"
    settings.write_text(f"data: {{name: own, path: {other}}}")
    config = [CONFIG, f"data.path={folder}", "data.split=official"]
    assert run("check", *config)[0] == 0
    code, output = run("check", *config, "--data", str(settings))
    assert code == 1
    assert "images in train and own: test" in output and "own/x.png = " in output and "own/0.png" not in output
    code, output = run("check", *config, "--data", str(settings), "--no-images")
    assert code == 2 and "--data and --no-images cannot be combined" in output


def test_split_writes_a_table_with_a_column(tmp_path: Path) -> None:
    lines = ["image,question,answer,patient"]
    lines += [f"{n % 40}.png,Question {n}?,yes,p{n % 20}" for n in range(120)]
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")
    code, output = run("split", str(tmp_path / "mine.csv"), "--test", "0.2", "--seed", "3")
    assert (
        code == 0
        and "20 groups of rows that share an image or patient stay together" in output
        and f"data.name=own data.split=official data.path={tmp_path}\n" in output
    )
    written = (tmp_path / "data.csv").read_text().splitlines()
    assert written[0] == "image,question,answer,patient,split" and len(written) == 121
    places: dict[str, set[str]] = {}
    for line in written[1:]:
        *_, patient, place = line.split(",")
        places.setdefault(patient, set()).add(place)
    assert all(len(found) == 1 for found in places.values())
    assert sum(line.endswith(",test") for line in written) == 24
    code, output = run("split", str(tmp_path / "mine.csv"))
    assert code == 2 and "already exists" in output
    code, output = run("split", str(tmp_path / "mine.csv"), "--by", "image", "--output", str(tmp_path / "i.csv"))
    assert code == 0 and "40 groups of rows that share an image stay together" in output
    (tmp_path / "cases.csv").write_text("\n".join([lines[0].replace("patient", "Case"), *lines[1:]]))
    code, output = run("split", str(tmp_path / "cases.csv"), "--output", str(tmp_path / "c.csv"))
    assert code == 0 and "Warning: Case may identify patients" in output and "40 groups" in output
    code, output = run("split", str(tmp_path / "mine.csv"), "--output", str(tmp_path / "new.csv"))
    assert code == 0 and "name it data.csv: data.name=own reads no other name" in output
    code, output = run("split", str(tmp_path / "gone.csv"), "--output", str(tmp_path / "x.csv"))
    assert code == 2 and "gone.csv" in output


def test_export_writes_every_split(folder: Path) -> None:
    out = folder / "out"
    code, output = run("export", CONFIG, f"data.path={folder}", "data.split=official", "--output", str(out))
    assert code == 0 and "test.jsonl, 4 rows, 4 images\n" in output
    rows = [json.loads(line) for name in ("train", "val", "test") for line in (out / f"{name}.jsonl").open()]
    assert len(rows) == 24 and {row["solution"] for row in rows} == {"yes"}
    assert all((out / name).is_file() for row in rows for name in row["images"])
    assert run("export", CONFIG, f"data.path={folder}", "--output", str(out))[0] == 2


def test_a_data_set_with_one_split_is_checked(tmp_path: Path) -> None:
    lines = []
    for n in range(12):
        Image.effect_noise((40, 30), 90).resize((80, 60)).save(tmp_path / f"{n}.png")
        options = {"options": ["cyst", "stone", "tumour", "abscess"], "answer": "ABCD"[n % 4]}
        lines.append(json.dumps({"image": f"{n}.png", "question": f"Which is number {n}?", **options}))
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    own = (PHANTOM, "data.name=own", f"data.path={tmp_path}", "data.scanner=home", f"data.cache_dir={tmp_path / 'c'}")
    code, output = run("check", *own)
    assert code == 0 and "test images" not in output and "12 choice" in output, output
    code, output = run("export", *own, "--output", str(tmp_path / "out"))
    assert code == 0 and [path.name for path in (tmp_path / "out").glob("*.jsonl")] == ["test.jsonl"]
    (tmp_path / "test.jsonl").unlink()
    code, output = run("check", *own)
    assert code == 2 and "no table of questions" in output


def test_written_splits_are_read_and_share_no_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    lines = ["image,question,answer,patient"]
    for n in range(60):
        if n < 30:
            Image.effect_noise((40, 30), 90).resize((80, 60)).save(tmp_path / "images" / f"{n}.png")
        lines.append(f"{n % 30}.png,Question {n}?,yes,p{n % 15}")
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    arguments = ("--by", "patient", "--images", str(tmp_path / "images"), "--val", "0.2", "--test", "0.2")
    code, output = run("split", str(tmp_path / "mine.csv"), *arguments)
    assert code == 0 and "15 groups of rows" in output and "0 duplicates of another image" in output
    own = (PHANTOM, "data.name=own", f"data.path={tmp_path}", "data.scanner=home", f"data.cache_dir={tmp_path / 'c'}")
    code, output = run("check", *own, "data.answer_types=[closed]")
    assert code == 0 and "0 of the 6 test images" in output, output


def test_slices_of_one_volume_in_two_splits_are_a_leak(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    for name in ("a", "b"):
        volume = np.random.default_rng(ord(name)).normal(100, 30, (40, 50, 6)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}.nii.gz")
    for place, images in (("train", "a.nii.gz#slice=1|a.nii.gz#slice=2"), ("test", "a.nii.gz#slice=4&window=100,200")):
        lines = ["image,question,answer", f'"{images}",Is it normal?,yes', "b.nii.gz,Is it large?,no"]
        (tmp_path / f"{place}.csv").write_text("\n".join(lines[: 2 if place == "train" else 3]))
    own = (PHANTOM, "data.name=own", f"data.path={tmp_path}", "data.scanner=home", f"data.cache_dir={tmp_path / 'c'}")
    (tmp_path / "val.csv").write_text("image,question,answer\nb.nii.gz#slice=0,Is it small?,no")
    code, output = run("check", *own, "data.answer_types=[closed]")
    assert code == 1 and "2 of the 2 test images" in output and "a.nii.gz#slice=4&window=100,200" in output, output
    assert "images in train and test" in output and "images in val and test" in output


def test_check_says_what_own_tables_are_and_lists_every_damaged_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.effect_noise((40, 30), 90).save(tmp_path / "images" / f"{number}.png")
    lines = [f"{number};Is finding {number} seen?;{'ja' if number % 2 else 'nein'}" for number in range(40)]
    (tmp_path / "test.csv").write_text("\n".join(["Scan;Frage;Antwort", *lines]), encoding="utf-8")
    (tmp_path / "plain.yaml").write_text("{}")
    arguments = ("check", str(tmp_path / "plain.yaml"), "data.name=own", f"data.path={tmp_path}")
    code, output = run(*arguments)
    assert code == 2 and "has no column image; it has Scan, Frage, Antwort" in output
    code, output = run(*arguments, "data.columns.image=Scan")
    assert code == 0, output
    first = "test.csv: 40 rows, separated by semicolons; image is 'Scan', question is 'Frage', answer is 'Antwort'."
    assert output.splitlines()[0] == first and "40 closed" in output
    for number in range(5):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"damaged")
    code, output = run(*arguments, "data.columns.image=Scan")
    below = output.split("unreadable image:\n")[1]
    assert code == 1 and all(
        f"{tmp_path / 'images' / str(number)}.png cannot be decoded" in below for number in range(5)
    )


def test_a_table_that_holds_its_images_is_divided_with_and_without_a_folder(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(40):
        path = tmp_path / "images" / f"{number}.png"
        Image.new("L", (8, 8), number // 2).save(path)
        rows.append({"image": {"bytes": path.read_bytes(), "path": None}, "question": f"{number}?", "answer": "yes"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub.parquet")
    for number, folder in enumerate(((), ("--images", str(tmp_path / "images")))):
        out = tmp_path / f"{number}.parquet"
        code, output = run("split", str(tmp_path / "hub.parquet"), "--output", str(out), *folder)
        assert code == 0 and "20 groups of rows that share an image" in output, output
        assert [row["image"] for row in parquet.read_table(out).to_pylist()] == [row["image"] for row in rows]
