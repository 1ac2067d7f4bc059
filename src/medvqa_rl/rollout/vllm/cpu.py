"""What vLLM's CPU build needs beyond its GPU builds. Runs inside vLLM, so it imports no other module of the package.

vLLM 0.32 packs the weights of linear layers for the CPU. ``reload_weights`` packs them again, but not an output layer
that shares its weights with the embeddings (``tie_word_embeddings``), which would keep the old ones.
"""

from __future__ import annotations

from typing import Any

EXTENSION = "medvqa_rl.rollout.vllm.cpu.PackedHeads"
"""For vLLM's ``worker_extension_cls``."""


class PackedHeads:
    """A mixin of vLLM's worker."""

    model_runner: Any

    def pack_heads(self) -> None:
        """Pack the output layers again, after ``reload_weights``."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
