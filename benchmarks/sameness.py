"""Proves on this machine that the fast paths compute what the stock model computes, before anybody times them.

    python -m benchmarks.sameness --preset gpu --output FILE
    python -m benchmarks.sameness --preset smoke

The stock model is transformers' own class in its own forward pass, one completion at a time, without padding, cache or
shared prompts. Both have the same random weights (rounded to bfloat16 once). Compared are greedy completions of each
rollout engine, log-probabilities of random completions, and the gradient of a weighted sum of them:

- In float32, nothing may differ by more than rounding (the limits of ``LIMITS``).
- In bfloat16, where rounding differs with every order of operations, both are compared with the stock model in
  float32: this package's root mean square error may be at most ``NO_WORSE`` times the stock model's own.

A greedy token counts as the stock model's choice if its logit is within the limit of the largest one, since ties are
broken by rounding; how many are equal is printed. Exits with 1, after writing the result file, if anything is beyond
its limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from benchmarks.common import Workload, hardware, make_data, table, write_result
from benchmarks.engines import forbid_stopping
from benchmarks.models import prepared
from benchmarks.step import PRESETS as STEPS
from benchmarks.update import lay_out, make_groups, make_learner, run
from medvqa_rl.core.machine import keep_freed_memory
from medvqa_rl.core.types import EncodedPrompt, Group
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.processor import Processor
from medvqa_rl.rollout.decode import RolloutEngine

PRESETS = {
    "gpu": replace(STEPS["paper-gpu"], prompts=2, generations=4, length=32, beta=0.0, checkpointing=False),
    "smoke": replace(STEPS["smoke"], beta=0.0, dtype="bfloat16"),
}
LIMITS: Mapping[str, Mapping[str, float]] = {
    "float32": {"greedy": 1e-3, "log-probabilities": 1e-3, "gradient": 1e-3},
    "bfloat16": {"greedy": 0.25},
}
"""Greedy: nats below the largest logit. Log-probabilities: largest difference in nats. Gradient: norm of the
difference over the norm."""
NO_WORSE = 1.5
"""Error in bfloat16, over that of the stock model in bfloat16."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    dtype: str
    what: str
    measured: float
    limit: float
    note: str

    @property
    def holds(self) -> bool:
        """Whether it is within its limit; NaN is not."""
        return self.measured <= self.limit


def stock_model(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model on the GPU if there is one, with the same weights frozen as in this package's default."""
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.model.visual.requires_grad_(False)
    return model


def stock_logits(model: Any, prompt: EncodedPrompt, tokens: Sequence[int], image_token: int) -> Tensor:
    """(T, V) float32 logits that predict the T tokens of a completion."""
    ids = torch.tensor([[*prompt.input_ids.tolist(), *tokens]], device=model.device)
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == image_token).int(),
        pixel_values=torch.from_numpy(prompt.image_inputs["pixel_values"]).to(model.device, model.dtype),
        image_grid_thw=torch.from_numpy(prompt.image_inputs["image_grid_thw"]).to(model.device),
        use_cache=False,
    ).logits
    return logits[0, -len(tokens) - 1 : -1].float()


def stock_pass(model: Any, groups: Sequence[Group], image_token: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T) log-probabilities of all completions, and the gradients by name of their weighted sum (as in
    :func:`benchmarks.update.run`)."""
    weights = torch.linspace(-1, 1, sum(len(group.completions) for group in groups)).tolist()
    rows: list[Tensor] = []
    model.zero_grad(set_to_none=True)
    for group in groups:
        for completion in group.completions:
            logits = stock_logits(model, group.prompt, completion.token_ids, image_token)
            chosen = torch.tensor(completion.token_ids, device=model.device)[:, None]
            logps = logits.log_softmax(-1).gather(-1, chosen)[:, 0]
            (logps.sum() * weights[len(rows)]).backward()
            rows.append(logps.detach())
    return torch.stack(rows), gradients(model.named_parameters())


def own_pass(learner: Learner, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with this package: all groups in one row, each prompt once."""
    (batch,) = lay_out(learner, groups, "default")
    (logps,), _ = run(learner, [batch])
    return logps, gradients(learner.trained.parameters.items())


