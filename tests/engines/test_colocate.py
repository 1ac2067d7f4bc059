"""vLLM in the training process, on a CPU: the same tokens and log-probabilities as the own engine and the stock model,
also of weights that were handed over."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from medvqa_rl.config import LoraConfig, VllmConfig
from medvqa_rl.core.types import Sample
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.vllm.agreement import VllmError, difference, rehearse
from medvqa_rl.rollout.vllm.engine import VllmEngine
from medvqa_rl.rollout.vllm.local import Colocated
from tests.engines.engine import GREEDY, SAMPLED, load, move, roll_out, tokens

LORA = {"lora": LoraConfig(rank=4)}


@pytest.fixture
def start() -> Iterator[Callable[[Policy], tuple[VllmEngine, Any]]]:
    """Starts an engine, and its source."""
    sources: list[Any] = []

    def make(policy: Policy) -> tuple[VllmEngine, Any]:
        sources.append(Colocated(policy, VllmConfig(max_model_length=2048), rank=0, num_ranks=1))
        return VllmEngine(policy, sources[-1]), sources[-1]

    yield make
    for source in sources:
        source._llm.llm_engine.engine_core.shutdown()
    sources.clear()
    gc.collect()


def same_greedy(engine: VllmEngine, policy: Policy, questions: list[Sample]) -> bool:
    return tokens(roll_out(engine, policy, questions, GREEDY)) == tokens(
        roll_out(RolloutEngine(policy), policy, questions, GREEDY)
    )


@torch.no_grad()
def stock_gap(policy: Policy, groups: Any, model_inputs: Callable[..., Any]) -> float:
    """Largest difference from the log-probabilities that the stock model's forward gives, after suppression and
    temperature."""
    model, processor, largest = causal_model(policy.model), policy.processor, 0.0
    never = [*processor.suppressed_ids, *range(len(processor.tokenizer), model.lm_head.out_features)]
    for group in groups:
        for completion in group.completions:
            inputs = model_inputs(model, group.prompt, completion.token_ids)
            logits = model(**inputs).logits[0, len(group.prompt.input_ids) - 1 : -1].double()
            logits[:, never] = -torch.inf
            logps = (logits / SAMPLED.temperature).log_softmax(-1)
            own = logps[range(len(completion.token_ids)), list(completion.token_ids)]
            largest = max(largest, float((own - torch.tensor(completion.logps)).abs().max()))
    return largest


CASES = [("phantom:instruct", {}), ("phantom:instruct", LORA)]
MATRIX = [
    ((arch, tied), settings)
    for arch in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    for tied in (True, False)
    for settings in ({}, LORA)
]


@pytest.mark.parametrize(
    ("model", "settings"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)],
    ids=str,
)
def test_three_handovers(model_folder, start, questions, model_inputs, model, settings):
    """Before any change and after each of three, with one image, two and none."""
    own = load(model if isinstance(model, str) else model_folder(*model), **settings)
    engine, _ = start(own)
    seen = []
    for step in range(4):
        with engine.fresh():
            assert same_greedy(engine, own, questions), step
            groups = roll_out(engine, own, questions, SAMPLED)
            assert tokens(groups) == tokens(roll_out(engine, own, questions, SAMPLED))
        assert difference(own, groups, SAMPLED) < 2e-5
        assert stock_gap(own, groups, model_inputs) < 1e-3
        seen.append(tokens(groups))
        move(own, step)
        assert difference(own, groups, SAMPLED) > 0.01  # as it would be without a handover
    assert all(one != two for one, two in pairwise(seen))


def test_what_is_skipped_is_noticed(start, questions, monkeypatch):
    """Each in turn; the last leaves the engine without image features that its scheduler counts on. The cache of
    processed images holds pixels, which no weight changes."""
    own = load("phantom:instruct")
    engine, source = start(own)
    with engine.fresh():
        roll_out(engine, own, questions, GREEDY)

    def sample(config: Any) -> Any:
        with engine.fresh():
            return roll_out(engine, own, questions, config)

    skipped = {
        "weights": (source._llm, "collective_rpc", lambda *args, **kwargs: []),
        "output layer": (source._llm, "collective_rpc", None),
        "prefix cache": (source._llm, "reset_prefix_cache", lambda: True),
    }
    call = source._llm.collective_rpc

    def without_packing(method: str, **kwargs: Any) -> Any:
        return [] if method == "pack_heads" else call(method, **kwargs)

    for number, (name, (owner, function, replacement)) in enumerate(skipped.items()):
        move(own, number)
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, replacement or without_packing)
            assert difference(own, sample(SAMPLED), SAMPLED) > 0.002, name
        assert difference(own, sample(SAMPLED), SAMPLED) < 2e-5, name
    assert rehearse(own, SAMPLED, sample).changed < 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(source._llm, "reset_prefix_cache", lambda: True)
        with pytest.raises(VllmError, match="did not take over changed weights"):
            rehearse(own, SAMPLED, sample)
    sample(SAMPLED)
    monkeypatch.setattr(source._llm.llm_engine, "reset_encoder_cache", lambda: None)
    with pytest.raises(VllmError, match="Encoder cache miss"):
        sample(SAMPLED)
