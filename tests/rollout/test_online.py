"""Requests in one batch get what each gets alone; tests/cli/serve compares their answers with ``generate``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from medvqa_rl.rollout import online
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.online import Failed, OnlineEngine, Piece, Request, _safe_length
from medvqa_rl.rollout.sampling import pick_greedy, pick_tokens
from tests.models.families.stock import stock_inputs

LENGTH = 24


@dataclass
class Answer:
    """What a request was sent."""

    pieces: list[Piece] = field(default_factory=list)
    failed: str = ""

    def take(self, piece: Piece | Failed) -> None:
        if isinstance(piece, Failed):
            assert not self.failed
            self.failed = piece.message
        else:
            self.pieces.append(piece)

    def texts(self) -> list[str]:
        """The whole text of each completion, which must have ended once."""
        count = 1 + max(piece.completion for piece in self.pieces)
        parts = [[piece for piece in self.pieces if piece.completion == index] for index in range(count)]
        for own in parts:
            assert own[-1].finish and not any(piece.finish for piece in own[:-1])
        return ["".join(piece.text for piece in own) for own in parts]

    @property
    def logprobs(self) -> list[Any]:
        return [one for piece in self.pieces for one in piece.logprobs]


@pytest.fixture
def make_policy(tiny_policy):
    """Tiny policies whose completions end at various lengths: one token in eight is a stop token, not one in 350."""

    def make(*args, **settings):
        policy = tiny_policy(*args, seed=3, **settings)
        policy.processor.stop_ids = (policy.processor.eos_id, *range(0, 320, 8))
        return policy

    return make


def complete(policy: Any, requests: Sequence[Request], *, max_sequences: int = 16) -> list[Answer]:
    """The answers to requests that arrive together."""
    engine = OnlineEngine(policy, max_sequences=max_sequences, max_length=LENGTH)
    answers = []
    for request in requests:
        answer = Answer()
        answers.append(answer)
        request.send = answer.take
        engine.submit(request)
    with torch.no_grad():
        engine._receive()
        while engine._running or engine._waiting:
            engine._step()
    return answers


def ask(policy: Any, sample: Any, **settings: Any) -> Request:
    given = {"max_length": LENGTH} | settings
    return Request(policy.processor.encode(sample), lambda piece: None, **given)


VARIOUS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 5, "num_generations": 3},
    {"temperature": 1.3, "top_p": 0.8, "seed": 1, "num_generations": 2, "max_length": 9},
    {"temperature": 1.0, "seed": 2, "is_streamed": True, "top_logprobs": 2},
    {"max_length": 1},
    {"temperature": 1.0, "seed": 5, "num_generations": 4, "stop": ("a", "e")},
]


@pytest.mark.parametrize("arch", ["qwen2_vl", "gemma3"])
def test_answers_do_not_depend_on_the_requests_beside_them(make_policy, mixed_samples, arch):
    policy = make_policy(arch)
    samples = [mixed_samples[index % len(mixed_samples)] for index in range(len(VARIOUS))]

    def requests() -> list[Request]:
        return [ask(policy, sample, **settings) for sample, settings in zip(samples, VARIOUS)]

    alone = [complete(policy, [request])[0] for request in requests()]
    assert len({len(text) for answer in alone for text in answer.texts()}) > 4
    for settings, answer in zip(VARIOUS, alone):
        limit = settings.get("max_length", LENGTH)
        for number in range(settings.get("num_generations", 1)):
            own = [piece for piece in answer.pieces if piece.completion == number]
            count = sum(piece.num_tokens for piece in own)
            assert count <= limit and (own[-1].finish != "length" or count == limit)
    for size in (4, 7, 32):
        together = complete(policy, requests(), max_sequences=size)
        assert [answer.texts() for answer in together] == [answer.texts() for answer in alone]
        counts = [[sum(p.num_tokens for p in answer.pieces)] for answer in together]
        assert counts == [[sum(p.num_tokens for p in answer.pieces)] for answer in alone]


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen3_vl", "gemma3"])
def test_greedy_answers_equal_those_of_an_evaluation(make_policy, mixed_samples, arch):
    policy = make_policy(arch)
    expected = RolloutEngine(policy).greedy(mixed_samples, max_completion_length=LENGTH, batch_size=2)
    sampled = ask(policy, mixed_samples[0], temperature=0.9, top_p=0.5, seed=4)  # so that rows differ
    answers = complete(policy, [sampled, *(ask(policy, sample) for sample in mixed_samples)])[1:]
    for group, answer in zip(expected, answers, strict=True):
        completion = group.completions[0]
        assert answer.texts() == [completion.text]
        assert answer.pieces[0].finish == ("length" if completion.is_truncated else "stop")
        assert answer.pieces[0].num_tokens == len(completion.token_ids)


def test_a_seed_gives_the_same_answer_and_another_seed_another(make_policy, mixed_samples):
    policy = make_policy()

    def texts(sample: Any, seed: int) -> list[str]:
        return complete(policy, [ask(policy, sample, temperature=1.0, seed=seed, num_generations=3)])[0].texts()

    first, other = mixed_samples[0], mixed_samples[1]
    assert texts(first, 1) == texts(first, 1) != texts(first, 2)
    assert len({*texts(first, 1)}) == 3
    same_words = replace(first, images=other.images[:1])
    assert texts(same_words, 1) != texts(first, 1)


def test_a_distribution_is_that_of_a_rollout(make_policy, mixed_samples):
    """With its uniforms, top-p and temperature give the tokens of ``pick_tokens`` row by row."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator) * 2
    logits[4, 7] = logits[4, 31] = logits.max() + 1  # a tie
    uniforms = torch.rand(6, dtype=torch.float64, generator=generator)
    settings = [(0.7, 1.0), (1.0, 0.9), (1.3, 0.5), (1.0, 1.0), (0.0, 1.0), (2.0, 0.99)]
    requests = [Request(None, lambda piece: None, 1, temperature=t, top_p=p) for t, p in settings]  # type: ignore[arg-type]
    policy = make_policy()
    picker = OnlineEngine(policy, max_sequences=8, max_length=4)._picker(
        [online._Sequence(request, 0) for request in requests]
    )
    picked = pick_tokens(logits, uniforms, **picker.sampling._asdict())
    for row, (temperature, top_p) in enumerate(settings):
        one, u = logits[row : row + 1], uniforms[row : row + 1]
        is_greedy = temperature == 0
        expected = pick_greedy(one)[0] if is_greedy else pick_tokens(one, u, temperature=temperature, top_p=top_p)
        assert picked[row] == expected


