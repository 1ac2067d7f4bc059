"""Upload an exported folder to the Hugging Face Hub: only when asked, and private unless asked otherwise."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]
from pydantic import BaseModel, TypeAdapter

from medvqa_rl.cli.export.folder import CARD, has_card, run_of
from medvqa_rl.config import is_hub_id
from medvqa_rl.core.files import read_json
from medvqa_rl.core.network import is_off, unusable_proxy
from medvqa_rl.core.text import printable, shown
from medvqa_rl.report.runs import read_run


class _Adapter(BaseModel):
    base_model_name_or_path: str | None = None


_ADAPTER = TypeAdapter(_Adapter)


class Upload:
    """An upload to one repository."""

    def __init__(self, repository: str, *, is_public: bool) -> None:
        """
        Args:
            repository: ``owner/name``.
            is_public: everyone may read it.

        Raises:
            ValueError: the network is off, the name is none, or there is no token.
        """
        if is_off():
            raise ValueError(
                "--push-to-hub uploads the model, but the network is off: leave it out, or turn the network on "
                "(--network, MEDVQA_RL_NETWORK)."
            )
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository) is None:
            raise ValueError(
                f"--push-to-hub is {shown(repository)}, but should be the owner and the name of a repository, as "
                "OWNER/NAME."
            )
        proxy = unusable_proxy()
        if proxy is not None:
            raise ValueError(
                f"The proxy in the environment's {proxy} cannot be used to upload: for SOCKS, install the package "
                "socksio and write socks5://, or unset the variable."
            )
        if get_token() is None:
            raise ValueError(
                "--push-to-hub needs a token of the Hugging Face Hub that may write: log in with `hf auth login`, or "
                "set HF_TOKEN."
            )
        self._repository, self._is_public, self._api = repository, is_public, HfApi()

    def check(self, checkpoint: Path, *, merge: bool) -> None:
        """Check before anything is written that the checkpoint can be shared, and with whom.

        Raises:
            ValueError: it is of a run with ``network: off``, has no model card, or names its base model by a folder;
                or the repository is public and that was not asked for, or cannot be used.
        """
        run = run_of(checkpoint)
        if run is not None and read_run(run).config.get("network") == "off":
            raise ValueError(
                f"The settings of the run {run} have network: off, so its model is not uploaded: leave out "
                "--push-to-hub, and upload the exported folder yourself if it may leave this machine."
            )
        if not has_card(checkpoint, merge=merge):
            raise ValueError(
                f"{checkpoint} has no model card ({CARD}), and is in no run that one could be written from: write one "
                "that says what the model is, or give the folder of its run."
            )
        settings = checkpoint / "adapter_config.json"
        if settings.is_file() and not merge:
            base = read_json(_ADAPTER, settings, "copy the adapter again").base_model_name_or_path
            if base is None or not is_hub_id(base):
                raise ValueError(
                    f"The adapter names its base model by a folder of this machine ({shown(base)}), which nobody else "
                    "has: add --merge, or write the id of the model on the Hub into base_model_name_or_path in its "
                    "adapter_config.json."
                )
        with self._explained("nothing was written"):
            self._refuse_public()

    def send(self, folder: Path) -> str:
        """Upload a folder with all its files.

        Returns:
            A sentence with the address of the repository.

        Raises:
            ValueError: the Hub refuses, or the connection breaks; the folder stays.
        """
        again = f"`hf upload {self._repository} {shlex.quote(str(folder))}` uploads it"
        with self._explained(f"the folder {folder} is complete, and {again} when that is repaired"):
            url = self._api.create_repo(self._repository, private=not self._is_public, exist_ok=True)
            is_private = self._refuse_public()
            self._api.upload_folder(
                repo_id=self._repository, folder_path=folder, commit_message="Upload the model and its card"
            )
        who = "which only those with access can read" if is_private else "which everyone can read"
        return f"Uploaded to {url}, {who}."

    def _refuse_public(self) -> bool | None:
        """Whether the repository is private; None if there is none.

        Raises:
            ValueError: it is public, and that was not asked for.
        """
        try:
            is_private = bool(self._api.model_info(self._repository).private)
        except RepositoryNotFoundError as error:
            if error.response is not None and error.response.status_code == 401:
                raise
            return None
        if not is_private and not self._is_public:
            raise ValueError(
                f"The repository {self._repository} exists and everyone can read it: add --public if the model may be "
                "read by everyone, or give another name."
            )
        return is_private

    @contextmanager
    def _explained(self, state: str) -> Iterator[None]:
        """Raise ValueError for what the Hub refuses and for connections that fail.

        Args:
            state: what is left; ends the message.
        """
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            why = printable((error.server_message or str(error)).strip().partition("\n")[0]).rstrip(".")
            remedy = {
                401: "log in again with `hf auth login`, or set HF_TOKEN to a valid token",
                403: "take a token that may write to this owner's repositories",
            }.get(status, "try again later")
            raise ValueError(
                f"The Hub refuses {self._repository} (HTTP {status}: {why}): {remedy}; {state}."
            ) from error
        except (OSError, RuntimeError, HTTPError) as error:  # of the HTTP client; RuntimeError for large files
            cause = error.__cause__ or error
            why = f"{type(cause).__name__}: {printable(str(cause).partition(chr(10))[0])}".rstrip(".")
            raise ValueError(
                f"The upload to {self._repository} failed ({why}): check the connection; {state}."
            ) from error
