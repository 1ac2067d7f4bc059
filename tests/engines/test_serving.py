"""A merged export behind a real ``vllm serve`` answers as behind ``medvqa-rl serve``."""

from __future__ import annotations

import torch

from medvqa_rl.cli.export.folder import export_model
from medvqa_rl.config import DataConfig, LoraConfig
from medvqa_rl.data.phantom.dataset import PhantomDataset
from medvqa_rl.models.checkpoints import write_model
from tests.cli.serve.test_serve import NAME, conversation, post, serving, texts
from tests.engines.engine import load, running

SAME = 10
"""Of 12 questions: pixels of torchvision and Pillow differ a little, which may change an answer."""


def test_vllm_serves_a_merged_export(tmp_path):
    policy = load("phantom:instruct", lora=LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01 * torch.randn_like(parameter)
    write_model(policy, tmp_path / "adapter")
    merged = export_model(tmp_path / "adapter", tmp_path / "merged", merge=True)
    words = ["vllm", "serve", str(merged), "--served-model-name", NAME, "--generation-config", "vllm"]
    words += ["--dtype", "float32", "--no-enable-chunked-prefill"]
    with running(words, tmp_path / "log.txt") as vllm, serving(load(str(merged))) as (_, where):
        same = 0
        for index in range(12):
            messages = conversation(PhantomDataset(DataConfig(), "test")[index])
            given = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 96}
            (status, ours), (code, theirs) = post(where, given), post(f"127.0.0.1:{vllm.port}", given)
            assert status == code == 200, (ours, theirs)
            assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
            same += texts(ours) == texts(theirs)
        assert same >= SAME
