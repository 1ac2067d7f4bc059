"""What a run starts from: the model, the questions, and how they are asked. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medvqa_rl.config.base import Positive, Settings, Share
from medvqa_rl.core.prompts import INSTRUCTIONS
from medvqa_rl.core.types import Template


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
    load_in_4bit: bool = False
    """Keep the linear layers of the language model in 4 bits (NF4, as in QLoRA) below an adapter, for less memory."""
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
