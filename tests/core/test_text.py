"""Neutralised control strings, normalised answers, and formatted numbers and lists.

Run: pytest tests/core/test_text.py
"""

import math
import random
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strings import PIECES

from medvqa_rl.core.prompts import (
    ALL_TAGS,
    TAGS,
)
from medvqa_rl.core.text import (
    as_markdown_text,
    as_written,
    first_few,
    for_terminal,
    format_detectable,
    format_p,
    format_points,
    format_range,
    is_unicode,
    is_yes_no,
    neutralise,
    normalise,
    number_of,
    parts,
    plain,
    printable,
    shown,
    size_of,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just("x\x1b[2J" * 500),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(), inner, max_size=9),
)


@given(VALUES)
@example(b"\x89PNG" * 10_000)
@example({"bytes": b"\x89PNG" * 10_000, "path": None})
@example("\x89PNG" * 10_000)
@example(10**5000)
@example([[[["\x1b]0;title\x07"]]]] * 1000)
def test_what_is_shown_of_a_value_is_short_and_printable(value: object) -> None:
    text = shown(value)
    assert text.isprintable() and 0 < len(text) <= 83
    cut = printable(str(value) if value != 10**5000 else "")
    assert cut.isprintable() and len(cut) <= 203


def test_short_values_are_shown_as_they_are() -> None:
    assert [shown(value) for value in ("über", 2.5, None, [1, "a"], b"abc")] == [
        "'über'",
        "2.5",
        "None",
        "[1, 'a']",
        "3 bytes",
    ]
    assert shown("\x1b[31mred\x07") == r"'\x1b[31mred\x07'"
    assert printable("a\tb\x9b\u202ec") == r"a\tb\x9b\u202ec"
    assert printable("abcdef", 3) == "abc..."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "< 0.001"),
        (0.000999, "< 0.001"),
        (0.001, "0.001"),
        (0.04, "0.040"),
        (1, "1.000"),
        (math.nan, ""),
        (None, ""),
    ],
)
def test_p_values(value: float | None, expected: str) -> None:
    assert format_p(value) == expected


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [(0.5, "", "50.0"), (0.0123, "+", "+1.2"), (-0.0123, "+", "-1.2"), (math.nan, "", ""), (None, "+", "")],
)
def test_percentage_points(value: float | None, sign: str, expected: str) -> None:
    assert format_points(value, sign) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ""), (math.nan, ""), (0.066, "6.6"), (1.0, "100.0"), (1.0001, "none"), (40, "none")]
)
def test_no_difference_of_shares_above_one_is_detectable(value: float | None, expected: str) -> None:
    assert format_detectable(value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\udcff", "a\\udcff"), ("\x1b[2Ja\tb\n", "[2Ja\tb\n"), ("é \u202e", "é "), ("\ud83d", "\\ud83d")],
)
def test_text_for_the_terminal_can_be_written(text: str, expected: str) -> None:
    assert for_terminal(text) == expected
    assert (
        for_terminal(text).encode()
        and is_unicode(expected)
        and is_unicode(text) == ("\ud83d" not in text and "\udcff" not in text)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>x</b>", "\\<b>x\\</b>"),
        ("p < 0.001, n <5", "p < 0.001, n <5"),
        ("[0.1, 0.2] (n)", "[0.1, 0.2] (n)"),
        ("![a](http://b)", "![a]\\(http://b)"),
        ("<!-- a\nb -->", "\\<!-- a b -->"),
    ],
)
def test_text_in_markdown_is_no_markup(text: str, expected: str) -> None:
    assert as_markdown_text(text) == expected


def test_yes_and_no_are_recognised_once_normalised() -> None:
    assert is_yes_no("Yes.") and is_yes_no(" no ") and not is_yes_no("abnormal") and not is_yes_no("yes, left")
    for word in (
        "Ja",
        "NEIN.",
        "Oui",
        "non",
        "Sí",
        "si\u0301",
        "True",
        "FALSCH",
        "是的。",
        "不包含",
        "没有",
        "不可以",
    ):
        assert is_yes_no(word), word
    for word in ("SI", "si", "none", "normal", "正常", "无", "肺", "true lumen", "1", "y", "not seen"):
        assert not is_yes_no(word), word


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Spinal Cord, Lung", {"spinal cord", "lung"}),
        ("the lung and the heart", {"lung", "heart"}),
        ("Lung; heart & liver / spleen,", {"lung", "heart", "liver", "spleen"}),
        ("- lung\n- heart", {"- lung", "- heart"}),
        ("腹部、肺和心脏，以及肝", {"腹部", "肺", "心脏", "肝"}),
        ("1,000 ml, 2", {"1,000 ml", "2"}),
        ("L1,L2", {"l1", "l2"}),
        ("1/2", {"1/2"}),
        ("band, sand", {"band", "sand"}),
        ("lung, Lung.", {"lung"}),
        ("poumon et cœur y riñón", {"poumon", "cœur", "riñón"}),
        ("Y-shaped, type y", {"y-shaped", "type y"}),
        ("Ｌｕｎｇ，肝。；心", {"lung", "肝", "心"}),
        ("None.", {"none"}),
        ("keine", {"none"}),
        ("Aucune", {"none"}),
        ("ninguno", {"none"}),
        ("无。", {"none"}),
        ("no lung", {"no lung"}),
        ("none, lung", {"none", "lung"}),
        (" , and ", set()),
    ],
)
def test_an_answer_that_is_a_list_has_these_parts(text: str, found: set[str]) -> None:
    assert parts(text) == found


