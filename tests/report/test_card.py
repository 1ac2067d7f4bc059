"""Model cards say what the run's files say, and nothing of the machine.

Run: pytest tests/report/test_card.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from synthetic import make_run, write, write_eval
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import EvalConfig, LoraConfig, LossConfig
from medvqa_rl.config.yaml import read_yaml, write_yaml
from medvqa_rl.core.types import Sample
from medvqa_rl.evaluation.statistics.summary import paired_gain
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.report import card
from medvqa_rl.report.card import LIMITS, write_cards
from medvqa_rl.report.pages.report import write_report
from medvqa_rl.report.runs import read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a best and two other checkpoints; the model came from a folder of this machine."""
    folder = make_run(
        tmp_path / "run",
        model={"path": str(tmp_path / "secret" / "Qwen2-VL-2B"), "lora": {"rank": 8}},
        loss={"type": "dr_grpo"},
        train={"steps": 40, "prompts_per_step": 4, "seed": 7},
    )
    for name in ("best", "checkpoints/step_000020", "checkpoints/step_000040"):
        write(folder / name / "adapter_config.json", {})
    write(folder / "best" / "best.json", {"step": 40, "accuracy": 0.7})
    return folder


def front_matter(card: str) -> dict[str, object]:
    _, text, _ = card.split("---\n", 2)
    found: dict[str, object] = read_yaml(text)
    return found


def test_best_and_last_get_a_card(run: Path) -> None:
    written = [str(path.relative_to(run)) for path in write_cards(run)]
    assert written == ["best/README.md", "checkpoints/step_000040/README.md"]
    assert not (run / "checkpoints" / "step_000020" / "README.md").exists()
    assert sorted(path.name for path in (run / "best").iterdir()) == ["README.md", "adapter_config.json", "best.json"]


def test_a_card_says_that_the_base_was_in_4_bits(run: Path) -> None:
    path = run / "config.resolved.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model"]["load_in_4bit"] = True
    path.write_text(json.dumps(settings), encoding="utf-8")
    card = write_cards(run)[0].read_text(encoding="utf-8")
    assert "LoRA adapter for `Qwen2-VL-2B`, whose linear layers were quantized to 4 bits (NF4), fine-tuned" in card


def test_cards_and_pages_show_no_folder_and_no_password(run: Path, tmp_path: Path) -> None:
    path = run / "config.resolved.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    secret = tmp_path / "secret"
    settings["data"] |= {"name": "own", "path": str(secret / "ours"), "image_folder": str(secret / "scans")}
    settings["judge"] |= {"endpoint": "https://anna:pass@judge.example/v1", "cache_dir": str(secret / "cache")}
    path.write_text(json.dumps(settings), encoding="utf-8")
    card = write_cards(run)[0].read_text(encoding="utf-8")
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'data.image_folder="scans"\n' in card and 'judge.endpoint="judge.example"\n' in card
    assert "scans" in page and "judge.example" in page and "so no images are shown" in page
    for text in (card, page):
        assert str(tmp_path) not in text and "secret" not in text and "anna:pass" not in text


def test_contents_of_a_card(run: Path, tmp_path: Path) -> None:
    card = write_cards(run)[1].read_text(encoding="utf-8")
    assert front_matter(card)["library_name"] == "peft" and "base_model" not in front_matter(card)
    assert "**Research software. Not for clinical use.**" in card and all(limit in card for limit in LIMITS)
    assert "LoRA adapter for `Qwen2-VL-2B`" in card
    assert "by Dr. GRPO (40 steps of 4 prompts with 8 sampled completions each)" in card
    stored = read_run(run)
    results = stored.evaluations[1].results
    low, high = (f"{100 * results[name]:.1f}" for name in ("accuracy_low", "accuracy_high"))
    assert f"| these weights | phantom/home/val, after step 40 | 20 | 10 | 70.0 | {low} to {high} | " in card
    assert "| before training | phantom/home/val | 20 | 10 | 50.0 |" in card
    gain = paired_gain(stored.evaluations[0].records(), stored.evaluations[1].records(), EvalConfig())
    assert f"+20.0 points, 95 % interval {100 * gain['gain_low']:+.1f} to {100 * gain['gain_high']:+.1f}" in card
    assert f"| train | phantom/home/train | endless | {stored.data['train']['fingerprint']} | – |" in card
    assert 'loss.type="dr_grpo"\n' in card and "train.seed=7\n" in card and "optimizer" not in card
    assert 'model.path="Qwen2-VL-2B"\n' in card
    assert str(tmp_path) not in card and "secret" not in card
    assert "too high by an unknown amount" not in card


def test_the_best_checkpoint_says_that_it_was_chosen(run: Path) -> None:
    card = write_cards(run)[0].read_text(encoding="utf-8")
    assert "# run, best checkpoint" in card and "which had the highest validation accuracy" in card
    assert "which is therefore biased upwards" in card


def test_full_weights_of_a_model_on_the_hub(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model={"path": "Qwen/Qwen2-VL-2B-Instruct"})
    write(run / "best" / "config.json", {})
    status = json.loads((run / "status.json").read_text())
    write(run / "status.json", status | {"kind": "sft"})
    card = write_cards(run)[0].read_text(encoding="utf-8")
    head = front_matter(card)
    assert head["base_model"] == "Qwen/Qwen2-VL-2B-Instruct" and head["base_model_relation"] == "finetune"
    assert head["library_name"] == "transformers" and "sft" in head["tags"]  # type: ignore[operator]
    assert "supervised fine-tuning (40 steps of 32 samples)" in card
    assert "after step unknown" in card and "No evaluation of these weights is stored" not in card


