"""Toy runs that take a fraction of a second: a data set in memory, a reward with variance, a tiny random model.

As a script it is the process that tests kill, interrupt and start twice: ``python toy.py MODE CONFIG_JSON``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from medvqa_rl.config import Config
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.learning.batching.feed import make_feed
from medvqa_rl.learning.collector import roll_out
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.objective.advantages import group_advantages
from medvqa_rl.learning.run import checkpoint
from medvqa_rl.learning.setup import Setup, make_accelerator, make_reference, set_up, wrap
from medvqa_rl.learning.sft import train_sft
from medvqa_rl.learning.update import Learner
from medvqa_rl.rewards import Rewards


@dataclass(frozen=True)
class ToyImage:
    """A gradient whose direction depends on the seed."""

    seed: int

    @property
    def key(self) -> str:
        return f"image-{self.seed}"

    def load(self) -> Image.Image:
        y, x = np.mgrid[0:56, 0:56]
        phase = x * (1 + self.seed % 3) * 4 + y * (1 + self.seed % 5) * 3 + 37 * self.seed
        return Image.fromarray(
            (np.stack([phase, phase // 2 + 80, 255 - phase], axis=-1) % 256).astype(np.uint8), "RGB"
        )

    def header_pixels(self) -> None:
        return None


@dataclass(frozen=True)
class ToyData:
    """Choice questions with reference reasoning; every other prompt is longer."""

    length: int = 5
    is_endless: bool = False
    name: str = "toy"
    fingerprint: str = "toy-1"

    @property
    def notes(self) -> dict[str, int]:
        return {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return Sample(
            id=f"toy-{index}",
            question="Is there an effusion?" if index % 2 else "Which organ is seen in this chest X-ray image?",
            answer="AB"[index % 2],
            answer_type="choice",
            images=(ToyImage(index),),
            options=("left lung", "right lung"),
            reasoning="The chest X-ray shows an opacity.",
        )


def vowels(
    prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, **kwargs: Any
) -> list[float | None]:
    """Share of vowels. TOY_DEATH=reward:N kills the process in step N, TOY_STOP=N asks it to stop there."""
    step = trainer_state.global_step
    if os.environ.get("TOY_DEATH") == f"reward:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TOY_STOP") == str(step):
        os.kill(os.getpid(), signal.SIGTERM)
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text.lower()) / max(1, len(text)) for text in texts]


def toy_config(folder: Path, output: Path, **changes: Any) -> Config:
    """Four prompts a step in two micro-batches, four completions each; ``section={...}`` changes settings."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder), "device": "cpu", "train_projector": True},
        "rollout": {"num_generations": 4, "max_completion_length": 10},
        "rewards": {"format": 0.0, "correctness": 0.0, "functions": {"toy.vowels": 1.0}},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.01},
        "train": {"steps": 6, "prompts_per_step": 4, "prompts_per_micro_batch": 2, "log_completions_steps": 2},
        "sft": {"batch_size": 4, "samples_per_micro_batch": 2},
        "eval": {"bootstrap": 20},
    }
    for section, change in changes.items():
        settings[section] = settings.get(section, {}) | change
    return Config.model_validate({"output_dir": str(output), **settings})


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "time" not in name} for line in lines]


def checkpoint_bytes(run: Path, step: int) -> list[bytes]:
    """The content of a checkpoint's safetensors files: weights and optimizer state."""
    files = sorted((run / "checkpoints" / f"step_{step:06d}").rglob("*.safetensors"))
    assert files
    return [path.read_bytes() for path in files]


def make_group(prompt: int, lengths: list[int], name: str = "x") -> Group:
    """A group with a prompt of this many tokens and completions of these lengths."""
    sample = Sample(id=name, question="?", answer="yes", answer_type="closed", images=())
    ids = np.zeros(prompt, dtype=np.int64)
    completions = [Completion((1,) * length, "", False) for length in lengths]
    return Group(sample, EncodedPrompt(ids, {}, ""), completions)


def odd_vowels(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    """Share of vowels where an effusion is asked for, else 0: every other question has no signal."""
    texts = [completion[0]["content"].lower() for completion in completions]
    return [
        sum(letter in "aeiou" for letter in text) / max(1, len(text)) * ("effusion" in str(prompt))
        for prompt, text in zip(prompts, texts)
    ]


def first_groups(config: Config, accelerator: Accelerator, setup: Setup) -> list[Group]:
    """This rank's groups of the first step."""
    with make_feed(config, accelerator, setup, range(1), config.train.prompts_per_step) as feed:
        return roll_out(config, setup, 0, feed.prompts(0))


def gradients(config: Config) -> dict[str, torch.Tensor]:
    """The gradient of the first step on this rank's groups, by parameter; all ranks get the same."""
    accelerator = make_accelerator(config, config.train.prompts_per_step)
    setup = set_up(config, ToyData(), None)
    reference = make_reference(config, setup.policy)
    trained = wrap(config, accelerator, setup.policy)
    learner = Learner(config, accelerator, setup.policy, reference, trained)
    groups = first_groups(config, accelerator, setup)
    total = torch.from_numpy(Rewards(config.rewards).score(groups, step=0).total)
    if accelerator.is_main_process:
        total[0, 0] = torch.nan  # one unscored completion, so that the ranks' own counts differ
    experience = learner.prepare(groups, group_advantages(total, scale="group"), ~total.isnan())
    setup.policy.model.train()
    metrics, _ = learner.accumulate(experience)
    found = {name: p.grad.clone() for name, p in trained.parameters.items() if p.grad is not None}
    return found | {f"metric/{name}": torch.tensor(value) for name, value in metrics.items()}


def main(mode: str, path: str) -> None:
    config = Config.model_validate_json(Path(path).read_text())
    if os.environ.get("TOY_DEATH", "").startswith("save:"):
        step, write = int(os.environ["TOY_DEATH"].removeprefix("save:")), checkpoint.save_file

        def die(tensors: dict[str, torch.Tensor], file: Path) -> None:
            if f"step_{step:06d}" in str(file):
                file.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            write(tensors, file)

        checkpoint.save_file = die
    if mode == "train":
        train(config, train_set=ToyData(), val_set=ToyData(3))
    elif mode == "resume":
        train(config, train_set=ToyData(), val_set=ToyData(3), resume=True)
    elif mode == "sft":
        train_sft(config, train_set=ToyData(), val_set=ToyData(3))
    elif mode == "ranks":
        torch.save(gradients(config), f"{config.output_dir}.rank{os.environ['RANK']}.pt")
        train(config, train_set=ToyData())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
