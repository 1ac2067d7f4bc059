"""The stage of the recipe in which the vision tower learns to see."""

import torch

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import ASSETS
from medvqa_rl.data.phantom.world import ALL_KINDS, Finding, Scene
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.processor import Processor
from medvqa_rl.phantom.seeing import CELLS, Probe, labels, learn_to_see
from medvqa_rl.phantom.vlm import build_model

PROCESSOR = Processor.from_folder(ASSETS / "instruct", Qwen2VL())


def test_labels_name_what_is_in_each_cell():
    cyst, plaque = Finding("cyst", "left", "upper", "small", 2), Finding("plaque", "right", "lower", "large", 1)
    found = labels(Scene("s", "MRI", "brain", (cyst, plaque)))
    expected = {("left", "upper"): (1 + ALL_KINDS.index("cyst"), 1, 2)}
    expected[("right", "lower")] = (1 + ALL_KINDS.index("plaque"), 3, 1)
    assert dict(zip(CELLS, found)) == {cell: expected.get(cell, (0, 0, 0)) for cell in CELLS}


def test_a_perfect_probe_counts_every_finding_as_correct():
    probe = Probe(hidden=8)
    cells = torch.tensor([labels(Scene("s", "MRI", "brain", (Finding("cyst", "left", "upper", "small", 2),)))])
    with torch.no_grad():
        probe.cells.weight.zero_()
        bias = torch.full((6, 17 + 4 + 4), -20.0)
        for cell, classes in enumerate(cells[0].tolist()):
            for start, label in zip((0, 17, 21), classes):
                bias[cell, start + label] = 20.0
        probe.cells.bias.copy_(bias.flatten())
    _, share = probe.loss(torch.randn(1, 16, 8), cells, torch.tensor([2]))
    assert share == 1.0
    _, share = probe.loss(torch.randn(1, 16, 8), cells.flip(1), torch.tensor([2]))
    assert share == 0.0


def test_a_few_steps_lower_the_loss(monkeypatch):
    monkeypatch.setattr("medvqa_rl.phantom.training.LOG_STEPS", 25)
    policy = Policy(build_model(PROCESSOR, 0), PROCESSOR, torch.device("cpu"), ModelConfig(train_vision=True))
    rows = []
    learn_to_see(policy, 50, 1e-3, 0, rows.append, batch=8)
    assert rows[1]["loss"] < 0.9 * rows[0]["loss"]
