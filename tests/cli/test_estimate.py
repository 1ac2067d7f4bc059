"""``medvqa-rl estimate``: output, exit codes and error messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import LoraConfig
from medvqa_rl.learning.estimate.hardware import CARDS
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.families.costs import read_architecture
from medvqa_rl.models.families.published import SIZES

ROOT = Path(__file__).parents[2]
PAPER = str(ROOT / "configs" / "grpo.yaml")
ADAPTER = str(ROOT / "configs" / "lora_single_gpu.yaml")
RARL = str(ROOT / "configs" / "rarl.yaml")
PHANTOM = str(ROOT / "configs" / "phantom_cpu.yaml")
GIVEN = ("--matmul-tflops", "100", "--bandwidth-gbs", "1000", "--memory-gib", "80")


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["estimate", *args])


def data(*args: str) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def test_tables():
    result = run(ADAPTER, "data.path=x", "--model-size", "2b", "--card", "rtx4090")
    assert result.exit_code == 0, result.output
    for text in ("2,209.0 M parameters", "9.2 M trained, in bfloat16", "(peak)", "KV cache", "It fits"):
        assert text in result.stdout
    assert "vendor's figures" in result.stdout and "at least" in result.stdout


def test_json_adds_up():
    found = data(PAPER, "data.path=x", "--model-size", "2b", *GIVEN)
    totals = {name: sum(parts.values()) for name, parts in found["memory"].items()}
    assert found["peak"]["bytes"] == max(totals.values()) == totals[found["peak"]["moment"]]
    assert found["step"] == {
        **{"prompts": 8, "generations": 8, "completion_tokens": 512, "groups_per_micro_batch": 1},
        "prompt_tokens": 110 + 22 * 22,  # 1024 x 1024 pixels shrink to 616 x 616
    }
    assert found["parameters"]["trained"] == 1_543_714_304
    for times in found["seconds"].values():
        assert times["total"] == pytest.approx(times["rollout"] + times["reference"] + times["update"])
    assert found["machine"]["flops"] == 100e12


def test_weights_in_4_bits():
    """1.31e9 weights of linear layers at 0.5 + 1/64 + 4/(64 * 256) bytes instead of 2, and what that lets fit."""
    settings = ("data.path=x", "--model-size", "2b", *GIVEN)
    whole, coarse = (data(RARL, f"model.load_in_4bit={value}", *settings) for value in ("false", "true"))
    saved = [found["memory"]["update: layers"]["weights"] for found in (whole, coarse)]
    assert saved[0] - saved[1] == pytest.approx(28 * 46_792_704 * (2 - 0.515869), rel=1e-6)
    assert "in bfloat16 and 4 bits" in run(RARL, "model.load_in_4bit=true", *settings).stdout.replace("\n", " ")
    large = ("data.path=x", "--model-size", "7b", *GIVEN[:4], "--memory-gib", "12")
    advised = run(RARL, *large)
    assert advised.exit_code == 2 and "model.load_in_4bit=true" in advised.stderr
    assert run(RARL, *large, "model.load_in_4bit=true").exit_code == 0
    assert "4bit" not in run(RARL, *large, "train.engine=zero2").stderr  # which cannot have it


def test_the_embedded_model_is_measured_on_this_machine():
    found = data(PHANTOM)
    assert found["machine"]["name"].startswith("CPU") and found["machine"]["source"] == "measured just now"
    assert 1e9 < found["machine"]["flops"] < 1e14 and 1e8 < found["machine"]["bandwidth"] < 1e13
    assert found["step"]["prompt_tokens"] == 110 + 16  # all its images become 112 x 112


def test_assumptions_can_be_changed():
    options = ("--model-size", "2b", *GIVEN, "--question-tokens", "50", "--image-size", "none")
    found = data(PAPER, "data.path=x", *options, "--ranks", "4", "--completion-tokens", "100")
    assert found["step"]["prompt_tokens"] == 50 and found["step"]["prompts"] == 2
    longer = data(PAPER, "data.path=x", *options, "--ranks", "4")
    assert found["memory"] == longer["memory"]  # memory is for the longest completions
    assert found["seconds"]["at_least"]["total"] < longer["seconds"]["at_least"]["total"]


def test_exit_code_1_if_it_would_fit_at_a_cost_of_time():
    options = ("data.path=x", "model.gradient_checkpointing=false", "--model-size", "2b", "--card", "l4")
    result = run(ADAPTER, "train.prompts_per_micro_batch=8", *options)
    assert result.exit_code == 1, result.output
    assert "It does not fit" in result.stdout
    first = result.stdout.index("train.prompts_per_micro_batch=1")
    assert result.stdout.index("Costs time only") < first < result.stdout.index("fits", first)
    assert "Changes what is learned" not in result.stdout
    assert run(ADAPTER, *options, "model.gradient_checkpointing=true").exit_code == 0


def test_vllm_takes_its_share_and_its_speed_is_unknown():
    """It replaces our own KV cache: all the time, during rollouts with sleep, or not at all with a server."""
    given = ("data.path=x", "--model-size", "2b", "--card", "a100-80")
    own, beside = data(ADAPTER, *given), data(ADAPTER, *given, "rollout.engine=vllm")
    assert own["notes"] == [] and "not known" in beside["notes"][0]
    assert {"rollout: prefill", "rollout: decode"} == own["memory"].keys() - beside["memory"].keys()
    share = 0.3 * own["machine"]["memory"]
    for name, parts in beside["memory"].items():
        assert parts == {**own["memory"][name], "vLLM": pytest.approx(share)}
    asleep = data(ADAPTER, *given, "rollout.engine=vllm", "vllm.sleep=true")["memory"]
    assert {name: bool(parts["vLLM"]) for name, parts in asleep.items()} == {
        name: name.startswith("rollout") for name in asleep
    }
    served = data(ADAPTER, *given, "rollout.engine=vllm", "vllm.mode=server", "vllm.server_url=http://localhost:1")
    assert not any(parts["vLLM"] for parts in served["memory"].values())
    output = run(ADAPTER, *given, "rollout.engine=vllm").stdout
    assert "vLLM" in output and "24.00" in output


def test_exit_code_2_if_not_even_one_group_fits():
    result = run(PAPER, "data.path=x", "--model-size", "2b", "--card", "rtx4090")
    assert result.exit_code == 2
    assert "Even one group of 8 completions at a time needs" in result.stderr
    assert "model.lora={rank: 16}" in result.stderr
    result = run(PAPER, "data.path=x", "--model-size", "7b", "--card", "rtx4090", "--memory-gib", "4")
    assert result.exit_code == 2 and "take a smaller model" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((PAPER, "data.path=x", "model.path=some/model-nobody-has"), "no config.json of it is on this machine"),
        ((PAPER, "data.path=x", "--model-size", "3b"), "the known sizes are 2b, 7b, 2.5-3b, 2.5-7b, 2.5-32b, 2.5-72b"),
        ((PHANTOM, "--card", "gtx"), "There is no card 'gtx' in the table: choose one of h200"),
        ((PHANTOM, "--image-size", "big"), "give WIDTHxHEIGHT in pixels"),
        ((PHANTOM, "--image-size", "10000x10", "--card", "l4"), "200 times the other"),
        ((PHANTOM, "--ranks", "3", "--card", "l4"), "which 3 devices cannot share evenly"),
        ((PHANTOM, "--completion-tokens", "97"), "completions end at rollout.max_completion_length, 96"),
        ((PHANTOM, "model.path=phantom:none", "--card", "l4"), "phantom:none"),
        ((PHANTOM, "train.stepz=1"), "train.stepz"),
        ((PHANTOM, "model.lora={targets: [qkv]}", "--card", "l4"), "names qkv"),
        (
            (PHANTOM, "model.adapter=nowhere", "--card", "l4"),
            "there is no file nowhere/adapter_config.json",
        ),
    ],
)
def test_bad_input(args, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_damaged_config_files(tmp_path):
    shutil.copytree(ROOT / "src" / "medvqa_rl" / "phantom" / "assets" / "instruct", tmp_path / "model")
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "has [] (should be an object): take it from the checkpoint"),
        ("{}", "of a None model"),
    ):
        (tmp_path / "model" / "config.json").write_text(text)
        result = run(PHANTOM, f"model.path={tmp_path / 'model'}", "--card", "l4")
        assert result.exit_code == 2 and message in result.stderr


def test_a_trained_adapter_is_read_from_its_folder(tiny_policy, tmp_path):
    policy = tiny_policy(lora=LoraConfig(rank=3, targets=("q_proj", "down_proj")))
    write_model(policy, tmp_path / "adapter")
    settings = (f"model.path={policy.config.path}", f"model.adapter={tmp_path / 'adapter'}")
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert (
        data(PHANTOM, *settings, "model.train_vision=false", "model.train_projector=false", *GIVEN)["parameters"][
            "trained"
        ]
        == trained
    )


def test_known_sizes_are_the_published_ones():
    totals = {name: sum(read_architecture(config).parameters) for name, config in SIZES.items()}
    assert totals == {
        "2b": 2_208_985_600,
        "7b": 8_291_375_616,
        "2.5-3b": 3_754_622_976,
        "2.5-7b": 8_292_166_656,
        "2.5-32b": 33_452_718_336,
        "2.5-72b": 73_410_777_344,
        "qwen3-2b": 2_127_532_032,
        "qwen3-4b": 4_437_815_808,
        "qwen3-8b": 8_767_123_696,
        "qwen3-32b": 33_357_390_064,
        "gemma3-4b": 4_300_079_472,
        "internvl3-1b": 938_193_024,
        "internvl3-2b": 2_088_957_440,
        "internvl3-8b": 7_944_373_760,
        "internvl3-14b": 15_117_256_704,
    }  # as the Hub shows, rounded, for these checkpoints


def test_cards_are_plausible():
    for name, (_, tflops, bandwidth, memory) in CARDS.items():
        assert 50 < tflops < 1000 and 200 < bandwidth < 5000 and 16 <= memory <= 141, name
