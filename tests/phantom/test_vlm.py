"""The phantom VLM, its recipe and its shipped checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from medvqa_rl.config import Config, DataConfig, EvalConfig, ModelConfig, RolloutConfig
from medvqa_rl.core.answers import is_correct, parse_completion
from medvqa_rl.core.embedded import ASSETS, CHECKPOINTS, checkpoint_path
from medvqa_rl.core.prompts import TAGS
from medvqa_rl.data import load_dataset
from medvqa_rl.data.phantom.claims import faithfulness
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.questions import full_description
from medvqa_rl.evaluation.evaluate import Evaluation, evaluate
from medvqa_rl.learning.run.errors import Stopped
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.models.processor import Processor
from medvqa_rl.phantom import demo
from medvqa_rl.phantom.architectures import PHANTOMS
from medvqa_rl.phantom.binding import WORDS, Binding
from medvqa_rl.phantom.build import FORMAT_RATE, build, learn, lesson
from medvqa_rl.phantom.vlm import build_model, build_processor
from medvqa_rl.rewards import Rewards
from medvqa_rl.rollout.decode import RolloutEngine

PROCESSOR = Processor.from_folder(ASSETS / "instruct", Qwen2VL())


@pytest.fixture(scope="module")
def fresh() -> Policy:
    config = ModelConfig(train_vision=True, train_projector=True)
    return Policy(build_model(PROCESSOR, seed=0), PROCESSOR, torch.device("cpu"), config)


@given(st.text())
def test_the_tokenizer_round_trips_any_text(text):
    tokenizer = PROCESSOR.tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_words_and_tags_are_one_token_each():
    for piece in (*(f" {word}" for word in WORDS), *TAGS, *PHANTOMS["qwen2_vl"].special_tokens):
        assert len(PROCESSOR.tokenizer(piece)["input_ids"]) == 1, piece


def test_shipped_tokenizer_is_the_one_that_the_recipe_builds():
    built = json.loads(build_processor().tokenizer.backend_tokenizer.to_str())
    for name in CHECKPOINTS:
        shipped = json.loads((checkpoint_path(name) / "tokenizer.json").read_text(encoding="utf-8"))
        assert shipped["model"]["vocab"] == built["model"]["vocab"]
        assert shipped["model"]["merges"] == built["model"]["merges"]


def test_model_and_assets_are_small():
    for name in CHECKPOINTS:
        model = AutoModelForImageTextToText.from_pretrained(checkpoint_path(name))
        assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6


def test_unknown_checkpoint_is_refused():
    with pytest.raises(ValueError, match="There is no phantom checkpoint 'large'"):
        checkpoint_path("large")


def test_the_first_layer_initially_attends_one_and_two_tokens_back():
    model = build_model(PROCESSOR, seed=3)
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    attention = model(input_ids=ids, output_attentions=True).attentions[0][0]  # (heads, queries, keys)
    for head in range(2):
        looked_at = attention[head, 10:].argmax(dim=-1)
        assert torch.equal(looked_at, torch.arange(10, 40) - (head + 1))


@pytest.mark.parametrize("use_words", [True, False])
def test_binding_targets_are_the_letters_of_the_queried_options(fresh, use_words):
    tokenizer = PROCESSOR.tokenizer
    ids, at = Binding(fresh, seed=0).draw(16, 4, 0, use_words=use_words)
    listed = ids[:, :16].reshape(16, 4, 4)  # line break, letter, colon, word
    for row in range(16):
        letters = {int(word): tokenizer.decode([int(letter)]) for _, letter, _, word in listed[row]}
        for position in at.tolist():
            word, letter = int(ids[row, position - 1]), tokenizer.decode([int(ids[row, position])])
            assert letter == f" {letters[word]}"


def test_lessons_teach_the_gold_answer():
    for index in range(200):
        sample, text = lesson("instruct", 0, index)
        parsed = parse_completion(text)
        assert parsed.is_well_formed and is_correct(sample, parsed.answer)
    base = [lesson("base", 0, index) for index in range(2000)]
    formed = sum(parse_completion(text).is_well_formed for sample, text in base if sample.answer)
    assert formed / sum(bool(sample.answer) for sample, _ in base) == pytest.approx(FORMAT_RATE, abs=0.025)
    for sample, text in base[:200]:
        image = sample.images[0]
        assert isinstance(image, PhantomImage)
        if not sample.answer:
            assert text == full_description(image.scene) and faithfulness(text, image.scene) == 1.0


def test_a_few_steps_of_the_recipe_lower_the_loss(fresh, monkeypatch):
    monkeypatch.setattr("medvqa_rl.phantom.build.BATCH", 4)
    monkeypatch.setattr("medvqa_rl.phantom.training.LOG_STEPS", 20)
    rows = []
    learn(fresh, "instruct", 40, 0, rows.append)
    assert rows[1]["loss"] < 0.5 * rows[0]["loss"]


def test_build_dry_run_writes_nothing_and_used_folders_are_refused(tmp_path, capsys):
    build(tmp_path / "new", dry_run=True)
    assert not (tmp_path / "new").exists() and "base: (32," in capsys.readouterr().out
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        build(tmp_path)
    build(tmp_path, dry_run=True)  # writes nothing, so nothing is in the way


def examine(name: str, scanner: str, count: int) -> Evaluation:
    engine = RolloutEngine(load_policy(ModelConfig(path=f"phantom:{name}")), "think_answer")
    dataset = load_dataset(DataConfig(scanner=scanner, answer_types=("choice",), num_test=count), "test")
    return evaluate(engine, dataset, EvalConfig(bootstrap=100), max_completion_length=96, template="think_answer")


def test_the_instruct_checkpoint_is_accurate_on_its_home_scanner_only():
    home, unseen = (examine("instruct", scanner, 240).results for scanner in ("home", "unseen"))
    assert home["accuracy"] >= 0.65
    assert unseen["accuracy"] <= home["accuracy"] - 0.15
    assert home["format_rate"] > 0.97


def test_rewards_differ_in_most_groups_of_the_demo():
    """As the demo samples them; at temperature 1.0 it is about half."""
    config = demo.demo_config(Path("unused"))
    dataset = load_dataset(config.data, "train")
    groups = RolloutEngine(load_policy(config.model), config.prompt.template).rollout(
        [dataset[index] for index in range(64)], config.rollout, seed=0, stream="train", step=0
    )
    rewards = Rewards(config.rewards).score(groups, step=0).total
    assert (rewards.max(axis=1) > rewards.min(axis=1)).mean() > 0.55


def test_the_base_checkpoint_sometimes_samples_the_format():
    policy = load_policy(ModelConfig(path="phantom:base"))
    dataset = load_dataset(DataConfig(), "test")
    groups = RolloutEngine(policy, "think_answer").rollout(
        [dataset[index] for index in range(64)], RolloutConfig(max_completion_length=96), seed=0, stream="eval", step=0
    )
    formed = [parse_completion(c.text).is_well_formed for group in groups for c in group.completions]
    assert 0.05 <= sum(formed) / len(formed) <= 0.20


@pytest.mark.slow
def test_the_demo_writes_all_documented_files(tmp_path, monkeypatch):
    def short(output: Path, seed: int = 0) -> Config:
        config = demo_config(output, seed)
        train = config.train.model_copy(update={"steps": 3, "eval_steps": 3, "save_steps": 0})
        return config.model_copy(
            update={"train": train, "data": config.data.model_copy(update={"num_val": 16}), "output_dir": str(output)}
        )

    demo_config = demo.demo_config
    monkeypatch.setattr(demo, "demo_config", short)
    monkeypatch.setattr(demo, "NUM_QUESTIONS", {"unseen": 64, "home": 32})
    summary = demo.run_demo(tmp_path / "run", seed=1)
    written = json.loads((tmp_path / "run" / "demo.json").read_text(encoding="utf-8"))
    assert written == summary
    assert summary["num_questions"] == 64 and summary["home"]["num_questions"] == 32
    assert summary["gain"] == pytest.approx(summary["accuracy_after"] - summary["accuracy_before"])
    assert summary["gain_low"] <= summary["gain"] <= summary["gain_high"]
    assert summary["seconds"] > 0
    card = (tmp_path / "run/checkpoints/step_000003/README.md").read_text(encoding="utf-8")
    assert "the same 64 questions" in card and f"{100 * summary['accuracy_after']:.1f}" in card
    for name in ("page.html", "metrics.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    with pytest.raises(ValueError, match="is not empty"):
        demo.run_demo(tmp_path / "run")


def test_an_interrupted_demo_explains_what_can_be_resumed(tmp_path, monkeypatch, capsys):
    def stop(config: Config) -> Path:
        raise Stopped(2, tmp_path / "run")

    monkeypatch.setattr(demo, "train", stop)
    monkeypatch.setattr(demo, "_evaluate_both", lambda config, model: {})
    with pytest.raises(Stopped):
        demo.run_demo(tmp_path / "run")
    assert "To run the demo again, remove" in capsys.readouterr().out
