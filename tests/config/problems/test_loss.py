"""Settings that a loss does not use, or that contradict it, are each reported in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from medvqa_rl.config import Config, ConfigError, LossConfig
from medvqa_rl.config.other_names import OTHER_VALUES
from medvqa_rl.config.problems.loss import FROM_ADVANTAGES, USED_BY
from medvqa_rl.config.yaml import build_config

NOT_DEFAULT: dict[str, Any] = {
    "advantage.baseline": "leave_one_out",
    "advantage.scale": "none",
    "loss.importance_sampling_level": "sequence",
    "loss.epsilon": 0.1,
    "loss.epsilon_high": 1.5,
    "loss.sapo_temperature_pos": 2.0,
    "loss.sapo_temperature_neg": 2.0,
    "loss.entropy_coef": 0.01,
    "loss.top_entropy_quantile": 0.2,
}


def problems(settings: dict[str, Any]) -> list[str]:
    try:
        build_config(settings, purpose="train")
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("kind", [*FROM_ADVANTAGES, "dpo"])
@pytest.mark.parametrize("name", USED_BY)
def test_a_setting_is_accepted_by_the_losses_that_use_it_only(name: str, kind: str) -> None:
    section, key = name.split(".")
    settings: dict[str, dict[str, Any]] = {"loss": {"type": kind}}
    settings.setdefault(section, {})[key] = NOT_DEFAULT[name]
    found = problems(settings)
    if kind in USED_BY[name]:
        assert not found
    else:
        (sentence,) = found
        assert sentence.startswith(f"{name} is {NOT_DEFAULT[name]}, but loss.type={kind} does not use it")
        assert sentence.endswith(f", its default, or loss.type to {'that' if 'sapo' in name else 'one of these'}.")


def test_every_setting_of_the_loss_is_used_by_some() -> None:
    """All but these are used by every loss."""
    by_all = {"loss.type", "loss.beta", "loss.num_iterations", "loss.mask_truncated_completions"}
    assert {f"loss.{name}" for name in LossConfig.model_fields} - by_all == {
        name for name in USED_BY if name.startswith("loss.")
    }


@pytest.mark.parametrize("kind", FROM_ADVANTAGES)
def test_defaults_written_out_are_accepted(kind: str) -> None:
    written = {**Config().loss.model_dump(), "type": kind}
    assert not problems({"loss": written, "advantage": Config().advantage.model_dump()})


def test_a_weight_below_that_of_an_unchanged_policy_is_refused() -> None:
    (sentence,) = problems({"loss": {"type": "cispo", "epsilon_high": 0.28}})
    assert sentence.startswith("loss.epsilon_high is 0.28, but with loss.type=cispo it is the largest weight")


@pytest.mark.parametrize(("path", "value"), OTHER_VALUES)
def test_values_of_other_programs_are_explained(path: str, value: str) -> None:
    section, key = path.split(".")
    given = {"true": True, "false": False}.get(value, value)
    (sentence,) = problems({section: {key: given}})
    assert sentence.startswith(f"{path} is ") and sentence.endswith(f" ({OTHER_VALUES[path, value]}).")


def test_names_of_other_programs_are_known() -> None:
    (sentence,) = problems({"advantage": {"normalize_advantages": True}})
    assert sentence.endswith("it is called advantage.scale here.")
