"""The demo: a model from elsewhere meets a scanner that it has not seen, and adapts to it by reinforcement alone.

    medvqa-rl demo

Evaluate, train with Dr. GRPO on answer and format rewards (no gold reasoning), evaluate again, on the unseen scanner
and on the one the model came from. Minutes on two CPU cores, no download.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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
from medvqa_rl.core.files import find_checkpoint
from medvqa_rl.core.progress import open_console, progress_bar
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from medvqa_rl.evaluation.statistics.summary import paired_gain
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.objective.advantages import group_advantages
from medvqa_rl.learning.run.errors import Stopped
from medvqa_rl.models.loading import load_policy
from medvqa_rl.report.card import write_cards
from medvqa_rl.report.figures.plots import plot_before_after, plot_training
from medvqa_rl.report.pages.page import Comparison, DemoPage, FigureFile, ShownGroup, shown_group, write_demo_page
from medvqa_rl.rewards import Rewards
from medvqa_rl.rollout.decode import RolloutEngine

NUM_QUESTIONS = {"unseen": 600, "home": 300}
"""Held-out questions per scanner."""
_NAMES = {"unseen": "unseen scanner", "home": "home scanner"}
_NUM_GROUPS = 8


def demo_config(output: Path, seed: int = 0) -> Config:
    """The settings of configs/phantom_cpu.yaml with this output folder and seed."""
    return Config(
        output_dir=str(output),
        model=ModelConfig(path="phantom:instruct", device="cpu", train_vision=True, train_projector=True),
        data=DataConfig(name="phantom", scanner="unseen", answer_types=("choice",), num_val=200, seed=1),
        rollout=RolloutConfig(num_generations=8, max_completion_length=96, temperature=1.2),
        advantage=AdvantageConfig(scale="none"),
        loss=LossConfig(type="dr_grpo", beta=0.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            lr_scheduler_type="linear",
            min_lr_ratio=0.1,
            warmup_steps=40,
            betas=(0.9, 0.98),
            max_grad_norm=0.1,
        ),
        train=TrainConfig(steps=400, seed=seed, eval_steps=100, save_steps=100, log_completions_steps=50),
    )


def run_demo(output: Path, seed: int = 0, *, dry_run: bool = False) -> dict[str, Any]:
    """Run the demo and write everything it shows to a run folder.

    Args:
        output: the run folder; must not exist, or be empty.
        seed: of the training; the questions of the evaluation are the same for every seed.
        dry_run: show the shapes of one training step and stop; nothing is written.

    Returns:
        The content of ``demo.json``: ``accuracy_before``, ``accuracy_after``, ``gain``, ``gain_low``, ``gain_high``
        (paired 95 % interval), ``num_questions`` on the unseen scanner, the same under ``home``, and ``seconds``;
        empty after a dry run.

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
        raise ValueError(f"The folder {output} is in use: remove it, or name another with --output.")

    console.print("[bold]1/4[/bold]  Evaluating the model as it comes from the home scanner.")
    before = _evaluate_both(config, config.model)
    _print_accuracy(console, before)
    console.print(
        f"[bold]2/4[/bold]  Adapting it to the unseen scanner: {config.train.steps} steps of Dr. GRPO, rewards for "
        "the right answer and the right form."
    )
    try:
        run_dir = train(config)
    except Stopped:
        console.print(
            f"That goes on with the training alone. For the demo, remove {output} and start it again.",
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

    console.print("[bold]4/4[/bold]  Drawing the curves and the page.")
    gains = {name: paired_gain(before[name].records, after[name].records, config.eval) for name in NUM_QUESTIONS}
    summary = _summary(gains["unseen"]) | {"home": _summary(gains["home"]), "seed": seed}
    page = _draw(config, run_dir, adapted, before, after, gains)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    (run_dir / "demo.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_cards(run_dir)
    _print_summary(console, summary, page)
    return summary


def _evaluate_both(config: Config, model: ModelConfig) -> dict[str, Evaluation]:
    """Greedy answers to the held-out questions of both scanners."""
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


def _draw(
    config: Config,
    run_dir: Path,
    adapted: ModelConfig,
    before: Mapping[str, Evaluation],
    after: Mapping[str, Evaluation],
    gains: Mapping[str, Mapping[str, float | int]],
) -> Path:
    """Figures and the page, from the run folder and the evaluations."""
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    overall = {_NAMES[name]: (before[name].results, after[name].results) for name in NUM_QUESTIONS}
    figures = []
    for name, title in (("training", "Training"), ("accuracy", "Before and after")):
        paths = {}
        for theme, suffix in (("light", ""), ("dark", "_dark")):
            path = run_dir / f"{name}{suffix}.png"
            if name == "training":
                plot_training(metrics, path, theme=theme)  # type: ignore[arg-type]
            else:
                plot_before_after(
                    before["unseen"].results,
                    after["unseen"].results,
                    path,
                    overall=overall,
                    theme=theme,  # type: ignore[arg-type]
                )
            paths[theme] = path
        figures.append(FigureFile(title, paths["light"], paths["dark"]))
    page = DemoPage(
        title="A model adapts to a scanner it has not seen",
        lead=(
            f"A tiny Qwen2-VL that learned on one simulated scanner was trained for {config.train.steps} steps on "
            "another, by Dr. GRPO, from rewards for the right answer and the right form alone. No reasoning was shown "
            "to it. Both evaluations are greedy, on the same held-out questions."
        ),
        comparisons=[
            Comparison(
                _NAMES[name],
                before[name].results,
                after[name].results,
                gains[name],
                "What it was trained on." if name == "unseen" else "Where it came from: what was forgotten.",
            )
            for name in NUM_QUESTIONS
        ],
        figures=figures,
        groups=_sample_groups(config, adapted),
        facts={"seed": str(config.train.seed), "threads": str(torch.get_num_threads())},
        settings=config.model_dump(mode="json"),
    )
    return write_demo_page(run_dir / "page.html", page)


def _sample_groups(config: Config, adapted: ModelConfig) -> list[ShownGroup]:
    """Groups that the adapted model samples for held-out questions, scored as in training."""
    policy = load_policy(adapted)
    engine = RolloutEngine(policy, config.prompt.template)
    dataset = load_dataset(config.data, "test")
    samples = [dataset[index] for index in range(0, 2 * _NUM_GROUPS, 2)]
    groups = engine.rollout(samples, config.rollout, seed=config.train.seed, stream="eval", step=config.train.steps)
    rewards = Rewards(config.rewards, max_completion_length=config.rollout.max_completion_length)
    scores = rewards.score(groups, step=config.train.steps, count_tokens=policy.processor.count_tokens)
    advantages = group_advantages(torch.from_numpy(scores.total), scale=config.advantage.scale)
    return [
        shown_group(group, scores, advantages, index, caption="after training") for index, group in enumerate(groups)
    ]


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
