"""Settings of rollouts, rewards and judges. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medvqa_rl.config.base import Free, Identity, Positive, Rounding, Settings, Share

Sees = Literal["text", "description", "image"]
EngineName = Literal["eager", "graph", "vllm"]
_WEIGHT = "weight of a reward part"
Weight = Annotated[float, Field(ge=0.0), _WEIGHT]


class RolloutConfig(Settings):
    """How completions are sampled."""

    num_generations: Identity[Positive] = 8
    """G, completions per prompt; training needs at least 2."""
    max_completion_length: Identity[Positive] = 256
    """Maximum number of tokens per completion, including the end-of-sequence token."""
    temperature: Identity[Annotated[float, Field(gt=0.0)]] = 1.0
    """Sampling temperature; the loss uses log-probabilities at the same temperature."""
    top_p: Identity[Annotated[float, Field(gt=0.0, le=1.0)]] = 1.0
    """Top-p (nucleus) sampling; 1 disables it."""
    top_k: Identity[Annotated[int, Field(ge=0)]] = 0
    """Top-k sampling; 0 disables it."""
    max_batch: Rounding[Positive] = 64
    """Prompts decoded at a time; finished ones are replaced by waiting ones. Bounds the KV cache."""
    max_resample_times: Identity[Annotated[int, Field(ge=0, le=100)]] = 0
    """Dynamic sampling (DAPO): attempts to replace groups of equal rewards with other prompts; 0 disables it."""
    engine: Identity[EngineName] = "eager"
    """eager runs on any device, graph decodes with CUDA graphs on a GPU, vllm samples with vLLM."""


class VllmConfig(Settings):
    """Rollouts on vLLM (rollout.engine vllm); needs the extra ``vllm``, see docs/vllm.md."""

    mode: Identity[Literal["colocate", "server"]] = "colocate"
    """colocate runs vLLM in this process on the training GPU; server connects to a running ``vllm serve``."""
    server_url: Free[str | None] = None
    """server: its address, such as http://localhost:8000."""
    weights_dir: Free[str | None] = None
    """Folder for handing weights over, which a server must be able to read; None is the system's temporary folder."""
    timeout: Free[Annotated[float, Field(gt=0.0)]] = 600.0
    """server: timeout in seconds for the completions of one prompt, or for loading weights."""
    gpu_memory_utilization: Rounding[Annotated[float, Field(gt=0.0, le=1.0)]] = 0.3
    """colocate: share of GPU memory for vLLM's weights and KV cache."""
    max_model_length: Identity[Positive | None] = None
    """colocate: maximum number of tokens of prompt and completion; None uses the model's limit."""
    sleep: Free[bool] = False
    """colocate: release memory between rollouts (vLLM's sleep mode); each rollout starts later."""
    importance_sampling_correction: Identity[bool] = True
    """Weight each token by its truncated importance ratio between training and vLLM."""
    importance_sampling_clip_max: Identity[Annotated[float, Field(ge=1.0)]] = 2.0
    """Upper bound of that weight."""
    max_logp_difference: Free[Annotated[float, Field(gt=0.0)]] = 0.5
    """Stop if the log-probabilities of training and vLLM differ by more nats per token in the mean of a step."""


