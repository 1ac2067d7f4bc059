"""The policy before training, as the reference of the KL term."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import nn

from medvqa_rl.models.adapters import fill_adapter, read_adapter
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.shards import Shards

REFERENCE_ADAPTER = "reference"


class Reference:
    """The policy before training, for the KL term."""

    def __init__(self, policy: Policy, frozen: nn.Module | None, shards: Shards | None = None) -> None:
        """
        Args:
            policy: the trained policy.
            frozen: a separate model; None uses the policy's own.
            shards: initial values of the trained weights, which the caller loads into the policy's model for the pass.
        """
        self._policy = policy
        self._frozen = frozen
        self.shards = shards

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Yield the module for the reference pass, in evaluation mode and under ``no_grad``.

        With LoRA it is the policy's own module with the trained adapter disabled, so do not train inside the block.
        """
        if self._frozen is not None:
            with torch.no_grad():
                yield self._frozen
            return
        is_training = self._policy.model.training
        if self.shards is not None:
            self._policy.model.eval()
            try:
                with torch.no_grad():
                    yield self._policy.model
            finally:
                self._policy.model.train(is_training)
            return
        model = cast(PeftModel, self._policy.model)
        gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.eval()
        try:
            with torch.no_grad():
                if REFERENCE_ADAPTER in model.peft_config:
                    model.set_adapter(REFERENCE_ADAPTER)
                    try:
                        yield model
                    finally:
                        model.set_adapter("default")
                else:
                    with model.disable_adapter():
                        yield model
        finally:
            # PEFT changes requires_grad when it switches adapters.
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(gradients[name])
            model.train(is_training)


def load_reference(policy: Policy) -> Reference:
    """Create the reference from the policy's current weights; call this before training or resuming a checkpoint.

    Full fine-tuning: a frozen copy that shares the untrained weights. A new LoRA adapter: the same model with the
    adapter disabled, no copy. A trained adapter (``model.adapter``): a second, frozen copy of that adapter, because
    the reference is where this training started, not the base model.
    """
    if not policy.is_lora:
        shared = {id(parameter): parameter for parameter in policy.model.parameters() if not parameter.requires_grad}
        frozen = copy.deepcopy(policy.model, dict(shared))
        frozen.requires_grad_(False)
        return Reference(policy, frozen.eval())
    if policy.config.adapter is not None:
        model = cast(PeftModel, policy.model)
        gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        folder = Path(policy.config.adapter).expanduser()
        model.add_adapter(REFERENCE_ADAPTER, read_adapter(folder))
        fill_adapter(model, folder, REFERENCE_ADAPTER)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(gradients.get(name, False))
        model.to(policy.device)
    return Reference(policy, None)
