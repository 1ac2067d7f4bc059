"""Settings: frozen models of everything a run can be told. Imports no torch.

Names follow TRL's ``GRPOConfig`` where it has one. Every field has a default that is safe on a laptop; the files
in ``configs/`` hold the papers' values.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medvqa_rl.prompts import INSTRUCTIONS, Template

Purpose = Literal["train", "sft", "eval"]
"""What a configuration is about to be used for: some combinations are wrong for one verb only."""

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Settings(BaseModel):
    """Base of all sections: frozen, unknown keys refused, the string under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class LoraConfig(Settings):
    """Low-rank adapters (PEFT) on the language model."""

    rank: Positive = 16
    """Rank of the two factors; more can learn more and costs more."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before the adapter while training."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers of the language model that get an adapter."""


class ModelConfig(Settings):
    """Which model is trained and which of its parts."""

    path: str = "phantom:instruct"
    """A local folder, a Hugging Face Hub id, or the embedded ``phantom:base`` / ``phantom:instruct``."""
    revision: str | None = None
    """Commit or tag on the Hub; None takes the newest."""
    adapter: str | None = None
    """Folder of a trained LoRA adapter to put on top of path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    lora: LoraConfig | None = None
    """None trains all weights of the language model."""
    train_vision: bool = False
    """Train the vision tower (its blocks and patch embedding)."""
    train_projector: bool = False
    """Train the projector (the merger between vision tower and language model)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    min_pixels: Positive | None = None
    """Images are enlarged to at least this area in pixels; None keeps the checkpoint's setting."""
    max_pixels: Positive | None = None
    """Images are shrunk to at most this area in pixels; one image token covers 28 x 28 of them."""


DataName = Literal[
    "phantom",
    "vqa_rad",
    "vqa_rad_hub",
    "pmc_vqa",
    "slake_en",
    "slake_zh",
    "path_vqa",
    "vqa_med",
    "omnimed",
    "own",
]


class DataConfig(Settings):
    """Which questions are asked."""

    name: DataName = "phantom"
    """phantom is drawn by this package, without a download; own is your own table; docs/data.md has all others."""
    path: str | None = None
    """Folder of a data set on disk; the phantom world needs none."""
    hub: str | None = None
    """Repository of the data set on the Hugging Face Hub (owner/name), in place of path."""
    revision: str | None = None
    """Commit of that repository, 40 hexadecimal digits."""
    image_folder: str | None = None
    """Folder of the images below path; None finds the usual ones."""
    variant: Literal["v1", "v1_clean", "v2"] = "v1"
    """PMC-VQA: train.csv with test.csv, train.csv with test_clean.csv, or train_2.csv with test_2.csv."""
    split: Literal["official", "image"] = "official"
    """The owners' split, or one by image that this package makes (no image in two splits)."""
    scanner: Literal["home", "unseen", "worn"] = "home"
    """Phantom world: the scanner that takes the images; the checkpoints were trained on ``home``."""
    answer_types: tuple[Literal["choice", "closed", "open"], ...] = ("choice", "closed", "open")
    """Kinds of questions to keep."""
    families: tuple[str, ...] = ()
    """Question families to keep; empty keeps all."""
    modalities: tuple[str, ...] = ()
    """Phantom world: modalities to keep; empty keeps all."""
    letter_skew: Share = 0.0
    """Phantom world: share of choice questions whose answer is moved to B or C, as in PMC-VQA."""
    num_train: Positive | None = None
    """Keep this many training samples (a seeded choice); None takes all."""
    num_val: Positive | None = 200
    """Keep this many validation samples."""
    num_test: Positive | None = None
    """Keep this many test samples."""
    seed: int = 0
    """Seed of the choice of samples and of the split by image."""
    max_dropped: Share = 0.05
    """Loading stops when a larger share of the rows is unusable."""
    cache_dir: str | None = None
    """Folder for indexes of large tables and unpacked images; None is medvqa-rl in the user's cache folder."""


class PrefetchConfig(Settings):
    """Prompts prepared ahead (images decoded, resized and cut into patches) while the model computes: the same
    results, sooner. For training, supervised fine-tuning and evaluation."""

    workers: Annotated[int, Field(ge=0)] = 1
    """Threads that prepare the prompts of the next step or batch; 0 prepares each when it is needed."""
    max_mib: Positive = 512
    """MiB that prompts may take which wait or are being prepared, per process; a single one may always go ahead."""


