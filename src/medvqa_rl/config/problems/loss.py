"""Problems with the settings of losses and advantages, as complete sentences. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from medvqa_rl.config import Config

CLIPPED = ("grpo", "dr_grpo", "dapo")
FROM_ADVANTAGES = (*CLIPPED, "cispo", "sapo")

USED_BY: dict[str, tuple[str, ...]] = {
    "advantage.baseline": FROM_ADVANTAGES,
    "advantage.scale": FROM_ADVANTAGES,
    "loss.importance_sampling_level": FROM_ADVANTAGES,
    "loss.epsilon": CLIPPED,
    "loss.epsilon_high": (*CLIPPED, "cispo"),
    "loss.sapo_temperature_pos": ("sapo",),
    "loss.sapo_temperature_neg": ("sapo",),
    "loss.entropy_coef": FROM_ADVANTAGES,
    "loss.top_entropy_quantile": FROM_ADVANTAGES,
}
"""Settings that not every loss uses, and the values of ``loss.type`` that do."""


def loss_problems(config: Config) -> Iterator[tuple[str, ...]]:
    """Yield each problem: a sentence, then the dotted paths of the settings involved."""
    loss, defaults = config.loss, Config()
    for name, types in USED_BY.items():
        section, key = name.split(".")
        value, default = (getattr(getattr(settings, section), key) for settings in (config, defaults))
        if value != default and loss.type not in types:
            yield (
                f"{name} is {value}, but loss.type={loss.type} does not use it (it belongs to {', '.join(types)}): "
                f"set {name}={'null' if default is None else default}, its default, or loss.type to "
                f"{'that' if len(types) == 1 else 'one of these'}.",
                name,
                "loss.type",
            )
    if loss.type in CLIPPED and loss.epsilon_high is not None and loss.epsilon_high < loss.epsilon:
        yield (
            f"loss.epsilon_high is {loss.epsilon_high} and loss.epsilon {loss.epsilon}, but the upper clipping range "
            "must be at least the lower one: raise loss.epsilon_high (0.28 is usual) or set it to null.",
            "loss.epsilon_high",
            "loss.epsilon",
        )
    if loss.type == "cispo" and loss.epsilon_high is not None and loss.epsilon_high < 1:
        yield (
            f"loss.epsilon_high is {loss.epsilon_high}, but with loss.type=cispo it is the largest weight of a token, "
            "and a policy that has not changed gives weight 1: set it to 1 or more (5 is usual), or to null.",
            "loss.epsilon_high",
            "loss.type",
        )
    if loss.type == "dpo" and loss.beta == 0:
        yield (
            "loss.beta is 0, but loss.type=dpo scales the preference by it: set it above 0 (0.1 is usual).",
            "loss.beta",
            "loss.type",
        )
    if loss.type == "dpo" and loss.num_iterations > 1:
        yield (
            f"loss.num_iterations is {loss.num_iterations}, but loss.type=dpo takes one optimizer step per rollout: "
            "set it to 1, or choose grpo.",
            "loss.num_iterations",
            "loss.type",
        )
