"""Templates of the config that ``medvqa-rl init`` writes, with a comment on every setting. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Template
from typing import Any

from medvqa_rl.config.yaml import write_yaml

HEAD = """\
# $machine
#
#   medvqa-rl train $config
#
# All settings: docs/configuration.md, or `medvqa-rl config show $config`.

output_dir: $output_yaml
network: $network                       # off: block connections to other machines; needs the model to be cached

data:
  name: own                        # your own table
  path: $path_yaml
${images}${columns}${text_only}  split: official                  # the table's column split: $counts
  num_val: null                    # use all validation questions
"""

TAIL = """\

rewards:
  format: 1.0                      # weight; 1 if the output has exactly the required tags
  correctness: 1.0                 # weight; 1 if the answer is correct
  open_correctness: $open_correctness           # open-ended answers: null or exact, token_f1, similarity, judge

advantage:
  scale: none                      # Dr. GRPO: rewards are centred within a group, not scaled

loss:
  type: dr_grpo                    # sum over tokens / (completions x length limit)
  beta: 0.04                       # KL penalty towards the initial model
"""

GPU = (
    HEAD
    + """
model:
  path: $model_yaml
  lora:                            # low-rank adapters on the frozen language model
    rank: 8                        # as in RARL (arXiv 2506.06600)
    alpha: 16                      # not stated in the paper
  gradient_checkpointing: $gradient_checkpointing    # true saves memory and takes about a third longer
$pixels
rollout:
  num_generations: 8               # completions sampled per question
  max_completion_length: $max_completion_length       # maximum tokens in a completion
  max_batch: $max_batch                     # questions decoded at a time
"""
    + TAIL
    + """
optimizer:
  learning_rate: 1e-5              # for the adapters
  lr_scheduler_type: cosine        # decays to min_lr_ratio
  min_lr_ratio: 0.1                # of the learning rate, at the last step
  warmup_steps: $warmup                 # linear warm-up

train:
  steps: $steps                       # 8 questions each: $passes passes over the training split
  prompts_per_step: 8              # questions per step
  prompts_per_micro_batch: $prompts_per_micro_batch       # questions per forward pass
  eval_steps: $every                   # evaluate on the validation split
  save_steps: $every                   # save a checkpoint, for --resume
  log_completions_steps: 25        # log completions to samples/ and the terminal

eval:
  batch_size: 16                   # questions per batch
"""
)

CPU = (
    HEAD
    + """
model:
  path: phantom:instruct           # the embedded model; on a GPU use $model
  device: cpu                      # too small to benefit from a GPU
  train_vision: true               # your images differ from the drawings it was trained on
  train_projector: true            # trained along with the vision tower

rollout:
  num_generations: 8               # completions sampled per question
  max_completion_length: 96        # maximum tokens in a completion
"""
    + TAIL
    + """
optimizer:
  learning_rate: 1e-4              # for a model this small
  lr_scheduler_type: linear        # linear decay
  min_lr_ratio: 0.1                # of the learning rate, at the last step
  warmup_steps: $warmup                 # linear warm-up

train:
  steps: $steps                       # 8 questions each: $passes passes over the training split
  prompts_per_step: 8              # questions per step
  prompts_per_micro_batch: 8       # all in one forward pass
  eval_steps: $every                   # evaluate on the validation split
  save_steps: $every                   # save a checkpoint, for --resume
  log_completions_steps: 25        # log completions to samples/ and the terminal
"""
)


_COMMENTED = re.compile(r"^( *\w+: \S+) +# ", re.MULTILINE)


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Fill in a template, with folders quoted as YAML, booleans in lower case and comments in one column."""
    plain = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}
    quoted = {f"{name}_yaml": write_yaml(plain[name], inline=True) for name in ("output", "path", "model")}
    filled = Template(template).substitute(plain | quoted)
    return _COMMENTED.sub(lambda line: f"{line[1]:<34} # ", filled)
