"""Prompts equal those of transformers' own processor, token for token and pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest

from medvqa_rl.core.prompts import render_prompt
from tests.models.families.stock import stock_processor
from tests.models.families.tiny import BUILDERS, tiny_policy


@pytest.mark.parametrize("name", BUILDERS)
def test_prompts_equal_the_stock_processor(name, mixed_samples):
    processor = tiny_policy(name).processor
    stock = stock_processor(BUILDERS[name]().processor, processor.tokenizer, processor.image_processor)
    for sample in mixed_samples:
        prompt = processor.encode(sample)
        messages = render_prompt(sample, "think_answer", prompt.wording).messages
        text = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [image.load() for image in sample.images] or None
        expected = stock(text=[text], images=images, return_tensors="np", add_special_tokens=False)
        assert prompt.text == text
        assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
        extra = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
        assert prompt.image_inputs.keys() == expected.keys() - extra
        for key, value in prompt.image_inputs.items():
            assert np.array_equal(value, expected[key]), key
