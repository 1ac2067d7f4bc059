"""The children that attacks fork."""

import sys

from tests import forking

THREADS = """
import os, sys, threading
import torch
from dev.attacks import children

def sum_in_threads():
    barrier, problems = threading.Barrier(8), []

    def work():
        barrier.wait()
        try:
            numbers.sum()
        except RuntimeError as error:
            problems.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit(len(problems))

numbers = torch.ones(200_000)
torch.set_num_threads(1)  # makes the pool
print([children.run(sum_in_threads, children.Path(sys.argv[1]), limit=20).code for _ in range(8)])
"""


def test_threads_find_torch_pool(tmp_path):
    ended = forking.run(
        [sys.executable, "-c", THREADS, str(tmp_path / "log")], capture_output=True, text=True, check=False
    )
    assert ended.stdout.strip() == str([0] * 8), ended.stderr
