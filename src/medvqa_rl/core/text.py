"""Neutralising control strings in data, and the one normalisation of answers. Imports no torch."""

from __future__ import annotations

import math
import re
import reprlib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_SPECIAL = re.compile(
    r"<(\|[A-Za-z0-9_]+\|)>|<(/?(?:describe|think|answer)|(?:start|end)_of_(?:turn|image)|image_soft_token|[be]os|unused\d+)>",
    re.IGNORECASE,
)


def neutralise(text: str) -> tuple[str, int]:
    """Neutralise special-token and tag strings in the text of a data set.

    ``<|image_pad|>`` becomes ``(|image_pad|)`` and ``</think>`` becomes ``(/think)``: still readable, but no tokenizer
    maps them to control tokens, and a question cannot close the reasoning of its answer.

    Returns:
        The text and the number of strings replaced.
    """
    return _SPECIAL.subn(lambda match: f"({match[1] or match[2]})", text)


_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_INVISIBLE = dict.fromkeys(
    (0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
)
"""Soft hyphen, zero-width characters and marks of direction, to be deleted by ``str.translate``."""
_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys(_INVISIBLE),
        **dict.fromkeys("*`"),  # markup
    }
)
_EDGES = " .,;:!?\"'()[]{}$_\u3001\u3002\u3010\u3011\u300c\u300d\u300e\u300f\u300a\u300b\u3008\u3009\u30fb"
"""Punctuation that does not count around a word, ASCII and CJK; full-width forms are ASCII after :func:`plain`."""
_LATEX = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)(?![a-z])")


def without_invisible(text: str) -> str:
    """Text without zero-width characters, soft hyphens and marks of direction."""
    return text.translate(_INVISIBLE)


def plain(text: str) -> str:
    """Fold what is typography and not meaning, and neutralise control strings as in the prompt.

    Unicode NFKC with case folding (full-width forms, ligatures, composed accents, the micro sign), straight quotes and
    hyphens for typographic ones, no invisible characters (:func:`without_invisible`), no Markdown emphasis, no LaTeX
    commands such as ``\\boxed`` (their braces are punctuation). White space becomes single spaces.
    """
    previous = None
    while text != previous:  # folding one character may compose it with the next
        previous = text
        text = unicodedata.normalize("NFKC", text.translate(_TYPOGRAPHY)).casefold()
        text = _LATEX.sub(" ", neutralise(text)[0])
        if previous.isascii():  # nothing left to fold
            break
    return " ".join(text.split())


def normalise(text: str) -> str:
    """Normalise an answer for comparison.

    :func:`plain`, then: strips punctuation around words, drops leading articles, turns number words up to ten into
    digits and drops zeros at the end of decimals ("2.0" is 2). Words are compared whole, never as substrings, so
    "abnormal" is not "no". Only a leading article goes, so "hepatitis A" keeps its letter; an answer that consists of
    articles keeps the last one ("A" is an option).
    """
    words = [word.strip(_EDGES) for word in plain(text).split(" ")]
    words = [_NUMBERS.get(word) or _without_zeros(word) for word in words if word]
    first = next((place for place, word in enumerate(words[:-1]) if word not in _ARTICLES), max(len(words) - 1, 0))
    return " ".join(words[first:])


def _without_zeros(word: str) -> str:
    """A decimal number without the zeros at its end; other words as they are."""
    if "." in word and word.removeprefix("-").replace(".", "", 1).isdecimal():
        return word.rstrip("0").rstrip(".")
    return word


_BETWEEN_PARTS = re.compile(
    r"[;&、]|以及|[和与及]|\b(?:and|und)\b|(?<=\s)(?:et|y)(?=\s)|(?<!\d),|,(?!\d{3}\b)|(?<!\d)/|/(?!\d)"
)


def parts(text: str) -> frozenset[str]:
    """The parts of an answer that is a list, each normalised: "Lung, spinal cord and the heart" has three.

    Commas, semicolons, slashes, lines, "and", "und", "et", "y", "和" and so on separate them, except inside numbers.
    The empty list in any of the five languages ("none", "keine", "无") is the one part "none".
    """
    pieces = (part for line in text.splitlines() for part in _BETWEEN_PARTS.split(plain(line)))
    found = frozenset(part for part in map(normalise, pieces) if part)
    return frozenset({"none"}) if len(found) == 1 and found <= _NONE else found


_NONE = {
    *("none", "nothing"),
    *("keine", "keiner", "keines", "kein", "nichts"),
    *("aucun", "aucune", "rien"),
    *("ninguno", "ninguna", "nada"),
    *("无", "没有", "未见", "均无"),
}


def as_written(text: str) -> str:
    """:func:`plain` without outer punctuation: unlike :func:`normalise`, "A. fumigatus" keeps its A."""
    return plain(text).strip(_EDGES)


