"""The policy wrapped for training: on one process, replicated (DDP) or sharded (FSDP2; ZeRO is in zero.py).

The engine wraps a single module, which computes log-probabilities with gradients. Everything without gradients runs
on ``policy.model``, a plain model under every engine: the trained model itself if every rank has all weights, else a
copy that :meth:`TrainedPolicy.gathered` fills.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from medvqa_rl.config import OptimizerConfig
from medvqa_rl.learning.objective.logprobs import GroupForward
from medvqa_rl.learning.objective.optimizer import Optimizer
from medvqa_rl.models.families import family_of
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.shards import Shards, filled, hollow_copy


class TrainedPolicy:
    """A policy with all weights on every rank: one process, or DDP."""

    is_collective = False
    """Whether forward passes, gathering and saving are collective, so that all ranks must run equally many."""

    def __init__(self, config: OptimizerConfig, accelerator: Accelerator, policy: Policy) -> None:
        """
        Args:
            policy: the policy with its initial weights. Its model is wrapped.

        Raises:
            ValueError: no parameter is trainable.
        """
        self.policy = policy
        self.accelerator = accelerator
        self.has_moved = False
        """Whether a step has changed weights since the run set this to False, so that they belong to no whole step."""
        self._max_grad_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        self._make(config)

    def _make(self, config: OptimizerConfig) -> None:
        """Wrap the model and create its optimizer."""
        model = self.policy.model
        self.forward: nn.Module = self.accelerator.prepare_model(GroupForward(model))
        self._optimizer = Optimizer(model, config)
        self.parameters: dict[str, nn.Parameter] = self._optimizer.parameters

    def gathered(self, weights: Shards | None = None) -> AbstractContextManager[None]:
        """Fill ``policy.model`` with all weights for the duration of the block. Collective.

        Args:
            weights: weights to use instead of the policy's; those it lacks are the policy's.
        """
        if weights is None:
            return nullcontext()
        return filled(self.policy.model, lambda name: weights.gather(name) if name in weights else None)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch's forward and backward pass. Gradients are synchronized in the last one."""
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.forward)
        return nullcontext() if is_last else context

    def backward(self, loss: Tensor) -> None:
        """Accumulate a micro-batch's gradient, averaged over ranks."""
        self.accelerator.backward(loss)

    def clip_gradients(self, *, fill_missing: bool) -> float:
        """Clip the step's gradient to ``optimizer.max_grad_norm``.

        Args:
            fill_missing: set missing gradients to zero. If groups without a gradient were skipped, a parameter that
                only they use (such as the vision tower's) gets none, but its moments must still decay.

        Returns:
            The gradient norm before clipping.
        """
        if fill_missing:
            for parameter in self.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self._max_grad_norm)
        assert norm is not None
        return float(_full(norm))

    def step(self, learning_rate: float) -> None:
        """Update the weights, then clear the gradient."""
        self.has_moved = True
        self._step(learning_rate)

    def _step(self, learning_rate: float) -> None:
        self._optimizer.step(learning_rate)

    def zero_grad(self) -> None:
        """Clear the gradient."""
        self._optimizer.zero_grad()

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer state as full tensors, gathered one at a time. Collective.

        Names are ``exp_avg/NAME``, ``exp_avg_sq/NAME``, ``step/NAME``, and ``master/NAME`` for float32 master weights.
        They do not depend on the engine, so a run can be resumed under another one.
        """
        for name, tensor in self._optimizer.state_tensors().items():
            yield name, _full(tensor)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the optimizer state from :meth:`state_tensors`. The model already has the matching weights."""
        self._optimizer.load_state_tensors(tensors)


class Fsdp2Policy(TrainedPolicy):
    """A policy whose weights, gradients and optimizer state are sharded by FSDP2, layer by layer."""

    is_collective = True

    def _make(self, config: OptimizerConfig) -> None:
        model = self.policy.model
        self.policy.model = hollow_copy(model)
        plugin = self.accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = layer_classes(model)
        self.forward = fsdp2_prepare_model(self.accelerator, GroupForward(model, always_sees=True))
        self._optimizer = Optimizer(model, config)
        self.parameters = self._optimizer.parameters
        # The sharded parameters themselves: FSDP2 swaps a module's parameters while it is unsharded.
        self._shards: dict[str, nn.Parameter] = dict(model.named_parameters())

    def gathered(self, weights: Shards | None = None) -> AbstractContextManager[None]:
        def gather(name: str) -> Tensor:
            if weights is not None and name in weights:
                return weights.gather(name)
            return _full(self._shards[name].detach())

        return filled(self.policy.model, gather)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # reduce in every pass: unsharded gradients would need memory for all of them

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        def shard(key: str) -> Tensor:
            kind, name = key.split("/", 1)
            tensor, parameter = tensors[key], self.parameters[name]
            if kind == "step" or not isinstance(parameter, DTensor):
                return tensor
            full = tensor.to(parameter.device)
            return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)

        self._optimizer.load_state_tensors(LazyTensors(tensors, shard))


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read only when it is accessed."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = tuple(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def layer_classes(model: nn.Module) -> list[str]:
    """Class names of the layers that are sharded as units."""
    family = family_of(model)
    layers: Iterable[nn.Module] = [*family.text(model).layers, *family.vision_layers(model)]
    return sorted({type(layer).__name__ for layer in layers})


def _full(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
