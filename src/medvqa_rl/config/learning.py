"""What is made of it: advantages, losses, the optimizer, the loop, evaluations. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medvqa_rl.config.base import Decay, Positive, Settings, Share

TrainEngine = Literal["ddp", "zero2", "zero3", "fsdp2"]


class AdvantageConfig(Settings):
    """How rewards of a group become advantages."""

    scale: Literal["group", "none"] = "group"
    """group divides by the group's standard deviation (GRPO); none only centers (Dr. GRPO). TRL's scale_rewards."""


class LossConfig(Settings):
    """The policy loss."""

    type: Literal["grpo", "dr_grpo", "dapo", "dpo"] = "grpo"
    """How token losses are averaged (TRL's loss_type); dpo learns to prefer each group's best completion."""
    beta: Annotated[float, Field(ge=0.0)] = 0.04
    """Weight of the KL divergence from the reference policy; with dpo its own beta, for which TRL has 0.1."""
    epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Clip range of the probability ratio."""
    epsilon_high: Annotated[float, Field(gt=0.0)] | None = None
    """Upper clip range; None takes epsilon."""
    num_iterations: Positive = 1
    """Optimizer passes over the completions of one rollout."""
    mask_truncated_completions: bool = False
    """Leave completions that hit the token limit out of the loss."""


class OptimizerConfig(Settings):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """The highest learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls after the warmup."""
    min_lr_ratio: Share = 0.0
    """Learning rate at the last step as a share of the highest; a constant schedule does not use it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly from zero."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradients are scaled down to this norm; None never clips."""


class TrainConfig(Settings):
    """The loop."""

    steps: Positive = 300
    """Training steps: one rollout and the update from it."""
    prompts_per_step: Positive = 8
    """P, prompts per step over all ranks (TRL: batch x accumulation x ranks / G)."""
    prompts_per_micro_batch: Positive = 8
    """At most this many whole groups share one forward and backward pass; memory and speed, never the gradient."""
    max_tokens_per_micro_batch: Positive | None = None
    """Tokens that share one forward and backward pass, whole groups sorted by length; None sets no such limit."""
    self_check: bool = True
    """Before the first update, compare the fast computation with the plain one on one group; stop if they differ."""
    engine: Literal["auto", "ddp", "zero2", "zero3", "fsdp2"] = "auto"
    """How several ranks train together; auto takes what the launcher says, others refuse to run under another one."""
    rank_timeout: Annotated[float, Field(gt=0.0)] = 1800.0
    """Seconds after which a run of several ranks ends where no rank gets any further; 60 where one is dead."""
    seed: int = 0
    """Seed of the order of the samples (of endless data: where it starts) and of every sampled token."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Evaluate greedily on the validation split before the first step, every so many and after the last; 0 never."""
    save_steps: Annotated[int, Field(ge=0)] = 0
    """Checkpoint every so many steps; 0 only at the end and when stopped."""
    save_total_limit: Positive = 2
    """Checkpoints kept besides the best."""
    logging_steps: Positive = 1
    """Show metrics every so many steps; metrics.jsonl has every one."""
    log_completions_steps: Annotated[int, Field(ge=0)] = 25
    """Print and store sample completions every so many steps; 0 never."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Programs that get a copy of metrics.jsonl (need the extra ``track``)."""
    tracker_samples: Literal["none", "texts", "images"] = "none"
    """What trackers get of logged completions: nothing, the texts, or the texts and the images."""
    tracker_online: bool = False
    """Let trackers send what they get to their servers; false keeps it on this machine."""


class SftConfig(Settings):
    """Supervised fine-tuning; steps, seeds and saving come from train."""

    batch_size: Positive = 32
    """Samples per optimizer step over all ranks."""
    samples_per_micro_batch: Positive = 32
    """At most this many samples share one forward and backward pass."""
    use_reasoning: bool = True
    """Train on reference reasoning and descriptions where the data has them; otherwise on the answer alone."""


class EvalConfig(Settings):
    """Evaluation: greedy answers, and sampled ones where asked."""

    batch_size: Positive = 64
    """Questions answered together."""
    max_samples: Positive | None = None
    """Evaluate on this many samples at most; None takes all."""
    num_samples: Annotated[int, Field(ge=0)] = 0
    """Sample this many answers to each question besides the greedy one, for majority@k and pass@k; 0 samples none."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of the sampled answers."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sampled answers: from the fewest tokens that hold this much probability; 1 keeps all."""
    perplexity_model: str | None = None
    """Language model for perplexity, not the judge that rewards: phantom:lm, folder or Hub id; None measures none."""
    similarity: str | None = None
    """tfidf, or a sentence-transformers model by folder or Hub id; None measures no similarity."""
    fail_on_unscored: Share = 0.05
    """The evaluation fails, its files written, when a larger share of the questions could not be scored."""
    interval: Literal["bca", "percentile"] = "bca"
    """How the 95 % intervals are read off the resampled images: bias-corrected and accelerated, or percentiles."""
    bootstrap: Positive = 2000
    """Resamples of the 95 % intervals."""
    seed: int = 0
    """Seed of the choice of samples, of the sampled answers and of the resampling."""
