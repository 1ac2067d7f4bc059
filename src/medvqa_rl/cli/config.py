"""The verbs ``medvqa-rl config ...``."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from medvqa_rl.cli.common import ConfigPath, Overrides, Verbs, verb

config_app = Verbs(help="Show and check settings without running anything.", no_args_is_help=True)


@config_app.command("show")
@verb
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print every setting as it would be used, and mark those that were set explicitly."""
    from medvqa_rl.config.yaml import load_config, show_config

    sys.stdout.write(show_config(load_config(config, overrides or ())))


@config_app.command("check")
@verb
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    purpose: Annotated[
        Literal["train", "sft", "eval"], typer.Option("--for", help="The verb that will use the settings.")
    ] = "train",
) -> None:
    """Print 'ok', or every problem at once."""
    from medvqa_rl.config.yaml import load_config
    from medvqa_rl.core.embedded import refuse_missing_folder

    refuse_missing_folder(load_config(config, overrides or (), purpose=purpose).config.model.path)
    print("ok")


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of the settings, for editors that validate YAML."""
    import json

    from medvqa_rl.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("tables", hidden=True)
def tables() -> None:
    """Print the tables of docs/configuration.md."""
    from medvqa_rl.config.schema import reference_tables

    print(reference_tables())
