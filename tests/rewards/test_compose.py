"""The weighted sum of reward parts, and user functions called as TRL calls them.

Run: pytest tests/rewards/test_compose.py
"""

import asyncio
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvqa_rl.config import RewardsConfig
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample, Wording
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.compose import PARTS

GOOD, WRONG, UNFORMED, NOTHING = (
    "<think>x</think><answer>B</answer>",
    "<think>x</think><answer>A</answer>",
    "well <answer>(B)</answer>",
    "B",
)


class OneImage:
    key = "scan.png"
    loads = 0

    def load(self) -> Image.Image:
        OneImage.loads += 1
        return Image.new("RGB", (2, 2))

    def header_pixels(self) -> None:
        return None


def group(*texts: str, sample_id: str = "q1") -> Group:
    sample = Sample(
        sample_id, "What?", "B", "choice", (OneImage(),), ("mass", "cyst"), groups={"family": "kind", "organ": "lung"}
    )
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "")
    return Group(sample, prompt, [Completion((index, 7), text, False) for index, text in enumerate(texts)])


GROUPS = [group(GOOD, WRONG, UNFORMED), group(NOTHING, GOOD, GOOD, sample_id="q2")]
FORMAT = np.array([[1, 1, 0], [0, 1, 1]], dtype=float)
CORRECT = np.array([[1, 0, 1], [0, 1, 1]], dtype=float)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of user functions, importable as my_rewards."""
    user = ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, "my_rewards", user)
    return user


def with_function(module: ModuleType, function: Any, weight: float = 1.0) -> Rewards:
    module.mine = function  # type: ignore[attr-defined]
    return Rewards(RewardsConfig(format=0, correctness=0, functions={"my_rewards.mine": weight}))


def test_the_total_is_the_weighted_sum_of_the_parts() -> None:
    rewards = Rewards(RewardsConfig(format=0.5, correctness=2.0))
    scores = rewards.score(GROUPS, step=0)
    assert rewards.names == ("format", "correctness")
    np.testing.assert_array_equal(scores.parts["format"], FORMAT)
    np.testing.assert_array_equal(scores.parts["correctness"], CORRECT)
    np.testing.assert_array_equal(scores.total, 0.5 * FORMAT + 2.0 * CORRECT)


def test_a_weight_of_0_turns_a_part_off() -> None:
    rewards = Rewards(RewardsConfig(format=0, functions={"no_such_module.function": 0.0}))
    assert rewards.names == ("correctness",)
    scores = rewards.score(GROUPS, step=0)
    assert set(scores.parts) == {"correctness"}
    np.testing.assert_array_equal(scores.total, CORRECT)


def test_the_direct_template_is_scored_in_its_own_form() -> None:
    direct = group("B", "", GOOD)
    direct.prompt = replace(direct.prompt, template="direct")
    scores = Rewards(RewardsConfig()).score([direct], step=0)
    np.testing.assert_array_equal(scores.parts["format"], [[1, 0, 1]])
    np.testing.assert_array_equal(scores.parts["correctness"], [[1, 0, 0]])


def test_completions_are_scored_in_the_tags_of_their_prompt(module: ModuleType) -> None:
    seen: list[Any] = []
    module.mine = lambda prompts, **kwargs: seen.extend(prompts) or [0.0] * 3  # type: ignore[attr-defined]
    own = group("[why]x y x y[/why][so]B[/so]", "[why]x[/why][so]A[/so]", GOOD)
    wording = Wording(system="Be brief.", think=("[why]", "[/why]"), answer=("[so]", "[/so]"))
    own.prompt = replace(own.prompt, wording=wording)
    config = RewardsConfig(repetition=1, repetition_ngram=2, functions={"my_rewards.mine": 1.0})
    scores = Rewards(config).score([own], step=0)
    np.testing.assert_array_equal(scores.parts["format"], [[1, 1, 0]])
    np.testing.assert_array_equal(scores.parts["correctness"], [[1, 0, 0]])
    # x y, y x, x y, y B: three of four pairs are distinct.
    np.testing.assert_array_equal(scores.parts["repetition"], [[-0.25, 0, 0]])
    assert seen[0][0] == {"role": "system", "content": "Be brief."}


def test_a_function_gets_what_trl_would_pass(module: ModuleType) -> None:
    seen: dict[str, Any] = {}

    def function(prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        kwargs["log_metric"]("mean_of_two", 1.0)
        kwargs["log_metric"]("mean_of_two", 2.0)
        kwargs["log_extra"]("numbers", list(range(6)))
        return [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]

    scores = with_function(module, function, weight=-2.0).score(GROUPS, step=17)
    np.testing.assert_array_equal(scores.parts["mine"], [[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]])
    np.testing.assert_array_equal(scores.total, -2.0 * scores.parts["mine"])
    assert seen["completions"] == [
        [{"role": "assistant", "content": text}] for text in (GOOD, WRONG, UNFORMED, NOTHING, GOOD, GOOD)
    ]
    assert seen["completion_ids"] == [[0, 7], [1, 7], [2, 7]] * 2
    assert [prompt[0]["role"] for prompt in seen["prompts"]] == ["user"] * 6
    assert seen["prompts"][0][0]["content"][-1]["text"].startswith("What?\nA: mass\nB: cyst\n")
    assert seen["solution"] == seen["answer"] == ["B"] * 6
    assert seen["answer_text"] == ["cyst"] * 6
    assert seen["id"] == ["q1"] * 3 + ["q2"] * 3
    assert seen["options"] == [["mass", "cyst"]] * 6
    assert seen["question"] == ["What?"] * 6
    assert seen["answer_type"] == ["choice"] * 6
    assert seen["groups"] == [{"family": "kind", "organ": "lung"}] * 6
    assert seen["image_key"] == ["scan.png"] * 6
    assert seen["trainer_state"].global_step == 17
    assert "images" not in seen
    assert scores.extras == {"mean_of_two": 1.5}
    assert scores.columns == {"numbers": list(range(6))}


def test_images_are_decoded_once_per_prompt_and_only_for_functions_that_name_them(module: ModuleType) -> None:
    def function(completions: Any, images: Any, **kwargs: Any) -> list[float]:
        assert len(images) == len(completions)
        return [float(image.size == (2, 2)) for (image,) in images]

    OneImage.loads = 0
    assert with_function(module, function).score(GROUPS, step=0).total.min() == 1.0
    assert OneImage.loads == 2


def test_none_does_not_apply_and_numbers_that_are_not_finite_are_unscored(module: ModuleType) -> None:
    module.mine = lambda **kwargs: [None, 1, True, math.nan, math.inf, np.float32(0.5)]  # type: ignore[attr-defined]
    rewards = Rewards(RewardsConfig(format=0.5, functions={"my_rewards.mine": 3.0}))
    scores = rewards.score(GROUPS, step=0)
    np.testing.assert_array_equal(scores.parts["mine"], [[np.nan, 1, 1], [np.nan, np.nan, 0.5]])
    np.testing.assert_array_equal(scores.applies["mine"], [[False, True, True], [True, True, True]])
    assert scores.applies["format"].all()
    # The first completion: format 1 and correct, without mine.
    np.testing.assert_array_equal(scores.total, [[1.5, 3.5, 4.0], [np.nan, np.nan, 3.0]])
    np.testing.assert_array_equal(scores.parts["format"], FORMAT)


def test_a_completion_that_no_part_applies_to_is_unscored(module: ModuleType) -> None:
    module.odd = lambda **kwargs: [None, None, 1, 1, 1, 1]  # type: ignore[attr-defined]
    module.even = lambda **kwargs: [None, 2, None, 2, 2, 2]  # type: ignore[attr-defined]
    functions = {"my_rewards.odd": 1.0, "my_rewards.even": 1.0}
    scores = Rewards(RewardsConfig(format=0, correctness=0, functions=functions)).score(GROUPS, step=0)
    np.testing.assert_array_equal(scores.total, [[np.nan, 2, 1], [3, 3, 3]])


def test_totals_equal_those_of_trl(module: ModuleType) -> None:
    """TRL drops a part that returned None with nansum (GRPOTrainer, _compute_advantages)."""
    values = [[None, 1.0, 0.5, None, 0.25, 2.0], [1.0, None, 0.5, 0.5, None, -1.0]]
    module.one = lambda **kwargs: values[0]  # type: ignore[attr-defined]
    module.two = lambda **kwargs: values[1]  # type: ignore[attr-defined]
    functions = {"my_rewards.one": 0.5, "my_rewards.two": 2.0}
    scores = Rewards(RewardsConfig(format=0, correctness=0, functions=functions)).score(GROUPS, step=0)
    per_function = np.array([[np.nan if value is None else value for value in row] for row in values])
    np.testing.assert_allclose(scores.total.ravel(), np.nansum(per_function * [[0.5], [2.0]], axis=0))


def test_functions_get_the_columns_of_the_data(module: ModuleType) -> None:
    seen: dict[str, Any] = {}

    def function(difficulty: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs, difficulty=difficulty)
        return [0.0] * 6

    columns: list[dict[str, Any]] = [
        {"difficulty": 3, "keywords": ["a", "b"], "solution": "worked", "image": "a.png"},
        {"difficulty": 1, "answer": "not this", "completions": "nor this", "extra": None},
    ]
    samples = [replace(group.sample, columns=own) for group, own in zip(GROUPS, columns)]
    groups = [replace(group, sample=sample) for group, sample in zip(GROUPS, samples)]
    with_function(module, function).score(groups, step=0)
    assert seen["difficulty"] == [3] * 3 + [1] * 3
    assert seen["keywords"] == [["a", "b"]] * 3 + [None] * 3
    assert seen["solution"] == ["worked"] * 3 + [None] * 3 and seen["extra"] == [None] * 6
    assert seen["organ"] == ["lung"] * 6 and seen["reasoning"] == [""] * 6
    assert seen["answer"] == ["B"] * 6 and len(seen["completions"]) == 6
    assert "image" not in seen


def test_async_functions_run_together(module: ModuleType) -> None:
    """Each waits for the other, so they end only if they run in one loop."""
    events: dict[str, asyncio.Event] = {}

    async def one(completions: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        events["one"].set()
        await asyncio.wait_for(events["two"].wait(), 5)
        log_metric("waited", 1.0)
        return [1.0] * len(completions)

    class Two:
        async def __call__(self, completions: Any, **kwargs: Any) -> list[float | None]:
            events["two"].set()
            await asyncio.wait_for(events["one"].wait(), 5)
            return [None, 2.0, 2.0, 2.0, 2.0, 2.0]

    def three(**kwargs: Any) -> list[float]:
        events.update(one=asyncio.Event(), two=asyncio.Event())
        return [4.0] * 6

    module.one, module.two, module.three = one, Two(), three  # type: ignore[attr-defined]
    functions = {f"my_rewards.{name}": 1.0 for name in ("one", "two", "three")}
    scores = Rewards(RewardsConfig(format=0, correctness=0, functions=functions)).score(GROUPS, step=0)
    np.testing.assert_array_equal(scores.total, [[5, 7, 7], [7, 7, 7]])
    assert scores.extras == {"waited": 1.0}


def test_async_functions_work_where_an_event_loop_runs(module: ModuleType) -> None:
    async def notebook() -> Any:
        return with_function(module, coroutine).score(GROUPS, step=0)

    np.testing.assert_array_equal(asyncio.run(notebook()).total, np.ones((2, 3)))


def test_errors_of_an_async_function_name_the_function(module: ModuleType) -> None:
    async def function(**kwargs: Any) -> list[float]:
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops") as caught:
        with_function(module, function).score(GROUPS, step=3)
    where = f"(test_compose.py, line {function.__code__.co_firstlineno + 1})"
    assert f"This was raised by the reward function 'my_rewards.mine' {where} in step 4." in caught.value.__notes__
    with pytest.raises(ValueError, match=r"'my_rewards\.mine' returned 1 reward for 6 completions"):
        with_function(module, short_coroutine).score(GROUPS, step=3)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0] * 5, "returned 5 rewards for 6 completions"),
        ([1.0] * 5 + ["good"], "returned 'good' for completion 5"),
        ([1.0] * 5 + [[1.0]], "for completion 5"),
        (1.0, "returned a float"),
        (None, "returned a NoneType"),
        ("111111", "returned a str"),
    ],
)
def test_invalid_return_values_are_refused_naming_the_function(
    module: ModuleType, returned: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=r"'my_rewards\.mine'") as caught:
        with_function(module, lambda **kwargs: returned).score(GROUPS, step=0)
    assert message in str(caught.value)


def test_wrong_columns_are_refused(module: ModuleType) -> None:
    def function(log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("numbers", [1])
        return [0.0] * 6

    with pytest.raises(ValueError, match="logged 1 values as 'numbers' for 6 completions"):
        with_function(module, function).score(GROUPS, step=0)


def test_errors_of_a_function_name_the_function(module: ModuleType) -> None:
    def function(**kwargs: Any) -> list[float]:
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops") as caught:
        with_function(module, function).score(GROUPS, step=3)
    where = f"(test_compose.py, line {function.__code__.co_firstlineno + 1})"
    assert caught.value.__notes__ == [f"This was raised by the reward function 'my_rewards.mine' {where} in step 4."]


async def coroutine(completions: Any, **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


async def short_coroutine(**kwargs: Any) -> list[float]:
    return [1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "is a int"),
        (SimpleNamespace, "is a type"),
        (lambda prompts, completions: [0.0], r"does not take \*\*kwargs"),
    ],
)
def test_uncallable_functions_are_refused_when_loading(module: ModuleType, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_function(module, value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("function", "not a dotted path"),
        ("my rewards.function", "not a dotted path"),
        ("no_such_module.function", "no module 'no_such_module'"),
        ("medvqa_rl.no_such.function", "no module 'medvqa_rl.no_such'"),
        ("medvqa_rl.rewards.no_such", "has no 'no_such'"),
    ],
)
def test_unknown_functions_are_refused_when_loading(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards(RewardsConfig(functions={path: 1.0}))


def test_functions_in_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(
        "def always(completions, **kwargs):\n    return [1] * len(completions)\n"
    )
    (tmp_path / "broken_rewards_of_a_test.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rewards = Rewards(RewardsConfig(format=0, correctness=0, functions={"rewards_of_a_test.always": 1.0}))
    assert rewards.names == ("always",)
    np.testing.assert_array_equal(rewards.score(GROUPS, step=0).total, np.ones((2, 3)))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        Rewards(RewardsConfig(functions={"broken_rewards_of_a_test.always": 1.0}))


def test_two_parts_of_one_name_are_refused(module: ModuleType) -> None:
    module.format = lambda **kwargs: [0.0]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Two reward parts are called 'format'"):
        Rewards(RewardsConfig(functions={"my_rewards.format": 1.0}))
    assert Rewards(RewardsConfig(format=0, functions={"my_rewards.format": 1.0})).names == ("correctness", "format")


def test_no_part_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="No reward is enabled"):
        Rewards(RewardsConfig(format=0, correctness=0))


def test_every_part_has_a_weight_in_the_settings() -> None:
    assert PARTS.keys() == RewardsConfig().weights.keys()


def test_a_letter_is_wrong_where_the_options_were_hidden() -> None:
    hidden = group(GOOD, "<think>x</think><answer>cyst</answer>")
    hidden.prompt = replace(hidden.prompt, template="open_ended")
    config = RewardsConfig(format=0, cwr=1, length_target=1, open_correctness="exact")
    scores = Rewards(config).score([hidden], step=0, count_tokens=len)
    np.testing.assert_array_equal(scores.parts["correctness"], [[0, 1]])
    np.testing.assert_array_equal(scores.parts["cwr"], [[0, 1]])
