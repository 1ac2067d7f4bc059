"""Check the data of arms that learn from a given number of reference reasonings (``traces``). Imports no torch."""

from __future__ import annotations

from medvqa_rl.config import Config
from medvqa_rl.core.prompts import asks_reasoning
from medvqa_rl.core.text import first_few
from medvqa_rl.data import load_dataset


def check_traces(where: str, traces: int, config: Config) -> None:
    """Check that an arm's training data has as many questions as asked for, each with reasoning that is learned.

    Args:
        where: the arm; begins the message.
        traces: number of questions.
        config: of one of its cells, with ``data.num_train`` set to that number.

    Raises:
        ValueError: the data has fewer questions, one has no reasoning, or the settings leave it out.
    """
    if not config.sft.use_reasoning or not all(map(asks_reasoning, config.prompt.templates)):
        raise ValueError(
            f"{where} has traces {traces}, but sft.use_reasoning is {str(config.sft.use_reasoning).lower()} and the "
            f"prompts are {', '.join(config.prompt.templates)}, so it would not learn reasoning: set "
            "sft.use_reasoning=true and prompts that ask for reasoning (think_answer), or remove traces."
        )
    dataset = load_dataset(config.data, "train")
    if len(dataset) < traces:
        raise ValueError(
            f"{where} has traces {traces}, but {dataset.name} has {len(dataset)} training questions with these "
            f"settings: ask for at most that many."
        )
    if config.data.name == "phantom":  # every question has reasoning
        return
    samples = [dataset[index] for index in range(traces)]
    if lacking := [sample.id for sample in samples if not sample.reasoning.strip()]:
        raise ValueError(
            f"{where} has traces {traces}, but {len(lacking)} of these questions of {dataset.name} have no reasoning "
            f"({first_few(lacking)}): remove those questions from the data, or take data whose questions all have it."
        )
