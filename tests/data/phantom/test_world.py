"""The phantom world: images, questions, claims and their two oracles."""

import hashlib
import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import DataConfig
from medvqa_rl.core.answers import read_choice
from medvqa_rl.core.text import normalise
from medvqa_rl.data.phantom.claims import claims, faithfulness, is_coherent, is_true
from medvqa_rl.data.phantom.dataset import load_phantom
from medvqa_rl.data.phantom.drawing import SIZE, PhantomImage, render
from medvqa_rl.data.phantom.questions import FAMILIES, FLAW_RATE, draw_sample
from medvqa_rl.data.phantom.world import ALL_ORGANS, KINDS, MODALITIES, ORGANS, Finding, Scene, draw_scene


def scene_of(sample) -> Scene:
    image = sample.images[0]
    assert isinstance(image, PhantomImage)
    return image.scene


SAMPLES = [draw_sample(seed=0, split="tests", index=index) for index in range(1500)]


def test_samples_are_the_same_on_every_platform():
    """The digest was written down once; another platform, NumPy or Python must draw the same bytes."""
    digest = hashlib.sha256()
    for index in range(24):
        for scanner in ("home", "unseen"):
            sample = draw_sample(seed=0, split="digest", index=index, scanner=scanner)
            digest.update(np.asarray(sample.images[0].load()).tobytes())
            digest.update(f"{sample.question}|{sample.options}|{sample.answer}|{sample.reasoning}".encode())
    assert digest.hexdigest() == "c9af4c5ecdbd3717ebb51d4d7ce596aea33f9ab49e811e38ddcef268e54f6b71"


def test_draws_at_least_300_samples_a_second():
    begin = time.process_time()
    for sample in SAMPLES[:150]:
        draw_sample(seed=0, split="rate", index=int(sample.id.rsplit("-", 1)[1])).images[0].load()
    assert 150 / (time.process_time() - begin) > 300


def test_every_organ_renders_and_findings_change_the_image_where_they_lie():
    for organ in ALL_ORGANS:
        modality = next(modality for modality, organs in ORGANS.items() if organ in organs)
        empty = render(Scene(f"{organ}/x", modality, organ, ())).astype(int)
        assert empty.shape == (SIZE, SIZE, 3)
        for kind in KINDS[modality]:
            # Same key, hence same noise: only the finding differs.
            finding = Finding(kind, "left", "upper", "medium", 1)
            changed = (
                np.abs(render(Scene(f"{organ}/x", modality, organ, (finding,))).astype(int) - empty).max(axis=2) > 40
            )
            rows, columns = np.nonzero(changed)
            assert len(rows) > 15, (organ, kind)
            assert np.median(rows) < SIZE / 2 and np.median(columns) < SIZE / 2, (organ, kind)


def test_scanners_differ_and_scenes_do_not():
    for index in range(5):
        samples = [
            draw_sample(seed=0, split="tests", index=index, scanner=name) for name in ("home", "unseen", "worn")
        ]
        assert len({(sample.question, sample.options, sample.answer) for sample in samples}) == 1
        assert len({sample.image_key for sample in samples}) == 3
        images = [np.asarray(sample.images[0].load(), int) for sample in samples]
        assert all(np.abs(one - other).mean() > 10 for one, other in combinations(images, 2))


def test_only_requested_modalities_are_drawn():
    kept = [draw_sample(seed=0, split="tests", index=index, modalities=("CT", "fundus")) for index in range(60)]
    assert {sample.groups["modality"] for sample in kept} == {"CT", "fundus"}
    # Images that are kept anyway stay what they are, so two settings differ only where they must.
    assert all(one == sample for one, sample in zip(kept, SAMPLES) if sample.groups["modality"] in ("CT", "fundus"))


def test_all_families_and_answer_types_occur():
    families = {family: sum(sample.groups["family"] == family for sample in SAMPLES) for family in FAMILIES}
    assert min(families.values()) > 90, families
    assert {sample.answer_type for sample in SAMPLES} == {"choice", "closed", "open"}


def test_answers_are_true_of_the_scene():
    for sample in SAMPLES:
        scene, family, gold = scene_of(sample), sample.groups["family"], sample.answer_text
        words = sample.question.rstrip("?").replace(",", "").split()
        if sample.answer_type == "closed":
            assert gold == ("yes" if _is_so(scene, family, words) else "no"), sample
        elif family in ("modality", "organ"):
            assert gold == getattr(scene, family)
        elif family == "kind":
            assert [finding.kind for finding in scene.findings] == [gold]
        elif family == "location":
            finding = scene.find(words[-1])
            assert gold == (finding.level if sample.options else finding.place)
        elif family == "size":
            assert gold == scene.find(words[-1]).size
        elif family == "count":
            assert gold == scene.find(words[-1]).count_word
        else:
            first, second = (finding.kind for finding in scene.findings)
            ranks = {kind: _rank(scene, kind) for kind in (first, second)}
            best = max(ranks, key=ranks.__getitem__)
            assert gold == ("equal" if len(set(ranks.values())) == 1 else best)


def _is_so(scene: Scene, family: str, words: list[str]) -> bool:
    """What a yes-no question asks, read off the scene."""
    if family in ("modality", "organ"):
        return getattr(scene, family) == words[-1]
    if family == "presence":
        return scene.find(words[-1]) is not None
    if family == "comparison":
        return _rank(scene, words[2]) > _rank(scene, words[-1])
    if family == "count":
        return scene.find(words[4]).count_word == words[-1]
    return getattr(scene.find(words[2]), {"location": "side", "size": "size"}[family]) == words[-1]


def _rank(scene: Scene, kind: str) -> int:
    return ("small", "medium", "large").index(scene.find(kind).size)


