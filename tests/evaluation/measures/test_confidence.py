"""Confidence of answers: hand-computed numbers, scipy, and the probabilities of a real forward.

Run: pytest tests/evaluation/measures/test_confidence.py
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from medvqa_rl.config import DataConfig, EvalConfig, ModelConfig
from medvqa_rl.core.answers import answer_span, parse_completion
from medvqa_rl.core.prompts import INSTRUCTIONS
from medvqa_rl.core.text import is_abstention
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.answering import answer_all
from medvqa_rl.evaluation.measures.confidence import (
    answer_probability,
    auroc,
    confidence_summary,
    expected_calibration_error,
    risks,
    vote_share,
)
from medvqa_rl.evaluation.records import EvalRecord, SampledAnswer
from medvqa_rl.evaluation.scoring import AnswerSettings
from medvqa_rl.models.loading import load_policy
from medvqa_rl.rollout.decode import RolloutEngine
from tests.records import make_record

CONFIDENCES = [0.95, 0.9, 0.9, 0.6, 0.55, 0.2]
RIGHT = [True, True, False, True, False, False]


def test_expected_calibration_error() -> None:
    error, bins = expected_calibration_error(CONFIDENCES, RIGHT, bins=5)
    # (0.8, 1]: 0.95, 0.9, 0.9, two of three right; (0.4, 0.6]: 0.6, 0.55, one right; (0, 0.2]: 0.2, wrong.
    assert [(row["low"], row["high"], row["n"]) for row in bins] == [(0.0, 0.2, 1), (0.4, 0.6, 2), (0.8, 1.0, 3)]
    assert error == pytest.approx((1 * 0.2 + 2 * abs(0.5 - 0.575) + 3 * abs(2 / 3 - 2.75 / 3)) / 6, abs=1e-12)
    assert expected_calibration_error([0.0, 1.0], [False, True])[0] == 0
    assert math.isnan(expected_calibration_error([], [])[0])


def test_risk_against_coverage() -> None:
    # The two answers of 0.9 are one right and one wrong, in random order: half an error each.
    assert risks(CONFIDENCES, RIGHT) == pytest.approx([0, 0.5 / 2, 1 / 3, 1 / 4, 2 / 5, 3 / 6], abs=1e-12)
    assert risks([0.5] * 4, [True, False, False, False]) == pytest.approx([0.75] * 4, abs=1e-12)
    assert risks([], []) == []


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=2, max_size=30))
def test_auroc_equals_the_u_statistic(pairs: list[tuple[float, bool]]) -> None:
    sure, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = auroc(sure, right)
    if all(right) or not any(right):
        assert math.isnan(found)
        return
    positive = [value for value, is_right in pairs if is_right]
    negative = [value for value, is_right in pairs if not is_right]
    expected = mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    assert found == pytest.approx(expected, abs=1e-12)


def test_votes_of_sampled_answers_are_another_confidence() -> None:
    def sampled(*votes: str | None, gold: str = "B") -> tuple[SampledAnswer, ...]:
        return tuple(SampledAnswer("", vote, vote, vote == gold, 3, False) for vote in votes)

    right = make_record(is_correct=True, choice="B", sampled=sampled("B", "B", "A", None), image_key="1")
    wrong = make_record(is_correct=False, choice="A", sampled=sampled("B", "A", "A", "A"), image_key="2")
    none = make_record(is_correct=False, choice=None, sampled=sampled("B", "B", "A", "A"), image_key="3")
    assert [vote_share(record) for record in (right, wrong, none)] == [0.5, 0.75, None]
    open_answer = make_record(is_correct=False, answer_type="open", answer="The Left lung.", choice=None)
    votes = sampled("left lung", "right lung", gold="heart")
    assert vote_share(replace(open_answer, sampled=votes)) == 0.5
    summary = confidence_summary([right, wrong, none], EvalConfig())["votes"]
    assert (summary["n"], summary["auroc"], summary["brier"]) == (2, 0.0, (0.25 + 0.5625) / 2)


def test_summary_of_records() -> None:
    records = [
        make_record(sample_id=f"q{index}", image_key=f"i{index}", is_correct=right, answer_probability=sure)
        for index, (sure, right) in enumerate(zip(CONFIDENCES, RIGHT))
    ]
    records.append(make_record(sample_id="unsure", is_correct=False, answer="I cannot tell", answer_type="open"))
    records.append(make_record(sample_id="declined", is_correct=False, answer="Cannot tell.", answer_type="open"))
    records.append(make_record(sample_id="failed", is_correct=None))
    summary = confidence_summary(records, EvalConfig())
    assert (summary["n"], summary["accuracy"]) == (6, 0.5)
    brier = (0.05**2 + 0.1**2 + 0.9**2 + 0.4**2 + 0.55**2 + 0.2**2) / 6
    assert summary["brier"] == pytest.approx(brier, abs=1e-12)
    assert summary["brier_low"] < brier < summary["brier_high"]
    assert summary["aurc"] == pytest.approx((0.25 + 1 / 3 + 0.25 + 0.4 + 0.5) / 6, abs=1e-12)
    assert summary["accuracy_at"] == pytest.approx({"0.9": 0.6, "0.8": 0.6, "0.5": 2 / 3}, abs=1e-12)
    assert summary["abstained"] == pytest.approx(1 / 8) and summary["accuracy_answered"] == pytest.approx(3 / 7)
    empty = confidence_summary([make_record(is_correct=None)], EvalConfig())
    assert empty["n"] == 0 and math.isnan(empty["brier"]) and math.isnan(empty["abstained"])


@pytest.mark.parametrize("text", ["Cannot tell.", "I don't know", "cannot be determined", "weiß nicht", "无法判断"])
def test_answers_that_decline(text: str) -> None:
    assert is_abstention(text)


@pytest.mark.parametrize("text", ["no", "none", "know", "unknown mass", "B"])
def test_answers_that_do_not(text: str) -> None:
    assert not is_abstention(text)


@pytest.mark.parametrize("template", INSTRUCTIONS)
@given(st.text("<think></think><answer></answer> ab\n", max_size=60))
def test_the_span_is_the_parsed_answer(template: str, text: str) -> None:
    for completion in (text, f"<think>{text}</think><answer> {text} </answer>", f"<answer>{text}</answer>"):
        span = answer_span(completion, template)  # type: ignore[arg-type]
        answer = parse_completion(completion, template).answer  # type: ignore[arg-type]
        assert (None if span is None else completion[slice(*span)]) == answer


def chunks(pieces: Sequence[bytes]) -> object:
    """A decoder of tokens that stand for some bytes, as byte-level tokenizers have."""
    return lambda ids: b"".join(pieces[id] for id in ids).decode("utf-8", "replace")


def test_the_tokens_of_an_answer_are_found_also_within_characters() -> None:
    text = "<think>a</think><answer>两个 cysts</answer>"
    data = text.encode()
    drawn = random.Random(0)
    for _ in range(200):
        cuts = sorted(drawn.sample(range(1, len(data)), 12))
        pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)])]
        begin, end = answer_span(text) or (0, 0)
        first, last = len(text[:begin].encode()), len(text[:end].encode())
        starts = [0, *cuts]
        overlaps = [start < last and start + len(piece) > first for start, piece in zip(starts, pieces)]
        logps = [-float(2**-index) for index in range(len(pieces))]
        found = answer_probability(range(len(pieces)), logps, (begin, end), chunks(pieces))  # type: ignore[arg-type]
        expected = math.exp(sum(logp for logp, is_in in zip(logps, overlaps) if is_in))
        assert found == pytest.approx(expected, rel=1e-12)


def test_unknown_log_probabilities_give_no_confidence() -> None:
    pieces = [b"<answer>", b"B", b"</answer>"]
    assert answer_probability([0, 1, 2], [-1.0, math.nan, -1.0], (8, 9), chunks(pieces)) is None  # type: ignore[arg-type]


def test_evaluations_record_the_probability_of_the_answer() -> None:
    """The same as in a forward of the stock model over prompt and completion."""
    policy = load_policy(ModelConfig(path="phantom:instruct", device="cpu"))
    dataset = load_dataset(DataConfig(num_test=6, answer_types=("choice",)), "test")
    samples = [dataset[index] for index in range(6)]
    engine = RolloutEngine(policy)
    records: list[EvalRecord] = []
    answer_all(lambda: engine, samples, AnswerSettings(EvalConfig(), 64), save=records.extend)
    by_id = {record.sample_id: record for record in records}
    for group in engine.greedy(samples, max_completion_length=64, batch_size=6):
        (completion,) = group.completions
        ids = list(completion.token_ids)
        prompt = torch.from_numpy(group.prompt.input_ids)
        inputs = {name: torch.from_numpy(array) for name, array in group.prompt.image_inputs.items()}
        tokens = torch.cat([prompt, torch.tensor(ids)])[None]
        kinds = (tokens == policy.model.config.image_token_id).int()
        with torch.no_grad():
            logits = policy.model(input_ids=tokens, mm_token_type_ids=kinds, **inputs).logits[0, len(prompt) - 1 : -1]
        logps = logits.index_fill(-1, torch.tensor(engine.processor.suppressed_ids), -torch.inf).log_softmax(-1)
        # One letter between the tags, which are tokens of their own.
        place = [engine.processor.decode([id]) for id in ids].index("<answer>") + 1
        record = by_id[group.sample.id]
        assert engine.processor.decode([ids[place]]) == record.answer
        assert record.answer_probability == pytest.approx(logps[place, ids[place]].exp().item(), abs=1e-5)
    assert len({record.answer_probability for record in records}) == 6
