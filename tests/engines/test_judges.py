"""Judges behind a real ``vllm serve``, which constrains replies, and a real language model as judge and instrument."""

from __future__ import annotations

import json
import math
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import JudgeConfig
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.data.phantom.reasonings import draw_reasoning
from medvqa_rl.evaluation.measures.fluency import load_language_model
from medvqa_rl.rewards.judges import JudgeRequest
from medvqa_rl.rewards.judges.endpoint import EndpointJudge
from medvqa_rl.rewards.judges.load import load_judge, load_judges
from medvqa_rl.rewards.judges.prompts import ENDPOINT
from medvqa_rl.rewards.judges.rubric import COHERENCE, CORRECTNESS, REASONING, Rubric, parse_yes_no
from tests.engines.engine import Serving, running

RUBRICS = (COHERENCE, REASONING, CORRECTNESS)


def cases(count: int) -> list[JudgeRequest]:
    """Reasoning of the phantom world: references, changed and damaged ones, each with the first option as answer."""
    texts = [draw_reasoning(0, "held out", index) for index in range(count)]
    return [
        JudgeRequest(
            text.sample.question,
            text.sample.options,
            text.text,
            answer=text.sample.options[0] if text.sample.options else "yes",
            gold=text.sample.gold,
        )
        for text in texts
    ]


def at(server: Serving, **settings: Any) -> JudgeConfig:
    given = {"model": "phantom:instruct", "cache": False, "concurrency": 4, "timeout": 120.0} | settings
    return JudgeConfig(endpoint=f"{server.url}/v1", **given)


def served_name(server: Serving) -> str:
    """The name under which the server serves its model."""
    with urllib.request.urlopen(f"{server.url}/v1/models") as reply:
        return str(json.loads(reply.read())["data"][0]["id"])


def unread(judge: EndpointJudge, requests: list[JudgeRequest]) -> int:
    return sum(not grade.is_scored for grade in judge.grade(requests))


def check_constraints(config: JudgeConfig, requests: list[JudgeRequest]) -> None:
    """Every verdict can be read, on every rubric; without the constraint hardly any can."""
    for rubric in RUBRICS:
        judge = EndpointJudge(config, "none", rubric)
        judge.check()
        assert unread(judge, requests) == 0, rubric.name
        judge._constraint = {}
        assert unread(judge, requests) > len(requests) / 2, rubric.name


def test_constrained_verdicts_can_all_be_read(server):
    check_constraints(at(server, model=served_name(server)), cases(6))


def test_a_server_that_serves_another_model(server):
    served = re.escape(served_name(server))
    with pytest.raises(ValueError, match=rf"does not serve the judge's model 'another', but {served}.*: set judge"):
        load_judge(at(server, model="another"))


def test_a_server_that_refuses_a_constraint_is_asked_without(server, monkeypatch):
    """The refusal is the server's own; the free text of this model is no verdict, which is said in one sentence."""
    impossible = {"structured_outputs": {"choice": []}}
    monkeypatch.setattr(Rubric, "constraint", property(lambda rubric: impossible))
    config = at(server, model=served_name(server), max_retries=0)
    with pytest.raises(
        ValueError, match=r"refuses structured_outputs \(HTTP 400: .+\), and without it does not answer as it should"
    ):
        load_judge(config)
    monkeypatch.setattr(Rubric, "parse", lambda rubric, text: parse_yes_no("Yes"))
    said: list[str] = []
    judge = load_judges(config, [COHERENCE], say=said.append)["coherence"]
    assert len(said) == 1 and "refuses structured_outputs (HTTP 400: " in said[0]
    assert judge.identity.prompt_hash == ENDPOINT.hash
    assert [grade.score for grade in judge.grade(cases(2))] == [1, 1]


@pytest.fixture(scope="module")
def real(smollm2, tmp_path_factory) -> Iterator[Serving]:
    words = ["vllm", "serve", str(smollm2), "--served-model-name", "smollm2", "--dtype", "float32"]
    with running(words, tmp_path_factory.mktemp("smollm2") / "log.txt") as started:
        yield started


@pytest.mark.slow
def test_a_real_language_model_gives_verdicts(real):
    check_constraints(at(real, model="smollm2"), cases(12))


