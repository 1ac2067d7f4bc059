"""Evaluation on the validation split during training, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.accelerator import Accelerator
from accelerate.utils.operations import gather_object

from medvqa_rl.config import Config
from medvqa_rl.core.types import Dataset
from medvqa_rl.evaluation.evaluate import Evaluation, plan_evaluation
from medvqa_rl.evaluation.measures.instruments import Instruments
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
