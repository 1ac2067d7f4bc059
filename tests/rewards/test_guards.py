"""Negation, laterality and other opposites: a hand-written table of pairs that never and that may count as similar.

Run: pytest tests/rewards/test_guards.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.rewards.guards import conflict

OPPOSITE = [
    # negation
    ("no effusion", "effusion"),
    ("effusion", "no pleural effusion"),
    ("no effusions", "a small effusion"),
    ("without effusion", "with effusion"),
    ("effusion is absent", "effusion is present"),
    ("absent bowel sounds", "bowel sounds"),
    ("absence of effusion", "effusion"),
    ("negative for pneumonia", "pneumonia"),
    ("negative for pneumonia", "positive for pneumonia"),
    ("pneumonia: negative", "pneumonia"),
    ("negative", "positive"),
    ("no evidence of pneumothorax", "pneumothorax"),
    ("no evidence of pneumothorax", "evidence of pneumothorax"),
    ("there is no pneumothorax", "there is a pneumothorax"),
    ("pneumothorax is not seen", "pneumothorax is seen"),
    ("pneumothorax not identified", "pneumothorax"),
    ("no mass, cyst or stone", "cyst"),
    ("no mass, cyst, or stone", "a stone"),
    ("neither mass nor cyst", "cyst"),
    ("free of disease", "disease"),
    ("lungs free of infiltrate", "infiltrate in the lungs"),
    ("pneumothorax ruled out", "pneumothorax"),
    ("ruled out pneumothorax", "pneumothorax"),
    ("excludes fracture", "fracture"),
    ("it isn't a mass", "it is a mass"),
    ("it isn\u2019t a mass", "a mass"),
    ("can't see a mass", "a mass"),
    ("denies pain", "pain"),
    ("the effusion has resolved", "the effusion"),
    ("lack of perfusion", "perfusion"),
    ("not enlarged", "enlarged"),
    ("the heart is not enlarged", "the heart is enlarged"),
    ("no increase", "increased"),
    ("no", "yes"),
    ("No, the lungs are clear", "Yes, the lungs are clear"),
    ("no", "effusion"),
    ("none", "effusion"),
    ("no effusion", "fluid collection"),
    ("no fracture, normal alignment", "broken bone"),
    ("mass without calcification", "mass with calcification"),
    ("effusion without pneumothorax", "pneumothorax without effusion"),
    ("no left effusion", "left effusion"),
    ("effusion is not present in the left lung", "effusion is present in the left lung"),
    ("no mass but effusion", "mass but no effusion"),
    ("no mass, effusion present", "mass present, no effusion"),
    ("no mass and no cyst", "mass and cyst"),
    ("false", "true"),
    ("present", "absent"),
    ("present", "not present"),
    ("not seen", "seen"),
    ("absent", "yes"),
    ("no fracture or dislocation", "dislocation"),
    ("fracture, no dislocation", "no fracture, dislocation"),
    ("unchanged", "changed"),
    ("nondisplaced fracture", "displaced fracture"),
    # double negation
    ("not absent", "absent"),
    ("effusion is not absent", "effusion is absent"),
    ("effusion is not absent", "no effusion"),
    ("no absence of effusion", "no effusion"),
    ("cannot rule out pneumonia", "no pneumonia"),
    ("not without contrast", "without contrast"),
    ("not abnormal", "abnormal"),
    ("no abnormality", "abnormal"),
    ("not normal", "normal"),
    # prefixes
    ("normal", "abnormal"),
    ("normal heart", "abnormal heart"),
    ("unremarkable", "abnormal"),
    ("unremarkable", "remarkable"),
    ("noncalcified nodule", "calcified nodule"),
    ("non-calcified nodule", "calcified nodule"),
    ("non calcified nodule", "calcified nodule"),
    ("non-contrast CT", "contrast CT"),
    ("non-contrast CT", "CT with contrast"),
    ("CT without contrast", "contrast-enhanced CT"),
    ("asymmetric", "symmetric"),
    ("irregular margin", "regular margin"),
    ("incomplete fracture", "complete fracture"),
    ("unenhanced", "enhanced"),
    # sides
    ("left", "right"),
    ("left lung", "right lung"),
    ("right-sided effusion", "left-sided effusion"),
    ("right-sided", "left"),
    ("on the left side", "on the right side"),
    ("bilateral", "left"),
    ("bilateral effusions", "right effusion"),
    ("both lungs", "left lung"),
    ("both lungs", "the right lung"),
    ("left and right", "left"),
    ("bilaterally", "unilaterally"),
    ("unilateral", "left and right"),
    ("midline", "left"),
    ("no left effusion", "no right effusion"),
    ("left mass and right cyst", "right mass and left cyst"),
    ("a mass on the left, a cyst on the right", "a mass on the right, a cyst on the left"),
    ("LUL", "RUL"),
    ("left upper lobe", "RUL"),
    ("Left-sided.", "(right-sided)"),
    # heights and the rest
    ("upper lobe", "lower lobe"),
    ("upper left", "lower left"),
    ("superior", "inferior"),
    ("upper and lower lobes", "upper lobe"),
    ("middle lobe", "lower lobe"),
    ("RUL", "right lower lobe"),
    ("left apex", "left base"),
    ("increased", "decreased"),
    ("increased density", "reduced density"),
    ("elevated", "low"),
    ("anterior", "posterior"),
    ("medial", "lateral"),
    ("proximal", "distal"),
    ("hyperintense", "hypointense"),
    ("T2 hyperintensity", "T2 hypointense"),
    ("hypertension", "hypotension"),
    ("benign", "malignant"),
    ("above the diaphragm", "below the diaphragm"),
    ("intra-axial mass", "extraaxial mass"),
    ("intracranial", "extracranial"),
    ("pre-contrast", "post-contrast"),
    ("acute", "chronic"),
    ("large mass", "small mass"),
    ("improved", "worse"),
]

COMPATIBLE = [
    ("effusion", "pleural effusion"),
    ("no effusion", "no pleural effusion"),
    ("no effusion", "without effusion"),
    ("no effusion", "effusion is absent"),
    ("no effusion", "negative for effusion"),
    ("no effusion", "no evidence of an effusion"),
    ("no effusion", "effusion is not seen"),
    ("no", "no effusion"),
    ("no", "none"),
    ("yes", "effusion"),
    ("effusion is not absent", "effusion is present"),
    ("not absent", "present"),
    ("cannot rule out pneumonia", "pneumonia"),
    ("normal", "no abnormality"),
    ("unchanged", "no change"),
    ("nondisplaced fracture", "fracture that is not displaced"),
    ("no", "not visible"),
    ("present", "visible"),
    ("present", "effusion"),
    ("lower right lobe", "right lower lobe"),
    ("high pressure", "pressure"),
    ("T1", "T2"),
    ("normal", "unremarkable"),
    ("normal heart", "normal heart, no cardiomegaly"),
    ("not normal", "abnormal"),
    ("no abnormality", "not abnormal"),
    ("non-contrast CT", "CT without contrast"),
    ("non-contrast CT", "CT"),
    ("noncalcified nodule", "nodule"),
    ("noncalcified", "not calcified"),
    ("nodule", "a node"),
    ("note", "nonetheless a note"),
    ("right-sided", "right"),
    ("right-sided effusion", "effusion on the right side"),
    ("left upper lobe", "LUL"),
    ("left upper lobe", "upper lobe"),
    ("left upper lobe", "left lung"),
    ("bilateral", "both sides"),
    ("bilateral effusion", "left and right effusion"),
    ("bilateral effusion", "effusion left and right"),
    ("right and left", "left and right"),
    ("unilateral", "left"),
    ("left mass and right cyst", "right cyst and left mass"),
    ("increased", "elevated"),
    ("hyperintense", "bright"),
    ("free fluid", "fluid"),
    ("mass, no effusion", "mass"),
    ("no mass, cyst or stone", "no stone"),
    ("MRI", "magnetic resonance imaging"),
    ("knee", "now"),
    ("notable mass", "mass"),
    ("", "effusion"),
    ("...", "effusion"),
    ("2.5 cm", "2.5 centimetres"),
]


@pytest.mark.parametrize(("one", "other"), OPPOSITE)
def test_conflicting_answers_never_count_as_similar(one: str, other: str) -> None:
    assert conflict(one, other) is not None
    assert conflict(other, one) == conflict(one, other)
    assert conflict(f"The answer: {one}.", other.upper()) is not None, "case and what stands around do not matter"


@pytest.mark.parametrize(("one", "other"), COMPATIBLE)
def test_compatible_answers_are_left_to_the_similarity(one: str, other: str) -> None:
    assert conflict(one, other) is None
    assert conflict(other, one) is None


@pytest.mark.parametrize("text", sorted({text for pair in OPPOSITE + COMPATIBLE for text in pair}))
def test_nothing_conflicts_with_itself(text: str) -> None:
    assert conflict(text, text) is None
    assert conflict(text, text.upper() + " ") is None


WORDS = st.sampled_from(
    sorted({w for pair in OPPOSITE + COMPATIBLE for text in pair for w in text.split()} | {",", "."})
)
TEXTS = st.lists(WORDS, max_size=10).map(" ".join) | st.text(max_size=30)


@given(TEXTS)
def test_any_gold_answer_passes_against_itself(text: str) -> None:
    assert conflict(text, text) is None


@given(TEXTS, TEXTS)
def test_conflict_is_symmetric(one: str, other: str) -> None:
    assert conflict(one, other) == conflict(other, one)


@given(st.lists(st.sampled_from(["effusion", "mass", "cyst", "lung", "heart"]), min_size=1, max_size=4))
def test_denying_a_text_without_cues_contradicts_it(words: list[str]) -> None:
    text = " ".join(words)
    assert conflict(f"no {text}", text) and conflict(f"{text} absent", text)
    assert conflict(f"left {text}", f"right {text}") and conflict(f"left {text}", f"bilateral {text}")


def test_the_reason_names_the_conflict() -> None:
    assert conflict("no effusion", "effusion") == "negation: effusion"
    assert conflict("left lung", "both lungs") == "side: left against left and right"
    assert conflict("left mass and right cyst", "right mass and left cyst") == "side of cyst: left against right"
