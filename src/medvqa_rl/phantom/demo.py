"""The demo: adapt a model to a scanner it has not seen, with RL alone.

    medvqa-rl demo

Evaluates, trains with Dr. GRPO on answer and format rewards (no gold reasoning) and evaluates again, on the unseen
scanner and on the model's home scanner. Takes minutes on two CPU cores and downloads nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from medvqa_rl.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
)
from medvqa_rl.core.files import find_checkpoint, write_json
from medvqa_rl.core.progress import open_console, progress_bar
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from medvqa_rl.evaluation.statistics.summary import paired_gain
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run.errors import Stopped
from medvqa_rl.models.loading import load_policy
from medvqa_rl.report.card import write_cards
from medvqa_rl.report.pages.report import Story, write_report
from medvqa_rl.rollout.decode import RolloutEngine

NUM_QUESTIONS = {"unseen": 600, "home": 300}
"""Held-out questions per scanner."""
_NAMES = {"unseen": "Unseen scanner", "home": "Home scanner"}


def demo_config(output: Path, seed: int = 0) -> Config:
    """Return the settings of configs/phantom_cpu.yaml with this output folder and seed."""
    return Config(
        output_dir=str(output),
        model=ModelConfig(path="phantom:instruct", device="cpu", train_vision=True, train_projector=True),
        data=DataConfig(name="phantom", scanner="unseen", answer_types=("choice",), num_val=200, seed=1),
        rollout=RolloutConfig(num_generations=8, max_completion_length=96, temperature=1.2),
        advantage=AdvantageConfig(scale="none"),
        loss=LossConfig(type="dr_grpo", beta=0.0),
        optimizer=OptimizerConfig(
            learning_rate=5e-5,
            lr_scheduler_type="linear",
            min_lr_ratio=0.1,
            warmup_steps=40,
            betas=(0.9, 0.98),
            max_grad_norm=0.1,
        ),
        train=TrainConfig(steps=400, seed=seed, eval_steps=100, save_steps=100, log_completions_steps=50),
    )


def run_demo(output: Path, seed: int = 0, *, dry_run: bool = False) -> dict[str, Any]:
    """Run the demo and write its results to a run folder.

    Args:
        output: the run folder, new or empty.
        seed: of training; the evaluation uses the same questions for every seed.
        dry_run: run one training step, print its shapes and write nothing.

    Returns:
        The content of ``demo.json``: ``accuracy_before``, ``accuracy_after``, ``gain``, ``gain_low``, ``gain_high``
        (paired 95 % interval) and ``num_questions`` on the unseen scanner, the same under ``home``, and
        ``seconds``; empty after a dry run.

    Raises:
        ValueError: the folder is in use, or the embedded checkpoint is not installed.
    """
    began = time.perf_counter()
    console = open_console()
    config = demo_config(output, seed)
    if dry_run:
        train(config, dry_run=True)
        return {}
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"The folder {output} is not empty: remove it, or choose another with --output.")

    console.print("[bold]1/4[/bold]  Evaluating the model trained on its home scanner.")
    before = _evaluate_both(config, config.model)
    _print_accuracy(console, before)
    console.print(
        f"[bold]2/4[/bold]  Adapting it to the unseen scanner: {config.train.steps} steps of Dr. GRPO with "
        "rewards for the correct answer and the correct format."
    )
    try:
        run_dir = train(config)
    except Stopped:
        console.print(
            f"That resumes training only. To run the demo again, remove {output} first.",
            soft_wrap=True,
        )
        raise
    console.print("[bold]3/4[/bold]  Evaluating the adapted model on the same questions.")
    # The last checkpoint rather than the best: the gain should be the method's, not that of choosing a checkpoint.
    adapted = config.model.model_copy(update={"path": str(find_checkpoint(run_dir, prefer_best=False))})
    after = _evaluate_both(config, adapted)
    _print_accuracy(console, after)
    for scanner in NUM_QUESTIONS:
        write_evaluation(before[scanner], run_dir / "eval" / f"before_{scanner}")
        write_evaluation(after[scanner], run_dir / "eval" / f"after_{scanner}")

    console.print("[bold]4/4[/bold]  Writing the report.")
    gains = {name: paired_gain(before[name].records, after[name].records, config.eval) for name in NUM_QUESTIONS}
    summary = _summary(gains["unseen"]) | {"home": _summary(gains["home"]), "seed": seed}
    page = write_report([run_dir], run_dir / "page.html", story=_story(config))
    summary["seconds"] = round(time.perf_counter() - began, 1)
    write_json(run_dir / "demo.json", summary)
    write_cards(run_dir)
    _print_summary(console, summary, page)
    return summary


def _evaluate_both(config: Config, model: ModelConfig) -> dict[str, Evaluation]:
    """Answer the held-out questions of both scanners greedily."""
    engine = RolloutEngine(load_policy(model), config.prompt.template)
    evaluations = {}
    for scanner, count in NUM_QUESTIONS.items():
        data = config.data.model_copy(update={"scanner": scanner, "num_test": count})
        with progress_bar("questions") as progress:
            evaluations[scanner] = evaluate(
                engine,
                load_dataset(data, "test"),
                config.eval,
                max_completion_length=config.rollout.max_completion_length,
                template=config.prompt.template,
                progress=progress,
            )
    return evaluations


def _summary(gain: Mapping[str, float | int]) -> dict[str, Any]:
    names = ("accuracy_before", "accuracy_after", "gain", "gain_low", "gain_high", "mcnemar_p")
    return {name: gain[name] for name in names} | {"num_questions": gain["n"]}


def _story(config: Config) -> Story:
    return Story(
        title="A model adapts to a scanner it has not seen",
        paragraphs=(
            "A small Qwen2-VL model was trained on images from one simulated scanner, its home scanner. On images "
            f"from another scanner it is often wrong. Here {config.train.steps} steps of RL (Dr. GRPO) adapted it to "
            "that scanner, rewarded only for the correct answer and the correct output format, with no reasoning to "
            "imitate.",
            "Both evaluations decode greedily and use the same held-out questions. A difference whose interval "
            "excludes 0 is larger than the choice of questions explains. The home scanner shows what was forgotten.",
        ),
        comparisons={
            "unseen": (_NAMES["unseen"], "The model was adapted to this scanner."),
            "home": (_NAMES["home"], "The model comes from this scanner."),
        },
        limits=(
            "The demo's images and questions are procedural. They show that the method works, not how well it works "
            "on real images.",
        ),
    )


def _print_accuracy(console: Console, evaluations: Mapping[str, Evaluation]) -> None:
    for name, evaluation in evaluations.items():
        shown = evaluation.results
        console.print(
            f"     {_NAMES[name]}: accuracy {shown['accuracy']:.1%} "
            f"[{shown['accuracy_low']:.1%}, {shown['accuracy_high']:.1%}] of {shown['num_scored']} questions"
        )


def _print_summary(console: Console, summary: Mapping[str, Any], page: Path) -> None:
    for name, row in (("unseen", summary), ("home", summary["home"])):
        console.print(
            f"[bold]{_NAMES[name]}[/bold]: {row['accuracy_before']:.1%} → {row['accuracy_after']:.1%}, "
            f"{100 * row['gain']:+.1f} points, 95 % interval [{100 * row['gain_low']:+.1f}, "
            f"{100 * row['gain_high']:+.1f}], {row['num_questions']} questions"
        )
    console.print(f"Took {summary['seconds']:.0f} s. Open {page} in a browser.")
