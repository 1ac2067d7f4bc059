"""The words that :mod:`medvqa_rl.rewards.guards` knows. Imports no torch."""

from __future__ import annotations

import re


def word_set(words: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(words.split())


CUES = word_set(
    """
    no not without none never neither nil cannot cant absent absence lack lacks lacking missing negative negatives
    free deny denies denied exclude excludes excluded excluding resolved removed disappeared nothing unlikely isnt
    arent wasnt werent doesnt dont didnt hasnt havent ruled rule rules ruling out
    """
)
"""Words that negate; some only in context (``guards._is_cue``)."""
SEEN = word_set(
    """
    seen present identified visible detected noted found evident visualized visualised demonstrated observed shown
    appreciated
    """
)
"""Words that affirm a finding unless it is negated."""
DETERMINERS = word_set("a an the any some it its this that these those there definite obvious convincing apparent")
"""Words that change nothing and stand inside a noun phrase."""
PLACING = word_set("in on at by within along around near over under between involving")
"""Prepositions that say where something is."""
PREPOSITIONS = PLACING | word_set("of to for from as")
EMPTY = (
    SEEN
    | DETERMINERS
    | PREPOSITIONS
    | word_set(
        """
        is are was were be been being am evidence sign signs and or nor have has had do does did can could may might
        will would image images scan answer longer appear appears see show shows we which who
        """
    )
)
"""Words without meaning of their own."""
BREAKS = word_set("but however although though except with yet whereas while")
"""Words that end a clause, like . ; and commas (except in lists: "no mass, cyst or stone")."""

OPPOSITES = {
    "abnormal": "normal",
    "abnormality": "normal",
    "abnormally": "normal",
    "remarkable": "unremarkable",
    "asymmetric": "symmetric",
    "asymmetrical": "symmetric",
    "asymmetry": "symmetric",
    "atypical": "typical",
    "avascular": "vascular",
    "unenhanced": "enhanced",
    "incomplete": "complete",
    "irregular": "regular",
    "irregularity": "regular",
    "unclear": "clear",
    "unstable": "stable",
    "instability": "stable",
    "unchanged": "changed",
    "inactive": "active",
    "undisplaced": "displaced",
    "untreated": "treated",
    "false": "true",
}
"""word -> the word it negates."""
SAME = {
    "unremarkable": "normal",
    "normally": "normal",
    "symmetrical": "symmetric",
    "symmetry": "symmetric",
    "positive": "yes",
    "true": "yes",
    "contrasted": "contrast",
    "change": "changed",
    "calcification": "calcified",
    "displacement": "displaced",
    "enhancement": "enhanced",
    "enhancing": "enhanced",
    "enlargement": "enlarged",
    "thickening": "thickened",
    "elevation": "elevated",
    "dilation": "dilated",
    "dilatation": "dilated",
    "fractured": "fracture",
}

NORMAL = word_set("normal healthy")
"""Words that affirm the absence of any finding."""
CALM = NORMAL | word_set(
    """
    clear intact patent preserved maintained benign stable symmetric typical regular smooth aligned midline
    central centered centred improved improving plain native
    """
)
"""Words that go with a denial: "no tear" and "intact"."""
GONE = re.compile(r".*ectomy|agenesis|aplasia|amputation|amputated")
"""Words that affirm an absence."""
FINDING = re.compile(
    r".*(?:itis|(?<!str)oma|(?<!gn)os[ie]s|megaly|pathy|ectasis|rrhage|rrhagic|o?edema|cephalus)|(?:pneumo|ha?emo|hydro)"
    r"thorax|mass|lesion|tumou?r|cancer|malignancy|metastas[ie]s|nodule|cyst|stone|calcul(?:us|i)|fracture|effusion|"
    r"pneumonia|opacity|infiltrate|consolidation|infarct(?:ion)?|bleed(?:ing)?|abscess|ulcer|aneurysm|thromb(?:us|i)|"
    r"embol(?:us|i|ism)|stroke|hernia|polyp|dislocation|tear|occlusion|obstruction|atrophy|defect|deformity|injury|"
    r"disease|infection|inflammation|swelling"
)
"""Common findings, in the singular."""

PLACES: dict[str, dict[str, str]] = {
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
    "plane": {"axial": "axial transverse transaxial", "sagittal": "sagittal", "coronal": "coronal"},
}
"""axis -> value -> words. Two texts that both name a place must name the same values: "left" is not "bilateral"."""
QUALITIES: dict[str, dict[str, str]] = {
    "degree": {
        "more": """
            increased increase increases increasing elevated elevation raised high higher enlarged enlargement widened
            widening thickened thickening dilated dilation dilatation distended
            """,
        "less": """
            decreased decrease decreases decreasing reduced reduction diminished low shrunken narrowed narrowing
            thinned thinning atrophy atrophic
            """,
        "same": "stable unchanged static",
    },
    "size": {"large": "large larger big huge", "small": "small smaller tiny little"},
    "severity": {
        "mild": "mild mildly minimal minimally slight slightly trace minor",
        "severe": "severe severely marked markedly massive extensive major significant significantly",
    },
    "nature": {"benign": "benign", "malignant": "malignant malignancy cancerous cancer"},
    "course": {
        "acute": "acute acutely new recent",
        "subacute": "subacute",
        "chronic": "chronic chronically old remote healed longstanding",
    },
    "trend": {
        "better": "improved improving improvement better",
        "worse": "worsened worsening worse",
        "same": "stable unchanged static",
    },
}
"""axis -> value -> words. Two texts contradict each other only where they share no value: "acute on chronic" is
acute."""


def _by_word() -> dict[str, list[tuple[str, frozenset[str]]]]:
    """word -> its axes with its values on them; "bilateral" has several values."""
    found: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for axis, values in (PLACES | QUALITIES).items():
        for value, names in values.items():
            for name in names.split():
                found.setdefault(name, []).append((axis, word_set(value)))
    return found


AXES_OF = _by_word()
FILLERS = word_set("side sided sides aspect lobe lobes zone zones region part area")
"""Words that accompany locations and are not findings."""

NON = re.compile(r"non(?!e$|etheless$|sense)([a-z]{4,})")
PREFIX = re.compile(
    r"(hyper|hypo|iso|intra|extra|supra|infra)([a-z]{4,})|(pre|post)(contrast|operati|treatment)[a-z]*"
)
"""The four letters after the prefix name the axis: hyperintense conflicts with hypointensity."""
_PREFIXES = "hyper|hypo|iso|intra|extra|supra|infra|pre|post"
PLACING_PREFIXES = {"intra", "extra", "supra", "infra"}
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"['\u2019]", ""),
        (r"\bcan not\b", "cannot"),
        (r"\bnot only\b", ""),
        (r"\b(?:other than|apart from|aside from)\b", "except"),
        (r"\b(?:rather than|instead of|as opposed to)\b", ", not"),
        (r"\bwith(?:out)?\s*(?:and|or|/|&)\s*with(?:out)?\s+([a-z]+)", r"with \1, without \1"),
        (r"\b(?:no|not|without)( (?:significant|interval|appreciable|substantial))* change[sd]?\b", "unchanged"),
        (r"\bmidline shift\b", "shift"),
        (r"\bbasal (?=ganglia|nuclei|cell|cistern)", ""),
        (rf"\b({_PREFIXES})-? (and|or) ({_PREFIXES})-?([a-z]{{4,}})", r"\1-\4 \2 \3-\4"),
        # Prefixes written separately.
        (r"\bnon[\s-]+(?=[a-z]{4})", "non"),
        (rf"\b({_PREFIXES})-(?=[a-z]{{4}})", r"\1"),
    )
]
"""Patterns and their replacements in lower-case text, applied in this order."""
