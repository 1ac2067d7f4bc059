"""The verb ``medvqa-rl serve``: a model behind OpenAI's chat API. Imports no torch until it runs."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvqa_rl.cli.common import read_settings, use_threads, verb
from medvqa_rl.core.network import bound_socket, is_off
from medvqa_rl.core.progress import open_console, print_line

if TYPE_CHECKING:
    from medvqa_rl.config import ModelConfig

KEY_VARIABLE = "MEDVQA_RL_API_KEY"


@verb
def serve(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run folder, whose best (else last) checkpoint is served; or a model or adapter folder, Hub id, "
            "phantom:base or phantom:instruct.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at. Any but this machine's own lets others ask.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests. Defaults to that of its folder, or its Hub id.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Most completions decoded at a time.")] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")] = 1024,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY_VARIABLE, help="Key that requests must show; other users see it in lists of processes."
        ),
    ] = None,
) -> None:
    """Serve a model on this machine with OpenAI's chat API. Never use it for a decision about a patient."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serve needs the package {error.name}: install it with `pip install 'medvqa-rl[serve]'`."
        ) from error
    if api_key is not None and (not api_key.isascii() or not api_key.strip()):
        raise ValueError(f"The API key is empty or not ASCII: set {KEY_VARIABLE} to another, or leave it out.")
    model, shown_name = served_model(run)
    is_local = _is_this_machine(host)
    if not is_local and is_off():
        raise ValueError(
            f"--host is {host}, which other machines can reach, but the network is off: leave out --host, or turn "
            "the network on (--network, MEDVQA_RL_NETWORK, or the settings of the run)."
        )
    with bound_socket(host, port) as listener:
        use_threads(model.path)
        from medvqa_rl.cli.serve.server import ModelServer
        from medvqa_rl.models.loading import load_policy

        policy = load_policy(model)
        server = ModelServer(
            policy, name or shown_name, max_batch=max_batch, max_length=max_length, key=api_key, is_local=is_local
        )
        console = open_console()
        if not is_local:
            access = "with the key can ask it" if api_key else f"can ask it: set {KEY_VARIABLE} to ask for a key"
            print_line(
                console, f"Warning: everyone who reaches this machine at {host} {access}. Nothing is encrypted."
            )
        listener.listen()
        where = f"[{host}]" if ":" in host else host
        print_line(
            console,
            f"{name or shown_name} is served at http://{where}:{listener.getsockname()[1]}/v1 until Ctrl-C. Research "
            "software: never use it for a decision about a patient.",
        )
        server.run(listener)


def served_model(run: str) -> tuple[ModelConfig, str]:
    """The settings of the model to serve, and its name.

    Raises:
        ValueError: there is no such model.
    """
    from medvqa_rl.core.files import find_checkpoint, note_on_best, run_config
    from medvqa_rl.models.checkpoints import model_for, with_checkpoint

    folder = Path(run).expanduser()
    if not (folder / "config.yaml").is_file():
        return model_for(run), folder.resolve().name if folder.is_dir() else run
    if note := note_on_best(folder):
        print_line(open_console(), note)
    model = read_settings(run_config(folder), (), purpose="eval").config.model
    return with_checkpoint(model, find_checkpoint(folder)), folder.resolve().name


def _is_this_machine(host: str) -> bool:
    """Whether nobody else can reach this address; unlike :func:`is_loopback`, not the one that stands for all."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"
