"""Answering with the real engine: records do not depend on prefetching or batches, and bad images are named.

Run: pytest tests/evaluation/test_answering.py
"""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from itertools import islice

import pytest
from PIL import Image

from medvqa_rl.config import DataConfig, EvalConfig, PrefetchConfig
from medvqa_rl.core.types import Completion, Group, Wording
from medvqa_rl.data.images import files
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.sets.vqa_rad import FILE, load_vqa_rad
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.evaluation import answering
from medvqa_rl.evaluation.answering import answer_all
from medvqa_rl.evaluation.evaluate import Evaluation, evaluate, plan_evaluation
from medvqa_rl.evaluation.records import EvalRecord, parse_record, record_line
from medvqa_rl.evaluation.scoring import AnswerSettings, Question, make_record
from medvqa_rl.rollout.decode import RolloutEngine

CONFIG = EvalConfig(batch_size=2, bootstrap=20, num_samples=2)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture
def data(mixed_samples) -> StoredDataset:
    return StoredDataset("mixed", tuple(mixed_samples))


def run(policy, data, workers: int, max_mib: int = 64, num_samples: int = 2) -> Evaluation:
    prefetch = PrefetchConfig(workers=workers, max_mib=max_mib)
    config = CONFIG.model_copy(update={"num_samples": num_samples})
    return evaluate(RolloutEngine(policy), data, config, max_completion_length=6, prefetch=prefetch)


def test_records_do_not_depend_on_workers_and_images_are_decoded_once(tiny_policy, data):
    policy = tiny_policy()
    found = [run(policy, data, workers) for workers in (0, 1, 3)]
    images = [image for sample in data.samples for image in sample.images]
    assert [image.loads for image in images] == [3] * len(images)  # one for each evaluation, sampled answers included
    assert found[0].records == found[1].records == found[2].records
    assert len({record.output for record in found[0].records}) > 1
    # Equal to greedy answers to prompts that the engine encodes itself.
    direct = list(RolloutEngine(policy).greedy(data.samples, max_completion_length=6, batch_size=1))
    assert [record.output for record in found[1].records] == [group.completions[0].text for group in direct]


@pytest.mark.parametrize(("workers", "num_samples"), [(0, 2), (2, 2), (2, 0)])
def test_a_damaged_file_is_unscored_and_the_others_are_answered(tiny_policy, data, tmp_path, workers, num_samples):
    policy = tiny_policy()
    sound = run(policy, data, workers)
    Image.effect_noise((64, 64), 50).save(tmp_path / "damaged.png")
    path = tmp_path / "damaged.png"
    path.write_bytes(path.read_bytes()[:1000])
    Image.new("RGB", (2, 900)).save(tmp_path / "strip.png")
    bad = [replace(data[0], id=name, images=(FileImage(f"{name}.png", tmp_path),)) for name in ("damaged", "strip")]
    found = run(policy, StoredDataset("bad", (bad[0], *data.samples, bad[1])), workers, num_samples=num_samples)
    assert [record.is_scored for record in found.records] == [False, *[True] * 4, False]
    assert f"The image {path} cannot be decoded (" in str(found.records[0].unscored_reason)
    assert "An image of sample 'strip' cannot be used: " in str(found.records[5].unscored_reason)
    assert found.results["unscored_rate"] == pytest.approx(2 / 6)
    assert [record.output for record in found.records[1:5]] == [record.output for record in sound.records]


def test_an_image_file_is_opened_for_its_size_once_and_to_decode_it_once_per_question(
    tiny_policy, data, tmp_path, monkeypatch
):
    Image.effect_noise((64, 64), 50).save(tmp_path / "shared.png")
    asked = [replace(data[0], id=str(number), images=(FileImage("shared.png", tmp_path),)) for number in range(4)]
    opened, exact = [], files._open
    monkeypatch.setattr(files, "_open", lambda path: opened.append(path.name) or exact(path))
    found = run(tiny_policy(), StoredDataset("shared", tuple(asked)), workers=2)
    assert all(record.is_scored for record in found.records)
    assert opened == ["shared.png"] * 5


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_answers_do_not_depend_on_how_many_share_the_batches(tiny_policy, data, parts, monkeypatch):
    monkeypatch.setattr(answering, "BATCHES_PER_CHUNK", 1)
    engine = RolloutEngine(tiny_policy())
    alone = evaluate(engine, data, CONFIG, max_completion_length=6)
    plan = plan_evaluation(data, CONFIG, max_completion_length=6)
    shares = [plan.answer(engine, part=slice(part, None, parts)) for part in range(parts)]
    assert [len(share) for share in shares] == {1: [4], 2: [2, 2], 3: [2, 2, 0], 5: [2, 2, 0, 0, 0]}[parts]
    together = plan.conclude(record for share in reversed(shares) for record in share)
    assert together.records == alone.records
    assert json.dumps(together.results) == json.dumps(alone.results)  # which may hold NaN


