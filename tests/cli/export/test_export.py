"""``medvqa-rl export``: one plain folder, from a run, a checkpoint or an adapter."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import LoraConfig, ModelConfig
from medvqa_rl.models.checkpoints import model_for, write_model
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.models.loading import load_policy
from tests.report.synthetic import make_run


def export(*arguments):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


def as_run(policy, run, *steps):
    """A run's folder with checkpoints of these steps."""
    for step in steps:
        folder = run / "checkpoints" / f"step_{step:06d}"
        write_model(policy, folder)
        (folder / "trainer").mkdir()
        (folder / "trainer" / "optimizer.safetensors").write_bytes(b"")


def test_a_run_is_its_best_model_or_its_last_checkpoint(tiny_policy, tmp_path):
    policy, run = tiny_policy(), tmp_path / "run"
    as_run(policy, run, 1, 2)
    (run / "checkpoints" / "step_000001" / "mark").write_text("")
    assert export(run, tmp_path / "last").exit_code == 0
    names = {path.name for path in (tmp_path / "last").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and not names & {"trainer", "mark"}
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == (
        run / "checkpoints" / "step_000002" / "model.safetensors"
    ).read_bytes()
    AutoModelForImageTextToText.from_pretrained(tmp_path / "last")
    write_model(policy, run / "best")
    (run / "best" / "best.json").write_text("{}")
    (run / "best" / "README.md").write_text("card")
    assert export(run, tmp_path / "best").exit_code == 0
    assert (tmp_path / "best" / "README.md").exists() and not (tmp_path / "best" / "best.json").exists()


def test_an_adapter_as_it_is_and_merged(tiny_policy, tmp_path, make_sample, model_inputs):
    """Merged, the model below answers as the two do together."""
    policy = tiny_policy(lora=LoraConfig(rank=4, alpha=8), train_projector=True)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    write_model(policy, tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "copy").exit_code == 0
    assert load_file(tmp_path / "copy" / "adapter_model.safetensors").keys() == (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    )
    assert export(tmp_path / "adapter", tmp_path / "merged", "--merge").exit_code == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    inputs = model_inputs(backbone(policy.model), policy.processor.encode(make_sample()), completion=(5, 6, 7))
    policy.model.eval()
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, policy.model(**inputs).logits, atol=1e-3)
        with policy.model.disable_adapter():
            assert not torch.allclose(merged(**inputs).logits, policy.model(**inputs).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("source", "target", "flags", "message"),
    [
        ("empty", "new", (), "There is no checkpoint in"),
        ("model", "model", (), "exists: give a new one"),
        ("model", "new", ("--merge",), "holds a whole model, so there is no adapter to merge"),
    ],
)
def test_invalid_exports_are_refused(tiny_policy, tmp_path, source, target, flags, message):
    write_model(tiny_policy(), tmp_path / "model")
    result = export(tmp_path / source, tmp_path / target, *flags)
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "new").exists()


def test_the_working_folder_is_no_output(tiny_policy, tmp_path, monkeypatch):
    write_model(tiny_policy(), tmp_path / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = export(tmp_path / "model", ".")
    assert result.exit_code == 2 and "The output folder . exists: give a new one" in result.output
    assert not list((tmp_path / "here").iterdir())


def test_a_merged_model_of_a_run_has_a_card_of_its_own(tiny_policy, tmp_path):
    """Written from the run; the lines that it documents open the model."""
    policy, run = tiny_policy(lora=LoraConfig(rank=2)), make_run(tmp_path / "run", model={"path": "owner/base"})
    for name in ("best", "checkpoints/step_000040"):
        write_model(policy, run / name)
    (run / "best" / "README.md").write_text("the card of the adapter", encoding="utf-8")
    assert export(run / "best", tmp_path / "copy").exit_code == 0
    assert (tmp_path / "copy" / "README.md").read_text(encoding="utf-8") == "the card of the adapter"
    assert export(run / "best", tmp_path / "merged", "--merge").exit_code == 0
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers\n" in card and "base_model_relation: finetune\n" in card
    assert "Weights of `owner/base` with a merged LoRA adapter, fine-tuned" in card and "best checkpoint" in card
    assert export(run / "checkpoints" / "step_000040", tmp_path / "last").exit_code == 0
    assert "LoRA adapter for `owner/base`, fine-tuned" in (tmp_path / "last" / "README.md").read_text(encoding="utf-8")


def test_a_run_is_averaged_with_its_start(tiny_policy, tiny_folder, tmp_path):
    policy, start = tiny_policy(), str(tiny_folder("qwen2_vl"))
    run = make_run(tmp_path / "run", model={"path": start})
    (run / "config.yaml").write_text(f"model: {{path: {start}}}\n", encoding="utf-8")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    write_model(policy, run / "checkpoints" / "step_000040")
    result = export(run, tmp_path / "averaged", "--average", 0.75)
    assert result.exit_code == 0, result.output
    first = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32).state_dict()
    for name, averaged in AutoModelForImageTextToText.from_pretrained(tmp_path / "averaged").state_dict().items():
        assert torch.allclose(averaged, first[name] + 0.75, atol=1e-6), name
    card = (tmp_path / "averaged" / "README.md").read_text(encoding="utf-8")
    assert "0.75 of the trained weights plus 0.25 of the others" in card
    assert "No evaluation of these weights is stored in the run." in card, "that of step 40 is of others"
    alone = export(tmp_path / "averaged", tmp_path / "new", "--average", 0.5)
    assert alone.exit_code == 2 and "averaged is not in a run" in alone.output and not (tmp_path / "new").exists()
    both = export(run, tmp_path / "new", "--average", 0.5, "--merge")
    assert both.exit_code == 2 and "--merge and --average are given together" in both.output
    write_model(tiny_policy(lora=LoraConfig(rank=2)), run / "best")
    adapter = export(run / "best", tmp_path / "new", "--average", 0.5)
    assert adapter.exit_code == 2 and "holds a LoRA adapter, but --average takes a whole model" in adapter.output


def test_an_adapter_keeps_the_image_sizes_of_its_training_when_merged(tmp_path):
    model = ModelConfig(
        path="phantom:instruct", device="cpu", lora=LoraConfig(rank=2), max_pixels=6272, min_pixels=3136
    )
    write_model(load_policy(model), tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "merged", "--merge").exit_code == 0
    settings = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert settings["size"] == {"longest_edge": 6272, "shortest_edge": 3136}
    asked = load_policy(model_for(str(tmp_path / "adapter")).model_copy(update={"device": "cpu", "max_pixels": 4704}))
    assert asked.processor.image_processor.size == {"longest_edge": 4704, "shortest_edge": 3136}
