"""Settings of advantages, losses, the optimizer, the training loop, SFT and evaluation. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medvqa_rl.config.base import Decay, Free, Identity, Later, Positive, Rounding, Settings, Share

TrainEngine = Literal["ddp", "zero2", "zero3", "fsdp2"]


class AdvantageConfig(Settings):
    """How the rewards of a group become advantages."""

    baseline: Identity[Literal["group", "leave_one_out"]] = "group"
    """What is subtracted: the group's mean, or the mean of its other completions (RLOO)."""
    scale: Identity[Literal["group", "none", "batch", "whiten"]] = "group"
    """Standard deviation to divide by: the group's, none, of the step's rewards (batch) or its advantages (whiten)."""


class LossConfig(Settings):
    """The policy loss."""

    type: Identity[Literal["grpo", "dr_grpo", "dapo", "cispo", "sapo", "dpo"]] = "grpo"
    """The loss, and how token losses are averaged (TRL: loss_type); dpo is online DPO on a group's best and worst."""
    importance_sampling_level: Identity[Literal["token", "sequence"]] = "token"
    """Probability ratio of each token, or one per completion (GSPO)."""
    beta: Identity[Annotated[float, Field(ge=0.0)]] = 0.04
    """KL coefficient; with dpo, the beta of DPO, for which TRL's default is 0.1."""
    epsilon: Identity[Annotated[float, Field(gt=0.0, lt=1.0)]] = 0.2
    """Clipping range of the probability ratio."""
    epsilon_high: Identity[Annotated[float, Field(gt=0.0)] | None] = None
    """Upper clipping range; None uses epsilon. With cispo, the largest weight; None uses 5."""
    sapo_temperature_pos: Identity[Annotated[float, Field(gt=0.0)]] = 1.0
    """sapo: how fast the gate closes for tokens with a positive advantage."""
    sapo_temperature_neg: Identity[Annotated[float, Field(gt=0.0)]] = 1.05
    """sapo: the same for the other tokens."""
    entropy_coef: Identity[Annotated[float, Field(ge=0.0)]] = 0.0
    """Weight of the mean entropy per token, which is subtracted from the loss."""
    top_entropy_quantile: Identity[Annotated[float, Field(gt=0.0, le=1.0)]] = 1.0
    """Share of the step's tokens, those of highest entropy, that the policy loss learns from; 1 takes all."""
    num_iterations: Identity[Positive] = 1
    """Optimizer steps per rollout, each on all of its completions."""
    mask_truncated_completions: Identity[bool] = False
    """Mask completions that hit the token limit out of the loss."""


class OptimizerConfig(Settings):
    """AdamW and its schedule."""

    learning_rate: Identity[Annotated[float, Field(gt=0.0, le=1.0)]] = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: Identity[Literal["constant", "linear", "cosine"]] = "constant"
    """Schedule after the warmup."""
    min_lr_ratio: Identity[Share] = 0.0
    """Final learning rate as a share of the peak; ignored by the constant schedule."""
    warmup_steps: Identity[Annotated[int, Field(ge=0)]] = 0
    """Steps of linear warmup from zero."""
    betas: Identity[tuple[Decay, Decay]] = (0.9, 0.999)
    """Adam's betas."""
    epsilon: Identity[Annotated[float, Field(gt=0.0)]] = 1e-8
    """Adam's epsilon."""
    weight_decay: Identity[Annotated[float, Field(ge=0.0)]] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Identity[Annotated[float, Field(gt=0.0)] | None] = 1.0
    """Gradient clipping norm; None disables clipping."""


