"""Data sets on the Hugging Face Hub, pinned to one commit. Imports no torch.

The first load downloads the files and writes a marker to the cache folder. Once the marker exists, the files come from
the Hub's cache without network access.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from medvqa_rl.core.embedded import snapshot
from medvqa_rl.core.files import write_text
from medvqa_rl.core.text import printable

COMMIT = re.compile(r"[0-9a-f]{40}")


def download(repository: str, revision: str, patterns: Sequence[str], cache_dir: Path) -> Path:
    """Download the files of a data set at one commit, unless they are cached.

    Args:
        repository: ``owner/name``.
        revision: commit of 40 hexadecimal digits; branches and tags are refused because they can move.
        patterns: the files to download, such as ``data/*.parquet``.
        cache_dir: folder of the markers for complete downloads.

    Returns:
        The folder that holds the files.

    Raises:
        ValueError: the revision is not a commit, or the files are neither cached nor downloadable.
    """
    if not COMMIT.fullmatch(revision):
        raise ValueError(
            f"data.revision is {revision}, but must be a commit of {repository}, 40 hexadecimal digits: copy it from "
            "the data set's page 'Files and versions'."
        )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    fetch = functools.partial(snapshot, repository, patterns, revision=revision, kind="dataset")
    address = hashlib.sha256(repr((repository, revision, sorted(patterns))).encode()).hexdigest()[:32]
    marker = cache_dir / "hub" / address
    try:
        if marker.is_file():
            try:
                return fetch(is_offline=True)
            except LocalEntryNotFoundError:
                marker.unlink(missing_ok=True)  # the Hub's cache was emptied
        folder = fetch()
        write_text(marker, f"{repository} {revision} {' '.join(patterns)}\n")
        return folder
    except HFValidationError as error:
        raise ValueError(f"data.hub is {repository}, which is not a repository name: write owner/name.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"The data set {repository} at {revision} is not cached and cannot be downloaded "
            f"({printable(str(error))}): check data.hub, data.revision and the network, or download it elsewhere and "
            "set data.path to its folder."
        ) from error
