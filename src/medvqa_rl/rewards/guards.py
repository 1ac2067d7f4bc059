"""Negation, laterality and other opposites: what makes two answers differ however similar their words. No torch.

Embeddings put "no effusion" next to "effusion" and "left" next to "right", and so does an overlap of words. So a
similarity counts only where :func:`conflict` finds nothing. It reads words by rule, knows no medicine, and would
rather withhold credit than give it to the opposite: "no fracture" and "normal" conflict, for they are not the same
answer. Equal texts never conflict. English only: in other languages it finds nothing.

How a text is read, after NegEx (Chapman et al. 2001, doi 10.1006/jbin.2001.1029), simplified:

- A cue ("no", "without", "negative for") negates the words after it to the end of its clause, or to the next cue; one
  with nothing after it negates those before ("effusion is not seen"); one alone means no. Cues in a row cancel out
  ("not absent", "cannot rule out").
- Prefixes negate their word alone: "non-contrast CT" is a CT. "abnormal" is not normal, "unremarkable" is normal.
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
"""Words that affirm, where they stand alone."""
_EMPTY = _SEEN | _set(
    """
    a an the of in on at is are was were be been being am there any evidence sign signs to for from and or nor it its
    this that these those has have had does do did can could may might will would by as image images scan answer
    appear appears see show shows we which who some
    """
)
"""Words that carry nothing of their own."""
_BREAKS = _set("but however although though except with yet whereas while")
"""Words that end a clause, as do . ; and commas (but in lists: "no mass, cyst or stone")."""

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
"""A word that says that another one does not hold."""
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
"""axis -> values -> words. Texts that both name an axis must name the same values."""


def _by_word() -> dict[str, list[tuple[str, frozenset[str]]]]:
    """word -> the axes that it is on, with its values; it may have several, as "bilateral" has."""
    found: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for axis, values in _AXES.items():
        for value, names in values.items():
            for name in names.split():
                found.setdefault(name, []).append((axis, _set(value)))
    return found


_PLACES = _by_word()
_FILLERS = _set("side sided sides aspect lobe lobes zone zones region part area")
"""Words that come with places and are no finding."""
_TOKEN = re.compile(r"[a-z0-9]+|[.,;:](?=\s|$)")
_NON = re.compile(r"non(?!e$|etheless$|sense)([a-z]{4,})")
_PREFIX = re.compile(r"(hyper|hypo|intra|extra|supra|infra)([a-z]{3,})|(pre|post)(contrast|operati|treatment)[a-z]*")
"""hyperintense against hypointensity: an axis for every four letters that stand behind."""
_JOINED = re.compile(r"\bnon[\s-]+(?=[a-z]{4})|\b(?:hyper|hypo|intra|extra|supra|infra|pre|post)-(?=[a-z]{4})")
"""Prefixes that are written apart."""


@dataclass
class _Reading:
    """What a text affirms, denies and places."""

    flips: dict[str, set[bool]] = field(default_factory=dict)
    """word -> whether it is negated, in all its places."""
    axes: dict[str, set[str]] = field(default_factory=dict)
    bound: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """(axis, word) -> values of the axis in the word's own phrase."""

    def only(self, negated: bool) -> set[str]:
        """Words that are negated everywhere, or nowhere."""
        return {word for word, flips in self.flips.items() if flips == {negated}}


def conflict(one: str, other: str) -> str | None:
    """Why two answers cannot mean the same, as far as their words tell; None where nothing is found.

    Symmetric, and None for equal texts.
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
    """Equal; but "unilateral" goes with either side alone."""
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
    """Tokens between full stops and semicolons; apostrophes and hyphens join or part words as they are spoken."""
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
    """A sentence parted at commas and at words such as "but". A comma does not part where an "or" or "nor" comes
    later, for it is a list then, unless it stands behind a cue ("No, mass or cyst")."""
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
    """Whether a word negates: "rule" before "out" only, "free" before "of" or at the end, "out" never."""
    word, after = clause[place], clause[place + 1 : place + 2]
    if word in ("rule", "rules", "ruled", "ruling"):
        return after == ["out"]
    if word == "free":
        return after in ([], ["of"], ["from"])
    return word in _CUES and word != "out"


def _read_clause(clause: list[str], reading: _Reading) -> None:
    """Find what the cues of a clause negate."""
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
    if len(flips) > 1 and not flips[-1][0]:  # cues at the end negate what stands before them
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
    """The word that a word is about, and whether it denies it."""
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
    """The axes that a word is on, with its values."""
    if word in _PLACES:
        return _PLACES[word]
    match = _PREFIX.fullmatch(word)
    if match is None:
        return []
    prefix, rest = match[1] or match[3], match[2] or match[4]
    return [(f"{rest[:4]}...", frozenset({prefix}))]


def _bind(sentence: list[str], reading: _Reading) -> None:
    """Which values of an axis stand in a word's own phrase, phrases parted at commas, "and", "or" and the like: a mass
    on the left and a cyst on the right are not the reverse. A phrase of places alone belongs to the next, or at the
    end to the one before."""
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
