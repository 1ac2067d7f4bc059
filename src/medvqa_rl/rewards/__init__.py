"""Rewards of completions: format, correctness and your own functions. Imports no torch."""

from medvqa_rl.core.answers import is_correct
from medvqa_rl.rewards.compose import Rewards

__all__ = ["Rewards", "is_correct"]
