"""The command ``medvqa-rl``. Imports no torch until a verb runs."""

from medvqa_rl.cli.app import app, main

__all__ = ["app", "main"]
