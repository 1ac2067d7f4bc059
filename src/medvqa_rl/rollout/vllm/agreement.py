"""Whether vLLM samples from the weights that training has.

Compares the log-probabilities that vLLM reports for the tokens it sampled with those that the policy itself computes
for the same distribution: after suppression, temperature, top-k and top-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from medvqa_rl.config import RolloutConfig
from medvqa_rl.core.randomness import address
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import as_shared
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import evaluating
from medvqa_rl.rollout.sampling import sampling_logps

TOLERANCES = {torch.float32: 0.01, torch.bfloat16: 0.2, torch.float16: 0.2}
"""Largest mean difference, in nats per token, that rounding explains. On a CPU in float32, equal weights differ by
less than 1e-5, and those of another short run by 0.06 to 0.11."""
SHIFT = 0.3
"""Nats per token by which :func:`rehearse` changes the policy at least."""
OUTSIDE = 1.0
"""Nats that a token counts which the policy's top-k and top-p leave out; rounding moves a few over the edge."""
_DOUBLINGS = 12
_CHUNK = 64
"""Tokens whose float64 log-probabilities over the vocabulary are held at a time."""


class VllmError(RuntimeError):
    """A call to vLLM failed. The trained weights are intact."""


class Rehearsal(NamedTuple):
    """Mean differences of log-probabilities, in nats per token."""

    before: float
    """With the policy's weights."""
    changed: float
    """After vLLM was given changed weights: from those."""
    unchanged: float
    """In the same rollout: from the policy's weights, as if none had been handed over."""


def never_sampled(policy: Policy) -> list[int]:
    """Tokens that are never sampled: control tokens, and rows that pad the output layer beyond the tokenizer."""
    processor = policy.processor
    padding = range(len(processor.tokenizer), causal_model(policy.model).lm_head.out_features)
    return sorted({*processor.suppressed_ids, *padding})


@torch.no_grad()
def difference(policy: Policy, groups: Sequence[Group], config: RolloutConfig) -> float:
    """Mean difference between the log-probabilities that vLLM reports and those of the policy's current weights.

    Args:
        policy: whose weights are compared.
        groups: completions from vLLM.
        config: the settings that they were sampled with.

    Returns:
        Nats per token; NaN if vLLM reports none.
    """
    suppressed = torch.tensor(never_sampled(policy), device=policy.device)
    total, count = 0.0, 0
    with evaluating(policy.model):
        for group in groups:
            features = group.image_features
            if features is None:
                (features,) = as_shared(policy.family).image_features(policy.model, [group.prompt], policy.device)
            for completion in group.completions:
                own = _logps(policy, group, completion, features, config, suppressed)
                gaps = (own - torch.tensor(completion.logps, dtype=own.dtype, device=policy.device)).abs()
                gaps = torch.where(own.isneginf(), OUTSIDE, gaps)[~gaps.isnan()]
                total, count = total + float(gaps.sum()), count + len(gaps)
    return total / count if count else math.nan


def _logps(
    policy: Policy,
    group: Group,
    completion: Completion,
    features: Tensor | None,
    config: RolloutConfig,
    suppressed: Tensor,
) -> Tensor:
    """(T,) log-probabilities of a completion's tokens under the distribution that they are sampled from."""
    prompt, device, family = group.prompt, policy.device, as_shared(policy.family)
    length, sampled = len(prompt.input_ids), completion.token_ids[:-1]  # nothing is sampled after the last
    ids = torch.tensor([[*prompt.input_ids.tolist(), *sampled]], device=device)
    is_prompt = torch.arange(ids.shape[1], device=device)[None] < length
    own = torch.from_numpy(policy.processor.positions(prompt))  # (axes, prompt tokens)
    following = torch.arange(len(sampled)) + int(own.max()) + 1
    positions = torch.cat([own, following.expand(len(own), -1)], dim=1)[:, None].to(device)
    embedded = family.embed(policy.model, ids, is_prompt, [features])
    hidden = family.hidden_states(policy.model, embedded, positions, use_cache=False)[0, length - 1 :]
    tokens = torch.tensor(completion.token_ids, device=device)
    found = []
    for states, picked in zip(hidden.split(_CHUNK), tokens.split(_CHUNK), strict=True):
        logps = sampling_logps(
            causal_model(policy.model).lm_head(states),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            suppressed=suppressed,
        )
        found.append(logps.gather(-1, picked[:, None]).squeeze(-1))
    return torch.cat(found)


def tolerance(policy: Policy) -> float:
    """The largest mean difference that rounding explains."""
    return TOLERANCES[causal_model(policy.model).lm_head.weight.dtype]


def check_agreement(policy: Policy, groups: Sequence[Group], config: RolloutConfig) -> None:
    """Check that vLLM samples from the policy's weights.

    Raises:
        VllmError: its log-probabilities differ by more than rounding explains.
    """
    gap = difference(policy, groups, config)
    if gap > tolerance(policy):
        raise VllmError(
            f"vLLM's log-probabilities differ from those of training by {gap:.2g} nats per token on average, which "
            f"rounding does not explain (at most {tolerance(policy):g}): it samples from other weights, so check that "
            "model.path is the same model there, and that no other run uses the server."
        )


def rehearse(
    policy: Policy,
    config: RolloutConfig,
    roll_out: Callable[[RolloutConfig], Sequence[Group]],
    least: Callable[[float], float] = float,
) -> Rehearsal:
    """Hand changed weights over to vLLM, compare its log-probabilities, and hand the policy's weights over again.

    All ranks call this together, while the policy's weights are whole. The trained weights get noise, which is doubled
    until log-probabilities change enough. Afterwards they are as before, bit for bit.

    Args:
        roll_out: hands the policy's weights over and samples groups.
        least: the smallest of a value over all ranks, whose weights get the same noise.

    Raises:
        VllmError: vLLM did not take over the changed weights, or keeps them.
    """
    plain = config.model_copy(update={"top_k": 0, "top_p": 1.0})  # a greedy choice says little about the weights
    groups = roll_out(plain)
    before = difference(policy, groups, plain)
    weights = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    saved = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        needed = max(SHIFT, 10 * before)
        for attempt in range(_DOUBLINGS):
            _perturb(weights, saved, 0.01 * 2**attempt)
            if not least(difference(policy, groups, plain) - needed) < 0:
                break
        else:
            raise VllmError("Noise on the trained weights hardly changes any log-probability: is anything trained?")
        groups = roll_out(plain)
        changed = difference(policy, groups, plain)
    finally:
        for name, weight in weights.items():
            weight.data.copy_(saved[name])
    found = Rehearsal(before, changed, difference(policy, groups, plain))
    if not changed <= max(4 * before, 0.1 * found.unchanged):
        raise VllmError(
            f"vLLM did not take over changed weights: its log-probabilities differ from theirs by {changed:.2g} nats "
            f"per token on average, and from those before the change by {found.unchanged:.2g} ({before:.2g} before)."
        )
    check_agreement(policy, roll_out(plain), plain)
    return found


def _perturb(weights: dict[str, torch.nn.Parameter], saved: dict[str, Tensor], scale: float) -> None:
    """Set weights to the saved ones plus normal noise, equal on all ranks.

    Args:
        scale: of the noise, relative to each tensor's root mean square; where that is 0, as in new adapters, to 0.02.
    """
    for name, weight in weights.items():
        generator = torch.Generator().manual_seed(address(0, name) >> 1)
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        size = float(saved[name].float().square().mean().sqrt()) or 0.02
        weight.data.copy_(saved[name] + (scale * size * noise).to(weight.dtype))
