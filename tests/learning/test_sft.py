"""Supervised fine-tuning: targets, the loss by the stock model's own, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import ToyData, read_metrics, toy_config

from medvqa_rl.core.answers import is_correct, parse_completion
from medvqa_rl.core.prompts import INSTRUCTIONS, SECTIONS, as_asked
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import EncodedPrompt, Sample, Wording
from medvqa_rl.data.phantom.claims import faithfulness
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.learning.batching.feed import PreparedPrompt
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.sft import sft_loss, target_groups, target_text, train_sft
from medvqa_rl.rewards.judges.embedded import conclusion

SAMPLE = Sample("s", "Which?", "B", "choice", options=("left", "right"), reasoning="It is right. </think>")


@pytest.mark.parametrize(
    ("template", "use_reasoning", "reasoning", "expected"),
    [
        ("think_answer", True, "It is right.", "<think>It is right.</think><answer>B</answer>"),
        ("think_answer", True, "</think>", "<think>(/think)</think><answer>B</answer>"),
        ("think_answer", False, "It is right.", "<answer>B</answer>"),
        ("think_answer", True, "  ", "<answer>B</answer>"),
        ("direct", True, "It is right.", "B"),
    ],
)
def test_targets(template, use_reasoning, reasoning, expected):
    sample = replace(SAMPLE, reasoning=reasoning)
    text = target_text(sample, template, use_reasoning=use_reasoning)
    assert text == expected
    assert is_correct(sample, parse_completion(text, template).answer)


def test_targets_have_the_tags_of_their_prompt():
    wording = Wording(think=("[why]", "[/why]"), answer=("[so]", "[/so]"))
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "", wording=wording)
    tokenizer = SimpleNamespace(encode_completion=lambda text: (0,))
    sample = replace(SAMPLE, reasoning="It is [/WHY] right.")
    (group,) = target_groups([PreparedPrompt(sample, 0, prompt, 0)], tokenizer, use_reasoning=True)
    assert group.completions[0].text == "[why]It is (/WHY) right.[/why][so]B[/so]"


@pytest.mark.parametrize(
    ("template", "use_reasoning", "added"),
    [
        ("think_answer", True, "It is right.</think><answer>B</answer>"),
        ("think_answer", False, "</think>\n\n<answer>B</answer>"),
        ("direct", True, "</think>\n\nB"),
    ],
)
def test_a_target_continues_the_reasoning_that_its_prompt_opens(template, use_reasoning, added):
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "assistant\n<think>\n", template=template)
    tokenizer = SimpleNamespace(encode_completion=lambda text: (text,))
    sample = replace(SAMPLE, reasoning="It is right.")
    (group,) = target_groups([PreparedPrompt(sample, 0, prompt, 0)], tokenizer, use_reasoning=use_reasoning)
    (completion,) = group.completions
    assert completion.token_ids == (added,)
    assert completion.text == f"<think>\n{added}"
    assert is_correct(sample, parse_completion(completion.text, template).answer)


@pytest.mark.parametrize("template", INSTRUCTIONS)
def test_every_template_is_taught_its_own_form(template):
    """On drawn questions, whose descriptions are true: the sections that it asks for, and no others."""
    for index in range(80):
        sample = draw_sample(seed=0, split="train", index=index)
        asked, text = as_asked(sample, template), target_text(sample, template, use_reasoning=True)
        parsed = parse_completion(text, template)
        assert parsed.is_well_formed and is_correct(asked, parsed.answer)
        assert parsed.think == (asked.reasoning if "think" in SECTIONS[template] else None)
        if template == "describe_think":
            assert faithfulness(parsed.description, sample.images[0].scene) == 1.0
        else:
            assert "<describe>" not in text
        if template == "direct":
            assert text == sample.answer
        if template == "open_ended" and not asked.options:  # and so no letter of one
            assert normalise(conclusion(parsed.think)) == normalise(parsed.answer)
        assert target_text(sample, template, use_reasoning=False).count("<") <= 2


@pytest.mark.parametrize("size", [4, 1])
def test_loss_and_gradient_equal_the_stock_model(tiny_policy, mixed_samples, model_inputs, size):
    """The stock cross-entropy over all target tokens of four prompts, whatever the micro-batches."""
    policy = tiny_policy()
    prompts = [PreparedPrompt(sample, 0, policy.processor.encode(sample), 0) for sample in mixed_samples]
    groups = target_groups(prompts, policy.processor, use_reasoning=True)
    losses, count = [], 0
    for group in groups:
        ids = group.completions[0].token_ids
        assert ids[-1] == policy.processor.eos_id
        inputs = model_inputs(policy.model, group.prompt, ids)
        labels = inputs["input_ids"].clone()
        labels[:, : -len(ids)] = -100
        losses.append(policy.model(**inputs, labels=labels).loss * len(ids))
        count += len(ids)
    expected = sum(losses) / count
    expected.backward()
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    policy.model.zero_grad()

    forward, total = GroupForward(policy.model), torch.zeros(())
    for start in range(0, 4, size):
        batch = collate(groups[start : start + size], policy.processor, "cpu")
        loss = sft_loss(forward, batch, count)
        loss.backward()
        total += loss.detach()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-8, name


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4}}], ids=["full", "lora"])
def test_it_learns_the_targets(tiny_folder, tmp_path, model):
    config = toy_config(
        tiny_folder("qwen2_vl"),
        tmp_path / "run",
        model=model,
        optimizer={"learning_rate": 2e-2, "weight_decay": 0.0},
        train={"steps": 60, "eval_steps": 30},
        rollout={"max_completion_length": 60},
    )
    run = train_sft(config, train_set=ToyData(2, is_endless=False), val_set=ToyData(2))
    lines = read_metrics(run)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.1 * losses[0]
    accuracy = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    assert accuracy[-1] == 1.0 and json.loads((run / "best" / "best.json").read_text())["accuracy"] == 1.0
    assert lines[-1]["eval/format_rate"] == 1.0


def test_dry_run_leaves_nothing_behind(tiny_folder, tmp_path, capsys):
    train_sft(toy_config(tiny_folder("qwen2_vl"), tmp_path / "run"), train_set=ToyData(), dry_run=True)
    assert not (tmp_path / "run").exists()
    assert "4 prompts x 1 completion\n" in capsys.readouterr().out
