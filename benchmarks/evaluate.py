"""Questions answered per second: ``medvqa-rl eval`` against transformers' ``generate`` and vLLM, alternating.

    taskset -c 1 env OMP_NUM_THREADS=1 python -m benchmarks.evaluate --clock processor
    python -m benchmarks.evaluate --preset paper-cpu --rounds 2
    python -m benchmarks.evaluate --engines ours generate vllm     # in an environment that has vLLM

Every engine decodes the same questions greedily, from samples to texts: it opens the images, encodes the prompts and
stops at stop tokens (``paper-cpu`` has random weights, so its completions have a fixed length). ``generate`` gets the
batches of ``eval``, which are sorted by prompt length, and this package's encoded prompts. vLLM gets all questions at
once. ``eval`` also parses and scores. Answers are compared text by text. Prints the ratio of questions per second with
a 95 % interval over the rounds (a t interval of the log ratios). The last line is ``speedup: RATIO``, over
``generate``.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.common import (
    Workload,
    hardware,
    load_line,
    make_config,
    make_data,
    now,
    table,
    use_clock,
    write_result,
)
from benchmarks.decode import stock_inputs
from benchmarks.engines import forbid_stopping
from benchmarks.models import PHANTOM, prepare_model
from medvqa_rl.config import DataConfig, EvalConfig, ModelConfig, VllmConfig
from medvqa_rl.core.machine import keep_freed_memory
from medvqa_rl.core.types import Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.answering import answer_all, batches
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.scoring import AnswerSettings
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.rollout.decode import RolloutEngine

Engine = Callable[[Sequence[Sample]], list[str]]
"""Completes the questions greedily; returns the texts in their order."""


@dataclass(frozen=True)
class Test:
    """The questions of a preset, and how they are answered."""

    model: str
    """As in Workload."""
    questions: int
    length: int
    """Token limit of a completion."""
    side: int | None = None
    """Side of the square images in pixels, for random weights; None takes PhantomVQA as it is."""
    questions_per_image: int = 1
    batch_size: int = EvalConfig().batch_size


PRESETS = {
    "embedded": Test(PHANTOM, questions=256, length=96),
    # VQA-RAD asks 2 to 7 questions about an image.
    "paper-cpu": Test("quarter", questions=24, length=64, side=504, questions_per_image=3),
    "smoke": Test("tiny", questions=4, length=4, side=56, questions_per_image=2, batch_size=2),
}


def make_questions(test: Test) -> list[Sample]:
    """The questions of a preset. With random weights, consecutive questions share an image."""
    if test.side is None:
        config = DataConfig(name="phantom", scanner="unseen", num_test=test.questions)
        data = load_dataset(config, "test")
        return [data[index] for index in range(test.questions)]
    samples = make_data(test.questions, test.side).samples
    first = [samples[index - index % test.questions_per_image] for index in range(test.questions)]
    return [replace(sample, images=owner.images) for sample, owner in zip(samples, first)]


def answer_ours(policy: Policy, test: Test) -> Engine:
    """``eval`` of this package, without its files."""
    engine = RolloutEngine(policy)
    settings = AnswerSettings(EvalConfig(batch_size=test.batch_size), test.length)

    def answer(samples: Sequence[Sample]) -> list[str]:
        found: dict[str, EvalRecord] = {}
        save = lambda records: found.update((record.sample_id, record) for record in records)  # noqa: E731
        answer_all(lambda: engine, samples, settings, save=save)
        return [found[sample.id].output for sample in samples]

    return answer


def answer_with_generate(policy: Policy, test: Test) -> Engine:
    """transformers' ``generate`` on the batches of ``eval``."""
    import torch

    processor, model = policy.processor, policy.model
    words = model.get_output_embeddings().weight.shape[0]
    never = sorted({*processor.suppressed_ids, *range(len(processor.tokenizer), words)})
    stop = [token for token in processor.stop_ids if token not in never] or None

    def answer(samples: Sequence[Sample]) -> list[str]:
        found: dict[str, str] = {}
        for batch in batches(samples, "think_answer", test.batch_size):
            inputs = stock_inputs(policy, [processor.encode(sample) for sample in batch])
            with torch.no_grad():
                ids = model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=test.length,
                    eos_token_id=stop,
                    suppress_tokens=never,
                    pad_token_id=processor.pad_id,
                )
            for sample, row in zip(batch, ids[:, inputs["input_ids"].shape[1] :].tolist()):
                found[sample.id] = processor.decode(row)
        return [found[sample.id] for sample in samples]

    return answer