def gradients(parameters: Any) -> dict[str, Tensor]:
    """Gradients by name, without what wrappers add to the names; taken from the parameters, not copied."""
    found = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    assert found
    return found


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The norm of the difference over the norm of the second, over all tensors together, summed in float64."""
    assert first.keys() == second.keys(), sorted(first.keys() ^ second.keys())[:4]
    difference = sum(float((first[name].float() - second[name].float()).norm().double() ** 2) for name in second)
    return float((difference / sum(float(tensor.float().norm().double() ** 2) for tensor in second.values())) ** 0.5)


def greedy_groups(learner: Learner, workload: Workload, engine: Any) -> list[Group]:
    """One greedy completion per prompt."""
    samples = make_data(workload.prompts, workload.side).samples
    decoder = RolloutEngine(learner.policy, engine=engine)
    prompts = [decoder.encode(sample) for sample in samples]
    rows = {"max_completion_length": workload.length, "batch_size": len(samples)}
    return list(decoder.greedy(samples, **rows, prompts=prompts))


def greedy_check(model: Any, groups: Sequence[Group], processor: Processor, dtype: str, engine: str) -> Check:
    """How far below the largest logit of the stock model, given what came before, the chosen tokens are."""
    gaps: list[Tensor] = []
    with torch.no_grad():
        for group in groups:
            (completion,) = group.completions
            logits = stock_logits(model, group.prompt, completion.token_ids, processor.image_token_id)
            logits[:, list(processor.suppressed_ids)] = -torch.inf
            logits[:, len(processor.tokenizer) :] = -torch.inf  # rows of the output layer without a token
            chosen = torch.tensor(completion.token_ids, device=model.device)[:, None]
            gaps.append(logits.max(-1).values - logits.gather(-1, chosen)[:, 0])
    gap = torch.cat(gaps)
    note = f"{int((gap == 0).sum())} of {gap.numel()} tokens are the stock model's first choice"
    return Check(dtype, f"greedy ({engine})", float(gap.max()), LIMITS[dtype]["greedy"], note)


def compare(workload: Workload, folder: Path) -> list[Check]:
    """All comparisons, in both dtypes.

    Args:
        workload: its dtype is that of the stored weights.
        folder: of the model.
    """
    engines = ("eager", "graph") if torch.cuda.is_available() else ("eager",)
    exact: tuple[Tensor, dict[str, Tensor]] | None = None
    found = []
    for dtype in ("float32", "bfloat16"):
        learner = make_learner(replace(workload, dtype=dtype), folder)
        processor = learner.policy.processor
        forbid_stopping(processor)
        groups = make_groups(learner.policy, workload)
        greedy = {engine: greedy_groups(learner, workload, engine) for engine in engines}
        learner.policy.model.train()
        ours = own_pass(learner, groups)
        model = stock_model(folder, getattr(torch, dtype))
        found += [greedy_check(model, greedy[engine], processor, dtype, engine) for engine in engines]
        stock = stock_pass(model, groups, processor.image_token_id)
        if exact is None:
            exact = stock
            largest = float((ours[0] - stock[0]).abs().max())
            found.append(
                Check(
                    dtype,
                    "log-probabilities",
                    largest,
                    LIMITS[dtype]["log-probabilities"],
                    "nats, largest difference from stock",
                )
            )
            found.append(
                Check(
                    dtype,
                    "gradient",
                    distance(ours[1], stock[1]),
                    LIMITS[dtype]["gradient"],
                    "of the norm, difference from stock",
                )
            )
        else:
            found += coarse_checks(ours, stock, exact)
        del learner, model, ours, stock  # before the next ones are loaded
    return found


def coarse_checks(
    ours: tuple[Tensor, dict[str, Tensor]],
    stock: tuple[Tensor, dict[str, Tensor]],
    exact: tuple[Tensor, dict[str, Tensor]],
) -> list[Check]:
    """Errors in bfloat16, with those of the stock model as limits.

    Args:
        ours: log-probabilities and gradients of this package.
        stock: those of the stock model in bfloat16.
        exact: those of the stock model in float32.
    """
    errors = [float((logps - exact[0]).square().mean().sqrt()) for logps in (ours[0], stock[0])]
    largest = float((ours[0] - stock[0]).abs().max())
    note = f"stock: {errors[1]:.1e} nats; largest difference from it {largest:.1e}"
    found = [Check("bfloat16", "log-probabilities", errors[0], NO_WORSE * errors[1], note)]
    norms = [distance(grads, exact[1]) for grads in (ours[1], stock[1])]
    return [*found, Check("bfloat16", "gradient", norms[0], NO_WORSE * norms[1], f"stock: {norms[1]:.1e} of the norm")]


def report(checks: Sequence[Check]) -> str:
    """Format the table of comparisons."""
    rows = [["", "dtype", "measured", "limit", ""]]
    for check in checks:
        numbers = [f"{check.measured:.1e}", f"{check.limit:.1e}"]
        rows.append([check.what, check.dtype, *numbers, "ok" if check.holds else "TOO FAR"])
    heading, *lines = table(rows).splitlines()
    return "\n".join([heading, *(f"{line:<52}  {check.note}" for line, check in zip(lines, checks, strict=True))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="gpu")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Qwen2-VL tokenizer for random weights")
    parser.add_argument("--models", type=Path, help="folder that keeps random models for other benchmarks")
    parser.add_argument("--output", type=Path, help="result file")
    options = parser.parse_args(argv)
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions would round to 10 bits otherwise
    workload = PRESETS[options.preset]
    with prepared(workload, options.tokenizer, options.models) as folder:
        checks = compare(workload, folder)
    machine = hardware()
    result = {"benchmark": "sameness", "preset": options.preset, "workload": asdict(workload), "hardware": machine}
    result["checks"] = [asdict(check) | {"holds": check.holds} for check in checks]
    write_result(options.output, result)
    print(f"{workload.model}, {machine.get('gpu', machine['cpu'])}, torch {machine['torch']}")
    print(report(checks))
    far = [f"{check.what} in {check.dtype}" for check in checks if not check.holds]
    print(f"NOT THE SAME: {', '.join(far)}: do not trust the speeds below." if far else "the same as the stock model")
    return int(bool(far))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