class RewardsConfig(Settings):
    """Weights and parameters of the reward parts; a part with weight 0 is off."""

    format: Identity[Weight] = 1.0
    """Format reward: 1 if the completion has exactly the requested format, else 0."""
    correctness: Identity[Weight] = 1.0
    """Correctness reward: 1 if the answer is correct, else 0; open_correctness can give partial credit."""
    semantic: Identity[Weight] = 0.0
    """Medical semantic reward: 1 if the judge finds the reasoning clinically coherent, else 0."""
    reasoning: Identity[Weight] = 0.0
    """Reasoning-aware reward: the judge's grade of the reasoning on a rubric from 0 to 3, divided by 3."""
    reasoning_gate: Identity[Share] = 0.5
    """reasoning: maximum reward for a wrong answer; 1 sets no limit."""
    open_correctness: Identity[Literal["exact", "token_f1", "similarity", "judge"] | None] = None
    """How open-ended answers are scored; null is exact, and an error if all training questions are open."""
    similarity_model: Identity[Annotated[str, Field(min_length=1)]] = "tfidf"
    """open_correctness similarity: tfidf (words only), or a sentence-transformers model (folder or Hub id)."""
    similarity_threshold: Identity[Annotated[float, Field(gt=0.0, le=1.0)]] = 0.8
    """open_correctness similarity: minimum similarity to the gold answer that counts as correct."""
    process: Identity[Weight] = 0.0
    """Process reward: the judge's verdict on each step of the reasoning, in the advantages of the step's tokens."""
    process_discount: Identity[Annotated[float, Field(gt=0.0, le=1.0)]] = 0.8
    """process: weight of a step relative to the one before; below 1, earlier invalid steps cost more."""
    ecr: Identity[Weight] = 0.0
    """Extended chain reward: reasoning tokens / length_target, at most 1."""
    cwr: Identity[Weight] = 0.0
    """Correctness-weighted length reward: as ecr if the answer is correct, else 0."""
    composite: Identity[Weight] = 0.0
    """Composite length reward: for a correct answer and coherent reasoning, longer with more distinct statements."""
    looking: Identity[Weight] = 0.0
    """Looking reward: for a correct answer, how much likelier the policy finds it with the image than with another."""
    looking_of: Identity[Literal["completion", "answer"]] = "completion"
    """looking: what is likelier: reasoning and answer, or the answer alone, given its reasoning."""
    looking_against: Identity[Literal["blank", "shuffled"]] = "blank"
    """looking: the other image: grey, or that of another training question."""
    looking_threshold: Identity[Annotated[float, Field(ge=0.0)]] = 1.0
    """looking: gain in nats at or below which the reward is 0."""
    looking_cap: Identity[Annotated[float, Field(gt=0.0)]] = 20.0
    """looking: nats at which the reward reaches 1."""
    calibration: Identity[Weight] = 0.0
    """Calibration reward: 1 - (p - correct)^2, with p the policy's probability of its answer given its reasoning."""
    cosine: Identity[Weight] = 0.0
    """Cosine length reward: interpolates cosine_correct or cosine_wrong by completion length."""
    overlong: Identity[Weight] = 0.0
    """Soft overlong punishment (DAPO): 0, falling to -1 over the last tokens before the limit."""
    repetition: Identity[Weight] = 0.0
    """Repetition penalty: minus the share of word n-grams that repeat an earlier one."""
    length_target: Identity[Positive] = 128
    """ecr, cwr and composite: number of reasoning tokens at which the reward reaches its maximum."""
    statements_target: Identity[Positive] = 6
    """composite: number of distinct statements at which the reward reaches its maximum."""
    cosine_correct: Identity[tuple[float, float]] = (1.0, 0.5)
    """cosine: reward of a correct answer at length 0 and at the token limit."""
    cosine_wrong: Identity[tuple[float, float]] = (-1.0, -0.5)
    """cosine: reward of a wrong answer at length 0 and at the token limit."""
    cosine_exceeded: Identity[float] = -1.0
    """cosine: reward of a truncated completion."""
    overlong_buffer: Identity[Annotated[float, Field(gt=0.0, le=1.0)]] = 0.2
    """overlong: share of rollout.max_completion_length over which it falls; DAPO uses 4096 of 20480."""
    repetition_ngram: Identity[Positive] = 3
    """repetition: words per n-gram."""
    functions: Identity[dict[str, float]] = Field(default_factory=dict)
    """Custom reward functions: dotted path of a function with TRL's signature, and its weight."""
    max_unscored: Free[Share] = 0.2
    """Fail if a larger share of a step's completions could not be scored."""

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the built-in parts by name."""
        names = [name for name, field in type(self).model_fields.items() if _WEIGHT in field.metadata]
        return {name: getattr(self, name) for name in names}

    @property
    def judged(self) -> dict[str, float]:
        """Weights above 0 of the parts that a judge scores, by name."""
        names = {"semantic", "reasoning", "process", "composite"}
        names |= {"correctness"} if self.open_correctness == "judge" else set()
        return {name: weight for name, weight in self.weights.items() if name in names and weight > 0}


class JudgeConfig(Settings):
    """A language model that judges reasoning with Yes or No, or grades it."""

    model: Identity[str] = "phantom:judge"
    """``phantom:judge``, ``judge_eval`` or ``judge_sees`` (embedded), a folder, a Hub id, or an endpoint's model."""
    revision: Identity[str | None] = None
    """Commit or tag on the Hub; None uses the latest."""
    template: Identity[Literal["auto", "biogpt", "biomistral", "chat", "phantom"]] = "auto"
    """Prompt format: biogpt is plain text, biomistral Mistral's instruction format, chat the model's chat template."""
    sees: Identity[Sees] = "text"
    """What a judge of reasoning is shown besides: nothing, the data set's description of the image, or the image."""
    max_pixels: Identity[Positive] = 401408
    """sees image: larger images are shrunk to this many pixels."""
    strictness: Identity[float] = 0.0
    """Margin in nats by which log P("Yes") must exceed log P("No"); 0 is the paper's rule; endpoints require 0."""
    device: Rounding[str] = "auto"
    """auto, cpu, cuda, or a separate GPU such as cuda:1."""
    dtype: Identity[Literal["auto", "float32", "bfloat16"]] = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    batch_size: Rounding[Positive] = 64
    """Prompts per batch."""
    endpoint: Identity[str | None] = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1; the judged texts are sent there."""
    api_key_env: Free[str | None] = None
    """Environment variable that holds the endpoint's API key; None sends no key."""
    timeout: Free[Annotated[float, Field(gt=0.0)]] = 60.0
    """Time limit of a whole request in seconds."""
    max_retries: Free[Annotated[int, Field(ge=0)]] = 5
    """Retries after throttling, timeouts and server errors."""
    concurrency: Free[Positive] = 8
    """Maximum number of concurrent requests."""
    cache: Rounding[bool] = True
    """Cache verdicts on disk by a hash of judge and text."""
    cache_dir: Free[str | None] = None
    """Folder of the verdict cache; None is medvqa-rl in the user's cache folder."""
