"""Reading what a launcher requests, and refusing settings that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.train import launch_command
from medvqa_rl.config import Config
from medvqa_rl.learning.distributed.launch import Launch, check_launch, read_launch

FILES = sorted((Path(__file__).parents[3] / "configs" / "launch").glob("*.yaml"))
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")


def environment(arguments: list[str]) -> dict[str, str]:
    """The environment that Accelerate's launcher sets; torchrun adds the number of ranks."""
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    world = {"WORLD_SIZE": str(args.num_processes), "RANK": "0", "LOCAL_RANK": "0"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args) | world
    args.deepspeed_fields_from_accelerate_config = "" if defaults is None else ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1] | world


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_launch_files_request_the_engine_in_their_name(path):
    found = read_launch(environment(["--config_file", str(path), "-m", "medvqa_rl", "train", "grpo.yaml"]))
    engine, *nodes = path.stem.split("_", 1)
    assert found == Launch(engine, 8 if nodes else 4)


def test_every_engine_has_a_file_for_one_and_two_machines():
    assert {path.stem for path in FILES} == {f"{engine}{nodes}" for engine in ENGINES for nodes in ("", "_2_nodes")}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gpus_option_requests_the_same(engine):
    config = Config.model_validate({"model": {"device": "cpu"}, "train": {"engine": engine}})
    command = launch_command(config, 4, ["train", "grpo.yaml", "train.steps=3", "--resume"])
    assert command[-6:] == ["-m", "medvqa_rl", "train", "grpo.yaml", "train.steps=3", "--resume"]
    assert read_launch(environment(command[3:])) == Launch(engine, 4)


def test_auto_is_ddp_and_one_process_needs_no_engine():
    config = Config.model_validate({"model": {"device": "cpu"}})
    assert read_launch(environment(launch_command(config, 2, ["train"])[3:])) == Launch("ddp", 2)
    assert "--multi_gpu" not in launch_command(config, 1, ["train"])
    assert read_launch({}) == Launch(None, 1)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="--gpus is 4, but torch finds 2 GPUs"):
        launch_command(Config(), 4, [])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="already started by a launcher"):
        launch_command(Config(), 2, [])


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "requests DeepSpeed ZeRO stage 1, but training supports"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "requests a deepspeed_config_file"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "requests offload_optimizer_device: nvme"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "requests offload_param_device: nvme"),
        (FSDP, "requests FSDP version 1"),
        (FSDP | {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "requests Megatron-LM"),
    ],
)
def test_unsupported_requests_are_refused(environ, message):
    with pytest.raises(ValueError, match=message) as error:
        read_launch(environ)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("changes", "launch", "message"),
    [
        (
            {"train": {"engine": "zero2"}},
            Launch(None, 1),
            "zero2, but only this one process was started",
        ),
        ({"train": {"engine": "zero2"}}, Launch("fsdp2", 2), "train.engine is zero2, but the launcher requests fsdp2"),
        ({}, Launch("ddp", 16), "There are 16 ranks but only 8 prompts per step"),
        ({}, Launch("ddp", 3), "A step has 8 prompts, which 3 ranks cannot share evenly"),
        ({"data": {"allow_text_only": True}}, Launch("fsdp2", 2), "under fsdp2 a rank whose questions have no image"),
        ({"rollout": {"engine": "graph"}}, Launch("zero3", 2), "zero3 gathers the weights into new memory"),
    ],
)
def test_settings_that_conflict_with_the_launcher(changes, launch, message):
    with pytest.raises(ValueError, match=message) as error:
        check_launch(Config.model_validate(changes), launch, 8)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("engine", ["auto", "ddp"])
def test_compatible_settings_are_accepted(engine):
    for launch in (Launch(None, 1), Launch("ddp", 4)):
        check_launch(Config.model_validate({"train": {"engine": engine}}), launch, 8)
    graph = Config.model_validate({"rollout": {"engine": "graph"}, "train": {"engine": "zero2"}})
    check_launch(graph, Launch("zero2", 2), 8)


def test_an_unknown_engine_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.yaml").write_text("train:\n  engine: zero1\n")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), "--gpus", "2"])
    assert result.exit_code == 2
    assert "train.engine is the text 'zero1', but must be auto, ddp, zero2, zero3 or fsdp2" in result.output


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "x"}, "^The environment variable WORLD_SIZE is 'x', but must be a whole number: unset it"),
        ({"WORLD_SIZE": "2.0", "RANK": "0"}, "WORLD_SIZE is '2.0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "\u0663"}, "WORLD_SIZE is"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK is 'one'"),
        ({"WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0 do not name"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2, but RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT are not set: start the "
            "processes with `accelerate launch`, torchrun or --gpus",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"},
            "MASTER_ADDR is not set: .* or unset WORLD_SIZE to run in one process",
        ),
        ({"RANK": "3"}, "RANK=3 and WORLD_SIZE=1 do not name one of the processes of a launch: unset both"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 do not name"),
    ],
)
def test_variables_that_name_no_process_are_refused(environ, message):
    with pytest.raises(ValueError, match=message):
        read_launch(environ)


def test_the_first_rank_of_one_process_is_a_single_process():
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1"}) == read_launch({"RANK": "0"}) == Launch(None, 1)
