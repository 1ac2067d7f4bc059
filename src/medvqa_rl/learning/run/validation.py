"""Evaluation on the validation split during training, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.accelerator import Accelerator
from accelerate.utils.operations import gather_object

from medvqa_rl.config import Config, EvalConfig
from medvqa_rl.core.types import Dataset
from medvqa_rl.evaluation.evaluate import Evaluation, plan_evaluation, write_evaluation
from medvqa_rl.evaluation.measures.instruments import Instruments
from medvqa_rl.learning.run.checkpoint import TrainState, save_best
from medvqa_rl.learning.run.logger import RunLogger
from medvqa_rl.learning.run.run_dir import RunDir
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import RolloutEngine


def validate(
    config: Config,
    accelerator: Accelerator,
    engine: RolloutEngine,
    dataset: Dataset,
    *,
    instruments: Instruments,
    progress: Callable[[int, int], None],
) -> Evaluation | None:
    """Answer the questions greedily, each rank its share of the batches. Collective.

    A batch is the same whichever rank answers it, so the answers are those of a single rank.

    Args:
        engine: holds all weights on every rank.
        instruments: used on the main rank only.
        progress: called after each of this rank's batches with the number of questions done and its total.

    Returns:
        The evaluation on the main rank, None on the others.
    """
    plan = plan_evaluation(
        dataset,
        config.eval,
        max_completion_length=config.rollout.max_completion_length,
        template=config.prompt.template,
        prefetch=config.prefetch,
    )
    own = slice(accelerator.process_index, None, accelerator.num_processes)
    records = gather_object(plan.answer(engine, part=own, progress=progress))
    return plan.conclude(records, instruments) if accelerator.is_main_process else None


def log_and_keep_best(
    evaluation: Evaluation, run: RunDir, logger: RunLogger, policy: Policy, state: TrainState, config: EvalConfig
) -> None:
    """Write an evaluation, save the model if it is the best so far, and log the metrics.

    Args:
        policy: the evaluated policy with all weights gathered.
        state: gets the best accuracy and its step.
    """
    run.check_folder()
    folder = run.evaluation(state.step)
    write_evaluation(evaluation, folder)
    unscored = evaluation.results["unscored_rate"]
    accuracy = evaluation.metrics.get("eval/accuracy")
    # With too many questions unscored, the accuracy is not comparable to that of other steps.
    if unscored > config.fail_on_unscored:
        accuracy = None
    # As in transformers' Trainer: the earliest of equals, and never the model before training. A best step of 0 is
    # from an older version.
    is_best = state.best_accuracy is None or state.best_step == 0 or (accuracy or 0.0) > state.best_accuracy
    if accuracy is not None and state.step > 0 and is_best:
        state.best_accuracy, state.best_step = accuracy, state.step
        save_best(run.best, policy, state)
    logger.record(state.step, evaluation.metrics)
    state.is_evaluated = True  # a tracker that fails below repeats nothing
    logger.show(state.step, evaluation.metrics)
    if unscored:
        logger.say(
            f"{unscored:.1%} of the validation questions could not be scored and are excluded: see "
            f"unscored_reason in {folder / 'samples.jsonl'}."
        )
