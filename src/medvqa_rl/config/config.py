"""The complete configuration, its digest, and differences between two of them. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from medvqa_rl.config.base import Free, Identity, Settings
from medvqa_rl.config.errors import MedVQAError
from medvqa_rl.config.inputs import DataConfig, ModelConfig, PrefetchConfig, PromptConfig
from medvqa_rl.config.learning import AdvantageConfig, EvalConfig, LossConfig, OptimizerConfig, SftConfig, TrainConfig
from medvqa_rl.config.rollout_and_rewards import JudgeConfig, RewardsConfig, RolloutConfig, VllmConfig
from medvqa_rl.core.text import printable

Purpose = Literal["train", "sft", "eval"]
"""The verb that a configuration is checked for: some combinations are wrong for one verb only."""


class Config(Settings):
    """All settings of a run."""

    output_dir: Free[Annotated[str, Field(min_length=1)]] = "runs/run"
    """Folder of the run; must be new, unless --resume continues it."""
    network: Free[Literal["on", "off"]] = "on"
    """off blocks every connection that leaves this machine, for the whole process."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prefetch: PrefetchConfig = PrefetchConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    rewards: RewardsConfig = RewardsConfig()
    judge: JudgeConfig = JudgeConfig()
    """The reward judge, used by rewards.semantic, reasoning, process, composite and open_correctness."""
    eval_judge: Identity[JudgeConfig | None] = None
    """The evaluation judge, which should differ from the reward judge; None disables it."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()

    @classmethod
    def from_yaml(cls, path: str | Path, *overrides: str) -> Config:
        """Read a YAML file, and apply overrides such as ``"train.steps=100"``.

        Raises:
            ConfigError: the file cannot be read, or with a sentence for every problem.
        """
        from medvqa_rl.config.yaml import load_config

        return load_config(path, overrides).config

    @classmethod
    def from_settings(cls, **settings: Any) -> Config:
        """Build the settings from names: ``steps=100`` or ``train={"steps": 100}``, ``**{"train.steps": 100}``.

        Of several settings with the same name (``seed``), the one that TRL's ``GRPOConfig`` has counts. Whether they
        contradict each other is checked when they are used, since data and rewards may be arguments.

        Raises:
            ConfigError: with a sentence for every problem.
        """
        from medvqa_rl.config.named import nest
        from medvqa_rl.config.yaml import build_config

        return build_config(nest(settings), is_whole=False)


class ConfigError(MedVQAError):
    """Invalid settings: one complete sentence per problem, one printable line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems
        self.problems = tuple(printable(problem, 1_500) for problem in problems)
        super().__init__("\n".join(self.problems))


def moved(config: Config, folder: Path) -> Config:
    """Return the settings of a run that is now in another folder; data that is stored in its folder moved with it."""
    before, data = Path(config.output_dir), config.data
    if data.path is not None and Path(data.path).is_relative_to(before):
        data = data.model_copy(update={"path": str(folder / Path(data.path).relative_to(before))})
    return config.model_copy(update={"output_dir": str(folder), "data": data})


def digest(config: Config) -> str:
    """Return the SHA-256 of the canonical JSON of the settings that differ from their defaults.

    Within one version, two digests are equal exactly if all settings are equal; versions that only add settings keep
    the digest. An optional section that is given counts even if all its settings are at their defaults.
    """
    changed = config.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to values by dotted path; an empty section stays as a value."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            result.update(leaves(value, f"{path}."))
        else:
            result[path] = value
    return result


def is_hub_id(path: str) -> bool:
    """Whether a path is the id of a Hugging Face Hub repository rather than a local folder."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()


def differences(before: Config, after: Config) -> list[str]:
    """Return the sorted dotted paths of the settings in which two configurations differ."""
    old, new = (leaves(config.model_dump(mode="json")) for config in (before, after))
    paths = {path for path in old.keys() | new.keys() if (path in old, old.get(path)) != (path in new, new.get(path))}
    # A section that is null on one side counts as one difference, not one per setting.
    return sorted(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))