def test_a_streamed_completion_is_the_whole_one(make_policy, mixed_samples):
    policy = make_policy()
    whole, streamed = (
        complete(policy, [ask(policy, mixed_samples[0], temperature=1.0, num_generations=3, is_streamed=streams)])[0]
        for streams in (False, True)
    )
    assert streamed.texts() == whole.texts()
    assert len(streamed.pieces) > len(whole.pieces) == 3


def test_a_completion_ends_before_a_stop_text(make_policy, mixed_samples):
    policy = make_policy()
    policy.processor.stop_ids = (policy.processor.eos_id,)
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    ((text,),) = [answer.texts() for answer in complete(policy, [ask(policy, mixed_samples[0], **settings)])]
    stop = text[len(text) // 2 :][:3]
    expected = text[: text.index(stop)]
    for streams in (False, True):
        request = ask(policy, mixed_samples[0], **settings, stop=("\0none", stop), is_streamed=streams)
        (answer,) = complete(policy, [request])
        assert answer.texts() == [expected] and answer.pieces[-1].finish == "stop"


@pytest.mark.parametrize(
    ("text", "stop", "safe"),
    [
        ("abc", (), "abc"),
        ("ab\ufffd", (), "ab"),
        ("abEN", ("END",), "ab"),
        ("abEN", ("END", "bENX"), "a"),
        ("abENx", ("END",), "abENx"),
        ("a\n", ("\n\n",), "a"),
        ("abEN\ufffd", ("ENÄ",), "ab"),
    ],
)
def test_what_may_still_change_is_held_back(text: str, stop: tuple[str, ...], safe: str) -> None:
    assert text[: _safe_length(text, stop)] == safe


def test_log_probabilities_equal_a_plain_forward_pass(make_policy, mixed_samples):
    policy = make_policy()
    requests = [
        ask(policy, mixed_samples[0], temperature=0.5, seed=1, top_logprobs=3),
        ask(policy, mixed_samples[1], top_logprobs=0),
        ask(policy, mixed_samples[2]),
    ]
    answers = complete(policy, requests)
    assert answers[2].logprobs == []
    for request, answer in zip(requests[:2], answers):
        tokens = [one.token for one in answer.logprobs]
        assert len(tokens) == answer.pieces[0].num_tokens
        with torch.no_grad():
            logits = policy.model(**stock_inputs(policy.model, request.prompt, tokens)).logits[0]
        start = len(request.prompt.input_ids) - 1
        expected = logits[start : start + len(tokens)].double().log_softmax(-1)
        for row, one in zip(expected, answer.logprobs):
            assert one.logp == pytest.approx(float(row[one.token]), abs=1e-4)
            values, ids = row.topk(request.top_logprobs)
            assert [token for token, _ in one.top] == ids.tolist()
            assert [logp for _, logp in one.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_cancelled_request_leaves_the_batch(make_policy, mixed_samples):
    policy = make_policy()
    policy.processor.stop_ids = (policy.processor.eos_id,)
    engine = OnlineEngine(policy, max_sequences=2, max_length=LENGTH)
    answers = [Answer() for _ in range(3)]
    requests = [
        ask(policy, sample, num_generations=2, temperature=1.0, is_streamed=True) for sample in mixed_samples[:3]
    ]
    for request, answer in zip(requests, answers):
        request.send = answer.take
        engine.submit(request)
    with torch.no_grad():
        engine._receive()
        for _ in range(4):
            engine._step()
        requests[0].is_cancelled = requests[1].is_cancelled = True
        count = len(answers[0].pieces)
        while engine._running or engine._waiting:
            engine._step()
    assert count == len(answers[0].pieces) > 0 and not answers[1].pieces
    assert engine._state is not None and engine._state.num_rows == engine._state.num_slots == 0
    alone = complete(policy, [ask(policy, mixed_samples[2], num_generations=2, temperature=1.0)])[0]
    assert answers[2].texts() == alone.texts()


def running(engine: OnlineEngine) -> threading.Thread:
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    return thread


def waiting_answer(request: Request) -> Callable[[], Answer]:
    """Make a request wake this thread; returns what waits for its end."""
    answer, done = Answer(), threading.Event()

    def take(piece: Piece | Failed) -> None:
        answer.take(piece)
        if isinstance(piece, Failed) or piece.finish:
            done.set()

    def wait() -> Answer:
        assert done.wait(20)
        return answer

    request.send = take
    return wait


def test_a_failure_ends_what_met_it_and_nothing_else(make_policy, mixed_samples, monkeypatch, capsys):
    policy = make_policy()
    policy.processor.stop_ids = (policy.processor.eos_id,)
    engine = OnlineEngine(policy, max_sequences=4, max_length=LENGTH)
    thread = running(engine)

    def answer() -> Answer:
        request = ask(policy, mixed_samples[0])
        wait = waiting_answer(request)
        engine.submit(request)
        return wait()

    expected = answer()
    prefill, next_logits = online.prefill, online.next_logits
    for error, message in (
        (FloatingPointError("The logits are not finite."), "The logits are not finite."),
        (torch.OutOfMemoryError("full"), "The memory of the device is full"),
        (KeyError("x"), "The server met a defect"),
    ):

        def fails(*args: Any, error: Exception = error) -> Any:
            raise error

        for name, real in (("prefill", prefill), ("next_logits", next_logits)):
            monkeypatch.setattr(online, name, fails)
            assert answer().failed.startswith(message)
            monkeypatch.setattr(online, name, real)
            assert answer() == expected
    assert "KeyError: 'x'" in capsys.readouterr().err
    engine.close()
    thread.join(20)
    assert not thread.is_alive()


def test_weights_that_diverged_are_named(make_policy, mixed_samples):
    policy = make_policy()
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(np.nan)
    engine = OnlineEngine(policy, max_sequences=4, max_length=LENGTH)
    thread = running(engine)
    request = ask(policy, mixed_samples[0])
    wait = waiting_answer(request)
    engine.submit(request)
    assert "logits that are not finite" in wait().failed
    engine.close()
    thread.join(20)


def test_closing_ends_what_runs_and_what_waits(make_policy, mixed_samples):
    policy = make_policy()
    policy.processor.stop_ids = (policy.processor.eos_id,)
    engine = OnlineEngine(policy, max_sequences=2, max_length=LENGTH)
    answers = []
    for sample in mixed_samples[:3]:
        request = ask(policy, sample, num_generations=2)
        answers.append(Answer())
        request.send = answers[-1].take
        engine.submit(request)
    engine._receive()
    with torch.no_grad():
        engine._step()
    engine.close()
    engine.run()
    assert [answer.failed for answer in answers] == ["The server was stopped."] * 3
