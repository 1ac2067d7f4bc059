"""The embedded language model as it is shipped: small, standard files, and worse fluency scores higher.

Run: pytest tests/phantom/test_lm.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.embedded import ASSETS
from medvqa_rl.core.randomness import Draws
from medvqa_rl.evaluation.measures.fluency import LanguageModel, load_language_model
from medvqa_rl.evaluation.measures.instruments import load_instruments
from medvqa_rl.phantom import lm
from medvqa_rl.phantom.lm import build_lm, cut_short, examine, reference_text, shuffled_words


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_language_model("phantom:lm", "cpu")


def nats(model: LanguageModel, text: str) -> float:
    """Per token."""
    (found,) = model.score([text])
    return found.nll / found.num_tokens


def test_standard_files_of_at_most_half_a_million_weights() -> None:
    weights = load_file(ASSETS / "lm" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in weights.values()) <= 500_000


def test_the_likelihood_equals_that_of_the_stock_model(model: LanguageModel) -> None:
    text = reference_text(0, "held out", 3)
    plain = AutoModelForCausalLM.from_pretrained(ASSETS / "lm", dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "lm", local_files_only=True)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        mean = float(plain(input_ids=ids, labels=ids).loss)
    assert nats(model, text) == pytest.approx(mean, abs=1e-5)


def test_less_fluent_texts_have_higher_perplexity(model: LanguageModel) -> None:
    found = examine(model, count=40)
    assert found["held out"] < 2.0 < found["cut short"] < found["shuffled"] / 50
    for index in range(20):
        text = reference_text(0, "held out", index)
        words = text.split()
        repeated = " ".join([*words[:4], words[3], words[3], *words[4:]])
        garbled = text.replace("the", "teh").replace("is", "si")
        assert nats(model, text) < min(nats(model, repeated), nats(model, garbled)), text


def test_reference_texts_have_no_tags_and_damaged_texts_differ() -> None:
    text = reference_text(0, "held out", 0)
    assert "<" not in text and text == reference_text(0, "held out", 0) != reference_text(0, "train", 0)
    assert sorted(shuffled_words(text, Draws("x", 0)).split()) == sorted(text.split())
    cut = cut_short(text, Draws("x", 0))
    assert text.startswith(cut) and 0 < len(cut) <= len(text)


def test_evaluations_record_the_language_model(model: LanguageModel) -> None:
    instruments = load_instruments(EvalConfig(perplexity_model="phantom:lm"), "cpu")
    assert instruments.language_model is not None and instruments.language_model.name == "phantom:lm"


def test_the_recipe_trains_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = AutoTokenizer.from_pretrained(ASSETS / "lm", local_files_only=True)
    monkeypatch.setattr(lm, "build_tokenizer", lambda: shipped)  # the same, built from 4,000 texts
    monkeypatch.setattr(lm, "examine", lambda model: examine(model, count=10))
    for name in ("one", "two"):
        build_lm(tmp_path / name, steps=50 if name == "one" else 1)
    (row,) = [json.loads(line) for line in (tmp_path / "one" / "lm.jsonl").read_text().splitlines()]
    assert row["step"] == 50
    first, second = (json.loads((tmp_path / name / "lm.json").read_text()) for name in ("one", "two"))
    assert first["held out"] < 0.2 * second["held out"] < 0.2 * math.exp(8)
    with pytest.raises(ValueError, match="already exists: choose another with --output"):
        build_lm(tmp_path / "one")
