"""A whole configuration, and what can be said of two of them. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from medvqa_rl.config.base import Settings
from medvqa_rl.config.inputs import DataConfig, ModelConfig, PrefetchConfig, PromptConfig
from medvqa_rl.config.learning import AdvantageConfig, EvalConfig, LossConfig, OptimizerConfig, SftConfig, TrainConfig
from medvqa_rl.config.sampling import JudgeConfig, RewardsConfig, RolloutConfig, VllmConfig

Purpose = Literal["train", "sft", "eval"]
"""What a configuration is about to be used for: some combinations are wrong for one verb only."""


class Config(Settings):
    """Everything a run can be told."""

    output_dir: Annotated[str, Field(min_length=1)] = "runs/run"
    """Folder of the run; a new one, or with --resume the one to continue."""
    network: Literal["on", "off"] = "on"
    """off refuses every connection beyond this machine, for the whole process."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prefetch: PrefetchConfig = PrefetchConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    rewards: RewardsConfig = RewardsConfig()
    judge: JudgeConfig = JudgeConfig()
    """The judge that rewards, where rewards.semantic, rewards.reasoning or rewards.open_correctness asks one."""
    eval_judge: JudgeConfig | None = None
    """The judge of evaluations, better another than the one that rewards; None judges none."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()


class ConfigError(ValueError):
    """Settings that cannot be used. Its text is one complete sentence per problem, a line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def digest(config: Config) -> str:
    """SHA-256 of the canonical JSON of the settings that differ from their defaults.

    Equal exactly when every setting is equal, in one version of the program; and equal across versions that only add
    settings. A section that may be null and is given stands there even if all of it is at its defaults.
    """
    changed = config.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by dotted path; an empty section is a value of its own."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            result.update(leaves(value, f"{path}."))
        else:
            result[path] = value
    return result


def is_hub_id(path: str) -> bool:
    """Whether a model's path names a repository on the Hugging Face Hub, not a folder."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()


def shareable(config: Config) -> dict[str, Any]:
    """The settings by dotted path without folders of this machine: of each only the last part."""
    found = leaves(config.model_dump(mode="json"))
    folders = ["output_dir", "model.path", "model.adapter", "data.path", "eval.perplexity_model", "eval.similarity"]
    folders += ["rewards.similarity_model", "vllm.weights_dir"]
    folders += [f"{name}.{key}" for name in ("judge", "eval_judge") for key in ("model", "cache_dir")]
    cut = {name: Path(found[name]).name for name in folders if found.get(name) and not is_hub_id(found[name])}
    return found | cut


def differences(before: Config, after: Config) -> list[str]:
    """Dotted paths of the settings in which two configurations differ, sorted."""
    old, new = (leaves(config.model_dump(mode="json")) for config in (before, after))
    paths = {path for path in old.keys() | new.keys() if (path in old, old.get(path)) != (path in new, new.get(path))}
    # A section that is null on one side is one difference, not one for each of its settings.
    return sorted(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))
