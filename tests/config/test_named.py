"""Settings by name in Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvqa_rl.config import Config, ConfigError, moved
from medvqa_rl.config.errors import MedVQAError, sentence
from medvqa_rl.config.yaml import check_config, load_config


def test_names_are_found_wherever_they_are() -> None:
    config = Config.from_settings(
        output_dir=Path("runs/mine"),
        steps=3,
        learning_rate=1e-4,
        num_generations=4,
        train={"eval_steps": 2},
        eval={"batch_size": 5},
        betas=(0.9, 0.95),
        **{"data.seed": 7, "rewards.functions.a.b": 2.0},
    )
    assert config.output_dir == "runs/mine" and config.train.steps == 3 and config.train.eval_steps == 2
    assert config.optimizer.learning_rate == 1e-4 and config.rollout.num_generations == 4
    assert config.eval.batch_size == 5 and config.data.seed == 7 and config.rewards.functions == {"a.b": 2.0}
    assert config.optimizer.betas == (0.9, 0.95)


def test_a_shared_name_is_the_one_of_grpo_config() -> None:
    """TRL's seed, temperature, top_p and epsilon are those of training, sampling and clipping."""
    config = Config.from_settings(seed=5, temperature=0.5, top_p=0.8, epsilon=0.1)
    assert (config.train.seed, config.rollout.temperature, config.rollout.top_p) == (5, 0.5, 0.8)
    assert config.loss.epsilon == 0.1
    assert (config.data.seed, config.eval.seed, config.eval.temperature, config.optimizer.epsilon) == (0, 0, 1.0, 1e-8)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"path": "x"}, r"path is model\.path or data\.path: write \*\*{'model\.path': \.\.\.}"),
        ({"max_steps": 3}, r"max_steps \(given as 3\) is not a setting: it is called train\.steps here\."),
        ({"stepz": 3}, r"did you mean train\.steps\?"),
        ({"steps": "3"}, r"train\.steps is the text '3', but must be a whole number of at least 1\."),
        ({"steps": object()}, "neither text, a number nor a list of them"),
        ({"steps": float("nan")}, r"train\.steps is NaN"),
    ],
)
def test_bad_names_and_values_are_sentences(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Config.from_settings(**settings)


def test_contradictions_wait_until_the_settings_are_used() -> None:
    config = Config.from_settings(**{"data.answers_as": "set"})
    assert config.data.answers_as == "set"
    with pytest.raises(ConfigError, match=r"data\.answers_as is set, but data\.name is phantom"):
        check_config(config, "train")


def test_a_file_and_overrides_are_what_the_command_line_reads(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train:\n  steps: 7\n")
    assert Config.from_yaml(file, "train.seed=3") == load_config(file, ["train.seed=3"]).config
    with pytest.raises(MedVQAError, match="does not exist"):
        Config.from_yaml(tmp_path / "missing.yaml")


def test_stored_data_moves_with_the_folder_of_a_run() -> None:
    config = Config.from_settings(output_dir="runs/a", **{"data.name": "own", "data.path": "runs/a/data"})
    assert moved(config, Path("/elsewhere/b")).data.path == "/elsewhere/b/data"
    other = Config.from_settings(output_dir="runs/a", **{"data.name": "own", "data.path": "runs/ab/data"})
    assert moved(other, Path("/elsewhere/b")).data.path == "runs/ab/data"
    assert moved(Config(), Path("b")) == Config(output_dir="b")


def test_the_sentence_of_an_error_has_its_notes() -> None:
    error = ValueError("It failed.")
    error.add_note("Try again.")
    assert sentence(error) == "It failed. Try again."
    assert sentence(FileNotFoundError(2, "No such file", "a.txt")) == (
        "No such file (a.txt): check the path and its permissions."
    )
    assert sentence(KeyError()) == ""
