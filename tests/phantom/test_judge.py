"""The embedded judges as they are shipped: standard files, small, right on reasoning that they have not seen.

Run: pytest tests/phantom/test_judge.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BioGptForCausalLM

from medvqa_rl.cli.judge.calibrate import phantom_pairs, run_calibrate
from medvqa_rl.config import JudgeConfig
from medvqa_rl.core.embedded import ASSETS
from medvqa_rl.core.types import Sample
from medvqa_rl.data.phantom.misreadings import misread
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.evaluation.judging.agreement import by_group
from medvqa_rl.phantom.judge import RECIPES, build_judges, build_model, build_tokenizer, sample_texts
from medvqa_rl.phantom.judge_lessons import Lessons, Probes, lesson_loss
from medvqa_rl.rewards.judges import JudgeRequest
from medvqa_rl.rewards.judges.local import load_local_judge

JUDGES = [recipe.name for recipe in RECIPES]
CASES = [
    ("The modality is CT. The organ is abdomen. There is a cyst: count one, size small, upper left.", True),
    ("The modality is CT. The organ is brain. There is a cyst: count one, size small, upper left.", False),
    ("The modality is fundus. There is a fracture: count one, size small, upper left.", False),
    ("There is a cyst: count one, size small, upper left. So the answer is cyst B.", True),
    ("There is a cyst: count one, size small, upper left. So the answer is stone B.", False),
    ("There is a cyst: count one, size small, upper left. No finding is seen. So the answer is yes.", False),
    ("No cyst is seen. So the answer is no.", True),
    ("No cyst is seen. No cyst is seen. So the answer is no.", False),
    ("The view is complete. The quality is good. The image is sharp. No cyst is seen. So the answer is no.", False),
    ("The organ is kidney. So the answer", False),
]


@pytest.mark.parametrize("name", JUDGES)
def test_standard_files_of_at_most_3_million_weights(name: str) -> None:
    weights = load_file(ASSETS / name / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in weights.values()) <= 3_000_000
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name, local_files_only=True)
    assert isinstance(model, BioGptForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name, local_files_only=True)
    assert [len(tokenizer(word)["input_ids"]) for word in (" Yes", " No")] == [1, 1]


def test_the_judges_differ_in_size_seed_and_data() -> None:
    first, second = (json.loads((ASSETS / name / "config.json").read_text()) for name in JUDGES)
    assert first["hidden_size"] != second["hidden_size"]
    assert first["num_hidden_layers"] != second["num_hidden_layers"]
    assert RECIPES[0].seed != RECIPES[1].seed and RECIPES[0].mixture != RECIPES[1].mixture


@pytest.mark.parametrize("name", JUDGES)
def test_misreadings_are_as_fluent_as_reference_reasoning(name: str) -> None:
    """A judge of text cannot tell that they are wrong of the image."""
    judge = load_local_judge(JudgeConfig(model=f"phantom:{name}", device="cpu"))
    samples = [draw_sample(seed=3, split="misread", index=index) for index in range(100)]

    def accepted(chosen: list[Sample]) -> float:
        requests = [JudgeRequest(one.question, one.options, one.reasoning) for one in chosen]
        return sum(grade.score for grade in judge.grade(requests)) / len(chosen)

    assert accepted([misread(sample) for sample in samples]) >= 0.97 > accepted(samples)  # an eighth is flawed


@pytest.mark.parametrize("name", JUDGES)
def test_clear_cases_are_judged_correctly(name: str) -> None:
    judge = load_local_judge(JudgeConfig(model=f"phantom:{name}", device="cpu"))
    grades = judge.grade([JudgeRequest("", (), text) for text, _ in CASES])
    right = [grade.score == float(label) for grade, (_, label) in zip(grades, CASES)]
    assert sum(right) >= len(CASES) - 1, [text for (text, _), is_right in zip(CASES, right) if not is_right]


@pytest.mark.slow
@pytest.mark.parametrize("name", JUDGES)
def test_accuracy_is_at_least_90_percent_on_written_and_sampled_reasoning(name: str) -> None:
    judge = load_local_judge(JudgeConfig(model=f"phantom:{name}", device="cpu"))
    pairs = phantom_pairs(240, seed=11)
    grades = judge.grade([pair.request for pair in pairs])
    for is_sampled in (False, True):
        chosen = [i for i, pair in enumerate(pairs) if pair.group.startswith("sampled") == is_sampled]
        found = by_group([pairs[i] for i in chosen], [grades[i] for i in chosen])["all"]
        assert found["accuracy"]["estimate"] >= 0.9, found
        assert 0.3 < found["label_yes_rate"] < 0.8 and found["kappa"]["estimate"] > 0.75


def test_calibrate_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"reasoning": text, "label": label, "group": "mine"} for text, label in CASES]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = JudgeConfig(device="cpu", cache_dir=str(tmp_path / "cache"))
    results = run_calibrate(config, pairs_file=pairs, output=tmp_path / "out", count=40, seed=3, with_policies=False)
    written = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert written["judge"] == results["judge"] and written["judge"]["name"] == "phantom:judge"
    phantom, mine = written["sources"]["phantom"], written["sources"]["pairs"]
    assert phantom["groups"]["all"]["n"] == 40 and set(phantom["groups"]) == {"all", "reference", "changed"}
    assert mine["groups"]["mine"]["n"] == len(CASES) and mine["groups"]["mine"]["unscored_rate"] == 0
    assert sum(item["count"] for item in phantom["margins"]) == 40
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 5000
    assert "kappa" in capsys.readouterr().out
    with pytest.raises(ValueError, match="already holds a calibration"):
        run_calibrate(config, output=tmp_path / "out", count=4, with_policies=False)


def test_sampled_texts_are_reasoning_without_tags() -> None:
    texts = sample_texts(24, 5, "a test")
    assert len(texts) > 15 and not any("<" in text.text for text in texts)
    assert {text.kind.split()[2] for text in texts} == {"instruct", "base"}


def test_a_step_of_the_recipe_lowers_the_loss() -> None:
    recipe, tokenizer = RECIPES[1], build_tokenizer()
    model = build_model(recipe, tokenizer)
    lessons = Lessons(tokenizer, recipe, ())
    texts = lessons.texts(0)
    assert texts == lessons.texts(0) != lessons.texts(1)
    batches = lessons.batches(texts)
    probes = Probes(recipe.hidden, 0)
    optimizer = torch.optim.SGD([*model.parameters(), *probes.parameters()], lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum((lesson_loss(model, probes, batch, lessons.answers)[0] for batch in batches), torch.zeros(()))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_labels_are_those_of_the_text_up_to_each_full_stop() -> None:
    tokenizer = build_tokenizer()
    text = "No cyst is seen. No cyst is seen. So the answer"
    (batch,) = Lessons(tokenizer, RECIPES[0], ()).batches([text])
    assert batch.label.tolist() == [1, 0, 0]
    ends = [tokenizer.decode(batch.ids[0, : position + 1]) for position in batch.position]
    assert ends == ["No cyst is seen.", "No cyst is seen. No cyst is seen.", text]


def test_unknown_recipes_and_existing_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="There is no recipe for a judge 'jury'"):
        build_judges(tmp_path, names=["jury"])
    (tmp_path / "judge").mkdir()
    with pytest.raises(ValueError, match=r"judge already exists: choose another with --output"):
        build_judges(tmp_path)
    build_judges(tmp_path, names=["judge_eval"], dry_run=True)
    assert "verdicts" in capsys.readouterr().out and not (tmp_path / "judge_eval").exists()
