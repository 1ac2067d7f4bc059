"""What leaves this machine of the settings: no folder, host credential or key, and new text settings are hidden.

Run: pytest tests/config/test_sharing.py
"""

from __future__ import annotations

import json

import pytest

from medvqa_rl.config import Config
from medvqa_rl.config.schema import all_settings, resolve
from medvqa_rl.config.sharing import (
    ADDRESSES,
    FOLDERS,
    HIDDEN,
    HIDDEN_SETTINGS,
    MODELS,
    PLAIN,
    last_part,
    shareable,
    without_folders,
)

DECLARED = (PLAIN, FOLDERS, MODELS, ADDRESSES, HIDDEN_SETTINGS)


def free_text() -> set[str]:
    """The settings that take free text, or a list of it."""
    found = set()
    for path, field in all_settings():
        schema = resolve(field)
        kinds = [resolve(schema["items"]) if "items" in schema else schema]
        if any(kind.get("type") == "string" and not {"enum", "const"} & kind.keys() for kind in kinds):
            found.add(path.removeprefix("eval_") if path.startswith("eval_judge.") else path)
    return found


def test_every_setting_of_free_text_is_declared_once() -> None:
    """Decide for a new setting in config/sharing.py: until then its value is hidden."""
    declared = [name for names in DECLARED for name in names]
    assert sorted(declared) == sorted(free_text())


def test_folders_addresses_and_keys_are_reduced() -> None:
    secret = "/home/anna/patients"
    judge = {"model": f"{secret}/judge", "cache_dir": secret, "api_key_env": "MY_KEY"}
    config = Config.model_validate(
        {
            "output_dir": f"{secret}/run",
            "model": {"path": f"{secret}/qwen/", "adapter": f"{secret}/lora", "revision": "v1"},
            "data": {"name": "own", "path": secret, "image_folder": f"{secret}/scans", "families": ["side/level"]},
            "vllm": {"server_url": "http://anna:pass@gpu7:8000/x?token=1", "weights_dir": f"{secret}/w"},
            "judge": judge | {"endpoint": "https://anna:pass@judge.example/v1"},
            "eval_judge": judge | {"model": "microsoft/biogpt"},
            "eval": {"similarity": f"{secret}/minilm", "perplexity_model": "phantom:lm"},
            "train": {"trackers": ["wandb"], "steps": 7},
            "rewards": {"functions": {"mine.reward": 0.5}},
        }
    ).model_dump(mode="json")
    found = shareable(config)
    expected = {
        "output_dir": "run",
        "model.path": "qwen",
        "model.adapter": "lora",
        "model.revision": "v1",
        "data.name": "own",
        "data.path": "patients",
        "data.image_folder": "scans",
        "data.families": ["side/level"],
        "data.answer_types": ["choice", "closed", "open"],
        "vllm.server_url": "gpu7:8000",
        "vllm.weights_dir": "w",
        "judge.model": "judge",
        "judge.endpoint": "judge.example",
        "judge.api_key_env": HIDDEN,
        "eval_judge.model": "microsoft/biogpt",
        "eval_judge.cache_dir": "patients",
        "eval.similarity": "minilm",
        "eval.perplexity_model": "phantom:lm",
        "train.trackers": ["wandb"],
        "train.steps": 7,
        "rewards.functions.mine.reward": 0.5,
        "optimizer.betas": [0.9, 0.999],
        "data.hub": None,
    }
    assert {name: found[name] for name in expected} == expected
    assert not any(word in json.dumps(found) for word in ("/home", "anna", "pass:", "token=", "MY_KEY"))


@pytest.mark.parametrize(
    "settings",
    [
        {"judge": {"headers": "Bearer x"}},
        {"data": {"name": "/home/anna"}},
        {"train": {"trackers": ["wandb", "/home/anna"]}},
        {"data": {"path": ["/home/anna"]}},
        {"new": {"setting": "/home/anna"}},
    ],
)
def test_unknown_settings_and_values_are_hidden(settings: dict[str, object]) -> None:
    assert list(shareable(settings).values()) == [HIDDEN]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/b", "b"),
        ("/a/b/", "b"),
        (r"C:\\Users\\anna\\scans", "scans"),
        ("https://u:p@h/x?token=1", "x"),
        ("name", "name"),
        ("/", HIDDEN),
    ],
)
def test_last_part(path: str, expected: str) -> None:
    assert last_part(path) == expected


def test_messages_lose_their_folders() -> None:
    assert without_folders("There is no file '/home/anna/scans/a.png' in ~/x/y: see http://h/a/b or 1/2.") == (
        "There is no file 'a.png' in y: see http://h/a/b or 1/2."
    )
    assert without_folders(r"C:\Users\anna\scans is gone") == "scans is gone"