Weight = Annotated[float, Field(ge=0.0)]


class MixConfig(Settings):
    """Training asks each question by one of these, drawn by weight (diversity prompting, arXiv 2506.06600). Where
    none of them fits it, and with all weights 0, it asks by prompt.template. Evaluations always do."""

    think_answer: Weight = 0.0
    """Weight of the prompt that asks for reasoning and answer in tags."""
    direct: Weight = 0.0
    """Weight of the prompt that asks for the answer alone, without tags."""
    explain: Weight = 0.0
    """Weight of the prompt that asks to explain step by step, then to answer."""
    short: Weight = 0.0
    """Weight of the prompt that asks for a few words in the answer's tags, without reasoning."""
    open_ended: Weight = 0.0
    """Weight of the prompt without options: for open and closed questions, and choice questions that make sense so."""
    choice: Weight = 0.0
    """Weight of the prompt that asks to compare the options; for choice questions."""
    describe_think: Weight = 0.0
    """Weight of the prompt that asks to describe the image first, in tags of its own, then to think and answer."""

    @property
    def weights(self) -> dict[Template, float]:
        """The templates with a weight above 0."""
        return {template: weight for template in INSTRUCTIONS if (weight := float(getattr(self, template))) > 0}

    @property
    def is_on(self) -> bool:
        return bool(self.weights)


class PromptConfig(Settings):
    """How questions are asked."""

    template: Template = "think_answer"
    """think_answer asks for reasoning and answer in tags, direct for the answer alone; docs/method.md has all."""
    mix: MixConfig = Field(default_factory=MixConfig)
    """Several prompts in training, drawn by weight; see below."""

    @property
    def templates(self) -> tuple[Template, ...]:
        """Those that training asks by; with a mix, questions that none of them fits are asked by ``template``."""
        return tuple(self.mix.weights) or (self.template,)


EngineName = Literal["eager", "graph"]
TrainEngine = Literal["ddp", "zero2", "zero3", "fsdp2"]


class RolloutConfig(Settings):
    """How completions are sampled."""

    num_generations: Positive = 8
    """G, completions per prompt; training needs 2 or more."""
    max_completion_length: Positive = 256
    """Tokens per completion, the end-of-sequence token included."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Logits are divided by it, when sampling and in the loss."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the fewest tokens that hold this much probability; 1 keeps all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many of the likeliest tokens; 0 keeps all."""
    max_batch: Positive = 64
    """Prompts completed at a time; where completions end, waiting prompts take their room. Bounds the KV cache."""
    max_resample_times: Annotated[int, Field(ge=0, le=100)] = 0
    """DAPO's dynamic sampling: attempts to replace groups of equal rewards by those of other prompts; 0 keeps them."""
    engine: EngineName = "eager"
    """eager, on any device; or graph, on a GPU: steps replayed as CUDA graphs, the KV cache stays allocated."""


