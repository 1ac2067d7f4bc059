"""The policy wrapped by DeepSpeed ZeRO: stage 2 shards gradients and optimizer state, stage 3 the weights too."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from medvqa_rl.config import OptimizerConfig
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.objective.logprobs import GroupForward
from medvqa_rl.learning.objective.optimizer import make_adamw, trained_parameters
from medvqa_rl.models.shards import Shards, filled, hollow_copy, own_part

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed 0.19 calls what torch 2.13 renames, at every step.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroPolicy(TrainedPolicy):
    """A policy trained by DeepSpeed through Accelerate."""

    is_collective = True

    def _make(self, config: OptimizerConfig) -> None:
        model = self.policy.model
        plugin = self.accelerator.state.deepspeed_plugin
        self._is_stage_3 = plugin.zero_stage == 3
        self._all: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.parameters = trained_parameters(model)
        self._is_bfloat16 = next(model.parameters()).dtype == torch.bfloat16
        if self._is_stage_3:
            self.policy.model = hollow_copy(model)
        plugin.deepspeed_config.update(
            {
                "train_micro_batch_size_per_gpu": 1,  # required, but only DeepSpeed's data loaders use it
                "gradient_accumulation_steps": 1,  # see micro_batch
                "gradient_clipping": config.max_grad_norm or 0.0,
                "bf16": {"enabled": self._is_bfloat16},
            }
        )
        self._engine: Any
        self._engine, _ = self.accelerator.prepare(
            GroupForward(model, always_sees=True), make_adamw(self.parameters, config)
        )
        self.forward = self._engine
        self._zero: Any = self._engine.optimizer

    def gathered(self, weights: Shards | None = None) -> AbstractContextManager[None]:
        def gather(name: str) -> Tensor | None:
            if weights is not None and name in weights:
                return weights.gather(name)
            if not self._is_stage_3:
                return None  # already in place
            with GatheredParameters([self._all[name]]):
                return self._all[name].data.clone()

        return filled(self.policy.model, gather)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip_gradients(self, *, fill_missing: bool) -> float:
        """Return the gradient norm. DeepSpeed clips in its own step and gives unused parameters zero gradients."""
        if not self._is_stage_3:
            norm = float(self._zero.scaled_global_norm())
            return norm if norm >= 0 else float("nan")  # DeepSpeed returns -1 if it is not finite
        squares = torch.zeros((), dtype=torch.float64, device=self.policy.device)
        for parameter in self.parameters.values():
            squares += safe_get_local_grad(parameter).double().square().sum()
        return float(self.accelerator.reduce(squares, "sum").sqrt())

    def _step(self, learning_rate: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def zero_grad(self) -> None:
        self._zero.zero_grad()

    def _moments(self) -> dict[Any, dict[str, Tensor]]:
        """AdamW's state of this rank's flat partitions; empty before the first step."""
        state: dict[Any, dict[str, Tensor]] = self._zero.optimizer.state
        return state

    def _link_moments(self) -> None:
        """Map the flat state to parameters in stage 2, which DeepSpeed does only once, before the state exists."""
        if self._is_stage_3:
            return
        for parameters, part in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups):
            lazy_init_hp_params_optimizer_state(parameters, part, self._moments())

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        steps = [state["step"] for state in self._moments().values()]
        if steps:
            self._link_moments()
        for name, parameter in self.parameters.items():
            if self._is_bfloat16:
                yield f"master/{name}", safe_get_full_fp32_param(parameter)
            if steps:
                # DeepSpeed's own AdamW, for state on the CPU, counts in an integer.
                yield f"step/{name}", torch.as_tensor(steps[0], dtype=torch.float32).cpu().clone()
                for key in _MOMENTS:
                    yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        steps = [name for name in tensors if name.startswith("step/")]
        if steps:
            # DeepSpeed creates the state in the first step; create it here to fill it below.
            zero = self._zero
            parts = zero.fp32_partitioned_groups_flat if self._is_stage_3 else zero.single_partition_of_fp32_groups
            step = tensors[steps[0]]
            for part in parts:
                count: Any = int(step) if isinstance(self._zero.optimizer, DeepSpeedCPUAdam) else step.clone()
                self._moments()[part] = {"step": count, **{key: torch.zeros_like(part) for key in _MOMENTS}}
            self._link_moments()
        # Stage 3 cannot set full tensors whose size is not a multiple of the number of ranks.
        cut: Callable[[Tensor], Tensor] = own_part if self._is_stage_3 else lambda full: full
        set_master = safe_set_local_fp32_param if self._is_stage_3 else safe_set_full_fp32_param
        set_moment = safe_set_local_optimizer_state if self._is_stage_3 else safe_set_full_optimizer_state
        for name, parameter in self.parameters.items():
            device = self.policy.device
            if self._is_bfloat16:
                set_master(parameter, cut(tensors[f"master/{name}"].to(device)))
            if f"step/{name}" in tensors:
                for key in _MOMENTS:
                    set_moment(parameter, cut(tensors[f"{key}/{name}"].to(device)), key)
