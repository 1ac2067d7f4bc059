"""The decoding benchmark: what it counts, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode
from benchmarks.common import Workload, make_config
from benchmarks.floors import architecture_of
from benchmarks.models import prepare_model
from medvqa_rl.models.loading import load_policy

TINY = Workload("tiny", prompts=2, generations=3, length=5, side=56)


def test_the_floor_counts_weights_and_cache_as_the_model_has_them(tmp_path: Path) -> None:
    path = prepare_model(TINY, tmp_path)
    text = load_policy(make_config(TINY, path).model).model.model.language_model
    weights = sum(p.numel() for p in text.layers.parameters()) + text.embed_tokens.weight.numel()
    per_token = sum(layer.self_attn.k_proj.out_features + layer.self_attn.v_proj.out_features for layer in text.layers)
    # 4 steps; before step i the 2 prompts (once) and i tokens of each of 6 completions are stored.
    expected = sum(4 * (weights + per_token * (10 + 20 + 6 * step)) for step in range(1, 5))
    moved, flops = decode.decode_floor(architecture_of(path), TINY, [10, 20])
    assert moved == pytest.approx(expected, rel=0.01)  # norms
    products = 2 * 6 * (weights - sum(p.numel() for n, p in text.layers.named_parameters() if p.ndim == 1))
    heads = 4 * text.config.hidden_size * len(text.layers)
    attention = sum(heads * (3 * (10 + 20) + 6 * step) for step in range(1, 5))
    assert flops == pytest.approx(4 * products + attention, rel=0.01)


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert decode.main(["--preset", "smoke", "--rounds", "1", "--output", str(path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(path.read_text())
    assert last == f"speedup: {found['speedup']:.2f}"
    assert found["same_greedy"] == {"eager": 1.0}
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["engines"].keys() == {"eager", "generate"}
