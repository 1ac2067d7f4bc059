"""Real engines for tests: settings, rollouts, and servers that end with the test."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from medvqa_rl.config import ModelConfig, RolloutConfig
from medvqa_rl.core.types import Group, Sample
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.rollout.vllm.serve import serve_command

GREEDY = RolloutConfig(num_generations=2, max_completion_length=24, top_k=1, max_batch=4)
SAMPLED = RolloutConfig(num_generations=4, max_completion_length=24, temperature=0.9)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ |= ENVIRONMENT  # before vLLM is imported


def load(path: str, **settings: Any) -> Policy:
    """Load a policy in float32 on the CPU: ``load("phantom:instruct", lora=LoraConfig(rank=4))``."""
    torch.manual_seed(0)
    return load_policy(ModelConfig(**{"path": path, "device": "cpu", "dtype": "float32"} | settings))


def roll_out(engine: Any, policy: Policy, samples: Sequence[Sample], config: RolloutConfig) -> list[Group]:
    prompts = [policy.processor.encode(sample) for sample in samples]
    zeros = [0] * len(samples)
    return engine.rollout(samples, config, seed=3, stream="train", step=0, occurrences=zeros, prompts=prompts)


def tokens(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def move(policy: Policy, seed: int, scale: float = 0.15) -> None:
    """Change the trained weights enough to change the most likely tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                size = float(parameter.square().mean().sqrt()) or 0.1
                parameter += scale * size * torch.randn(parameter.shape, generator=generator)


class Serving:
    """A ``vllm serve`` process in a process group of its own."""

    def __init__(self, words: Sequence[str], log: Path, port: int) -> None:
        """
        Args:
            words: of the command, assignments of environment variables first.
            log: the file to which the server writes.
            port: of this machine.
        """
        self.port, self.url, self.log = port, f"http://127.0.0.1:{port}", log
        index = words.index("vllm")
        given = dict(word.split("=", 1) for word in words[:index])
        # Compiling takes longer than all requests of a test.
        own = ["--port", str(port), "--enforce-eager", "--max-model-len", "2048"]
        # A schema allows white space without end, and the embedded model, which knows no JSON, writes it.
        own += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("vllm")), *words[index + 1 :], *own],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | given,
                start_new_session=True,
            )

    def wait(self, seconds: float = 240.0) -> None:
        """Wait until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(f"vllm serve does not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End the server and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(words: Sequence[str], log: Path, port: int | None = None) -> Iterator[Serving]:
    """Run a server until the block ends; the arguments are those of :class:`Serving`, with a free port by default."""
    server = Serving(words, log, free_port() if port is None else port)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@contextmanager
def serving(policy: Policy, log: Path, *, without: Sequence[str] = (), port: int | None = None) -> Iterator[Serving]:
    """Serve a policy's model until the block ends, with the command that training prints.

    Args:
        policy: with an adapter, the server takes adapters too.
        log: the file to which the server writes.
        without: words of the command to leave out, with their values.
        port: a free one by default.
    """
    words = shlex.split(serve_command(policy, is_cpu=True))
    for word in without:
        first = words.index(word)
        has_value = word.startswith("--") and not [*words, "--"][first + 1].startswith("--")
        del words[first : first + 1 + has_value]
    with running(words, log, port) as server:
        yield server
