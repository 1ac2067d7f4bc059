"""The second stage of the recipe: the language model learns that a letter names the option behind it. Text only.

Sequences are a list of lettered options among random tokens, then some of the options, whose letters are predicted.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from medvqa_rl.config import OptimizerConfig
from medvqa_rl.core.randomness import address
from medvqa_rl.core.types import LETTERS
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, COUNTS, LEVELS, MODALITIES, SIDES, SIZES
from medvqa_rl.learning.objective.optimizer import Optimizer
from medvqa_rl.models.families import shared_family_of
from medvqa_rl.models.families.parts import Embedded
from medvqa_rl.models.loading import Policy
from medvqa_rl.phantom.training import Log, load_state, save_state

WORDS = tuple(dict.fromkeys((*MODALITIES, *ALL_ORGANS, *ALL_KINDS, *SIDES, *LEVELS, *SIZES, *COUNTS, "equal")))
MAX_DISTANCE = 60
"""Maximum number of random tokens between the options and their queries at the end of the binding stage."""
CHECK_STEPS = 25
"""Steps between checks of the accuracy, and over which it is averaged."""


class Binding:
    """Endless token sequences that train the binding of options to their letters."""

    def __init__(self, policy: Policy, seed: int) -> None:
        tokenizer = policy.processor.tokenizer

        def token(text: str) -> int:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == 1, f"{text!r} is {len(ids)} tokens"
            return int(ids[0])

        self.generator = torch.Generator().manual_seed(address("phantom binding", seed) >> 1)
        self._words = torch.tensor([token(f" {word}") for word in WORDS])
        self._any = torch.arange(tokenizer.vocab_size)
        self._line, self._colon, self._stop = token("\n"), token(":"), token(".")
        self._before = torch.tensor([token(letter) for letter in LETTERS[:8]])
        self._after = torch.tensor([token(f" {letter}") for letter in LETTERS[:8]])

    def draw(self, count: int, options: int, distance: int, *, use_words: bool) -> tuple[Tensor, Tensor]:
        """Sequences of noise, a list of options ("\\nA: cyst"), noise, and six queries (" cyst" -> " A").

        Args:
            count: number of sequences.
            options: number of options in a list.
            distance: maximum number of noise tokens between the list and the queries.
            use_words: take options from the words of the phantom world rather than from all tokens.

        Returns:
            (count, T) token ids, and (6,) positions of the letters to predict.
        """
        queries = 6
        generator, pool = self.generator, self._words if use_words else self._any

        def noise(limit: int) -> Tensor:
            length = int(torch.randint(0, limit + 1, (1,), generator=generator))
            return torch.randint(0, len(self._any), (count, length), generator=generator)

        def column(token: int, width: int) -> Tensor:
            return torch.full((count, width), token)

        named = pool[torch.rand(count, len(pool), generator=generator).argsort(dim=1)[:, :options]]
        letters = self._before[:options].expand(count, -1)
        listed = torch.stack([column(self._line, options), letters, column(self._colon, options), named], dim=-1)
        asked = torch.randint(options, (count, queries), generator=generator)
        answers = self._after[asked]
        questions = torch.stack([named.gather(1, asked), answers, column(self._stop, queries)], dim=-1)
        ids = torch.cat([noise(distance * 2 // 3), listed.flatten(1), noise(distance), questions.flatten(1)], dim=1)
        return ids, ids.shape[1] - 3 * queries + 1 + 3 * torch.arange(queries)

    def loss(self, model: nn.Module, ids: Tensor, positions: Tensor) -> tuple[Tensor, float]:
        """Cross-entropy of the letters, and the share predicted correctly."""
        family = shared_family_of(model)
        position_ids = torch.arange(ids.shape[1]).expand(family.num_axes, len(ids), -1)
        embedded = Embedded(family.text(model).embed_tokens(ids), {})
        hidden = family.hidden_states(model, embedded, position_ids, use_cache=False)
        logits = family.logits(model, hidden[:, positions - 1]).flatten(0, 1)
        targets = ids[:, positions].flatten()
        return functional.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean().item()


def learn_binding(
    policy: Policy,
    seed: int,
    log: Log,
    *,
    rate: float,
    max_steps: int = 3000,
    kept: Path | None = None,
) -> None:
    """Train until 95 % of the letters are predicted correctly at the maximum distance.

    The distance grows from 0 each time this share is reached.

    Args:
        rate: learning rate after 50 steps of warmup.
        max_steps: number of steps after which it is given up.
        kept: file that holds the state after every :data:`CHECK_STEPS` steps; training continues from it if it exists.

    Raises:
        RuntimeError: it was not learned in that many steps.
    """
    optimizer = Optimizer(policy.model, OptimizerConfig(learning_rate=rate, weight_decay=0.05, betas=(0.9, 0.98)))
    practice, recent = Binding(policy, seed), deque[float](maxlen=CHECK_STEPS)
    done = load_state(kept, optimizer, practice.generator)
    distance = done.get("distance", 0)
    for step in range(done.get("steps", 0), max_steps):
        ids, positions = practice.draw(64, (2, 3, 4, 4)[step % 4], distance, use_words=step % 4 < 3)
        loss, accuracy = practice.loss(policy.model, ids, positions)
        loss.backward()
        clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step(rate * min(1.0, (step + 1) / 50))
        recent.append(accuracy)
        if (step + 1) % CHECK_STEPS == 0:
            mean = sum(recent) / len(recent)
            log({"stage": "binding", "step": step + 1, "distance": distance, "loss": loss.item(), "accuracy": mean})
            if mean > 0.95 and distance >= MAX_DISTANCE:
                return
            distance += 20 if mean > 0.95 else 0
            save_state(kept, optimizer, practice.generator, steps=step + 1, distance=distance)
    raise RuntimeError(f"Binding was not learned in {max_steps} steps: try another seed.")
