"""The verbs `data ...` through the real command line.

Run: pytest tests/test_data_commands.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from medvqa_rl.cli import app
from medvqa_rl.config import ModelConfig
from medvqa_rl.data.vqa_rad import FILE
from medvqa_rl.data_commands import image_budget

ROOT = Path(__file__).parents[1]
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


def test_strict_counts_what_is_only_to_be_looked_at(folder: Path) -> None:
    rows = json.loads((folder / FILE).read_text())
    rows.append({**rows[5], "qid": "900"})
    rows.append(row(901, "gone.png", "freeform"))
    (folder / FILE).write_text(json.dumps(rows))
    arguments = ("check", CONFIG, f"data.path={folder}", "data.split=official")
    code, output = run(*arguments)
    assert code == 0 and "2 to look at" in output and "row 25" in output and "missing image" in output
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


def test_the_budget_is_the_checkpoint_s_and_settings_win(tmp_path: Path, shared_data: Path) -> None:
    published, where = image_budget(ModelConfig(path=str(shared_data / "qwen2_vl" / "instruct")))
    assert (published.min_pixels, published.max_pixels) == (3136, 12_845_056) and where.startswith("of ")
    assert image_budget(ModelConfig(path="some/model-nobody-has"))[0] == published
    content = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 784, "longest_edge": 12544}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    budget, _ = image_budget(ModelConfig(path=str(tmp_path), max_pixels=6272))
    assert (budget.min_pixels, budget.max_pixels) == (784, 6272)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no image settings"):
        image_budget(ModelConfig(path=str(tmp_path)))
