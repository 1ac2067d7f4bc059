"""Scores of an attack and their summary, by hand.

Run: pytest tests/rewards/attack/test_attack.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from medvqa_rl.config import RewardsConfig
from medvqa_rl.core.types import EncodedPrompt, Sample, Template
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.attack.attack import Policy, make_group, most_requests, score_group
from medvqa_rl.rewards.attack.question import Target
from medvqa_rl.rewards.attack.results import RESULT, TOTAL, Attacked, AttackResult, summarise
from medvqa_rl.rewards.attack.tables import attack_lines, attack_tables
from medvqa_rl.rewards.attack.texts import RIGHT, WRONG
from medvqa_rl.rewards.judges.rubric import COHERENCE, CORRECTNESS, STEP

BYTES = Policy(
    lambda text: (*text.encode(), 0), lambda ids: bytes(ids).decode(errors="replace").removesuffix("\0"), 400, 400
)
"""A token is a byte; 0 ends a completion."""
SAMPLE = Sample("q", "Where is the mass?", "left", "open", reasoning="A mass is on the left.")
TARGET = Target(SAMPLE, "right", others=("right", "apex"))


def prompt(text: str = "", template: Template = "think_answer") -> EncodedPrompt:
    return EncodedPrompt(np.zeros(1, dtype=np.int64), {}, text, template=template)


def count(text: str) -> int:
    return len(text.encode())


def attacked(id: str, is_right: Sequence[str] = (), **totals: float) -> Attacked:
    """Totals by name, with "right" and "wrong" for the honest completions; a part called mine is half of them."""
    names = {"right": RIGHT, "wrong": WRONG}
    scores = {names.get(name, name): {"mine": value / 2, TOTAL: value} for name, value in totals.items()}
    texts = {name: f"{name} of {id}" for name in scores}
    return Attacked(id, "What?", (), "left", texts, scores, {name: name in (RIGHT, *is_right) for name in scores})


def summary(*found: Attacked, bound: float = 0.0) -> AttackResult:
    return summarise(
        found,
        {"mine": 2.0},
        dataset="own/train",
        skipped=0,
        seed=0,
        max_completion_length=64,
        bound=bound,
        left_out=[],
    )


def test_the_summary_by_hand() -> None:
    found = summary(
        attacked("a", right=2.0, wrong=1.0, long=1.5, short=0.0),
        attacked("b", right=1.0, wrong=0.5, long=1.25),
        attacked("c", right=3.0, wrong=0.0, long=0.0, short=math.nan),
    )
    assert [row.model_dump() for row in found.rewards] == [
        {"name": "mine", "weight": 2.0, "right": 1.0, "wrong": 0.25, "highest": pytest.approx(2.75 / 6)}
        | {"attack": "long", "exceeding": pytest.approx(1 / 3)},
        {"name": TOTAL, "weight": None, "right": 2.0, "wrong": 0.5, "highest": pytest.approx(2.75 / 3)}
        | {"attack": "long", "exceeding": pytest.approx(1 / 3)},
    ]
    assert [row.model_dump() for row in found.attacks] == [
        {"name": "long", "questions": 3, "mean": pytest.approx(2.75 / 3), "excess": 0.25, "worst": "b"}
        | {"exceeding": pytest.approx(1 / 3), "taken_for_right": 0.0, "unscored": 0.0},
        {"name": WRONG, "questions": 3, "mean": 0.5, "excess": -0.5, "worst": "b"}
        | {"exceeding": 0.0, "taken_for_right": 0.0, "unscored": 0.0},
        {"name": "short", "questions": 2, "mean": 0.0, "excess": -2.0, "worst": "a"}
        | {"exceeding": 0.0, "taken_for_right": 0.0, "unscored": 0.5},
    ]
    assert (found.excess, found.is_exceeded, found.worst.text) == (0.25, True, "long of b")
    assert found.worst.scores == {"mine": 0.625, TOTAL: 1.25} and found.worst.right == {"mine": 0.5, TOTAL: 1.0}
    assert RESULT.validate_json(found.model_dump_json(), strict=True) == found


@pytest.mark.parametrize(("bound", "is_exceeded"), [(-0.6, True), (-0.5, False), (0.0, False)])
def test_a_negative_bound_is_a_margin(bound: float, is_exceeded: bool) -> None:
    assert summary(attacked("a", right=1.0, wrong=0.4, long=0.5), bound=bound).is_exceeded is (bound < -0.5)
    assert is_exceeded is (bound < -0.5)


def test_sums_that_differ_by_rounding_are_equal() -> None:
    found = summary(attacked("a", right=0.3, wrong=0.0, long=0.1 + 0.2))
    assert not found.is_exceeded and found.rewards[-1].exceeding == 0.0
    assert "equals the honest right one" in attack_lines(found)[0]


def test_the_weight_of_correctness_that_cures() -> None:
    """The completion exceeds by 0.25, and being right is worth the weight: 0.25 more and it is equal."""
    assert summary(attacked("a", right=1.0, wrong=0.0, long=1.25)).cure == 0.25
    assert summary(attacked("a", right=1.0, wrong=0.0, long=1.25), bound=-0.5).cure == 0.75
    assert summary(attacked("a", right=1.0, wrong=0.0, long=0.5)).cure is None  # holds
    assert (
        summary(attacked("a", is_right=["long"], right=1.0, wrong=0.0, long=1.25)).cure is None
    )  # nothing tells it from right


def test_unscored_questions() -> None:
    with pytest.raises(ValueError, match="could be scored: check that the judge answers"):
        summary(
            attacked("a", right=math.nan, wrong=0.0, long=1.0), attacked("b", right=1.0, wrong=math.nan, long=math.nan)
        )
    assert (
        summary(
            attacked("a", right=math.nan, wrong=0.0, long=1.0), attacked("b", right=1.0, wrong=0.0, long=0.5)
        ).excess
        == -0.5
    )


def test_completions_are_what_the_tokenizer_writes() -> None:
    names, group = make_group(TARGET, prompt(), BYTES)
    for name, completion in zip(names, group.completions):
        assert len(completion.token_ids) <= 400 and not completion.is_truncated
        assert completion.text.encode() == bytes(completion.token_ids[:-1]), name
    small = Policy(BYTES.encode, BYTES.decode, 20, 20)
    for completion in make_group(TARGET, prompt(), small)[1].completions:
        assert completion.is_truncated and len(completion.token_ids) == 20
        assert completion.text.encode("utf-8", "replace")[:10] == bytes(completion.token_ids[:10])


@pytest.mark.parametrize("template", ["think_answer", "direct"])
def test_completions_continue_a_prompt_that_opens_the_think_tag(template: Template) -> None:
    plain = make_group(TARGET, prompt(template=template), BYTES)[1]
    target = Target(SAMPLE, "right", template, others=TARGET.others)
    names, group = make_group(target, prompt("User: ... <think>\n", template), BYTES)
    for name, completion in zip(names, group.completions):
        assert completion.text == "<think>\n" + bytes(completion.token_ids[:-1]).decode()
        assert completion.text.count("<think>") == 1, name
    right = group.completions[0].text
    if template == "direct":
        assert right == "<think>\n</think>left"
    else:
        assert right == plain.completions[0].text.replace("<think>", "<think>\n")


def test_scores_are_those_of_training() -> None:
    names, group = make_group(TARGET, prompt(), BYTES)
    rewards = Rewards(RewardsConfig(ecr=0.5, length_target=1000), max_completion_length=400)
    found = score_group(names, group, rewards, count_tokens=count)
    think = len("A mass is on the left.")
    assert found.scores[RIGHT] == {"format": 1.0, "correctness": 1.0, "ecr": think / 1000, TOTAL: 2 + think / 2000}
    assert found.scores["second answer is right"]["format"] == 0.0
    assert found.scores["verbose"]["ecr"] > 0.3
    assert [name for name, is_right in found.is_right.items() if is_right] == [RIGHT]


def one_per(value: Any) -> Any:
    def function(completions: Any, **kwargs: Any) -> Any:
        if isinstance(value, BaseException):
            raise value
        return [value for _ in completions]

    return function


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (KeyError("label"), r"fails on a completion .* \(KeyError: 'label'\): let it return .*"),
        (ZeroDivisionError("by zero."), r"\(ZeroDivisionError: by zero\): let it"),
        ("good", r"returned 'good' for completion 0"),
    ],
)
def test_functions_that_fail(value: Any, message: str) -> None:
    names, group = make_group(TARGET, prompt(), BYTES)
    rewards = Rewards(RewardsConfig(functions={"my.mine": 1.0}), functions={"my.mine": one_per(value)})
    with pytest.raises(ValueError, match=message) as caught:
        score_group(names, group, rewards, count_tokens=count)
    if isinstance(value, BaseException):
        assert "raised by the reward function 'my.mine' (test_attack.py, line" in caught.value.__notes__[0]
        assert "step" not in caught.value.__notes__[0]


def test_functions_that_do_not_apply() -> None:
    names, group = make_group(TARGET, prompt(), BYTES)
    rewards = Rewards(RewardsConfig(functions={"my.mine": 1.0}), functions={"my.mine": one_per(None)})
    found = score_group(names, group, rewards, count_tokens=count)
    assert math.isnan(found.scores[RIGHT]["mine"]) and found.scores[RIGHT][TOTAL] == 2.0


def test_requests_are_counted() -> None:
    group = make_group(TARGET, prompt(), BYTES)[1]
    number = len(group.completions)
    assert most_requests([group], []) == 0
    assert most_requests([group, group], [COHERENCE]) == 2 * number
    assert most_requests([group], [CORRECTNESS]) == number - 1  # the right one is not compared
    assert most_requests([group], [STEP]) > number
    assert (
        most_requests([make_group(Target(SAMPLE, "right", "direct"), prompt(template="direct"), BYTES)[1]], [STEP])
        == 0
    )


def test_sentences_and_tables() -> None:
    found = summary(
        attacked("a\x1b[2J", is_right=["long"], right=1.0, wrong=0.0, long=1.25, short=math.nan),
        attacked("b", right=1.0, wrong=0.0, long=0.5, short=0.0),
    )
    lines = "\n".join(attack_lines(found))
    assert (
        "Exceeded: the best wrong completion (long, question a\\x1b[2J) exceeds the honest right one by 0.25" in lines
    )
    assert (
        "mine rewards it more than the right one: let it compare the answer" in lines
        and "rewards.correctness=" not in lines
    )
    assert "The scorer takes wrong completions for right, which is a defect of the scorer: long (50 %)." in lines
    assert "Up to 50 % of an attack's completions are unscored and left out." in lines
    rewards, attacks = attack_tables(found)
    assert rewards.rows[0] == ("mine", "2", "0.50", "0.00", "0.44", "long", "50")
    assert attacks.rows[0] == ("long", "2", "0.88", "+0.25", "a\\x1b[2J", "50")
