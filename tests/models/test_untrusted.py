"""Damaged and hostile checkpoints: one sentence, whatever their files hold, and in little time.

Run: pytest tests/models/test_untrusted.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import ASSETS, checkpoint_path
from medvqa_rl.evaluation.measures.fluency import load_language_model
from medvqa_rl.models import untrusted
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.loading import load_policy
from medvqa_rl.models.processor import Processor

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint."""
    return Path(shutil.copytree(checkpoint_path("instruct"), tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["[]", "7", "{", '"x"'])
def test_files_that_are_not_of_a_tokenizer_are_named(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    with pytest.raises(ValueError, match=r"The tokenizer or the image settings in .* cannot be read"):
        Processor.from_folder(model, Qwen2VL())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("preprocessor_config.json", {"patch_size": "x"}, "image settings in .* cannot be read"),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 10**12, "longest_edge": 10**13}},
            "image settings in .* cannot be read .*at least 1,000,000,000,000 pixels",
        ),
        ("preprocessor_config.json", {"patch_size": 2**70}, "image settings in .* cannot be read"),
        (
            "generation_config.json",
            {"eos_token_id": "x"},
            "eos_token_id 'x', but a token id or a list of ids is needed",
        ),
        ("generation_config.json", {"eos_token_id": [True]}, r"eos_token_id \[True\], but a token id"),
        ("config.json", {"vision_end_token_id": "x"}, r"config\.json cannot be read as a model"),
        ("config.json", {"text_config": 7}, r"config\.json cannot be read as a model"),
    ],
)
def test_values_of_another_type_are_refused(model: Path, name: str, change: dict[str, Any], message: str) -> None:
    edit(model / name, lambda value: value.update(change))
    with pytest.raises(ValueError, match=message):
        load_policy(ModelConfig(path=str(model), device="cpu"))


def test_weights_with_a_damaged_index_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "x.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}}))
    with pytest.raises(ValueError, match=r"The weights in .* cannot be loaded"):
        load_policy(ModelConfig(path=str(model), device="cpu"))


@pytest.mark.parametrize(
    "template", [LOOPS, "{{ 'x' * 3000000000 }}", "{% for i in range(99999) %}12345678901{% endfor %}"]
)
def test_a_template_that_takes_too_long_or_too_much_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "SECONDS", 1)
    with pytest.raises(ValueError, match="The chat template needs more than"):
        untrusted._render_within_limits(template)


@pytest.mark.parametrize("template", ["", "{{", "{{ raise_exception('no') }}", "{% generation %}x{% endgeneration %}"])
def test_other_templates_are_rendered_once_and_pass(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template in error passes too: the processor reports the error when it renders the template itself."""
    untrusted._render_within_limits.cache_clear()
    run, codes = subprocess.run, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        done = run(*args, **kwargs)
        codes.append(done.returncode)
        return done

    monkeypatch.setattr(untrusted.subprocess, "run", recording)
    untrusted._render_within_limits(template)
    untrusted._render_within_limits(template)
    assert codes == [0]


def test_the_template_of_a_checkpoint_is_tried(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "SECONDS", 1)
    (model / "chat_template.jinja").write_text(LOOPS)
    with pytest.raises(ValueError, match="The chat template needs more than"):
        Processor.from_folder(model, Qwen2VL())


def test_sizes_that_the_files_do_not_have_are_refused_before_memory_is_taken(model: Path) -> None:
    """Without its sizes, transformers builds a Qwen2-VL with 80 layers: 300 GB."""
    edit(model / "config.json", lambda config: config.pop("text_config"))
    with pytest.raises(ValueError, match=r"describes a model of 7\d,\d{3},\d{3},\d{3} weights, but the files hold 1,"):
        load_policy(ModelConfig(path=str(model), device="cpu"))


def test_a_language_model_with_sizes_that_its_files_do_not_have_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ASSETS / "lm", tmp_path / "lm"))
    edit(folder / "config.json", lambda config: config.update(n_embd=16384))
    with pytest.raises(ValueError, match=r"describes a model of \d+,\d{3},\d{3},\d{3} weights"):
        load_language_model(str(folder), "cpu")