def answer_with_vllm(policy: Policy, test: Test) -> Engine:
    """``vllm.LLM`` in this process, which encodes the images itself."""
    from medvqa_rl.rollout.vllm.local import ENVIRONMENT, engine_arguments

    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams, TokensPrompt

    from medvqa_rl.rollout.vllm.engine import NEVER, collapsed

    processor = policy.processor
    arguments = engine_arguments(policy, VllmConfig(), rank=0, num_ranks=1)
    own = ("enable_mm_embeds", "mm_processor_cache_gb", "enforce_eager", "worker_extension_cls")
    llm = LLM(**{name: value for name, value in arguments.items() if name not in own}, max_model_len=1024)
    stop = [token for token in processor.stop_ids if token not in processor.suppressed_ids]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=test.length,
        stop_token_ids=stop,
        ignore_eos=not stop,
        logit_bias=dict.fromkeys(processor.suppressed_ids, NEVER),
    )

    def answer(samples: Sequence[Sample]) -> list[str]:
        llm.reset_prefix_cache()
        llm.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()
        prompts = []
        for sample in samples:
            ids = collapsed(processor.encode(sample), processor)
            images = [source.load() for source in sample.images]
            prompts.append(TokensPrompt(prompt_token_ids=ids, multi_modal_data={"image": images} if images else {}))
        return [
            processor.decode(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)
        ]

    return answer


ENGINES: Mapping[str, Callable[[Policy, Test], Engine]] = {
    "ours": answer_ours,
    "generate": answer_with_generate,
    "vllm": answer_with_vllm,
}


@contextmanager
def loaded(test: Test, tokenizer: Path | None) -> Iterator[Policy]:
    """The model of a preset."""
    workload = Workload(test.model, prompts=1, generations=1, length=test.length, side=test.side or 112)
    with tempfile.TemporaryDirectory() as folder:
        path = prepare_model(workload, Path(folder), tokenizer)
        config = ModelConfig(path=test.model) if test.side is None else make_config(workload, path).model
        policy = load_policy(config)
        if test.side is not None:
            forbid_stopping(policy.processor)
        policy.model.eval()
        yield policy


def run(test: Test, names: Sequence[str], rounds: int, tokenizer: Path | None) -> dict[str, Any]:
    """Answer the questions with each engine in turn, after one warmup round.

    Returns:
        ``seconds`` by engine and round, ``same`` (share of answers that are equal to ours) and ``ratio`` by engine:
        questions per second of this package over the engine's, with ``low`` and ``high`` (95 %).
    """
    samples = make_questions(test)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, list[str]] = {}
    with loaded(test, tokenizer) as policy:
        engines = {name: ENGINES[name](policy, test) for name in names}
        for turn in range(rounds + 1):
            for name, engine in engines.items():
                began = now()
                answers[name] = engine(samples if turn else samples[: test.batch_size])
                if turn:
                    seconds[name].append(now() - began)
    same = {name: statistics.mean(map(str.__eq__, answers["ours"], texts)) for name, texts in answers.items()}
    ratios = {name: interval(seconds["ours"], seconds[name]) for name in names if name != "ours"}
    return {"questions": len(samples), "seconds": seconds, "same": same, "ratio": ratios}


def interval(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The geometric mean of theirs / ours over the rounds, with a 95 % t interval; a single round has none."""
    logs = [math.log(other / own) for own, other in zip(ours, theirs, strict=True)]
    mean, half = statistics.mean(logs), math.nan
    if len(logs) > 1:
        half = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if answers of ``generate`` differ on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ours", "generate"], help="ours is needed")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warmup round")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Qwen2-VL checkpoint's tokenizer")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--json", "--output", type=Path, help="write the results here")
    given = parser.parse_args(arguments)
    names = ["ours", *(name for name in given.engines if name != "ours")]
    use_clock(given.clock)
    keep_freed_memory()
    result = run(PRESETS[given.preset], names, given.rounds, given.tokenizer)
    rows = [["", "questions/s", "seconds", "same answers", "ours is faster by", "95 % interval"]]
    for name in names:
        middle = statistics.median(result["seconds"][name])
        row = [name, f"{result['questions'] / middle:.1f}", f"{middle:.2f}", f"{result['same'][name]:.1%}"]
        if name in result["ratio"]:
            ratio = result["ratio"][name]
            row += [f"{ratio['ratio']:.2f}", f"{ratio['low']:.2f} to {ratio['high']:.2f}"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    machine = hardware()
    settings = {"preset": given.preset, "rounds": given.rounds, "clock": given.clock}
    write_result(given.json, {"settings": settings, "hardware": machine, **result})
    print(table(rows))
    print(load_line(machine, given.clock))
    if "generate" in result["ratio"]:
        print(f"speedup: {result['ratio']['generate']['ratio']:.2f}")
    return int(result["same"].get("generate", 1.0) < 1.0 and machine.get("gpu") is None)


if __name__ == "__main__":
    sys.exit(main())
