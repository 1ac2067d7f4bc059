"""The check before the first update: silent on a right computation, fatal on a wrong one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from toy import ToyData, make_group, read_metrics, toy_config

from medvqa_rl.learning import update as update_module
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.objective import logprobs
from medvqa_rl.learning.objective.self_check import TOLERANCES, SelfCheckError, compare
from medvqa_rl.models.prefix.group_attention import group_layout


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


def leaking(*args):
    """A layout in which completions see their own future."""
    layout = group_layout(*args)
    mask = layout.mask.clone()
    mask[..., layout.prompt_width :] = True
    return dataclasses.replace(layout, mask=mask)


def test_wrong_attention_stops_the_run_before_the_first_update(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(logprobs, "group_layout", leaking)
    config = toy_config(folder, tmp_path / "run", train={"steps": 2})
    with pytest.raises(SelfCheckError, match=r"sample 'toy-\d' differ .* by up to [\d.]+ and [\d.]+ on average"):
        train(config, train_set=ToyData())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert not read_metrics(tmp_path / "run")
    # It is not looked for where that is asked.
    config = toy_config(folder, tmp_path / "unchecked", train={"steps": 1, "self_check": False})
    train(config, train_set=ToyData())


def test_the_check_runs_once_per_start(folder, tmp_path, monkeypatch):
    checked = []
    original = update_module.check_first_group

    def counting(*args):
        checked.append(args[-1].sample.id)
        original(*args)

    monkeypatch.setattr(update_module, "check_first_group", counting)
    config = toy_config(folder, tmp_path / "run", train={"steps": 2})
    train(config, train_set=ToyData())
    assert len(checked) == 1
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    train(longer, train_set=ToyData(), resume=True)
    assert len(checked) == 2


def test_the_check_does_not_change_results(folder, tmp_path):
    """With dropout, whose random numbers another forward pass could have used up."""
    lora = {"path": str(folder), "device": "cpu", "lora": {"rank": 2, "dropout": 0.3}}
    lines = []
    for name, self_check in (("with", True), ("without", False)):
        config = toy_config(folder, tmp_path / name, model=lora, train={"steps": 2, "self_check": self_check})
        lines.append(read_metrics(train(config, train_set=ToyData())))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tolerances_by_hand(dtype):
    limit = TOLERANCES[dtype]
    mask = torch.tensor([[True, True], [True, False]])
    group = make_group(3, [2, 1])
    plain = torch.zeros(2, 2)
    for error, is_wrong in ((0.9 * limit.mean, False), (1.1 * limit.mean, True), (torch.nan, True)):
        fast = torch.full((2, 3), error)  # a batch can be wider than the group
        fast[1, 1:] = 100.0  # padding does not count
        if is_wrong:
            with pytest.raises(SelfCheckError, match="No weight was touched"):
                compare(fast, plain, mask, dtype, group)
        else:
            compare(fast, plain, mask, dtype, group)
    compare(torch.full((2, 2), torch.nan), torch.full((2, 2), torch.nan), mask, dtype, group)  # left to the loss


def test_one_token_far_off_is_enough():
    mask = torch.ones(1, 1000, dtype=torch.bool)
    fast = torch.zeros(1, 1000)
    fast[0, 500] = 0.01
    with pytest.raises(SelfCheckError, match=r"by up to 0\.01 and 1e-05 on average"):
        compare(fast, torch.zeros(1, 1000), mask, torch.float32, make_group(3, [1000]))
