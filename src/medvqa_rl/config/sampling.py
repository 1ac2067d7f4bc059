"""Completions and what they are worth: rollouts, rewards, judges. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medvqa_rl.config.base import Positive, Settings, Share

EngineName = Literal["eager", "graph", "vllm"]


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
    """eager, on any device; graph, on a GPU: steps replayed as CUDA graphs; vllm: completions come from vLLM."""


class VllmConfig(Settings):
    """Rollouts on vLLM (rollout.engine vllm), which needs a GPU and the extra ``vllm``; docs/vllm.md says how."""

    mode: Literal["colocate", "server"] = "colocate"
    """colocate: in this process, on the GPU that trains; server: a ``vllm serve`` that was started beside it."""
    server_url: str | None = None
    """Address of that server, such as http://localhost:8000."""
    weights_dir: str | None = None
    """Folder for weights on their way to vLLM, which a server must see too; None is the system's temporary one."""
    timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds that the server may take for the completions of one prompt, or to load weights."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """colocate: share of the GPU's memory that vLLM takes for weights and KV cache."""
    max_model_length: Positive | None = None
    """colocate: tokens of prompt and completion together at most; None takes the model's own limit."""
    sleep: bool = False
    """colocate: give the memory back between rollouts (vLLM's sleep mode); each rollout starts later."""
    importance_sampling_correction: bool = True
    """Weigh each token by how much likelier training finds it than vLLM did (truncated importance sampling)."""
    importance_sampling_clip_max: Annotated[float, Field(ge=1.0)] = 2.0
    """That weight at most."""


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
