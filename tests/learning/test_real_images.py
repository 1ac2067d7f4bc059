"""GRPO on real radiology images with the embedded model, as configs/vqa_rad_cpu.yaml runs it, cut short."""

import json
from pathlib import Path

from medvqa_rl.config.yaml import load_config
from medvqa_rl.learning.grpo import train

ROOT = Path(__file__).parents[2]


def test_a_few_steps_on_vqa_rad(shared_data, tmp_path):
    overrides = [
        f"data.path={shared_data / 'vqa_rad'}",
        f"output_dir={tmp_path / 'run'}",
        "data.num_val=12",
        "rollout.max_completion_length=48",
        "train.steps=2",
        "train.prompts_per_step=4",
        "train.eval_steps=2",
        "train.save_steps=0",
        "train.log_completions_steps=1",
    ]
    run = train(load_config(ROOT / "configs" / "vqa_rad_cpu.yaml", overrides).config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["unscored_rate"] == 0 and row["grad_norm"] >= 0 for row in steps)
    assert sum("eval/accuracy" in row for row in rows) == 2
    results = json.loads((run / "eval" / "step_000002" / "results.json").read_text(encoding="utf-8"))
    assert results["n"] == 12 and set(results["by"]["answer_type"]) <= {"closed", "open"}
    data = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert data["train"]["name"] == "vqa_rad/image/train"
    assert (run / "checkpoints" / "step_000002" / "model.safetensors").is_file()
    samples = [
        json.loads(line) for line in (run / "samples" / "step_000001.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(samples) == 4 * 8