def test_options_are_distinct_and_letters_spread():
    letters = dict.fromkeys("ABCD", 0)
    for sample in SAMPLES:
        if sample.answer_type == "choice":
            assert len({normalise(option) for option in sample.options}) == len(sample.options)
            assert read_choice(sample.answer, sample.options) == sample.answer
            letters[sample.answer] += 1
    assert letters["D"] > 90 and letters["A"] < 350


def test_a_share_of_training_questions_is_about_the_home_scanner():
    """The same questions; only the scanner differs, for the share and nowhere but in training."""
    plain = DataConfig(name="phantom", scanner="unseen", num_test=50)
    mixed = plain.model_copy(update={"home_share": 0.25})
    one, other = (load_phantom(config, "train") for config in (plain, mixed))
    scanners = [other[index].groups["scanner"] for index in range(800)]
    assert set(scanners) == {"home", "unseen"}
    assert 0.25 - 0.05 < scanners.count("home") / 800 < 0.25 + 0.05, "3 standard errors"
    assert [one[index].question for index in range(50)] == [other[index].question for index in range(50)]
    assert other[scanners.index("home")].image_key.startswith("home:")
    tests = [load_phantom(config, "test") for config in (plain, mixed)]
    assert {sample.groups["scanner"] for sample in map(tests[1].__getitem__, range(50))} == {"unseen"}
    assert tests[0].fingerprint == tests[1].fingerprint and one.fingerprint != other.fingerprint


def test_letter_skew_moves_answers_to_b_and_c():
    skewed = [draw_sample(seed=0, split="skew", index=i, letter_skew=1.0, answer_types=("choice",)) for i in range(60)]
    assert {sample.answer for sample in skewed} <= {"B", "C"}
    assert all(sample.answer_text in sample.options for sample in skewed)


def test_reference_reasoning_is_mostly_coherent_and_faithful():
    coherent = [is_coherent(sample.reasoning) for sample in SAMPLES]
    assert 1 - FLAW_RATE - 0.04 < np.mean(coherent) < 1 - FLAW_RATE + 0.04
    for sample, is_sound in zip(SAMPLES, coherent):
        if is_sound:
            assert faithfulness(sample.reasoning, scene_of(sample)) == 1.0, sample
    sentences = [sample.reasoning.count(".") for sample in SAMPLES]
    assert min(sentences) == 2 and max(sentences) <= 9 and np.std(sentences) > 1


SCENE = Scene("s", "MRI", "brain", (Finding("cyst", "left", "upper", "small", 2),))
CYST = "There is a cyst: count two, size small, upper left."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The modality is MRI. The organ is spine.", 0.5),
        (CYST, 1.0),
        ("There is a cyst: count one, size small, upper left.", 0.0),
        ("No cyst is seen. No tumor is seen. The right part is clear. The left part is clear.", 0.5),
        ("No finding is seen.", 0.0),
        ("The quality is good. So the answer is yes.", None),
        ("", None),
    ],
)
def test_faithfulness_is_the_share_of_true_claims(text, expected):
    assert faithfulness(text, SCENE) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"The modality is MRI. The organ is brain. {CYST} So the answer is cyst B.", True),
        (f"{CYST} So the answer is two.", True),
        (f"{CYST} The view is complete. So the answer is no.", True),
        ("So the answer is cyst B.", False),  # concludes from nothing
        (f"{CYST} So the answer is tumor.", False),  # does not follow
        (f"{CYST} {CYST} So the answer is cyst.", False),  # repeats itself
        (f"{CYST} No cyst is seen.", False),  # contradicts itself
        (f"{CYST} The left part is clear.", False),
        (f"{CYST} No finding is seen.", False),
        ("The modality is MRI. The modality is CT.", False),
        ("The modality is MRI. The organ is skin.", False),  # an MRI of what an MRI does not show
        ("The modality is MRI. No drusen is seen.", False),
        (
            f"{CYST} There is a drusen: count one, size small, lower left.",
            False,
        ),
        (f"{CYST} The quality is good. The image is sharp. The view is complete.", False),  # padding
        (f"{CYST} Blah blah.", False),
        ("", False),
    ],
)
def test_coherence_follows_the_rules_of_the_world(text, expected):
    assert is_coherent(text) is expected


@given(st.text())
def test_oracles_accept_any_text(text):
    assert is_coherent(text) in (True, False)
    assert all(is_true(claim, SCENE) in (True, False) for claim in claims(text))


def test_splits_do_not_share_images_and_test_questions_share_theirs():
    config = DataConfig()
    train, val, test = (load_phantom(config, split) for split in ("train", "val", "test"))
    keys = [{dataset[i].image_key for i in range(200)} for dataset in (train, val, test)]
    assert not keys[0] & keys[1] and not keys[1] & keys[2] and not keys[0] & keys[2]
    assert len(keys[0]) == 200 and len(keys[2]) < 110
    assert train.is_endless and not test.is_endless and len(test) == 600
    assert len({test[i].id for i in range(600)}) == 600
    assert train.fingerprint != test.fingerprint != load_phantom(DataConfig(seed=1), "test").fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": ("kidneys",)}, "data.families names kidneys"),
        ({"modalities": ("PET", "CT")}, "data.modalities names PET, which"),
        ({"families": ("presence",), "answer_types": ("choice",)}, "No phantom question"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_phantom(DataConfig(**settings), "train")


def test_scenes_follow_the_rules_of_the_world():
    for index in range(500):
        scene = draw_scene(str(index))
        assert scene.modality in MODALITIES and scene.organ in ORGANS[scene.modality]
        assert {finding.kind for finding in scene.findings} <= set(KINDS[scene.modality])
        assert len({(finding.side, finding.level) for finding in scene.findings}) == len(scene.findings)
