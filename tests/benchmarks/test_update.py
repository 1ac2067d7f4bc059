"""The update benchmark: layouts give the same numbers, and their operations are those that torch counts.

Run: pytest tests/benchmarks/test_update.py
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import update
from benchmarks.common import Workload
from benchmarks.floors import architecture_of
from benchmarks.models import prepare_model
from medvqa_rl.core.types import Group
from medvqa_rl.learning.estimate.cost import group_pairs
from medvqa_rl.learning.update import Learner

TINY = dataclasses.replace(update.PRESETS["smoke"], prompts=2, generations=3, length=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_model(TINY, tmp_path_factory.mktemp("tiny"))


def learner_and_groups(workload: Workload, folder: Path) -> tuple[Learner, list[Group]]:
    learner = update.make_learner(workload, folder)
    return learner, update.make_groups(learner.policy, workload)


def test_layouts_give_the_same_numbers_and_a_wrong_one_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, groups = learner_and_groups(TINY, folder)
    ways: tuple[update.Way, ...] = ("default", "dense", "separate")
    found = update.compare(learner, groups, ways, "float32")
    assert set(found) == {"default", "dense"}
    assert all(row["logps"] < 1e-5 and row["gradient"] < 1e-5 for row in found.values())
    right = update.lay_out

    def shifted(learner: Learner, groups: list[Group], way: update.Way) -> object:
        batches = right(learner, groups, way)
        moved = [dataclasses.replace(batch, position_ids=batch.position_ids * 2) for batch in batches]
        return moved if way == "default" else batches

    monkeypatch.setattr(update, "lay_out", shifted)
    with pytest.raises(ValueError, match=r"'shared prompt' log-probabilities differ by .* do not trust its speed\.$"):
        update.compare(learner, groups, ways, "float32")


@pytest.mark.parametrize("lora", [0, 4])
def test_flops_of_one_row_per_completion_equal_torchs_count(folder: Path, lora: int) -> None:
    workload = dataclasses.replace(TINY, prompts=1, prompts_per_micro_batch=1, lora=lora)
    learner, groups = learner_and_groups(workload, folder)
    batches = update.lay_out(learner, groups, "separate")
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        update.run(learner, batches)
    model, prompt = architecture_of(folder), len(groups[0].prompt.input_ids)
    # Torch counts the masked half of the squares too: two products forward, four backward.
    masked = 3 * (prompt + 4) ** 2 - group_pairs(0, [prompt + 4] * 3)
    expected = update.count_flops(model, workload, [prompt], "separate") + 3 * 4 * model.hidden * model.layers * masked
    assert counter.get_total_flops() == expected


def test_shared_prompts_need_fewer_flops(folder: Path) -> None:
    model = architecture_of(folder)
    default, dense, separate = (update.count_flops(model, TINY, [70, 80], way) for way in update.WAYS)
    assert default < dense < separate


@pytest.mark.parametrize("scaling", [False, True])
def test_the_last_line_is_the_speedup(scaling: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    options = ["--preset", "smoke", "--repeats", "1", "--output", str(output), *(["--scaling"] if scaling else [])]
    assert update.main(options) == 0
    found = re.fullmatch(r"speedup: (\d+\.\d+)", capsys.readouterr().out.splitlines()[-1])
    assert found is not None
    written = json.loads(output.read_text())
    if scaling:
        assert [(row["changed"], row["value"]) for row in written["scaling"]] == [
            (name, value) for name, values in update.SCALING["smoke"].items() for value in values
        ]
        return
    ways = written["ways"]
    assert float(found[1]) == pytest.approx(ways["separate"]["seconds"] / ways["default"]["seconds"], abs=0.01)
    assert ways["default"]["flops"] == written["needed_flops"]