def test_evaluations_apart_from_training_belong_to_their_weights(run: Path) -> None:
    for name, folder in (("test-best", "best"), ("test-last", "checkpoints/step_000040")):
        results = write_eval(run / "eval" / name, [True] * 20)
        model = {"path": "x", "adapter": str(run / folder)}
        write(run / "eval" / name / "results.json", results | {"dataset": {"name": f"{name} set"}, "model": model})
    results = write_eval(run / "eval" / "averaged", [True] * 20)
    model = {"path": "x", "adapter": str(run / "best"), "average_with": "x", "average_weight": 0.6}
    write(run / "eval" / "averaged" / "results.json", results | {"dataset": {"name": "averaged"}, "model": model})
    best, last = (path.read_text(encoding="utf-8") for path in write_cards(run))
    assert "averaged" not in best, "an average is another model"
    assert "| these weights | test-best set | 20 |" in best and "test-last" not in best
    assert "| these weights | test-last set | 20 |" in last and "test-best" not in last


def test_names_cannot_break_the_table(run: Path) -> None:
    path = run / "eval" / "step_000040" / "results.json"
    write(path, json.loads(path.read_text()) | {"dataset": {"name": "a | b\n<script>"}})
    assert "| a \\| b \\<script\\>, after step 40 |" in write_cards(run)[1].read_text(encoding="utf-8")


def test_missing_parts_are_named(run: Path) -> None:
    for name in ("config.resolved.json", "env.json", "data.json", "status.json", "metrics.jsonl"):
        (run / name).unlink()
    for path in run.glob("eval/*/samples.jsonl"):
        path.unlink()
    card = write_cards(run)[1].read_text(encoding="utf-8")
    assert "The settings are missing." in card and "env.json is missing." in card
    assert "- Missing when this card was written: data.json is missing." in card
    assert "The paired difference on phantom/home/val, after step 40 is unknown" in card


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        write_cards(make_run(tmp_path / "run"))


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_training_ends_with_a_card(tiny_folder: Callable[[str], Path], tmp_path: Path, verb: str) -> None:
    settings = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_folder("qwen2_vl")), "device": "cpu"},
        "data": {"num_val": 2},
        "rollout": {"num_generations": 2, "max_completion_length": 16},
        "train": {"steps": 1, "prompts_per_step": 2, "eval_steps": 1},
        "sft": {"batch_size": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(settings))
    result = CliRunner().invoke(app, [verb, str(path), "--debug"], catch_exceptions=False)
    assert result.exit_code == 0
    cards = [tmp_path / "run" / name / "README.md" for name in ("best", "checkpoints/step_000001")]
    assert all("Not for clinical use." in card.read_text(encoding="utf-8") for card in cards)
    before = cards[0].read_bytes()
    cards[0].unlink()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--card"])
    assert result.output.split() == [str(card) for card in cards] and cards[0].read_bytes() == before


def test_every_loss_has_a_name_in_cards() -> None:
    assert card._METHODS.keys() == set(get_args(LossConfig.model_fields["type"].annotation))


LINES = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("arch", ["qwen2_vl", "gemma3", "internvl"])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_the_lines_of_a_card_open_the_checkpoint(
    tiny_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, is_adapter: bool
) -> None:
    """Where torchvision is missing, too: nothing installs it here."""
    policy = tiny_policy(arch, lora=LoraConfig(rank=2) if is_adapter else None)
    run = make_run(tmp_path / "run", model={"path": "owner/base"})
    write_model(policy, run / "best")
    (run / "best" / "best.json").write_text('{"step": 40}', encoding="utf-8")
    (lines,) = LINES.findall(write_cards(run)[0].read_text(encoding="utf-8"))
    monkeypatch.chdir(run / "best")
    opened: dict[str, Any] = {}
    exec(compile(lines, "card", "exec"), opened)
    image = opened["images"](images=[Image.new("RGB", (64, 64))], return_tensors="np")
    expected = policy.family.preprocess(policy.processor.image_processor, [Image.new("RGB", (64, 64))])
    assert (image["pixel_values"] == expected["pixel_values"]).all()
    prompt = policy.processor.encode(Sample("x", "Is there a mass?", "yes", "closed"))
    assert opened["tokenizer"](prompt.text)["input_ids"][-len(prompt.input_ids) :] == prompt.input_ids.tolist()
    ids = torch.from_numpy(prompt.input_ids)[None]
    with torch.no_grad():
        given, expected_logits = (
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            for model in (opened["model"], policy.model)
        )
    assert torch.allclose(given, expected_logits, atol=1e-4)


def test_the_card_of_an_adapter_of_an_embedded_model_names_what_opens_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model={"path": "phantom:instruct"})
    write(run / "best" / "adapter_config.json", {})
    card = write_cards(run)[0].read_text(encoding="utf-8")
    assert not LINES.findall(card) and "`medvqa-rl export . FOLDER --merge` writes a model that transformers" in card
