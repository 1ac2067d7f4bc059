"""A minimal HTTP client of a vLLM server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Literal

from medvqa_rl.config import VllmConfig
from medvqa_rl.core.text import printable, shown
from medvqa_rl.rollout.vllm.agreement import VllmError


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirects, which could send images to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class HttpError(VllmError):
    """The server answers with an error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """A minimal HTTP client for JSON requests."""

    def __init__(self, url: str, timeout: float) -> None:
        """
        Args:
            url: of the server.
            timeout: seconds per request.
        """
        self.url, self._timeout = url.rstrip("/"), timeout
        # No proxy, so that data goes to this server only.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def ask(self, method: Literal["GET", "POST"], path: str, body: Any = None) -> Any:
        """Send a request and return the JSON of its response, or None if it has none.

        Raises:
            HttpError: the response is an error.
            VllmError: there is no response, or no valid one.
        """
        data = None if method == "GET" else json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}, method=method
        )
        where = f"The vLLM server at {self.url}"
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                text = response.read()
                is_json = response.headers.get_content_type() == "application/json"
        except urllib.error.HTTPError as error:
            said = printable(error.read(300).decode("utf-8", "replace").strip(), 300)
            raise HttpError(f"{where} answers {path} with HTTP {error.code}: {said}", error.code) from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise VllmError(f"{where} does not answer {path}: {reason or type(error).__name__}.") from error
        try:
            return json.loads(text) if is_json else None
        except (ValueError, RecursionError) as error:
            raise VllmError(f"{where} answers {path} with invalid JSON ({printable(str(error))}).") from error


def check_answers(config: VllmConfig) -> str:
    """Check that the server responds, before a model is loaded.

    Returns:
        Its version of vLLM.

    Raises:
        ValueError: it does not respond, or is no vLLM server.
    """
    assert config.server_url is not None
    client = Client(config.server_url, 20.0)
    try:
        client.ask("GET", "/health")
        answer = client.ask("GET", "/version")
        if not isinstance(answer, dict) or not isinstance(answer.get("version"), str):
            raise VllmError(f"Another server answers there: it names no version of vLLM ({shown(answer)}).")
        return printable(answer["version"])
    except VllmError as error:
        raise ValueError(
            f"vllm.server_url is {config.server_url}, but no vLLM server can be used there: {error} Start one as "
            "docs/vllm.md says, or set vllm.mode=colocate."
        ) from error
