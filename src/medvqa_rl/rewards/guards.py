"""Detect negation, laterality and other opposites, which similar wording hides. Imports no torch.

Embeddings and word overlap place "no effusion" next to "effusion" and "left" next to "right", so similarity is
credited only if :func:`conflict` finds nothing. It works by rules on words, knows little medicine, and prefers
withholding credit to crediting the opposite. Equal texts never conflict. English only: in other languages it finds
nothing.

The rules are a simplified NegEx (Chapman et al. 2001, doi 10.1006/jbin.2001.1029):

- A cue ("no", "without", "negative for") negates the noun phrases up to the end of its clause, or up to the next cue;
  a trailing cue negates what stands before it ("effusion is not seen"); a lone cue means no. Consecutive cues cancel
  out ("not absent", "cannot rule out").
- Only the last word of a negated noun phrase is negated, its modifiers restrict it: "no acute fracture" contradicts
  "fracture" but not "chronic fracture", and "no abnormal signal" does not contradict "normal signal".
- Prefixes negate only their word: "non-contrast CT" is a CT. "abnormal" is not normal, "unremarkable" is normal.
- A text that denies conflicts with one that affirms something else ("no effusion" and "mass"), but not with one that
  says that all is well ("not enlarged" and "normal size", "no tear" and "intact").
- Places are sets: "bilateral" is left and right, and is not "left". Qualities conflict only if they share no value:
  "acute on chronic" is acute.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from medvqa_rl.rewards.guard_words import (
    AXES_OF,
    BREAKS,
    CALM,
    CUES,
    DETERMINERS,
    EMPTY,
    FILLERS,
    FINDING,
    GONE,
    NON,
    NORMAL,
    OPPOSITES,
    PLACES,
    PLACING,
    PLACING_PREFIXES,
    PREFIX,
    PREPOSITIONS,
    REWRITES,
    SAME,
    SEEN,
)

_TOKEN = re.compile(r"[a-z0-9]+|[.,;:](?=\s|$)")


@dataclass
class _Reading:
    """What a text affirms and denies, and where."""

    flips: dict[str, set[bool]] = field(default_factory=dict)
    """word -> whether it is negated, over all its occurrences."""
    axes: dict[str, set[str]] = field(default_factory=dict)
    """axis -> values; of qualities, those affirmed."""
    denied: dict[str, set[str]] = field(default_factory=dict)
    """quality -> values that stand in a negated phrase."""
    not_so: dict[str, set[str]] = field(default_factory=dict)
    """quality -> values that are denied themselves ("not enlarged"), and do not restrict something else."""
    modifiers: dict[str, set[tuple[str, bool]]] = field(default_factory=dict)
    """negated word -> its modifiers, as :func:`_meaning` returns them."""
    bound: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """(axis, word) -> values of the axis in the same phrase as the word."""
    denies: bool = False
    """Whether a cue denies something ("not normal" affirms)."""
    affirms: bool = False
    """Whether something is affirmed that "no" contradicts."""
    is_normal: bool = False
    """Whether something is called normal."""
    findings: set[str] = field(default_factory=set)
    """Affirmed words that "normal" contradicts."""

    def only(self, negated: bool) -> set[str]:
        """Words that are always negated, or never."""
        return {word for word, flips in self.flips.items() if flips == {negated}}


def conflict(one: str, other: str) -> str | None:
    """Return why two answers cannot mean the same, or None if no conflict is found.

    Symmetric; equal texts never conflict.
    """
    first, second = _read(one), _read(other)
    both = ((first, second), (second, first))
    opposite = {
        word
        for a, b in both
        for word in a.only(True) & b.only(False)
        if not any(_is_restricted(word, denying=denying, other=other) for denying, other in both)
    }
    if opposite:
        return f"negation: {min(opposite)}"
    if not first.only(False) & second.only(False) and any(_denies_only(a, b) for a, b in both):
        return "negation: only one of them denies"
    for axis in sorted(first.axes.keys() & second.axes.keys()):
        if not _agree(axis, first.axes[axis], second.axes[axis]):
            return f"{axis}: {_said(first.axes[axis], second.axes[axis])}"
    for axis in sorted(first.not_so.keys() & second.not_so.keys()):
        if not first.not_so[axis] & second.not_so[axis]:
            return f"{axis}: {_said(first.not_so[axis], second.not_so[axis])}"
    for a, b in both:
        for axis in sorted(a.not_so.keys() & b.axes.keys() - a.axes.keys()):
            if b.axes[axis] <= a.not_so[axis]:
                return f"{axis}: {_said(b.axes[axis], {'not ' + value for value in a.not_so[axis]})}"
    for axis, word in sorted(first.bound.keys() & second.bound.keys()):
        values = first.bound[axis, word], second.bound[axis, word]
        is_not_so = axis in first.not_so.keys() | second.not_so.keys()
        if axis not in PLACES and (is_not_so or first.flips.get(word) != second.flips.get(word)):
            continue  # a quality that restricts what is denied, or is denied itself
        if not _agree(axis, *values):
            return f"{axis} of {word}: {_said(*values)}"
    for a, b in both:
        if a.is_normal and b.findings and not a.findings and not b.is_normal:
            return f"normal against {min(b.findings)}"
    return None


def _is_restricted(word: str, *, denying: _Reading, other: _Reading) -> bool:
    """Whether a text denies a word only of another kind: "no acute fracture" and "old fracture", "no displaced
    fracture" and "nondisplaced fracture"."""
    return _lacks_modifier(denying.modifiers.get(word, set()), other) or any(
        name == word and axis not in PLACES and axis in denying.denied and not values & other.bound[axis, name]
        for (axis, name), values in denying.bound.items()
        if (axis, name) in other.bound
    )