def test_a_chunk_that_was_interrupted_is_answered_again_and_its_records_are_kept(tiny_policy, data, monkeypatch):
    monkeypatch.setattr(answering, "BATCHES_PER_CHUNK", 4)
    engine, greedy = RolloutEngine(tiny_policy()), RolloutEngine.greedy
    settings = AnswerSettings(CONFIG.model_copy(update={"batch_size": 1, "num_samples": 0}), 6)
    samples = list(data.samples)
    undisturbed: list[EvalRecord] = []
    answer_all(lambda: engine, samples, settings, save=undisturbed.extend)
    assert len(undisturbed) == 4

    def dying(*args, **kwargs):
        yield from islice(greedy(*args, **kwargs), 3)
        raise KeyboardInterrupt

    saved: list[EvalRecord] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RolloutEngine, "greedy", dying)
        answer_all(lambda: engine, samples, settings, save=saved.extend)
    assert saved == undisturbed[:3]
    saved[1:2] = []  # as if another process had lost it
    seen: list[tuple[int, int]] = []
    answer_all(
        lambda: engine,
        samples,
        settings,
        done=[record.sample_id for record in saved],
        save=saved.extend,
        progress=lambda *progress: seen.append(progress),
    )
    assert sorted(saved, key=lambda record: record.sample_id) == sorted(undisturbed, key=lambda r: r.sample_id)
    assert len(saved) == 4
    assert seen == [(3, 4), (4, 4)]


def test_threads_end_when_the_engine_fails(tiny_policy, data, monkeypatch):
    def fail(*args, **kwargs):
        assert [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
        raise KeyboardInterrupt

    monkeypatch.setattr(RolloutEngine, "greedy", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_policy(), data, workers=2)


def test_answers_do_not_depend_on_the_batch(tiny_policy, tmp_path):
    (tmp_path / "images").mkdir()
    kinds = ("CLOSED", "Yes", "PRES"), ("OPEN", "left lobe", "POS"), ("CLOSED", "no", "ABN, PRES")
    rows = []
    for number in range(6):  # of different sizes; num_test leaves one out
        Image.effect_noise((60 + 30 * number, 140 - 20 * number), 50).save(tmp_path / "images" / f"{number}.jpg")
        answer_type, answer, question_type = kinds[number % 3]
        row = {"qid": number, "image_name": f"{number}.jpg", "image_organ": "HEAD" if number % 2 else "CHEST"}
        row |= {"question": f"What is {'very ' * number}bright?", "answer": answer, "answer_type": answer_type}
        rows.append(row | {"question_type": question_type, "phrase_type": "test_freeform"})
    (tmp_path / FILE).write_text(json.dumps(rows))
    dataset = load_vqa_rad(DataConfig(name="vqa_rad", path=str(tmp_path), num_test=5), "test")
    engine = RolloutEngine(tiny_policy())
    whole, single = (
        evaluate(engine, dataset, EvalConfig(batch_size=size, bootstrap=50), max_completion_length=6)
        for size in (5, 1)
    )
    assert [record.sample_id for record in whole.records] == [sample.id for sample in dataset.samples]
    assert [record.output for record in whole.records] == [record.output for record in single.records]
    assert whole.results["dataset"]["fingerprint"] == dataset.fingerprint
    assert set(whole.results["by"]) == {"answer_type", "organ", "family", "answer_kind"}
    assert max(record.num_tokens for record in whole.records) <= 6


def test_answers_are_read_in_the_tags_of_their_prompt(tiny_policy, make_sample):
    wording = Wording(think=("[why]", "[/why]"), answer=("[so]", "[/so]"))
    processor = tiny_policy().processor
    processor.use(wording)
    sample = make_sample(options=("left", "right"))
    settings = AnswerSettings(CONFIG, 6)
    question = Question(sample, sample, processor.encode(sample), None, None)

    def read(text: str) -> EvalRecord:
        completion = Completion((1, 2), text, False)
        group = Group(sample, question.prompt, [completion])
        record = make_record(question, group, [completion], settings, processor)
        assert record.sampled[0].answer == record.answer
        return parse_record(record_line(record), "line")

    record = read(f"[why]seen[/why][so]{sample.answer}[/so]")
    assert (record.think, record.answer, record.is_correct, record.is_well_formed) == (
        "seen",
        sample.answer,
        True,
        True,
    )
    assert record.text == f"seen  {sample.answer}" and record.tags == wording.tags
    other = read(f"<think>seen</think><answer>{sample.answer}</answer>")
    assert (other.answer, other.why) == (None, "no answer: 0 answer sections")
