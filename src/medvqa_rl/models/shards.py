"""Tensors sharded over ranks, and models whose weights are loaded temporarily.

Sharded training keeps a part of each weight on each rank. Everything without gradients (rollouts, evaluations, the
reference pass, saving) runs on a separate plain model, whose weights are gathered before and freed after: once, not
once per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def own_part(tensor: Tensor) -> Tensor:
    """A flat copy of this rank's part of a tensor; parts have equal size, the last ones are padded with zeros."""
    flat, rank = tensor.flatten(), dist.get_rank()
    size = -(-len(flat) // dist.get_world_size())
    part = flat.new_zeros(size)
    own = flat[rank * size : (rank + 1) * size]
    part[: len(own)] = own
    return part


class Shards:
    """Sharded copies of tensors, with an equal part on each rank."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Args:
            tensors: by name, the same on all ranks.
        """
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._parts = {name: own_part(tensor.detach()) for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def gather(self, name: str) -> Tensor:
        """Gather a tensor; called on all ranks together."""
        part, shape = self._parts[name], self._shapes[name]
        whole = part.new_empty(len(part) * dist.get_world_size())
        dist.all_gather(list(whole.split(len(part))), part)
        return whole[: shape.numel()].view(shape)


def hollow_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its weights: all parameters have size 0, but keep name, dtype and requires_grad."""
    empty: dict[int, nn.Parameter] = {
        id(parameter): nn.Parameter(parameter.data.new_empty(0), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, dict(empty))


@contextmanager
def filled(model: nn.Module, gather: Callable[[str], Tensor | None]) -> Iterator[None]:
    """Replace the weights of a model for the block, in which nothing may be trained.

    Args:
        model: its own weights are restored afterwards.
        gather: returns a parameter's value by name, or None to keep it; called on all ranks together.
    """
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                whole = gather(name)
                if whole is not None:
                    before.append((parameter, parameter.data))
                    parameter.data = whole
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
