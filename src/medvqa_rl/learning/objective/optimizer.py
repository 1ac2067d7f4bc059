"""AdamW with float32 master weights, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medvqa_rl.config import OptimizerConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")


def lr_at(step: int, config: OptimizerConfig, steps: int) -> float:
    """Return the learning rate of a step, counted from 0.

    Warmup is linear and reaches the peak rate at step ``warmup_steps - 1``. Afterwards ``constant`` stays there, and
    ``linear`` and ``cosine`` decay to ``min_lr_ratio`` times the peak rate at the last of ``steps`` steps.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    decay = {"constant": 0.0, "linear": progress, "cosine": 0.5 * (1 - math.cos(math.pi * progress))}
    return config.learning_rate * (1 - (1 - config.min_lr_ratio) * decay[config.lr_scheduler_type])


def should_decay(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: to matrices, but not to norms, biases or embeddings."""
    return parameter.ndim >= 2 and "embed_tokens" not in name


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's trainable parameters by name.

    Raises:
        ValueError: there are none.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError(
            "No parameter of the model is trained: train the language model (model.lora null), an adapter, "
            "model.train_projector or model.train_vision."
        )
    return parameters


def make_adamw(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Create AdamW with weight decay on matrices only.

    Args:
        parameters: by their names in the model.
    """
    decayed = [parameter for name, parameter in parameters.items() if should_decay(name, parameter)]
    others = [parameter for name, parameter in parameters.items() if not should_decay(name, parameter)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
    )


class Optimizer:
    """AdamW on the trainable parameters of a model.

    bfloat16 parameters are trained through a float32 master copy: at a learning rate of 1e-6 an update is smaller
    than bfloat16's rounding step and would be lost. The copy is rounded into the model after every step. It is part
    of the optimizer state; the model's files hold the rounded weights.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.parameters = trained_parameters(model)
        self._masters: dict[str, nn.Parameter] = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.parameters.items()
        }
        self._adamw = make_adamw(self._masters, config)

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self._masters[name].grad = None

    def step(self, learning_rate: float) -> None:
        """Update the parameters from their gradients, then set the gradients to None."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        copies = [(p, self._masters[name]) for name, p in self.parameters.items() if self._masters[name] is not p]
        for parameter, master in copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self._adamw.step()
        with torch.no_grad():
            for parameter, master in copies:
                parameter.copy_(master)
        self.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state as flat tensors: ``exp_avg/NAME`` and so on, and ``master/NAME`` for master copies."""
        tensors = {}
        for name, parameter in self.parameters.items():
            master = self._masters[name]
            if master is not parameter:
                tensors[f"master/{name}"] = master.detach()
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state from :meth:`state_tensors`. Loading the model's weights is up to the caller."""
        for name, parameter in self.parameters.items():
            master = self._masters[name]
            if master is not parameter:
                with torch.no_grad():
                    master.copy_(tensors[f"master/{name}"])
                    parameter.copy_(master)
            if f"step/{name}" in tensors:
                state = {key: tensors[f"{key}/{name}"] for key in _STATE}
                # AdamW keeps its step counter on the CPU.
                self._adamw.state[master] = {
                    key: value.clone() if key == "step" else value.to(master.device, copy=True)
                    for key, value in state.items()
                }
