"""The independent side of every comparison: transformers' own processors, forward and ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from medvqa_rl.core.types import EncodedPrompt, Group
from medvqa_rl.models.loading import Policy


def stock_processor(name: str, tokenizer: Any, image_processor: Any) -> Any:
    """A processor class of transformers around these parts, without its video processor, which needs torchvision."""
    kind = getattr(transformers, name)
    unchecked = type(name, (kind,), {"check_argument_for_proper_class": lambda self, name, given: type(given)})
    video = {} if name == "Gemma3Processor" else {"video_processor": SimpleNamespace(model_input_names=[])}
    has_length = name in ("Gemma3Processor", "InternVLProcessor")
    lengths = {"image_seq_length": image_processor.image_seq_length} if has_length else {}
    return unchecked(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        **video,
        **lengths,
    )


def stock_inputs(model: Any, prompt: EncodedPrompt, completion: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """What the stock forward takes for one prompt and completion.

    Args:
        model: the backbone or the whole model, without PEFT's wrapper.
    """
    ids = torch.tensor([[*prompt.input_ids.tolist(), *completion]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.image_inputs:
        if model.config.model_type != "internvl":  # which has positions of one axis, and causal images
            is_image = ids == model.config.image_token_id
            is_image[:, len(prompt.input_ids) :] = False
            key = "token_type_ids" if model.config.model_type == "gemma3" else "mm_token_type_ids"
            inputs[key] = is_image.int()
        inputs |= {name: torch.from_numpy(array) for name, array in prompt.image_inputs.items()}
    return inputs


def whole_model(policy: Policy) -> Any:
    """The ``...ForConditionalGeneration`` of a policy."""
    return policy.model.get_base_model() if policy.is_lora else policy.model


def never_sampled(policy: Policy) -> list[int]:
    """Control tokens, and the rows of the output layer beyond the tokenizer."""
    words = len(policy.processor.tokenizer)
    rows = whole_model(policy).get_output_embeddings().weight.shape[0]
    assert rows > words
    return [*policy.processor.suppressed_ids, *range(words, rows)]


def stock_greedy(policy: Policy, prompt: EncodedPrompt, length: int) -> tuple[int, ...]:
    """Greedy tokens of ``generate`` for one prompt."""
    model: Any = policy.model
    ids = model.generate(
        **stock_inputs(whole_model(policy), prompt),
        max_new_tokens=length,
        do_sample=False,
        suppress_tokens=never_sampled(policy),
        eos_token_id=list(policy.processor.stop_ids),
        pad_token_id=policy.processor.pad_id,
    )
    return tuple(ids[0, len(prompt.input_ids) :].tolist())


def stock_logits(policy: Policy, prompt: EncodedPrompt, completion: Sequence[int]) -> torch.Tensor:
    """(T, V) logits that predict the tokens of a completion, computed alone and without padding."""
    inputs = stock_inputs(whole_model(policy), prompt, completion)
    logits: torch.Tensor = policy.model(**inputs).logits[0, len(prompt.input_ids) - 1 : -1]
    return logits


def stock_logps(policy: Policy, groups: Sequence[Group]) -> torch.Tensor:
    """(B, T) log-probabilities of the tokens of all completions, 0 at padding."""
    rows = []
    for group in groups:
        for completion in group.completions:
            table = stock_logits(policy, group.prompt, completion.token_ids).log_softmax(-1)
            rows.append(table.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
