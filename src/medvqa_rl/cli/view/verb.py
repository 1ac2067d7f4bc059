"""The verb ``medvqa-rl view``: runs in the browser. Imports no torch until a model is asked."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from medvqa_rl.cli.common import verb
from medvqa_rl.core.network import bound_socket, forbid_network
from medvqa_rl.core.text import first_few, for_terminal

HOST = "127.0.0.1"


@verb
def view(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with runs below it, or a run.")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Look at runs in the browser, live: curves, evaluated questions, samples, comparisons. Ctrl-C ends it."""
    missing = [name for name in ("starlette", "uvicorn", "python_multipart") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"`medvqa-rl view` needs {first_few(missing, 3)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed: run `pip install 'medvqa-rl[view]'`."
        )
    import uvicorn

    from medvqa_rl.cli.view.server import make_app
    from medvqa_rl.report.folder import RunsFolder

    runs = RunsFolder(folder)
    listener = bound_socket(HOST, port)
    listener.listen()  # before its address is printed
    forbid_network()
    token = secrets.token_urlsafe(16)
    settings = uvicorn.Config(
        make_app(runs, token),
        log_level="warning",
        access_log=False,  # it would hold the token
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    print(f"Runs in {for_terminal(str(folder))}: http://{HOST}:{listener.getsockname()[1]}/{token}/", flush=True)
    print("Open this address in a browser of this machine. Whoever has it sees the data. Ctrl-C ends the server.")

    class Server(uvicorn.Server):
        """Says nothing of requests that are dropped when it ends."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            super().handle_exit(sig, frame)

    try:
        Server(settings).run(sockets=[listener])
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr, flush=True)
        os._exit(130)  # a thread in which a model answers would have to end first
