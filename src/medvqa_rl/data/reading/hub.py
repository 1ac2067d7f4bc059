"""A data set from the Hugging Face Hub, at one commit. Imports no torch.

The first load downloads. A note in the cache folder says that the download was complete; from then on the files in
the Hub's cache are used without asking the network.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")


def download(repository: str, revision: str, patterns: Sequence[str], cache_dir: Path) -> Path:
    """The folder of a data set repository's files at one commit.

    Args:
        repository: ``owner/name``.
        revision: a commit, 40 hexadecimal digits: a branch or tag could mean other data tomorrow.
        patterns: the files that are wanted, such as ``data/*.parquet``.
        cache_dir: where it is noted that a download was complete.

    Raises:
        ValueError: the revision is no commit, or the files are not in the cache and cannot be downloaded.
    """
    if not COMMIT.fullmatch(revision):
        raise ValueError(
            f"data.revision is {revision}, but must be a commit of {repository}, 40 hexadecimal digits: copy it from "
            "the page 'Files and versions' of the data set."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = list(patterns)

    def fetch(*, is_offline: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=wanted,
                local_files_only=is_offline,
            )
        )

    address = hashlib.sha256(repr((repository, revision, sorted(wanted))).encode()).hexdigest()[:32]
    note = cache_dir / "hub" / address
    try:
        if note.is_file():
            try:
                return fetch(is_offline=True)
            except LocalEntryNotFoundError:
                note.unlink(missing_ok=True)  # the Hub's cache was emptied
        folder = fetch(is_offline=False)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{repository} {revision} {' '.join(wanted)}\n", encoding="utf-8")
        return folder
    except HFValidationError as error:
        raise ValueError(f"data.hub is {repository}, which is no name of a repository: write owner/name.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"The data set {repository} at {revision} is not in the cache and cannot be downloaded ({error}): check "
            "data.hub, data.revision and the network, or download it elsewhere and set data.path to its folder."
        ) from error
