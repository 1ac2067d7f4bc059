"""Headless Chromium over its debugging pipe (two file descriptors, JSON ended by zero bytes): no driver needed."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.skips import find_chromium

PATIENCE = 60.0
"""Seconds to wait for an answer; a busy machine is slow."""


class Page:
    """One tab."""

    def __init__(self, process: subprocess.Popen[bytes], reading: int, writing: int) -> None:
        self._process, self._reading, self._writing = process, reading, writing
        self._buffer, self._number, self._session = b"", 0, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.messages: list[str] = []
        """What the browser complained about: errors of scripts, and what the content security policy blocked."""
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Give a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.messages.append(str(answer["params"]["exceptionDetails"]))
            elif answer.get("method") == "Log.entryAdded":
                self.messages.append(answer["params"]["entry"]["text"])

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._reading, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, page: Path | str, fragment: str = "") -> None:
        """Load a file, or an address of this machine, and wait until its scripts have run."""
        self.send("Page.navigate", url="about:blank")
        address = page.resolve().as_uri() if isinstance(page, Path) else page
        self.send("Page.navigate", url=address + fragment)
        self.wait_for("location.protocol !== 'about:' && document.readyState === 'complete'")

    def wait_for(self, script: str) -> None:
        """Wait until an expression in the page is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key as a person does."""
        text = {"text": key} if len(key) == 1 else {}
        code = {"Tab": 9, "Escape": 27, "Enter": 13}.get(key, ord(key.upper()[0]))
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def choose(self, id: str, value: str) -> None:
        """Choose an option of a select element."""
        self.run(f"{{const e = document.getElementById({id!r}); e.value = {value!r}; "
                 "e.dispatchEvent(new Event('input', {bubbles: true}))}")  # fmt: skip

    def look(self, *, width: int, theme: str) -> None:
        """Set the width of the window in pixels, and the theme, light or dark."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start Chromium with a profile in a folder, offline, and end it with the block.

    Raises:
        AssertionError: it is not installed, or does not answer.
    """
    program = find_chromium()
    assert program is not None
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()
    arguments = [
        *(
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
        ),
        *(
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--remote-debugging-pipe",
        ),
        f"--user-data-dir={folder}",
    ]

    def wire() -> None:
        os.dup2(from_us, 3)  # where Chromium reads commands
        os.dup2(to_us, 4)  # and writes answers

    process = subprocess.Popen(
        [program, *arguments],
        pass_fds=(3, 4),
        preexec_fn=wire,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(process, from_browser, to_browser)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)
        os.close(to_browser)
        os.close(from_browser)
