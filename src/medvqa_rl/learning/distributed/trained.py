"""The policy as it is trained: alone, copied to every rank (DDP), or sharded (FSDP2; ZeRO is in zero.py).

One module computes log-probabilities with gradients, and that module is what an engine wraps. What needs no
gradients runs on ``policy.model``, which is a plain model under every engine: the very one that is trained where each
rank has all weights, else one that :meth:`TrainedPolicy.gathered` fills.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.qwen_vl import backbone
from medvqa_rl.models.shards import Shards, filled, hollow_copy


class TrainedPolicy:
    """All weights on every rank: alone, or with averaged gradients (DDP)."""

    is_collective = False
    """True where passes, gathering and saving exchange data, so that all ranks must do the same number of each."""

    def __init__(self, config: OptimizerConfig, accelerator: Accelerator, policy: Policy) -> None:
        """
        Args:
            policy: with the weights that training starts from; what is wrapped is made of its model.

        Raises:
            ValueError: no parameter is trained.
        """
        self.policy = policy
        self.accelerator = accelerator
        self._max_grad_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        self._make(config)

    def _make(self, config: OptimizerConfig) -> None:
        """Wrap the model."""
        model = self.policy.model
        self.forward: nn.Module = self.accelerator.prepare_model(GroupForward(model))
        self._optimizer = Optimizer(model, config)
        self.parameters: dict[str, nn.Parameter] = self._optimizer.parameters

    def gathered(self, weights: Shards | None = None) -> AbstractContextManager[None]:
        """``policy.model`` holds all weights for the time of the block; all ranks enter and leave it together.

        Args:
            weights: to hold instead of the policy's, as far as they go.
        """
        return nullcontext() if weights is None else filled(self.policy.model, lambda name: _of(weights, name))

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a micro-batch; gradients are exchanged in the last one."""
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.forward)
        return nullcontext() if is_last else context

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient, averaged over ranks."""
        self.accelerator.backward(loss)

    def clip_gradients(self, *, fill_missing: bool) -> float:
        """Clip the gradient of the step.

        Args:
            fill_missing: groups without gradient were left out. A parameter that only they reach, as the vision tower
                beside text-only questions, has the gradient zero then and not none: the optimizer's running means
                move on.

        Returns:
            Its norm before that.
        """
        for parameter in self.parameters.values() if fill_missing else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self._max_grad_norm)
        assert norm is not None
        return float(_whole(norm))

    def step(self, learning_rate: float) -> None:
        """Update the weights from the gradient, then forget it."""
        self._optimizer.step(learning_rate)

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self._optimizer.zero_grad()

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state in whole tensors, one after another: ``exp_avg/NAME``, ``exp_avg_sq/NAME``,
        ``step/NAME``, and ``master/NAME`` for float32 copies. The same under every engine, so that a run can go on
        under another one; all ranks walk through it together."""
        for name, tensor in self._optimizer.state_tensors().items():
            yield name, _whole(tensor)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state from :meth:`state_tensors`; the model's weights are those that it was made with."""
        self._optimizer.load_state_tensors(tensors)


class Fsdp2Policy(TrainedPolicy):
    """Weights, gradients and optimizer state sharded by FSDP2, layer by layer."""

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
        # The very parameters: a module shows others while it is gathered.
        self._shards: dict[str, nn.Parameter] = dict(model.named_parameters())

    def gathered(self, weights: Shards | None = None) -> AbstractContextManager[None]:
        return filled(
            self.policy.model,
            lambda name: _whole(self._shards[name].detach()) if weights is None else _of(weights, name, self._shards),
        )

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # gradients are exchanged and sharded in every pass, or they would need their full room

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._optimizer.load_state_tensors(_Distributed(tensors, self.parameters))


class _Distributed(Mapping[str, Tensor]):
    """An optimizer's state sharded as the parameters are, one tensor at a time as it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        self._tensors, self._parameters = tensors, parameters

    def __getitem__(self, key: str) -> Tensor:
        kind, name = key.split("/", 1)
        tensor, parameter = self._tensors[key], self._parameters[name]
        if kind == "step" or not isinstance(parameter, DTensor):
            return tensor
        whole = tensor.to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes of the layers that are gathered one at a time."""
    inner = backbone(model)
    layers: Iterable[nn.Module] = [*inner.language_model.layers, *inner.visual.blocks]
    return sorted({type(layer).__name__ for layer in layers})


def _of(weights: Shards, name: str, others: Mapping[str, Tensor] | None = None) -> Tensor | None:
    """A weight by name: of the shards, else of the others."""
    if name in weights:
        return weights.gather(name)
    return None if others is None else _whole(others[name].detach())


def _whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
