"""Settings of a run as frozen pydantic models. Imports no torch.

Names follow TRL's ``GRPOConfig`` where it has one. All defaults are safe on a laptop; the files in ``configs/`` hold
the papers' values.
"""

from medvqa_rl.config.config import Config, ConfigError, Purpose, differences, digest, is_hub_id, leaves, moved
from medvqa_rl.config.inputs import DataConfig, LoraConfig, ModelConfig, PrefetchConfig, PromptConfig
from medvqa_rl.config.learning import (
    AdvantageConfig,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    TrainEngine,
)
from medvqa_rl.config.rollout_and_rewards import EngineName, JudgeConfig, RewardsConfig, RolloutConfig, VllmConfig

__all__ = [
    "AdvantageConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineName",
    "EvalConfig",
    "JudgeConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrefetchConfig",
    "PromptConfig",
    "Purpose",
    "RewardsConfig",
    "RolloutConfig",
    "TrainConfig",
    "TrainEngine",
    "VllmConfig",
    "differences",
    "digest",
    "is_hub_id",
    "leaves",
    "moved",
]
