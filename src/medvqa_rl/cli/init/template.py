"""The settings that ``medvqa-rl init`` writes, with gaps; every line says what it is for. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from string import Template
from typing import Any

from medvqa_rl.config.yaml import write_yaml

HEAD = """\
# $machine
#
#   medvqa-rl train $config
#
# Every setting that there is: docs/configuration.md, or `medvqa-rl config show $config`.

output_dir: $output_yaml
network: $network                       # off: refuse every connection beyond this machine, once the model is on it

data:
  name: own                        # your own table
  path: $path_yaml
  image_folder: $images_yaml
  split: official                  # as the column split of the table says: $counts
  num_val: null                    # all validation questions
"""

TAIL = """\

rewards:
  format: 1.0                      # 1 for the exact form of tags
  correctness: 1.0                 # 1 for the right answer
  open_correctness: $open_correctness           # of open answers: exact (as null), token_f1, similarity, judge

advantage:
  scale: none                      # Dr. GRPO: rewards are only centered within a group

loss:
  type: dr_grpo                    # sum over tokens / (completions x length limit)
  beta: 0.04                       # stay near the model as it came
"""

GPU = (
    HEAD
    + """
model:
  path: $model
  lora:                            # low-rank adapters on the language model; its own weights stay as they are
    rank: 8                        # RARL's (arXiv 2506.06600)
    alpha: 16                      # not stated there
  gradient_checkpointing: $gradient_checkpointing    # true: less memory, about a third more time
  max_pixels: $max_pixels               # larger images are shrunk; 28 x 28 pixels are a token

rollout:
  num_generations: 8               # answers sampled to each question
  max_completion_length: $max_completion_length       # tokens of an answer at most
  max_batch: $max_batch                     # questions answered at a time
"""
    + TAIL
    + """
optimizer:
  learning_rate: 1e-5              # of the adapters
  lr_scheduler_type: cosine        # down to min_lr_ratio
  min_lr_ratio: 0.1                # a tenth at the last step
  warmup_steps: $warmup                 # linear rise at the start

train:
  steps: $steps                       # 8 questions each: $passes passes over the training questions
  prompts_per_step: 8              # questions of a step
  prompts_per_micro_batch: $prompts_per_micro_batch       # of them in one pass through the model
  eval_steps: $every                   # greedy answers to the validation questions
  save_steps: $every                   # checkpoint, to continue with --resume
  log_completions_steps: 25        # sample answers to samples/ and the terminal

eval:
  batch_size: 16                   # questions answered together
"""
)

CPU = (
    HEAD
    + """
model:
  path: phantom:instruct           # the embedded model; on a GPU: $model
  device: cpu                      # too small to gain from a GPU
  train_vision: true               # your images look unlike the drawn ones that it knows
  train_projector: true            # the projector learns along with the tower

rollout:
  num_generations: 8               # answers sampled to each question
  max_completion_length: 96        # tokens of an answer at most
"""
    + TAIL
    + """
optimizer:
  learning_rate: 1e-4              # right for a model this small
  lr_scheduler_type: linear        # falls steadily
  min_lr_ratio: 0.1                # to a tenth
  warmup_steps: $warmup                 # linear rise at the start

train:
  steps: $steps                       # 8 questions each: $passes passes over the training questions
  prompts_per_step: 8              # questions of a step
  prompts_per_micro_batch: 8       # all of them in one pass
  eval_steps: $every                   # greedy answers to the validation questions
  save_steps: $every                   # checkpoint, to continue with --resume
  log_completions_steps: 25        # sample answers to samples/ and the terminal
"""
)


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template with its gaps filled: names of folders quoted as YAML needs them, truth values in lower case."""
    plain = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}
    quoted = {f"{name}_yaml": write_yaml(plain[name], inline=True) for name in ("output", "path", "images")}
    return Template(template).substitute(plain | quoted)
