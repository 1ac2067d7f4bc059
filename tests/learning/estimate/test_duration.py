"""Seconds of a step against FLOPs and bytes counted by hand."""

from __future__ import annotations

import pytest

from medvqa_rl.config import Config, LossConfig, ModelConfig
from medvqa_rl.learning.estimate.duration import expected_seconds, least_seconds, update_shape
from medvqa_rl.learning.estimate.hardware import Rates
from medvqa_rl.learning.estimate.workload import plan
from medvqa_rl.models.dimensions import Architecture, Parameters

MODEL = Architecture(
    **{"vocabulary": 100, "hidden": 8, "intermediate": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_size": 4},
    **{"vision_layers": 1, "vision_hidden": 4, "vision_intermediate": 8, "vision_is_gated": False},
    **{"patch_values": 12, "patches_per_token": 4, "tower_weights": 128, "projector_weights": 384},
    largest_projector_weight=256,
    linears={
        **{"q_proj": (8, 8), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (8, 8)},
        **{"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)},
    },
    # Linears, biases of queries, keys and values, and norms of two layers, and the last norm; a tied output layer.
    parameters=Parameters(
        layers=1152 + 2 * (8 + 2 * 4) + 2 * 2 * 8 + 8, embedding=800, head=0, tower=200, projector=400
    ),
)
LAYERS = 2 * (8 * 8 + 8 * 4 * 2 + 8 * 8 + 3 * 8 * 16)  # weights of all linears


def work(**changes):
    """2 prompts of 5 tokens with 3 completions of 4 tokens, no images, float32."""
    sections = {
        "model": {"device": "cpu"},
        "rollout": {"num_generations": 3, "max_completion_length": 4},
        "train": {"prompts_per_step": 2},
        "loss": {"beta": 0.0},
    } | changes
    return plan(Config.model_validate(sections), MODEL, question_tokens=5, grids=(), on_gpu=False)


def test_every_phase_by_hand():
    times = least_seconds(work(loss={"beta": 0.1}), Rates(flops=1.0, bandwidth=1e30), completion_tokens=4)
    assert times.vision == 0
    assert times.prefill == 2 * LAYERS * 10 + 4 * 8 * 2 * 30 + 2 * 8 * 100 * 2
    one_step = 6 * (2 * LAYERS + 4 * 8 * 2 * (5 + 2) + 2 * 8 * 100)  # 6 rows that see 7 tokens on average
    assert times.decode == 3 * one_step  # the first token comes from the prefill
    shape = update_shape(work(), 4)
    pairs = 15 + 3 * 4 * (5 + 4)  # a prompt's triangle, and completions with their prompt and themselves
    assert shape == (2 * 17, 2 * pairs, 24, ())
    linear, attention, head = 2 * LAYERS * 34, 4 * 8 * 2 * 2 * pairs, 2 * 8 * 100 * 24
    assert times.reference == linear + attention + head
    assert times.update == pytest.approx(3 * linear + 3.5 * attention + 3 * head)
    assert times.total == times.rollout + times.reference + times.update


def test_decoding_is_limited_by_bandwidth():
    times = least_seconds(work(), Rates(flops=1e30, bandwidth=1.0), completion_tokens=4)
    weights = LAYERS + 2 * (8 + 2 * 4) + 2 * 2 * 8 + 8 + 8 * 100  # linears, biases, norms, output layer
    keys = 2 * 5 + 6 * 2  # two prompts, read once, and what six rows wrote
    read = 4 * weights + keys * (2 * 2 * 4 * 4) + 10 * 8 * 6 * 100
    assert times.decode == 3 * read
    assert times.prefill == pytest.approx(0)


def test_a_pass_for_the_entropy_costs_a_forward_pass():
    rates = Rates(flops=1.0, bandwidth=1e30)
    plain, passed = (
        least_seconds(work(loss={"beta": 0.1, "top_entropy_quantile": share}), rates, completion_tokens=4)
        for share in (1.0, 0.2)
    )
    # All weights are trained, so it costs as much as the pass of the reference.
    assert passed.update - plain.update == pytest.approx(plain.reference) and passed.reference == plain.reference


def test_expected_times_are_longer_than_the_least():
    rates = Rates(flops=1e9, bandwidth=1e8)
    least, likely = (time(work(), rates, completion_tokens=4) for time in (least_seconds, expected_seconds))
    assert all(a <= b for a, b in zip(least, likely)) and likely.total > least.total
    hosted = expected_seconds(work(), Rates(1e30, 1e30), completion_tokens=4)
    assert hosted.decode == pytest.approx(3 * 2 * 0.7e-3)  # 3 steps of 2 layers, however fast the machine


def test_repeated_prompts_cost_more():
    apart = work(model=ModelConfig(attention="flash_attention_2").model_dump())
    assert update_shape(apart, 4).tokens == 6 * 9
    assert update_shape(apart, 4).pairs == 6 * 9 * 10 // 2
    dense = work(model=ModelConfig(attention="eager").model_dump())
    assert update_shape(dense, 4).pairs == 2 * 17**2 > update_shape(work(), 4).pairs


def test_shorter_completions_cost_less():
    rates = Rates(flops=1e9, bandwidth=1e8)
    short, long = (least_seconds(work(), rates, completion_tokens=count) for count in (2, 4))
    assert short.decode < long.decode and short.update < long.update and short.prefill == long.prefill
    assert LossConfig().beta > 0 and least_seconds(work(), rates, completion_tokens=4).reference == 0