def _lacks_modifier(modifiers: set[tuple[str, bool]], other: _Reading) -> bool:
    """Whether a text says the opposite of a modifier: "nondisplaced" of "displaced"."""
    return any(other.flips.get(name) == {not is_negated} for name, is_negated in modifiers)


def _denies_only(denying: _Reading, other: _Reading) -> bool:
    """Whether one text denies and the other affirms something else, which is neither well nor of another kind than
    what is denied: "not acute" and "chronic"."""
    is_other_kind = _lacks_modifier(set().union(*denying.modifiers.values()), other) or any(
        other.axes[axis].isdisjoint(values) for axis, values in denying.denied.items() if axis in other.axes
    )
    return denying.denies and other.affirms and not other.denies and not is_other_kind


def _agree(axis: str, one: set[str], other: set[str]) -> bool:
    """Whether two sets of values are compatible: equal places, or qualities that share a value; "unilateral" also
    agrees with either single side."""
    if axis not in PLACES and not one & PLACING_PREFIXES:
        return not one.isdisjoint(other)
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
    """Rewrite fixed phrases, and split into sentences of tokens at full stops and semicolons."""
    text = text.lower()
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
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
        is_list = token == "," and {"or", "nor"} & set(sentence[place:]) and clause != [] and clause[-1] not in CUES
        if token in BREAKS or (token == "," and not is_list):
            yield clause
            clause = []
        else:
            clause.append(token)
    yield clause


def _is_cue(clause: list[str], place: int) -> bool:
    """Whether a word is a cue: "rule" only before "out" and not as the first word, which asks; "free" only before "of"
    or at the end, "negative" not before a noun ("triple negative cancer"), "out" never."""
    word, after = clause[place], clause[place + 1 : place + 2]
    if word in ("rule", "rules", "ruled", "ruling"):
        return after == ["out"] and (word != "rule" or place > 0)
    if word == "free":
        return after in ([], ["of"], ["from"])
    if word == "negative":
        return not after or after[0] in EMPTY or after[0] in CUES or after == [","]
    return word in CUES and word != "out"


@dataclass
class _Span:
    """Some cues in a row and the phrases after them."""

    cues: int
    first: str = ""
    """The token after the cues."""
    phrases: list[tuple[bool, list[str]]] = field(default_factory=list)
    """Whether a preposition places the phrase, and its words."""

    @property
    def words(self) -> list[str]:
        return [word for _, words in self.phrases for word in words]

    @property
    def only_places(self) -> bool:
        """Whether the cues say of what stands before them that it is not here: "not seen in the left lung"."""
        return self.first in SEEN | PLACING and all(is_placed for is_placed, _ in self.phrases)

    def heads(self) -> set[int]:
        """Which of :attr:`words` the cues negate: the last of each phrase that is not placed, or of the first."""
        ends, count = [], 0
        for is_placed, words in self.phrases:
            count += len(words)
            ends.append((is_placed, count - 1))
        return {end for is_placed, end in ends if not is_placed} or {end for _, end in ends[:1]}


def _spans(clause: list[str]) -> list[_Span]:
    """Split a clause at its cues, and what follows each into phrases."""
    spans, is_placed, is_open = [_Span(0)], False, False
    for place, token in enumerate(clause):
        span = spans[-1]
        if _is_cue(clause, place):
            if span.phrases or span.first or not span.cues:
                spans.append(_Span(1))
            else:
                span.cues += 1
            is_placed = is_open = False
            continue
        span.first = span.first or token
        if token in EMPTY or token in (",", "out"):
            if token not in DETERMINERS:
                is_placed, is_open = token in PREPOSITIONS, False
        elif is_open:
            span.phrases[-1][1].append(token)
        else:
            span.phrases.append((is_placed, [token]))
            is_open = True
    return spans


