"""Tensors of which every rank keeps a part, and models whose weights come and go.

Sharded training keeps a share of each weight on each rank. Everything that needs no gradients (rollouts, evaluations,
the reference pass, saving) runs on a plain model beside it, which is filled for the time of the work and emptied
after it: gathered once, not once per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor cut into equal ones, a flat copy; the last ones are padded with zeros."""
    flat, rank = tensor.flatten(), dist.get_rank()
    size = -(-len(flat) // dist.get_world_size())
    part = flat.new_zeros(size)
    own = flat[rank * size : (rank + 1) * size]
    part[: len(own)] = own
    return part


class Shards:
    """Copies of tensors, an equal part of each on every rank."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Args:
            tensors: the same on all ranks, by name. They are copied.
        """
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._parts = {name: own_part(tensor.detach()) for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def gather(self, name: str) -> Tensor:
        """One whole tensor; all ranks call this together."""
        part, shape = self._parts[name], self._shapes[name]
        whole = part.new_empty(len(part) * dist.get_world_size())
        dist.all_gather(list(whole.split(len(part))), part)
        return whole[: shape.numel()].view(shape)


def hollow_copy(model: nn.Module) -> nn.Module:
    """The same model with buffers and without weights: names, types and what is trained are kept, all sizes are 0."""
    empty: dict[int, nn.Parameter] = {
        id(parameter): nn.Parameter(parameter.data.new_empty(0), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, dict(empty))


@contextmanager
def filled(model: nn.Module, gather: Callable[[str], Tensor | None]) -> Iterator[None]:
    """Other weights in a model for the time of the block; nothing may be trained meanwhile.

    Args:
        model: gets back the memory that its weights had.
        gather: the weight to put in place by name, None to keep what is there; all ranks call this together.
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
