"""What trackers receive, and that nothing leaves the machine by default. W&B and Trackio are replaced by fakes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate.state import PartialState
from PIL import Image
from toy import ToyData, read_metrics, toy_config

from medvqa_rl.config import Config
from medvqa_rl.config.sharing import shareable
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run.errors import NonFiniteError
from medvqa_rl.learning.run.trackers import COLUMNS, Trackers


class Recorder:
    """A fake of a tracker's package and its run, which records every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.Table = self.Image = lambda *args, **kwargs: SimpleNamespace(args=args, **kwargs)

    def __getattr__(self, name: str) -> Callable[..., Recorder]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call

    def all(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture(autouse=True)
def accelerate_state() -> None:
    """Accelerate's trackers need its state, which a run has."""
    PartialState(cpu=True)


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Recorder]:
    recorder = Recorder()
    module: Any = ModuleType(request.param)
    for name in ("Table", "Image", "init"):
        setattr(module, name, getattr(recorder, name))
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("WANDB_ERROR_REPORTING", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    return request.param, recorder


def logged(name: str, recorder: Recorder) -> list[dict[str, Any]]:
    """The logged values, with their step."""
    if name == "wandb":
        return [args[0] for args, _ in recorder.all("log")]
    return [{"step": kwargs["step"], **args[0]} for args, kwargs in recorder.all("log")]


def run_toy(folder: Path, tmp_path: Path, name: str, **changes: Any) -> Path:
    settings = {"steps": 3, "trackers": [name], "eval_steps": 3, **changes}
    return train(toy_config(folder, tmp_path / "run", train=settings), train_set=ToyData(), val_set=ToyData(2))


def test_only_numbers_by_default_and_offline(
    tiny_folder: Callable[[str], Path], tmp_path: Path, tracker: tuple[str, Recorder]
) -> None:
    name, recorder = tracker
    run = run_toy(tiny_folder("qwen2_vl"), tmp_path, name)
    lines = [{k: v for k, v in json.loads(line).items() if v is not None} for line in (run / "metrics.jsonl").open()]
    assert logged(name, recorder) == lines
    assert all(isinstance(value, int | float) for row in logged(name, recorder) for value in row.values())
    ((_, given),) = recorder.all("init")
    assert str(tmp_path) not in json.dumps(given["config"]) and given["config"]["train.steps"] == 3
    if name == "wandb":
        assert (
            given["mode"] == "offline" and given["dir"] == str(run) and os.environ["WANDB_ERROR_REPORTING"] == "false"
        )
        quiet = given["settings"]
        assert all(quiet[key] for key in quiet if "disable" in key) and quiet["console"] == "off"
        assert not quiet["x_save_requirements"]
        assert recorder.all("finish") == [((), {"exit_code": 0})]
    else:
        assert "space_id" not in given and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert recorder.all("finish") == [((), {})]


@pytest.mark.parametrize("what", ["texts", "images"])
def test_samples_are_logged_only_if_enabled(
    tiny_folder: Callable[[str], Path], tmp_path: Path, tracker: tuple[str, Recorder], what: str
) -> None:
    name, recorder = tracker
    run = run_toy(tiny_folder("qwen2_vl"), tmp_path, name, tracker_samples=what)
    (row,) = [row for row in logged(name, recorder) if "samples" in row]
    stored = [json.loads(line) for line in (run / "samples" / "step_000002.jsonl").open()]
    assert row["step"] == 2
    for column, key in (("completion", "completion"), ("prompt", "template")):
        cells = [cells[COLUMNS.index(column)] for cells in row["samples"].data]
        assert cells == [record[key] for record in stored]
    images = [value for key, value in row.items() if key.startswith("images")]
    flat = [image for value in images for image in (value if isinstance(value, list) else [value])]
    assert all(isinstance(image.args[0], Image.Image) for image in flat)
    assert len(flat) == (len({record["sample_id"] for record in stored}) if what == "images" else 0)


def test_a_resumed_run_continues_the_same_tracker_run(
    tiny_folder: Callable[[str], Path], tmp_path: Path, tracker: tuple[str, Recorder]
) -> None:
    name, recorder = tracker
    run_toy(tiny_folder("qwen2_vl"), tmp_path, name)
    config = toy_config(
        tiny_folder("qwen2_vl"), tmp_path / "run", train={"steps": 4, "trackers": [name], "eval_steps": 3}
    )
    train(config, train_set=ToyData(), val_set=ToyData(2), resume=True)
    first, second = (kwargs for _, kwargs in recorder.all("init"))
    key = "id" if name == "wandb" else "name"
    assert first[key] == second[key] and second["resume"] == "allow"
    assert logged(name, recorder)[-1]["step"] == 4


def test_online_if_enabled(tmp_path: Path, tracker: tuple[str, Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    name, recorder = tracker
    (tmp_path / "env.json").write_text('{"started": "now"}')
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    config = Config.model_validate({"train": {"trackers": [name], "tracker_online": True}})
    Trackers(tmp_path, config, first_step=0)
    if name == "wandb":
        assert recorder.all("init")[0][1]["mode"] == "online" and os.environ["WANDB_ERROR_REPORTING"] == ""
        return
    with pytest.raises(ValueError, match=r"TRACKIO_SPACE_ID would make Trackio upload the run.*tracker_online"):
        Trackers(tmp_path, Config.model_validate({"train": {"trackers": [name]}}), first_step=0)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "env.json").write_text('{"started": "now"}')
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    for module in ("torch.utils.tensorboard", "tensorboardX", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"train.trackers names {name}, which is not installed: pip install"):
        Trackers(tmp_path, Config.model_validate({"train": {"trackers": [name]}}), first_step=0)


def test_a_failed_run_is_marked(
    tiny_folder: Callable[[str], Path], tmp_path: Path, tracker: tuple[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, recorder = tracker

    def fail(*args: Any, **kwargs: Any) -> None:
        raise NonFiniteError("The loss is not finite.", (), has_valid_weights=False)

    monkeypatch.setattr("medvqa_rl.learning.collector.roll_out", fail)
    with pytest.raises(NonFiniteError):
        run_toy(tiny_folder("qwen2_vl"), tmp_path, name)
    assert recorder.all("finish") == [((), {"exit_code": 1} if name == "wandb" else {})]


def test_tensorboard_receives_samples_if_enabled(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = run_toy(tiny_folder("qwen2_vl"), tmp_path, "tensorboard", tracker_samples="images")
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    first = json.loads((run / "samples" / "step_000002.jsonl").read_text().splitlines()[0])
    text = events.Tensors(f"samples/{first['sample_id']}/0/text_summary")[0]
    assert first["question"] in text.tensor_proto.string_val[0].decode()
    image = events.Images(f"images/{first['sample_id']}/0")[0]
    assert (image.width, image.height) == (56, 56)
    assert len(read_metrics(run)) == 5


def test_shared_settings_contain_no_full_path(tmp_path: Path) -> None:
    model = {"path": str(tmp_path / "qwen"), "adapter": str(tmp_path / "runs" / "best")}
    config = Config.model_validate(
        {"output_dir": str(tmp_path / "x"), "model": model, "data": {"name": "vqa_rad", "path": str(tmp_path / "rad")}}
    )
    found = shareable(config.model_dump(mode="json"))
    assert [found[name] for name in ("output_dir", "model.path", "model.adapter", "data.path")] == [
        "x",
        "qwen",
        "best",
        "rad",
    ]
    assert str(tmp_path) not in json.dumps(found)
    hub = Config.model_validate({"model": {"path": "Qwen/Qwen2-VL-2B-Instruct"}})
    assert shareable(hub.model_dump(mode="json"))["model.path"] == "Qwen/Qwen2-VL-2B-Instruct"


def test_only_finite_metrics_are_logged(tmp_path: Path, tracker: tuple[str, Recorder]) -> None:
    name, recorder = tracker
    (tmp_path / "env.json").write_text('{"started": "now"}')
    trackers = Trackers(tmp_path, Config.model_validate({"train": {"trackers": [name]}}), first_step=0)
    trackers.log(3, {"a": 1, "b": float("nan"), "c": float("-inf"), "d": 0.5})
    assert logged(name, recorder) == [{"step": 3, "a": 1.0, "d": 0.5}]
