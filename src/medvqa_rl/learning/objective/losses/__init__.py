"""Losses, one algorithm per file; loss.py has the interface and what they share."""

from __future__ import annotations

from medvqa_rl.learning.objective.losses.cispo import cispo_loss
from medvqa_rl.learning.objective.losses.dpo import dpo_loss
from medvqa_rl.learning.objective.losses.grpo import grpo_loss
from medvqa_rl.learning.objective.losses.loss import Loss
from medvqa_rl.learning.objective.losses.sapo import sapo_loss

LOSSES: dict[str, Loss] = {
    "grpo": grpo_loss,
    "dr_grpo": grpo_loss,
    "dapo": grpo_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "dpo": dpo_loss,
}
"""By ``loss.type``."""
