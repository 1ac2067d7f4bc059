"""The verb ask, end to end on tiny random models.

Run: pytest tests/cli/test_ask.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.ask import make_question, read_vote
from medvqa_rl.core.types import DEFAULT_WORDING, Completion, Sample

MakeFolder = Callable[[str], Path]
MakeSample = Callable[..., Sample]


def test_votes(make_sample: MakeSample) -> None:
    choice, free = make_sample(options=("left lung", "right lung")), make_sample()

    def vote(sample: Sample, answer: str) -> str:
        text = f"<think>x</think><answer>{answer}</answer>"
        return read_vote(sample, Completion((), text, False), "think_answer", DEFAULT_WORDING)

    assert vote(choice, "b.") == vote(choice, "right lung") == "B: right lung"
    assert vote(choice, "C") == vote(choice, "") == "(no answer)"
    assert vote(free, "The Liver.") == vote(free, "liver") == "liver"


def test_ask_greedily_and_as_a_group(
    tiny_folder: MakeFolder, tmp_path: Path, make_image: Callable[..., object]
) -> None:
    image = tmp_path / "x.png"
    make_image().load().save(image)  # type: ignore[attr-defined]
    model = str(tiny_folder("qwen2_vl"))
    arguments = ["ask", str(image), "Where?", "--model", model, "--max-length", "6"]
    greedy = CliRunner().invoke(app, arguments)
    assert greedy.exit_code == 0, greedy.output
    assert "never use it for a decision" in greedy.output
    first, again, other = (
        CliRunner().invoke(app, [*arguments, "--samples", "4", "--seed", seed]).output for seed in ("0", "0", "1")
    )
    assert first == again != other
    assert "of 4" in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png", "Where?"], "The image none.png does not exist: give the path of an image file"),
        ([".", "Where?"], "The image . is a folder"),
        (["x.png", " "], "The question is empty"),
        (["x.png", "Where?", "--option", "left"], "There are 1 options, but a choice question needs 2 to 26"),
    ],
)
def test_ask_says_what_is_wrong_before_it_loads_a_model(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 30)).save("x.png")
    result = CliRunner().invoke(app, ["ask", *arguments, "--model", "nowhere"])
    assert result.exit_code == 2
    assert message in result.output


def test_a_question_does_not_know_its_answer(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    assert make_question(tmp_path / "x.png", "Where?", ("left", "right")).answer_type == "choice"
    assert make_question(tmp_path / "x.png", "Where?", ()).answer == ""
