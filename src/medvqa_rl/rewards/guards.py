"""Detect negation, laterality and other opposites, which similar wording hides. Imports no torch.

Embeddings and word overlap place "no effusion" next to "effusion" and "left" next to "right", so similarity is
credited only if :func:`conflict` finds nothing. It works by rules on words, knows no medicine, and prefers withholding
credit to crediting the opposite: "no fracture" and "normal" conflict, since they are different answers. Equal texts
never conflict. English only: in other languages it finds nothing.

The rules are a simplified NegEx (Chapman et al. 2001, doi 10.1006/jbin.2001.1029):

- A cue ("no", "without", "negative for") negates the words up to the end of its clause, or up to the next cue; a
  trailing cue negates the words before it ("effusion is not seen"); a lone cue means no. Consecutive cues cancel out
  ("not absent", "cannot rule out").
- Prefixes negate only their word: "non-contrast CT" is a CT. "abnormal" is not normal, "unremarkable" is normal.
- Sides, heights and the like are sets: "bilateral" is left and right, and is not "left".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CUES = _set(
    """
    no not without none never neither cannot cant absent absence lack lacks lacking negative negatives free deny
    denies denied exclude excludes excluded excluding resolved nothing isnt arent wasnt werent doesnt dont didnt
    hasnt havent ruled rule rules ruling out
    """
)
"""Words that negate. ``out`` and ``rule`` only together (:func:`_is_cue`)."""
_SEEN = _set(
    """
    seen present identified visible detected noted found evident visualized visualised demonstrated observed shown
    appreciated
    """
)
"""Words that affirm a finding unless it is negated."""
_EMPTY = _SEEN | _set(
    """
    a an the of in on at is are was were be been being am there any evidence sign signs to for from and or nor it its
    this that these those has have had does do did can could may might will would by as image images scan answer
    appear appears see show shows we which who some
    """
)
"""Words without meaning of their own."""
_BREAKS = _set("but however although though except with yet whereas while")
"""Words that end a clause, like . ; and commas (except in lists: "no mass, cyst or stone")."""

_OPPOSITES = {
    "abnormal": "normal",
    "abnormality": "normal",
    "abnormally": "normal",
    "remarkable": "unremarkable",
    "asymmetric": "symmetric",
    "asymmetrical": "symmetric",
    "asymmetry": "symmetry",
    "atypical": "typical",
    "avascular": "vascular",
    "unenhanced": "enhanced",
    "incomplete": "complete",
    "irregular": "regular",
    "unclear": "clear",
    "unstable": "stable",
    "unchanged": "changed",
    "inactive": "active",
    "displaced": "undisplaced",
    "untreated": "treated",
    "false": "true",
}
"""word -> the word it negates."""
_SAME = {
    "unremarkable": "normal",
    "normally": "normal",
    "symmetrical": "symmetric",
    "positive": "yes",
    "true": "yes",
    "contrasted": "contrast",
}

_AXES: dict[str, dict[str, str]] = {
    "side": {
        "left": "left leftward lt lul lll lingula lingular",
        "right": "right rightward rt rul rml rll",
        "left right": "bilateral bilaterally both bibasilar bibasal biapical",
        "middle": "midline",
        "unilateral": "unilateral unilaterally",
    },
    "height": {
        "upper": "above upper superior superiorly top apical apex biapical lul rul",
        "middle": "middle mid rml",
        "lower": "below lower inferior inferiorly bottom basal base basilar bibasilar bibasal lll rll",
    },
    "depth": {"front": "anterior anteriorly ventral front", "back": "posterior posteriorly dorsal back"},
    "width": {"medial": "medial medially", "lateral": "lateral laterally"},
    "reach": {"proximal": "proximal proximally", "distal": "distal distally"},
    "degree": {
        "more": "increased increase increases increasing elevated raised high higher enlarged widened thickened",
        "less": "decreased decrease decreases decreasing reduced diminished low shrunken narrowed thinned",
    },
    "size": {"large": "large larger big huge", "small": "small smaller tiny little"},
    "nature": {"benign": "benign", "malignant": "malignant cancerous"},
    "course": {"acute": "acute", "chronic": "chronic"},
    "trend": {"better": "improved improving better", "worse": "worsened worsening worse"},
}
"""axis -> value -> words. Two texts that both name an axis must name the same values."""


def _by_word() -> dict[str, list[tuple[str, frozenset[str]]]]:
    """word -> its axes with its values on them; "bilateral" has several values."""
    found: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for axis, values in _AXES.items():
        for value, names in values.items():
            for name in names.split():
                found.setdefault(name, []).append((axis, _set(value)))
    return found


_PLACES = _by_word()
_FILLERS = _set("side sided sides aspect lobe lobes zone zones region part area")
"""Words that accompany locations and are not findings."""
_TOKEN = re.compile(r"[a-z0-9]+|[.,;:](?=\s|$)")
_NON = re.compile(r"non(?!e$|etheless$|sense)([a-z]{4,})")
_PREFIX = re.compile(r"(hyper|hypo|intra|extra|supra|infra)([a-z]{3,})|(pre|post)(contrast|operati|treatment)[a-z]*")
"""The four letters after the prefix name the axis: hyperintense conflicts with hypointensity."""
_JOINED = re.compile(r"\bnon[\s-]+(?=[a-z]{4})|\b(?:hyper|hypo|intra|extra|supra|infra|pre|post)-(?=[a-z]{4})")
"""Prefixes written separately."""


@dataclass
class _Reading:
    """The words that a text affirms and denies, and its locations."""

    flips: dict[str, set[bool]] = field(default_factory=dict)
    """word -> whether it is negated, over all its occurrences."""
    axes: dict[str, set[str]] = field(default_factory=dict)
    bound: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """(axis, word) -> values of the axis in the same phrase as the word."""

    def only(self, negated: bool) -> set[str]:
        """Words that are always negated, or never."""
        return {word for word, flips in self.flips.items() if flips == {negated}}


def conflict(one: str, other: str) -> str | None:
    """Return why two answers cannot mean the same, or None if no conflict is found.

    Symmetric; equal texts never conflict.
    """
    first, second = _read(one), _read(other)
    opposite = (first.only(True) & second.only(False)) | (first.only(False) & second.only(True))
    if opposite:
        return f"negation: {min(opposite)}"
    denies = [bool(reading.only(True)) for reading in (first, second)]
    if denies[0] != denies[1] and not first.only(False) & second.only(False) and first.flips and second.flips:
        return "negation: only one of them denies"
    for axis in sorted(first.axes.keys() & second.axes.keys()):
        if not _agree(first.axes[axis], second.axes[axis]):
            return f"{axis}: {_said(first.axes[axis], second.axes[axis])}"
    for axis, word in sorted(first.bound.keys() & second.bound.keys()):
        if not _agree(first.bound[axis, word], second.bound[axis, word]):
            return f"{axis} of {word}: {_said(first.bound[axis, word], second.bound[axis, word])}"
    return None


def _agree(one: set[str], other: set[str]) -> bool:
    """Whether two sets of values are equal; "unilateral" also agrees with either single side."""
    if {"unilateral"} in (one, other):
        return {"left", "right"} not in (one, other)
    return one == other


def _said(one: set[str], other: set[str]) -> str:
    return " against ".join(sorted([" and ".join(sorted(one)), " and ".join(sorted(other))]))


def _read(text: str) -> _Reading:
    reading = _Reading()
    for sentence in _sentences(text):
        for clause in _clauses(sentence):
            _read_clause(clause, reading)
        _bind(sentence, reading)
    return reading


def _sentences(text: str) -> Iterator[list[str]]:
    """Split into sentences of tokens at full stops and semicolons. Apostrophes are removed, prefixes are joined."""
    text = text.lower().replace("'", "").replace("\u2019", "").replace("can not", "cannot")
    text = _JOINED.sub(lambda match: match[0].rstrip("- \n\t"), text)
    sentence: list[str] = []
    for token in _TOKEN.findall(text):
        if token in ".;":
            yield sentence
            sentence = []
        elif token != ":":
            sentence.append(token)
    yield sentence


def _clauses(sentence: list[str]) -> Iterator[list[str]]:
    """Split a sentence at commas and at words such as "but". A comma followed by a later "or" or "nor" is part of a
    list and does not split, unless it follows a cue ("No, mass or cyst")."""
    clause: list[str] = []
    for place, token in enumerate(sentence):
        is_list = token == "," and {"or", "nor"} & set(sentence[place:]) and clause != [] and clause[-1] not in _CUES
        if token in _BREAKS or (token == "," and not is_list):
            yield clause
            clause = []
        elif token != ",":
            clause.append(token)
    yield clause


def _is_cue(clause: list[str], place: int) -> bool:
    """Whether a word is a cue: "rule" only before "out", "free" only before "of" or at the end, "out" never."""
    word, after = clause[place], clause[place + 1 : place + 2]
    if word in ("rule", "rules", "ruled", "ruling"):
        return after == ["out"]
    if word == "free":
        return after in ([], ["of"], ["from"])
    return word in _CUES and word != "out"


def _read_clause(clause: list[str], reading: _Reading) -> None:
    """Record which words of a clause are negated."""
    spans: list[tuple[int, list[str]]] = [(0, [])]  # (cues in a row, the words after them)
    for place, token in enumerate(clause):
        if _is_cue(clause, place):
            if spans[-1][1] or spans[-1][0] == 0:
                spans.append((1, []))
            else:
                spans[-1] = (spans[-1][0] + 1, [])
        elif token not in _EMPTY and token != "out":
            spans[-1][1].append(token)
    if spans == [(0, [])] and _SEEN & set(clause):
        reading.flips.setdefault("yes", set()).add(False)
    flips = [(words, cues % 2 == 1) for cues, words in spans]
    if len(flips) > 1 and not flips[-1][0]:  # trailing cues negate the words before them
        _, is_odd = flips.pop()
        words, before = flips[-1]
        if len(flips) == 1 and not words:
            reading.flips.setdefault("yes", set()).add(is_odd)  # a bare no
        flips[-1] = (words, before != is_odd)
    for words, is_negated in flips:
        for word in words:
            name, own = _meaning(word)
            reading.flips.setdefault(name, set()).add(is_negated != own)
            for axis, values in _places(word):
                reading.axes.setdefault(axis, set()).update(values)


def _meaning(word: str) -> tuple[str, bool]:
    """The base word, and whether the given word negates it."""
    word, is_negated = _singular(word), False
    if match := _NON.fullmatch(word):
        word, is_negated = match[1], True
    if word in _OPPOSITES:
        word, is_negated = _OPPOSITES[word], not is_negated
    return _SAME.get(word, word), is_negated


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    is_plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if is_plural else word


def _places(word: str) -> list[tuple[str, frozenset[str]]]:
    """The axes of a word, with its values."""
    if word in _PLACES:
        return _PLACES[word]
    match = _PREFIX.fullmatch(word)
    if match is None:
        return []
    prefix, rest = match[1] or match[3], match[2] or match[4]
    return [(f"{rest[:4]}...", frozenset({prefix}))]


def _bind(sentence: list[str], reading: _Reading) -> None:
    """Record which values of an axis are in the same phrase as a word, so that "mass on the left, cyst on the right"
    differs from the reverse. Phrases end at commas, "and", "or" and similar words. A phrase that only names locations
    belongs to the next phrase, or at the end to the previous one."""
    phrases: list[tuple[set[str], dict[str, set[str]]]] = [(set(), {})]
    for token in sentence:
        words, axes = phrases[-1]
        if token in _BREAKS or token in (",", "and", "or", "nor"):
            if words:
                phrases.append((set(), {}))
            continue
        for axis, values in _places(token):
            axes.setdefault(axis, set()).update(values)
        if not _places(token) and token not in _EMPTY and token not in _CUES and token not in _FILLERS:
            words.add(_meaning(token)[0])
    if len(phrases) > 1 and not phrases[-1][0]:
        _, axes = phrases.pop()
        for axis, found in axes.items():
            phrases[-1][1].setdefault(axis, set()).update(found)
    for words, axes in phrases:
        for word in words:
            for axis, found in axes.items():
                reading.bound.setdefault((axis, word), set()).update(found)