@pytest.mark.slow
def test_a_real_judge_that_is_not_worth_using(real, smollm2, tmp_path, monkeypatch):
    """SmolLM2 says No to everything: calibration says so, behind an endpoint and locally, and training warns."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    where = {"smollm2": ["--endpoint", f"{real.url}/v1"], str(smollm2): []}
    for judge, options in where.items():
        result = CliRunner().invoke(
            app, ["judge", "calibrate", "--judge", judge, *options, "--count", "24", "--no-policies"]
        )
        assert result.exit_code == 0, result.output
        assert "Not worth using: it says No to all 24 texts of phantom" in " ".join(result.output.split())
        given = {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": "phantom:instruct", "device": "cpu"},
            "rollout": {"num_generations": 2, "max_completion_length": 24},
            "rewards": {"semantic": 1.0, "reasoning": 1.0},
            "judge": {"model": judge, "device": "auto"} | ({"endpoint": options[1]} if options else {}),
            "train": {"steps": 1, "prompts_per_step": 1},
        }
        path = tmp_path / "config.yaml"
        path.write_text(write_yaml(given), encoding="utf-8")
        result = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
        assert result.exit_code == 0, result.output
        assert "which rewards, should not. Not worth using: it says No to all 24" in " ".join(result.output.split())


@pytest.mark.slow
def test_levels_and_words_of_a_real_model_equal_plain_forward_passes(smollm2):
    """Of a local judge, against one forward pass per answer with the tokens of the chat template."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    requests = cases(3)
    judges = load_judges(JudgeConfig(model=str(smollm2), device="cpu", cache=False), RUBRICS)

    def log_prob(text: str, answer: str) -> float:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        given, whole = (tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, prompt + answer))
        with torch.no_grad():
            log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(log_probs[i - 1, whole[i]]) for i in range(len(given), len(whole)))

    for request, grade in zip(requests, judges["coherence"].grade(requests)):
        text = COHERENCE.render(request)
        assert grade.margin == pytest.approx(log_prob(text, "Yes") - log_prob(text, "No"), abs=1e-3)
    for rubric in (REASONING, CORRECTNESS):
        for request, grade in zip(requests, judges[rubric.name].grade(requests)):
            values = [log_prob(rubric.render(request), f'{{"score": {level}') for level in range(4)]
            assert grade.score == values.index(max(values))
            total = sum(math.exp(value - max(values)) for value in values)
            shares = [f"{math.exp(value - max(values)) / total:.2f}" for value in values]
            assert grade.reason == f"P(0 to 3) = {', '.join(shares)}"


TEXTS = [
    "Chest radiography is usually the first examination in a patient with shortness of breath. The heart is not "
    "enlarged, and both lungs are clear.",
    "The scan shows a small infarct in the left hemisphere; no haemorrhage is seen.",
    "Yes.",
    "lungs the clear are both, enlarged not heart is The",
]


@pytest.mark.slow
def test_perplexity_equals_an_independent_computation(smollm2, tmp_path):
    """Of texts token by token, with nothing but the logits of prefixes; then of an evaluation's file of answers."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def nll(text: str) -> tuple[float, int]:
        tokens, total = tokenizer(text, add_special_tokens=False).input_ids, 0.0
        for index, token in enumerate(tokens):
            with torch.no_grad():
                logits = model(torch.tensor([[tokenizer.bos_token_id, *tokens[:index]]])).logits[0, -1].double()
            total -= float(logits[token] - logits.exp().sum().log())
        return total, len(tokens)

    measured = load_language_model(str(smollm2), "cpu").score(TEXTS)
    for text, found in zip(TEXTS, measured):
        total, count = nll(text)
        assert found.num_tokens == count and found.nll == pytest.approx(total, rel=1e-4)
    prose, jumble = (found.nll / found.num_tokens for found in (measured[0], measured[3]))
    assert prose + 1 < jumble
    given = {
        "output_dir": str(tmp_path),
        "model": {"path": "phantom:instruct", "device": "cpu"},
        "data": {"num_test": 8},
        "rollout": {"max_completion_length": 48},
        "eval": {"perplexity_model": str(smollm2), "bootstrap": 50},
    }
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(given), encoding="utf-8")
    result = CliRunner().invoke(app, ["eval", str(path), "--output", str(tmp_path / "eval")])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    sums = [nll(re.sub("</?(think|answer)>", " ", row["output"]).strip()) for row in rows]
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    expected = math.exp(sum(total for total, _ in sums) / sum(count for _, count in sums))
    assert results["perplexity"]["value"] == pytest.approx(expected, rel=1e-3)