class RewardsConfig(Settings):
    """Weights of the reward parts and what they need; a part with weight 0 is off."""

    format: Annotated[float, Field(ge=0.0)] = 1.0
    """1 where the completion has exactly the requested form, else 0."""
    correctness: Annotated[float, Field(ge=0.0)] = 1.0
    """1 where the answer is right, else 0, or what open_correctness gives it."""
    semantic: Annotated[float, Field(ge=0.0)] = 0.0
    """Medical semantic reward: 1 where the judge says that the reasoning is clinically coherent, else 0."""
    reasoning: Annotated[float, Field(ge=0.0)] = 0.0
    """Reasoning-aware reward: the judge's grade of the reasoning on a rubric from 0 to 3, divided by 3."""
    reasoning_gate: Share = 0.5
    """reasoning: the most of it that a wrong answer can get; 0 gives it none, 1 does not limit it."""
    open_correctness: Literal["exact", "token_f1", "similarity", "judge"] | None = None
    """How open questions get correctness; null is exact, and refused where all training questions are open."""
    similarity_model: Annotated[str, Field(min_length=1)] = "tfidf"
    """open_correctness similarity: tfidf (words alone), or a sentence-transformers model by folder or Hub id."""
    similarity_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """open_correctness similarity: answers at least as similar to the gold answer are right."""
    ecr: Annotated[float, Field(ge=0.0)] = 0.0
    """Extended chain reward: tokens of the reasoning over length_target, at most 1."""
    cwr: Annotated[float, Field(ge=0.0)] = 0.0
    """Correctness-weighted length reward: the same where the answer is right, else 0."""
    cosine: Annotated[float, Field(ge=0.0)] = 0.0
    """Cosine length reward: between the values of cosine_correct or cosine_wrong by the completion's length."""
    overlong: Annotated[float, Field(ge=0.0)] = 0.0
    """Soft overlong punishment (DAPO): 0, falling to -1 over the last tokens before the limit."""
    repetition: Annotated[float, Field(ge=0.0)] = 0.0
    """Repetition penalty: minus the share of n-grams of words that occurred before in the completion."""
    length_target: Positive = 128
    """ecr and cwr: tokens of reasoning beyond which the reward does not grow."""
    cosine_correct: tuple[float, float] = (1.0, 0.5)
    """cosine: reward of a right answer at length 0 and at the token limit."""
    cosine_wrong: tuple[float, float] = (-1.0, -0.5)
    """cosine: reward of a wrong answer at length 0 and at the token limit."""
    cosine_exceeded: float = -1.0
    """cosine: reward of a completion that the token limit cut off."""
    overlong_buffer: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """overlong: the share of rollout.max_completion_length over which it falls; DAPO has 4096 of 20480."""
    repetition_ngram: Positive = 3
    """repetition: words of an n-gram."""
    functions: dict[str, float] = Field(default_factory=dict)
    """Your own rewards: dotted path of a function with TRL's signature -> weight."""
    max_unscored: Share = 0.2
    """The run stops when a larger share of a step's completions could not be scored."""


class JudgeConfig(Settings):
    """A language model that says Yes or No to reasoning, or grades it."""

    model: str = "phantom:judge"
    """``phantom:judge`` or ``phantom:judge_eval`` (embedded), a local folder, a Hub id, or an endpoint's model."""
    revision: str | None = None
    """Commit or tag on the Hub; None takes the newest."""
    template: Literal["auto", "biogpt", "biomistral", "chat", "phantom"] = "auto"
    """The prompt: text to continue, Mistral's instruction format, the model's chat template, or reasoning alone."""
    strictness: float = 0.0
    """Nats by which log P("Yes") must exceed log P("No"); 0 is the paper's rule. An endpoint allows 0 only."""
    device: str = "auto"
    """auto, cpu, cuda, or a GPU of its own such as cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    batch_size: Positive = 64
    """Prompts read together."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1: what is judged goes there."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the endpoint's key; None sends none."""
    timeout: Annotated[float, Field(gt=0.0)] = 60.0
    """Seconds that an endpoint may take for one answer."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """Repetitions of a request that was throttled, timed out or failed on the server."""
    concurrency: Positive = 8
    """Requests under way at the same time."""
    cache: bool = True
    """Keep verdicts on disk, by hash of judge and text, so that no text is judged twice."""
    cache_dir: str | None = None
    """Folder of the kept verdicts; None is medvqa-rl in the user's cache folder."""


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
    """Train on the data set's reference reasoning where it has one; otherwise the answer alone is the target."""


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
    """SHA-256 of the canonical JSON of a configuration: equal exactly when every setting is equal."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
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
    folders += ["rewards.similarity_model"]
    folders += [f"{name}.{key}" for name in ("judge", "eval_judge") for key in ("model", "cache_dir")]
    cut = {name: Path(found[name]).name for name in folders if found.get(name) and not is_hub_id(found[name])}
    return found | cut


def differences(before: Config, after: Config) -> list[str]:
    """Dotted paths of the settings in which two configurations differ, sorted."""
    old, new = (leaves(config.model_dump(mode="json")) for config in (before, after))
    paths = {path for path in old.keys() | new.keys() if (path in old, old.get(path)) != (path in new, new.get(path))}
    # A section that is null on one side is one difference, not one for each of its settings.
    return sorted(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))