def _read_clause(clause: list[str], reading: _Reading) -> None:
    """Record which words of a clause are negated."""
    spans = _spans(clause)
    if len(spans) == 1 and not spans[0].words and SEEN & set(clause):
        _note("yes", False, reading)
        reading.affirms = True
    flips = [(span, span.cues % 2 == 1) for span in spans]
    for place in range(len(flips) - 1, 0, -1):  # trailing cues negate the words before them
        span, is_odd = flips[place]
        before, was_negated = flips[place - 1]
        if not span.words or (span.only_places and before.words and not before.cues):
            if not before.words and place == 1:
                _note("yes", is_odd, reading)  # a bare no
                reading.denies |= is_odd
                reading.affirms |= not is_odd
            flips[place - 1] = (before, was_negated != is_odd)
            flips[place] = (span, False)
    for span, is_negated in flips:
        if is_negated:
            _deny(span, reading)
        else:
            _affirm(span.words, reading)


def _note(name: str, is_negated: bool, reading: _Reading) -> None:
    reading.flips.setdefault(name, set()).add(is_negated)


def _affirm(words: list[str], reading: _Reading) -> None:
    """Record words that no cue negates."""
    meanings = [_meaning(word) for word in words]
    is_calm = ("changed", True) in meanings or any(
        (name in CALM and not is_negated) or GONE.fullmatch(name) for name, is_negated in meanings
    )
    for word, (name, is_negated) in zip(words, meanings):
        _note(name, is_negated, reading)
        for axis, values in _axes(word):
            reading.axes.setdefault(axis, set()).update(values)
            if axis in ("degree", "size", "severity") and "same" not in values:
                reading.findings.add(name)
        is_finding = not is_negated and FINDING.fullmatch(name) is not None
        if is_finding or (name == "normal" and is_negated):
            reading.findings.add(name if is_finding else "abnormal")
            reading.affirms = True
        reading.affirms |= not is_negated and not is_calm
        reading.is_normal |= name in NORMAL and not is_negated


def _deny(span: _Span, reading: _Reading) -> None:
    """Record the words of a negated span: the heads are negated, what stands before them restricts them."""
    heads, modifiers = span.heads(), list[str]()
    for place, word in enumerate(span.words):
        name, is_negated = _meaning(word)
        for axis, values in _axes(word):
            if axis in PLACES or values & PLACING_PREFIXES:
                reading.axes.setdefault(axis, set()).update(values)
            else:
                reading.denied.setdefault(axis, set()).update(values)
                if place in heads:
                    reading.not_so.setdefault(axis, set()).update(values)
        if place not in heads:
            modifiers.append(word)
            continue
        _note(name, not is_negated, reading)
        reading.modifiers.setdefault(name, set()).update(_meaning(modifier) for modifier in modifiers)
        modifiers = []
        if name in CALM and not is_negated:
            reading.affirms = True  # "not normal", "not intact"
        else:
            reading.denies = True


def _meaning(word: str) -> tuple[str, bool]:
    """The base word, and whether the given word negates it."""
    word, is_negated = _singular(word), False
    if match := NON.fullmatch(word):
        word, is_negated = match[1], True
    if word in OPPOSITES:
        word, is_negated = OPPOSITES[word], not is_negated
    if word == "negative":
        return "yes", not is_negated
    return SAME.get(word, word), is_negated


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    is_plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if is_plural else word


def _axes(word: str) -> list[tuple[str, frozenset[str]]]:
    """The axes of a word, with its values."""
    if word in AXES_OF:
        return AXES_OF[word]
    match = PREFIX.fullmatch(word)
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
        if token in BREAKS or token in (",", "and", "or", "nor"):
            if words:
                phrases.append((set(), {}))
            continue
        found = _axes(token)
        for axis, values in found:
            axes.setdefault(axis, set()).update(values)
        if not found and token not in EMPTY and token not in CUES and token not in FILLERS:
            words.add(_meaning(token)[0])
    if len(phrases) > 1 and not phrases[-1][0]:
        _, axes = phrases.pop()
        for axis, values_of in axes.items():
            phrases[-1][1].setdefault(axis, set()).update(values_of)
    for words, axes in phrases:
        for word in words:
            for axis, values_of in axes.items():
                reading.bound.setdefault((axis, word), set()).update(values_of)
