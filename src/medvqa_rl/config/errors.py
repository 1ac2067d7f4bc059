"""What an error says, as one sentence for people. Imports no torch."""

from __future__ import annotations

from medvqa_rl.core.files import describe_os_error
from medvqa_rl.core.network import NetworkRefused
from medvqa_rl.core.text import shown


class MedVQAError(ValueError):
    """What the Python interface raises where the command line prints ``error:``; the message is the same sentence."""


def sentence(error: BaseException) -> str:
    """Return an error's message as a sentence, followed by its notes; empty if it has neither."""
    return " ".join(filter(None, [_message(error), *getattr(error, "__notes__", ())]))


def _message(error: BaseException) -> str:
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":  # the target of a link, for one
        text = shown(error.object[max(0, error.start - 40) : error.end + 40])
        return (
            f"A name or a text is not UTF-8 and cannot be written ({text}): rename the file or folder, or repair it."
        )
    if isinstance(error, OSError) and not isinstance(error, NetworkRefused):
        return describe_os_error(error)
    return str(error)
