"""Settings: reading, overrides, error messages, digest and differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medvqa_rl.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    differences,
    digest,
    leaves,
)
from medvqa_rl.config.base import Settings
from medvqa_rl.config.schema import all_settings, on_resume, one_of
from medvqa_rl.config.yaml import build_config, load_config, parse_override, read_yaml, show_config, write_yaml
from medvqa_rl.core.prompts import TAGS
from medvqa_rl.core.types import DEFAULT_WORDING


def problems_of(text: str, tmp_path: Path, overrides: tuple[str, ...] = (), purpose: Any = None) -> list[str]:
    """The problems reported for a configuration file."""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, purpose=purpose)
    assert str(error.value) == "\n".join(error.value.problems)
    return list(error.value.problems)


def choices(section: type[Settings], name: str) -> str:
    """The allowed values of a setting as messages list them, so that a new value breaks no test."""
    return one_of(get_args(section.model_fields[name].annotation))


def test_no_settings_are_the_defaults() -> None:
    assert build_config({}) == Config()


def test_file_and_overrides_are_merged_and_the_last_override_wins(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optimizer: {learning_rate: 1e-6}\ntrain:\n  steps: 5\neval:\n", encoding="utf-8")
    loaded = load_config(path, ["train.seed=1", "model.lora.rank=4", "train.seed=2", "data.answer_types=[open]"])
    assert loaded.config.optimizer.learning_rate == 1e-6
    assert (loaded.config.train.steps, loaded.config.train.seed) == (5, 2)
    assert loaded.config.model.lora == LoraConfig(rank=4)
    assert loaded.config.data.answer_types == ("open",)
    assert loaded.overridden == {"train.seed", "model.lora.rank", "data.answer_types"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", 1000),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("[1, a, 2.]", [1, "a", 2.0]),
    ],
)
def test_yaml_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    data = read_yaml(text)
    assert data == value and type(data) is type(value)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**28), 10**28)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    | st.sampled_from(["1e-6", "no", "null", "true", "07", "~", "", "a: b", "# x", "12:30", "- a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc._?:-", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN)
@example(["?0", "?&", {":a": "?"}])
@example("\x85")
@example("one\ntwo\r\u2028three")
def test_written_yaml_reads_back_unchanged(data: Any) -> None:
    assert read_yaml(write_yaml(data)) == data
    inline = write_yaml(data, inline=True)
    assert read_yaml(inline) == data
    assert "\n" not in inline


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = """
model: {path: phantom:instrct}
data: {name: vqa_rda, answer_types: [chocie]}
rollout: {num_generations: 1, temperature: 0}
loss: {type: drgrpo, epsilon: 0.3, epsilon_high: 0.2}
optimizer: {learning_rate: -1e-6, betas: [0.9, 1.5]}
train: {learning_rate: 1e-6, steps: true, prompts_per_steps: 3}
optim: {weight: 3}
"""
    assert problems_of(text, tmp_path, ("steps", "train.seed="), purpose="train") == [
        "The override 'steps' is not of the form key=value, such as train.steps=100.",
        "The override 'train.seed=' has no value: write train.seed=null for null, train.seed='\"\"' for empty text.",
        f"data.name is the text 'vqa_rda', but must be {choices(DataConfig, 'name')}: did you mean vqa_rad?",
        "data.answer_types[0] is the text 'chocie', but must be choice, closed or open: did you mean choice?",
        "rollout.temperature is 0, but must be a number above 0.",
        f"loss.type is the text 'drgrpo', but must be {choices(LossConfig, 'type')}: did you mean dr_grpo?",
        "optimizer.learning_rate is -1e-06, but must be a number above 0 and at most 1.",
        "optimizer.betas[1] is 1.5, but must be a number of at least 0 and below 1.",
        "train.steps is true, but must be a whole number of at least 1.",
        "train.learning_rate (given as 1e-06) is not a setting: learning_rate belongs to optimizer, "
        "write optimizer.learning_rate.",
        "train.prompts_per_steps (given as 3) is not a setting: did you mean train.prompts_per_step?",
        'optim (given as {"weight": 3}) is not a setting: did you mean optimizer?',
        "model.path is phantom:instrct, but the embedded models are phantom:base and phantom:instruct: "
        "did you mean phantom:instruct?",
        "loss.epsilon_high is 0.2 and loss.epsilon 0.3, but the upper clipping range must be at least the lower one: "
        "raise loss.epsilon_high (0.28 is usual) or set it to null.",
        "rollout.num_generations is 1, but GRPO compares completions of the same prompt: set it to 2 or more "
        "(8 is usual).",
    ]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("modle.path=x", "modle (given as {\"path\": \"x\"}) is not a setting: did you mean model?"),
        ("foo.bar=1", "foo.bar (given as 1) is not a setting: there is no section foo, only model, model.lora, "),
        ("train.zzz=1", "train.zzz (given as 1) is not a setting: train has steps, prompts_per_step, "),
        ("data.num_generation=4", "did you mean rollout.num_generations?"),
        ("loss.lr=1", "loss.lr (given as 1) is not a setting: it is called optimizer.learning_rate here."),
        ("model.seed=1", "seed belongs to data, train or eval, write data.seed, train.seed or eval.seed."),
        ("model.output_dir=a", "output_dir belongs to the top level, write output_dir."),
        ("rollout.num_generations=[1]", "rollout.num_generations is [1], but must be a whole number of at least 1."),
        ("rollout.num_generations='8'", "rollout.num_generations is the text '8', but must be a whole number"),
        ("rollout.num_generations=null", "rollout.num_generations is null, but must be a whole number"),
        ("train.steps=1e3", "train.steps is 1000.0, but must be a whole number of at least 1."),
        ("rollout.temperature=true", "rollout.temperature is true, but must be a number above 0."),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate is Infinity, but must be a number above 0 and"),
        ("optimizer.max_grad_norm=0", "optimizer.max_grad_norm is 0, but must be a number above 0, or null."),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9], but must be a list of 2, each a number of at least 0"),
        ("model.lora=3", "model.lora is 3, but must be a section (rank, alpha, "),
        ("rewards.functions.a.b=x", "rewards.functions.a.b is the text 'x', but must be a number."),
        ("output_dir=''", "output_dir is the text '', but must be text that is not empty."),
    ],
)  # fmt: skip
def test_wrong_overrides(override: str, sentence: str, tmp_path: Path) -> None:
    (problem,) = problems_of("", tmp_path, (override,))
    assert sentence in problem and problem[-1] in ".?"


CROSS = [
    ("train", {"rollout": {"num_generations": 1}}, "rollout.num_generations is 1, but GRPO compares completions"),
    ("train", {"rollout": {"top_k": 1}}, "rollout.top_k is 1"),
    ("train", {"train": {"max_tokens_per_micro_batch": 2048}}, "has up to 2048 besides its prompt"),
    ("train", {"rollout": {"max_completion_length": 4}}, "rollout.max_completion_length is 4"),
    ("train", {"rollout": {"max_completion_length": 10**6}}, "but it must be at most 32768"),
    ("train", {"rewards": {"format": 0, "correctness": 0}}, "All reward weights are 0"),
    ("train", {"rewards": {"format": 0, "correctness": 0, "functions": {"a.b": 0}}}, "All reward weights are 0"),
    ("sft", {"optimizer": {"warmup_steps": 10}, "train": {"steps": 10}}, "optimizer.warmup_steps is 10"),
    (
        "eval",
        {"model": {"min_pixels": 5000, "max_pixels": 4000}},
        "model.min_pixels is 5000 and model.max_pixels 4000",
    ),
    ("eval", {"model": {"max_pixels": 700}}, "model.max_pixels is 700, but an image token covers"),
    ("eval", {"model": {"attention": "flash_attention_2", "device": "cpu"}}, "needs bfloat16 on a GPU"),
    ("eval", {"model": {"path": " "}}, "model.path is empty"),
    ("eval", {"prompt": {"system": " "}}, "prompt.system is empty"),
    ("eval", {"prompt": {"system": "x <|image_pad|>"}}, "prompt.system holds <|image_pad|>, which a tokenizer reads"),
    ("eval", {"prompt": {"instruction": "{options} Answer."}}, "prompt.instruction has no {question}"),
    ("eval", {"prompt": {"instruction": "{question}"}}, "prompt.instruction has no {options}, but data.answer_types"),
    ("eval", {"prompt": {"instruction": "{question} {gold}"}}, "prompt.instruction has the placeholder {gold}, but"),
    ("eval", {"prompt": {"instruction": "{question} {options.x}"}}, "has the placeholder {options.x}, but only"),
    ("eval", {"prompt": {"instruction": "{question:9} {options}"}}, "has the placeholder {question:9}, but only"),
    ("eval", {"prompt": {"instruction": "{question} \\boxed{}"}}, "has the placeholder {}, but only"),
    ("eval", {"prompt": {"instruction": "{question} {"}}, "prompt.instruction has a single brace"),
    ("eval", {"prompt": {"tags": {"think": ["<a>", "<a>"]}}}, "The tags '<a>' of prompt.tags.think and '<a>' of"),
    ("eval", {"prompt": {"tags": {"think": ["<answer>", "</a>"]}}}, "and '<answer>' of prompt.tags.answer are equal"),
    ("eval", {"prompt": {"tags": {"think": ["<<A>>", "</A>"], "answer": ["<a>", "[/a]"]}}}, "are parts of each other"),
    (
        "eval",
        {"prompt": {"tags": {"answer": ["Answer:", "</a>"]}}},
        "has the tag 'Answer:', but a tag is a name between",
    ),
    ("eval", {"prompt": {"tags": {"answer": ["<|im_end|>", "</a>"]}}}, "reads as a control token"),
    ("eval", {"data": {"name": "vqa_rad"}}, "data.path is missing, but data.name is vqa_rad"),
    ("eval", {"data": {"name": "vqa_rad", "path": "x", "scanner": "unseen"}}, "data.scanner is unseen, but only"),
    ("eval", {"data": {"name": "vqa_rad", "path": "x", "letter_skew": 0.5}}, "data.letter_skew is 0.5, but only"),
    ("eval", {"data": {"name": "vqa_rad", "path": "x", "reasoning": "wrong"}}, "data.reasoning is wrong, but only"),
    ("train", {"data": {"reasoning": "wrong"}}, "RL rewards correct answers: use it with `medvqa-rl sft`"),
    ("eval", {"data": {"path": "x"}}, "data.path is x, but data.name is phantom, which reads no files"),
    ("eval", {"data": {"split": "image"}}, "data.split is image, but data.name is phantom"),
    ("eval", {"data": {"name": "own"}}, "data.path is missing, but data.name is own, which is read from disk"),
    (
        "eval",
        {"data": {"name": "own", "path": "x", "variant": "v2"}},
        "data.variant is v2, but only pmc_vqa",
    ),
    ("eval", {"data": {"name": "own", "hub": "a/b", "revision": "0" * 40}}, "data.hub is a/b, but data.name is own"),
    ("eval", {"data": {"name": "own", "path": "x", "revision": "0" * 40}}, "but data.hub is not set"),
    ("eval", {"data": {"name": "path_vqa", "path": "x", "image_folder": "y"}}, "the images of path_vqa come with"),
    ("eval", {"data": {"name": "slake_en", "hub": "a/b"}}, "data.revision is missing, but data.hub is a/b"),
    (
        "eval",
        {"data": {"name": "slake_en", "hub": "a/b", "revision": "0" * 40, "path": "x"}},
        "only one of the two may be set",
    ),
    ("eval", {"data": {"answer_types": []}}, "data.answer_types is an empty list"),
    ("eval", {"loss": {"epsilon_high": 0.1}}, "loss.epsilon_high is 0.1 and loss.epsilon 0.2"),
]


@pytest.mark.parametrize(("purpose", "data", "sentence"), CROSS)
def test_contradictory_settings(purpose: Any, data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_config(data, purpose=purpose)
    (problem,) = error.value.problems
    assert sentence in problem and problem.endswith(".")


def test_some_combinations_are_wrong_for_training_only() -> None:
    for data in [data for purpose, data, _ in CROSS if purpose != "eval"]:
        # Evaluation takes them as they are given.
        assert build_config(data, purpose="eval") == Config.model_validate(data)


def test_a_cross_check_is_silent_about_a_value_already_refused() -> None:
    with pytest.raises(ConfigError) as error:
        build_config({"rollout": {"num_generations": 0}}, purpose="train")
    assert error.value.problems == ("rollout.num_generations is 0, but must be a whole number of at least 1.",)


def test_text_settings_take_an_override_as_it_stands() -> None:
    assert parse_override("data.path=2024") == (("data", "path"), "2024")
    assert parse_override("data.path=/a/[b: c") == (("data", "path"), "/a/[b: c")
    assert parse_override("data.path='a b'") == (("data", "path"), "a b")
    assert parse_override("data.path=null") == (("data", "path"), None)
    assert parse_override("--train.steps = 4") == (("train", "steps"), 4)
    assert parse_override("rewards.functions.my.module.f=0.5") == (("rewards", "functions", "my.module.f"), 0.5)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: [1", "is not valid YAML, line 1, column 6:"),
        (
            b"train:\n  steps: 1\n  steps: 2\n",
            'found duplicate key "steps"',
        ),
        (b"data: &x {seed: 1}\neval: *x\n", "line 2, column 7: aliases (*name) are not supported."),
        (
            b"data: !!python/object:os.system {}",
            "line 1, column 7: could not determine a constructor for the tag",
        ),
        (b"? [a]\n: 1\n", "line 1, column 3: a key must be a word."),
        (b"- a\n", 'holds ["a"] at its top level, but must hold sections'),
        (b"just words", "holds the text 'just words' at its top level"),
        (b"a: \xff\xfe", "is not UTF-8 text (byte 3 is 0xff): save it as UTF-8."),
        (b"a: \x07", "is not valid YAML"),
    ],
)
def test_unreadable_files(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    (problem,) = error.value.problems
    assert str(path) in problem and sentence in problem and problem.endswith(".")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: give the path of a YAML file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder: give the path of a YAML file in it"):
        load_config(tmp_path)


def test_show_marks_given_settings_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 5}\nrewards: {functions: {my.reward: 0.5}}\n", encoding="utf-8")
    loaded = load_config(path, ["optimizer.learning_rate=1e-6"])
    text = show_config(loaded)
    assert build_config(read_yaml(text)) == loaded.config
    marked = [line.strip() for line in text.splitlines() if "# given" in line]
    assert marked == [
        "my.reward: 0.5  # given in the file",
        "learning_rate: 1e-06  # given on the command line",
        "steps: 5  # given in the file",
    ]


def test_digest_and_differences() -> None:
    before = Config(train=TrainConfig(steps=5))
    after = Config(train=TrainConfig(steps=6), model=ModelConfig(lora=LoraConfig()))
    assert differences(before, before) == []
    assert differences(before, after) == ["model.lora", "train.steps"]
    assert digest(before) == digest(Config.model_validate_json(json.dumps(before.model_dump(mode="json"))))
    assert digest(before) != digest(after)
    assert digest(Config()) == digest(build_config({"train": {"seed": 0}}))


def test_every_setting_is_described() -> None:
    missing = [name for name, field in all_settings() if "." in name and not field.get("description")]
    assert [name for name in missing if name != "model.lora"] == []


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_in_the_repository_is_sound(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    needs_folder = ["data.path=/somewhere"] if "data.path=" in text else []
    load_config(path, needs_folder, purpose="train")
    for line in text.splitlines():
        is_value = ": " in line.partition("#")[0] or line.partition("#")[0].strip().startswith("-")
        assert not is_value or "#" in line, f"{path.name} does not explain: {line}"


def test_every_setting_says_what_changing_it_on_resume_does() -> None:
    kinds = {path: on_resume(path) for path in leaves(Config(model={"lora": {}}, eval_judge={}).model_dump())}
    assert len(kinds) > 130 and set(kinds.values()) == {"identity", "rounding", "free", "later"}
    assert {path for path, kind in kinds.items() if kind == "later"} == {"train.steps", "data.skip_images"}
    assert kinds["train.prompts_per_micro_batch"] == kinds["eval_judge.batch_size"] == "rounding"
    assert kinds["data.path"] == kinds["model.gradient_checkpointing"] == "free"
    assert on_resume("rewards.functions.my_rewards.short") == on_resume("model.lora") == "identity"


def test_a_setting_that_does_not_say_it_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"Section\.size does not say what changing it on resume does"):

        class Section(Settings):
            size: int = 1


def test_own_prompts_and_tags_are_accepted() -> None:
    prompt = {
        "system": "Think in <reason></reason>.",
        "instruction": "{question}\n{options}\n\\boxed{{}}",
        "tags": {"think": ["<reason>", "</reason>"]},
    }
    config = build_config({"prompt": prompt}, purpose="train")
    wording = config.prompt.wording
    assert (wording.system, wording.think, wording.answer) == (prompt["system"], ("<reason>", "</reason>"), TAGS[2:])
    closed = {"prompt": {"instruction": "{question}"}, "data": {"answer_types": ["closed", "open"]}}
    assert build_config(closed, purpose="eval").prompt.wording.instruction == "{question}"
    assert build_config({}, purpose="train").prompt.wording == DEFAULT_WORDING