_YES_NO = {
    *("yes", "no", "true", "false"),
    *("ja", "nein", "wahr", "falsch"),
    *("oui", "non", "vrai", "faux"),
    *("sí", "no", "verdadero", "falso"),
    *("是", "是的", "不是", "否", "对", "不对", "有", "没有", "能", "不能", "会", "不会", "可以", "不可以"),
    *("包含", "不包含", "包括", "不包括", "存在", "不存在", "属于", "不属于"),
}
"""Answers that mean yes or no whatever the question, normalised; a Chinese answer repeats the verb of its question.
Words that can mean something else are left out: "si" without its accent (SI joint), 正常 (normal), 无 (none)."""


def is_yes_no(answer: str) -> bool:
    """Whether an answer is yes or no once normalised, in English, German, French, Spanish or Chinese."""
    return normalise(answer) in _YES_NO


_ABSTENTIONS = {
    normalise(text)
    for text in (
        *("cannot tell", "can't tell", "cannot say", "cannot be determined", "cannot determine", "not sure", "unsure"),
        *("i do not know", "i don't know", "unknown", "undetermined", "not enough information", "unclear"),
        *("nicht beurteilbar", "nicht zu beurteilen", "weiß nicht", "ich weiß es nicht", "unklar"),
        *("je ne sais pas", "impossible à dire", "indéterminé"),
        *("no sé", "no se puede determinar", "indeterminado"),
        *("不知道", "无法确定", "无法判断", "不确定"),
    )
}
"""Answers that decline to answer, normalised."""


def is_abstention(answer: str) -> bool:
    """Whether an answer declines to answer, in English, German, French, Spanish or Chinese."""
    return normalise(answer) in _ABSTENTIONS


def number_of(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: ``1 row``, ``2 rows``, ``1,000 rows``.

    Args:
        plural: of the noun; an s is added by default.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = 2


def size_of(path: Path) -> str:
    """The size of a file, in kB or, from a tenth of it, in MB."""
    size = path.stat().st_size
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{math.ceil(size / 1e3)} kB"


def printable(text: str, limit: int = 200) -> str:
    """Text of at most ``limit`` characters and "...", all on one line: control characters, among them those that
    steer a terminal, and lone surrogates are escaped."""
    if len(text) <= limit and text.isprintable():
        return text
    text = text[: limit + 1].encode("utf-8", "backslashreplace").decode()
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text if len(text) <= limit else text[:limit] + "..."


_HALVES = re.compile("[\ud800-\udfff]")


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8. A file name that is not UTF-8 has half characters (lone surrogates) in
    place of its bytes."""
    return _HALVES.search(text) is None


_TERMINAL = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
_TERMINAL |= dict.fromkeys((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def for_terminal(text: str) -> str:
    """Text without the control characters that steer a terminal, and without those that reverse its direction; keeps
    tabs and line ends. A sequence such as ``ESC [ 2 J`` loses its ESC and is then shown as ``[2J``; lone surrogates
    are escaped."""
    text = text.translate(_TERMINAL)
    return text if is_unicode(text) else text.encode("utf-8", "backslashreplace").decode()


def shown(value: object, limit: int = 80) -> str:
    """A given value in a message: its ``repr``, printable and short, and for bytes only their number.

    Every message that quotes what is in a file or a setting quotes it through this function or :func:`printable`.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value):,} bytes"
    if isinstance(value, str):
        return printable(repr(value[: limit + 1]), limit)
    try:
        return printable(_REPR.repr(value), limit)
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return "a number of thousands of digits"


def first_few(items: Iterable[object], limit: int = 8) -> str:
    """The first items, separated by commas, and how many more there are: ``3, 5, 8 and 12 more``."""
    texts = list(map(str, items))
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|(?<=\])\(")


def as_markdown_text(text: str) -> str:
    """One line of Markdown in which text from recipes, data and models is neither HTML, a link nor an image."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def format_p(value: float | None) -> str:
    """A p-value with three decimals, ``< 0.001`` below that; empty for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_points(value: float | None, sign: str = "") -> str:
    """A share in percent, or a difference of shares in percentage points, with one decimal; empty for None and NaN.

    Args:
        sign: ``"+"`` shows the sign of positive numbers too.
    """
    return "" if value is None or math.isnan(value) else f"{100 * value:{sign}.1f}"


def format_detectable(value: float | None) -> str:
    """A detectable difference of shares in points, as :func:`format_points`; ``none`` above 100 points, which no
    difference exceeds."""
    return "none" if value is not None and value > 1 else format_points(value)


def format_range(low: float | None, high: float | None, sign: str = "") -> str:
    """Both bounds of an interval, formatted by :func:`format_points`; empty if there is none."""
    bounds = format_points(low, sign), format_points(high, sign)
    return " to ".join(bounds) if all(bounds) else ""
