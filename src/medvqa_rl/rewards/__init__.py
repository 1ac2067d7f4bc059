"""Rewards of completions: format, correctness and your own functions. Imports no torch."""

from medvqa_rl.rewards.compose import Rewards
from medvqa_rl.rewards.correctness import is_correct

__all__ = ["Rewards", "is_correct"]