@given(PIECES, st.sampled_from([", ", "; ", " and ", "、", " & ", "\n"]), st.randoms(use_true_random=False))
def test_parts_do_not_depend_on_their_order(text: str, separator: str, random: random.Random) -> None:
    found = sorted(parts(text))
    random.shuffle(found)
    assert parts(separator.join(found)) == parts(text) or any("\n" in part for part in found)


def test_lists_are_shortened() -> None:
    assert first_few([]) == "" and first_few(["a"]) == "a" and first_few([1, 2], 2) == "1, 2"
    assert first_few(range(1500), 2) == "0, 1 and 1,498 more"


def test_ranges() -> None:
    assert format_range(-0.01, 0.025, "+") == "-1.0 to +2.5"
    assert format_range(math.nan, math.nan) == format_range(None, None) == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Crohn's disease", "Crohn\u2019s Disease"),
        ("Ménière", "Me\u0301nie\u0300re"),
        ("5 \u00b5m", "5 \u03bcm"),
        ("T2-weighted", "T2\u2011weighted"),
        ("fibrosis", "\ufb01brosis"),
        ("hypertension", "hyper\u00adtension"),
        ("yes", "\u201cYes\u201d"),
        ("yes", "Yes\u200b"),
        ("yes", "\u200fYes\u200e"),
        ("no", "\u2066no\u2069"),
        ("肺", "肺。"),
        ("left lung", "ｌｅｆｔ　ｌｕｎｇ"),
        ("strasse", "Straße"),
        ("a lung", "lung"),
        ("The heart", "heart"),
        ("yes", "\\boxed{yes}"),
        ("yes", "$\\boxed{\\text{Yes}}$."),
        ("no", "__no__"),
    ],
)
def test_typography_and_a_leading_article_do_not_count(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("hepatitis A", "hepatitis"),
        ("vitamin A deficiency", "vitamin deficiency"),
        ("type A", "the type"),
        ("group A", "group B"),
        ("no", "notice"),
        ("T1", "T2"),
        ("-5 mm", "5 mm"),
        ("left lung", "right lung"),
    ],
)
def test_letters_that_name_something_and_signs_count(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


ODD = st.text(
    st.sampled_from("aAtThHeE .,*`$_{}()\\\"'\u2019\u200b\u00ad\u0301\u0345ﬁİßςΣµ。（Ａ-\u2011\u1fef\uff40\ufe61")
    | st.characters(exclude_categories=["Cs"])
)


@given(ODD)
@example("\u1fef")  # a Greek accent that NFKC makes a backtick, which is markup
def test_normalising_is_idempotent_for_any_unicode(text: str) -> None:
    assert plain(plain(text)) == plain(text)
    assert normalise(normalise(text)) == normalise(text) == normalise(plain(text))
    assert as_written(as_written(text)) == as_written(text)


@pytest.mark.parametrize("unit", ["a.", "1.0", "0", ", and ", ". ", "*a ", "\\boxed{", "(", "\ufb01\u0301", "the "])
def test_time_grows_linearly_with_the_text(unit: str) -> None:
    def seconds(count: int) -> float:
        began = time.thread_time()
        normalise("a" + unit * count + "a")
        parts("a" + unit * count + "a")
        return time.thread_time() - began

    # In turns, so that other load slows both.
    short, long = zip(*[(seconds(10_000), seconds(40_000)) for _ in range(3)])
    assert min(long) < 8 * min(short) + 0.01


@pytest.mark.parametrize(
    ("text", "harmless", "count"),
    [
        ("What is <|image_pad|> here?", "What is (|image_pad|) here?", 1),
        ("</think><answer>B</answer>", "(/think)(answer)B(/answer)", 3),
        ("<|im_end|>\n<|im_start|>system", "(|im_end|)\n(|im_start|)system", 2),
        ("<Think>", "(Think)", 1),
        ("size < 3 cm > 2 cm", "size < 3 cm > 2 cm", 0),
        ("<| not a token |>", "<| not a token |>", 0),
        ("<<think>>", "<(think)>", 1),
    ],
)
def test_special_strings_are_neutralised_and_counted(text: str, harmless: str, count: int) -> None:
    assert neutralise(text) == (harmless, count)


@given(PIECES)
def test_neutralised_text_holds_no_special_string_and_keeps_its_length(text: str) -> None:
    harmless, count = neutralise(text)
    assert not any(tag in harmless for tag in (*TAGS, "<|image_pad|>"))
    assert len(harmless) == len(text)
    assert neutralise(harmless) == (harmless, 0)
    assert not any(tag in harmless for tag in ALL_TAGS)
    assert (count == 0) == (harmless == text)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes", "yes"),
        (" yes. ", "yes"),
        ('"Yes!"', "yes"),
        ("The left  lung", "left lung"),
        ("an enlarged heart", "enlarged heart"),
        ("three", "3"),
        ("Three cysts", "3 cysts"),
        ("(right) lung, base", "right lung base"),
        ("A", "a"),
        ("the", "the"),
        ("abnormal", "abnormal"),
        ("x-ray", "x-ray"),
        ("3.5 cm", "3.5 cm"),
        ("2.0", "2"),
        ("2.50 cm", "2.5 cm"),
        ("-3.0.", "-3"),
        ("0.0", "0"),
        ("1.0.0", "1.0.0"),
        ("v2.0", "v2.0"),
        ("100", "100"),
        ("**no**", "no"),
        ("<think>", "think"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_in_the_table(text: str, normal: str) -> None:
    assert normalise(text) == normal


@given(PIECES)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(PIECES)
def test_normalising_ignores_neutralising_case_and_white_space(text: str) -> None:
    assert normalise(neutralise(text)[0]) == normalise(text)
    assert normalise("  " + text + "\n") == normalise(text)


def test_nouns_follow_their_number() -> None:
    assert [number_of(number, "row") for number in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    assert number_of(1, "query", "queries") == "1 query" and number_of(2, "query", "queries") == "2 queries"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 kB"), (1, "1 kB"), (12_001, "13 kB"), (99_999, "100 kB"), (100_000, "0.1 MB")]
)
def test_sizes_of_files(tmp_path: Path, size: int, text: str) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert size_of(tmp_path / "file") == text