class TrainConfig(Settings):
    """The training loop."""

    steps: Later[Positive] = 300
    """Training steps; each is one rollout and the updates from it."""
    prompts_per_step: Identity[Positive] = 8
    """P, prompts per step over all ranks (TRL: batch size x gradient accumulation x ranks / G)."""
    prompts_per_micro_batch: Rounding[Positive] = 8
    """Maximum number of groups per forward and backward pass; changes memory and speed, not the gradient."""
    max_tokens_per_micro_batch: Rounding[Positive | None] = None
    """Maximum number of tokens per forward and backward pass, in whole groups sorted by length; None sets no limit."""
    self_check: Free[bool] = True
    """Before the first update, check the shared-prefix forward against the plain one; fail if they differ."""
    engine: Rounding[Literal["auto", "ddp", "zero2", "zero3", "fsdp2"]] = "auto"
    """Distributed engine; auto uses the launcher's, any other value fails under a different launcher setting."""
    rank_timeout: Free[Annotated[float, Field(gt=0.0)]] = 1800.0
    """Seconds without progress after which a distributed run fails; 60 if a rank has died."""
    seed: Identity[int] = 0
    """Seed for the order of samples and for every sampled token."""
    eval_steps: Identity[Annotated[int, Field(ge=0)]] = 0
    """Evaluate greedily on the validation split before training, every N steps and at the end; 0 disables it."""
    save_steps: Free[Annotated[int, Field(ge=0)]] = 0
    """Save a checkpoint every N steps; 0 saves only at the end and when interrupted."""
    save_total_limit: Free[Positive] = 2
    """Maximum number of checkpoints, not counting the best one."""
    logging_steps: Free[Positive] = 1
    """Print metrics every N steps; metrics.jsonl always has every step."""
    log_completions_steps: Free[Annotated[int, Field(ge=0)]] = 25
    """Print and save sample completions every N steps; 0 disables it."""
    trackers: Free[tuple[Literal["tensorboard", "wandb", "trackio"], ...]] = ()
    """Experiment trackers that receive the metrics (need the extra ``track``)."""
    tracker_samples: Free[Literal["none", "texts", "images"]] = "none"
    """What trackers receive of logged completions: nothing, texts, or texts and images."""
    tracker_online: Free[bool] = False
    """Allow trackers to upload to their servers; false keeps everything on this machine."""


class SftConfig(Settings):
    """Supervised fine-tuning (SFT); steps, seed and saving come from train."""

    batch_size: Identity[Positive] = 32
    """Samples per optimizer step over all ranks."""
    samples_per_micro_batch: Rounding[Positive] = 32
    """Maximum number of samples per forward and backward pass."""
    use_reasoning: Identity[bool] = True
    """Train on reference reasoning and descriptions where the data has them, else on the answer only."""


class EvalConfig(Settings):
    """Evaluation: greedy answers, and optionally sampled ones."""

    batch_size: Rounding[Positive] = 64
    """Questions per batch."""
    max_samples: Identity[Positive | None] = None
    """Maximum number of questions; None uses all."""
    num_samples: Identity[Annotated[int, Field(ge=0)]] = 0
    """Sampled answers per question besides the greedy one, for majority@k and pass@k."""
    temperature: Identity[Annotated[float, Field(gt=0.0)]] = 1.0
    """Temperature of sampled answers."""
    top_p: Identity[Annotated[float, Field(gt=0.0, le=1.0)]] = 1.0
    """Top-p (nucleus) of sampled answers; 1 disables it."""
    perplexity_model: Identity[str | None] = None
    """Language model for perplexity, not the reward judge: phantom:lm, a folder or a Hub id; None disables it."""
    similarity: Identity[str | None] = None
    """Answer similarity: tfidf, or a sentence-transformers model (folder or Hub id); None disables it."""
    fail_on_unscored: Free[Share] = 0.05
    """Fail, after writing the results, if a larger share of the questions could not be scored."""
    interval: Identity[Literal["bca", "percentile"]] = "bca"
    """Bootstrap method of the 95 % intervals: bias-corrected and accelerated, or percentile."""
    bootstrap: Identity[Positive] = 2000
    """Bootstrap resamples of the 95 % intervals."""
    seed: Identity[int] = 0
    """Seed for the choice of questions, the sampled answers and the bootstrap."""
