"""Decoding with CUDA graphs: its logic with a stand-in for capturing, and the real one on a GPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from medvqa_rl.config import LoraConfig, RolloutConfig
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.rollout import cuda_graph
from medvqa_rl.rollout.cuda_graph import GraphDecoder, capture_graph
from medvqa_rl.rollout.decode import RolloutEngine

BOTH = pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
LENGTH = 24


class Recorder:
    """Stands in for capturing: a replay repeats the arithmetic on the buffers as they were when captured."""

    def __init__(self) -> None:
        self.shapes = []
        self.replays = 0

    def __call__(self, run, pool):
        run()
        _, _, shape, picker = run.args
        self.shapes.append((shape, picker.sampling))
        model, state = run.args[0], copy.copy(run.args[1])
        for name in ("_rows", "_prompt_lengths", "_num_steps", "_oldest_step", "_shape", "shape"):
            setattr(state, name, None)  # a graph cannot read the host's state
        recorded = partial(run.func, model, state, shape, picker)

        def replay():
            self.replays += 1
            recorded()

        return replay


@pytest.fixture
def make_policy(tiny_policy):
    """Tiny policies whose completions end at various lengths."""

    def make(*args, **settings):
        policy = tiny_policy(*args, **settings)
        policy.processor.stop_ids = (policy.processor.eos_id, *range(0, 320, 8))
        return policy

    return make


def with_graphs(policy, recorder):
    """An engine that replays, on the CPU."""
    engine = RolloutEngine(policy)
    engine._graphs = GraphDecoder(policy.model, "cpu", recorder)
    return engine


def sampled(engine, samples, *, step=0, **settings):
    config = RolloutConfig(**({"num_generations": 4, "max_completion_length": LENGTH} | settings))
    groups = engine.rollout(samples, config, seed=0, stream="train", step=step)
    return [[completion.token_ids for completion in group.completions] for group in groups]


def greedy(engine, samples, size):
    groups = engine.greedy(samples, max_completion_length=LENGTH, batch_size=size)
    return [group.completions[0].token_ids for group in groups]


def many(samples):
    return [replace(sample, id=f"{sample.id}-{turn}") for turn in range(3) for sample in samples]


@BOTH
@pytest.mark.parametrize("steps", [1, 5])
def test_replayed_steps_give_the_same_tokens_as_eager_ones(arch, steps, make_policy, mixed_samples, monkeypatch):
    monkeypatch.setattr(cuda_graph, "STEPS_PER_SYNC", steps)
    monkeypatch.setattr(cuda_graph, "LENGTH_MULTIPLE", 8)
    policy = make_policy(arch, seed=3)
    eager, recorder = RolloutEngine(policy), Recorder()
    graphs = with_graphs(policy, recorder)
    samples = many(mixed_samples)
    for settings in ({}, {"max_batch": 3}, {"max_batch": 5, "top_k": 9, "temperature": 0.7}):
        assert sampled(graphs, samples, **settings) == sampled(eager, samples, **settings)
    for size in (12, 5):
        assert greedy(graphs, samples, size) == greedy(eager, samples, size)
    assert recorder.replays > len(recorder.shapes)
    rows = {shape.rows for shape, _ in recorder.shapes}
    assert len(rows) > 2  # smaller batches are captured again, at powers of two or the capacity
    assert all(count in (48, 12) or count & (count - 1) == 0 for count in rows)


def test_each_shape_is_captured_once_per_run(make_policy, mixed_samples):
    policy = make_policy(seed=3)
    recorder = Recorder()
    graphs = with_graphs(policy, recorder)
    for step in range(4):
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.01)  # as an optimizer does, in place
        before = len(recorder.shapes)
        assert sampled(graphs, mixed_samples, step=step) == sampled(RolloutEngine(policy), mixed_samples, step=step)
    assert len(set(recorder.shapes)) == len(recorder.shapes)
    assert len(recorder.shapes) - before <= 1
    with torch.no_grad():
        head = backbone(policy.model).language_model.norm
        head.weight = torch.nn.Parameter(head.weight * 2)  # other memory: captured graphs would read the old weights
    before = len(recorder.shapes)
    assert sampled(graphs, mixed_samples) == sampled(RolloutEngine(policy), mixed_samples)
    assert len(recorder.shapes) > before


def test_longer_prompts_are_captured_again(make_policy, make_sample, mixed_samples):
    policy = make_policy(seed=3)
    recorder = Recorder()
    graphs = with_graphs(policy, recorder)
    long = make_sample("long", question="Which organ is seen in this image? " * 20)
    samples = [*mixed_samples, long, *many(mixed_samples)]
    assert sampled(graphs, samples, max_batch=2) == sampled(RolloutEngine(policy), samples, max_batch=2)
    lengths = [shape.prompt_length for shape, _ in recorder.shapes]
    assert lengths[0] < lengths[-1]
    assert sorted(lengths) == lengths
    assert all(length % cuda_graph.LENGTH_MULTIPLE == 0 for length in lengths)


def test_lora(make_policy, mixed_samples):
    policy = make_policy(lora=LoraConfig(rank=4), seed=3)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    graphs = with_graphs(policy, Recorder())
    assert sampled(graphs, mixed_samples) == sampled(RolloutEngine(policy), mixed_samples)


def test_the_engine_works_after_a_failure(make_policy, mixed_samples):
    policy = make_policy(seed=3)
    graphs = with_graphs(policy, Recorder())
    norm = backbone(policy.model).language_model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(graphs, mixed_samples)
    with torch.no_grad():
        norm.copy_(kept)
    assert sampled(graphs, mixed_samples) == sampled(RolloutEngine(policy), mixed_samples)


def test_graphs_need_a_gpu(make_policy):
    with pytest.raises(
        ValueError, match=r"rollout.engine is graph, but the model is on the device 'cpu': .*NVIDIA GPU"
    ):
        RolloutEngine(make_policy(), engine="graph")


@pytest.mark.gpu
@BOTH
def test_graphs_on_a_gpu(arch, make_policy, mixed_samples):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    policy = make_policy(arch, seed=3)
    policy.model.to("cuda")
    policy = replace(policy, device=torch.device("cuda"))
    eager, graphs = RolloutEngine(policy), RolloutEngine(policy, engine="graph")
    assert graphs._graphs._capture is capture_graph
    samples = many(mixed_samples)
    for step in range(3):
        expected, found = (sampled(engine, samples, step=step, max_batch=5) for engine in (eager, graphs))
        pairs = [pair for groups in zip(expected, found, strict=True) for pair in zip(*groups, strict=True)]
        # The same kernels may round differently for other shapes, which flips a few picks.
        assert sum(one == other for one, other in pairs) >= 0.9 * len(pairs)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.01)
    assert sum(a == b for a, b in zip(greedy(graphs, samples, 5), greedy(eager, samples, 5), strict=True)) >= 11
