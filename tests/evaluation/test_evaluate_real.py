"""Evaluation with the real engine on real radiology questions.

Run: pytest tests/evaluation/test_evaluate_real.py
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from medvqa_rl.config import DataConfig, EvalConfig
from medvqa_rl.data.sets.vqa_rad import load_vqa_rad
from medvqa_rl.data.splits import StoredDataset
from medvqa_rl.evaluation.evaluate import evaluate
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import RolloutEngine


def test_answers_belong_to_their_questions_whatever_the_batch(
    tiny_policy: Callable[..., Policy], shared_data: Path
) -> None:
    config = DataConfig(name="vqa_rad", path=str(shared_data / "vqa_rad"), num_test=5)
    dataset = load_vqa_rad(config, "test")
    engine = RolloutEngine(tiny_policy(), "think_answer")
    whole, single = (
        evaluate(engine, dataset, EvalConfig(batch_size=size, bootstrap=50), max_completion_length=6)
        for size in (5, 1)
    )
    assert [record.sample_id for record in whole.records] == [sample.id for sample in dataset.samples]
    assert [record.output for record in whole.records] == [record.output for record in single.records]
    assert whole.results["dataset"]["fingerprint"] == dataset.fingerprint
    assert set(whole.results["by"]) == {"answer_type", "organ", "family", "answer_kind"}
    # A question alone gets the same answer as among others.
    alone = StoredDataset("one", (replace(dataset[3], id="alone"),))
    (record,) = evaluate(engine, alone, EvalConfig(bootstrap=50), max_completion_length=6).records
    assert record.output == whole.records[3].output
    assert record.num_tokens == whole.records[3].num_tokens <= 6
