"""The scoring rules of MedEvalKit, without its language-model judge. Imports no torch.

Source: https://github.com/alibaba-damo-academy/MedEvalKit. Read, not run: ``utils/VQA_RAD/VQA_RAD.py`` at
564d2791f5298e18e57b022bad2ca7aa47b43930, ``utils/SLAKE/SLAKE.py`` and ``utils/MMMU/eval_test.py`` at
9b12e3b34232a8779cc1275417bf4f72f03d28e0; ``utils/utils.py`` and the other data sets as two forks have them
(chenz53/MedEvalKit at 016723d424f44b36fbf6242d9679885e02129550, blackkiring/MedEvalKit at
f60b5bebf44ab205fc72a41251af5ad1ec68ea8c, which agree); ``boxed`` from https://github.com/hiyouga/MathRuler at
9ead5a3f80189d2aefa52a45de8c3a0714115cb2.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from medvqa_rl.core.text import shown
from medvqa_rl.core.types import LETTERS
from medvqa_rl.evaluation.measures import mmmu
from medvqa_rl.evaluation.measures.harness_texts import Verdict, boxed, compared, tagged
from medvqa_rl.evaluation.records import EvalRecord

SOURCES = (
    "alibaba-damo-academy/MedEvalKit@564d2791f5298e18e57b022bad2ca7aa47b43930",
    "alibaba-damo-academy/MedEvalKit@9b12e3b34232a8779cc1275417bf4f72f03d28e0",
    "chenz53/MedEvalKit@016723d424f44b36fbf6242d9679885e02129550",
)
_LEAD_INS = (
    *("**answer**:", "**answer**", "*answer*:", "**answer:**"),
    *("answer is", "answer:", "答案:", "final answer", "final answer is"),
)
"""What precedes an answer, in the order in which the rules look for them."""
_NO_TASK = ("vqa_med", "med_r1")


def score(record: EvalRecord, dataset: str) -> Verdict:
    """Score an answer by the rule for its data set, ``data.name``; own and generated questions by their kind.

    The rules see the whole output. Only the first gold answer counts.
    """
    if dataset in _NO_TASK:
        return Verdict(None, f"MedEvalKit has no task for {dataset}.")
    output = record.output
    if dataset == "mmmu_medical":
        if record.answer_type == "choice":
            return mmmu.choice(_mmmu_answer(output), record.options, record.gold, letters="words")
        return Verdict(0.0, "An open answer is compared character by character, so none is ever right.")
    if record.answer_type == "choice":
        if dataset in ("omnimed", "medxpertqa"):
            options = [f"{letter}. {option}" for letter, option in zip(LETTERS, record.options)]
            return multiple_choice(tagged(output, "answer"), options, record.gold)
        return multiple_choice(output, record.options, record.gold)
    response = tagged(output, "answer") if (inside := boxed(output)) is None else inside
    if dataset in ("slake_en", "slake_zh"):
        if record.answer_type == "open":
            return open_answer(response, record.gold)
        # Only lower case counts as yes or no.
        return (yes_or_no if record.gold in ("yes", "no") else closed)(response, record.gold)
    gold = record.gold.lower().strip()
    return (yes_or_no if gold in ("yes", "no") else open_answer)(response.lower().strip(), gold)


def _mmmu_answer(output: str) -> str:
    """What the rule for MMMU reads: the answer in tags, of that what is in a box, and once more, where a box that does
    not close leaves "None"."""
    response = tagged(output, "answer")
    response = response if (inside := boxed(response)) is None else inside
    if "<answer>" in response:
        response = tagged(response, "answer")
    elif r"\boxed" in response:
        response = "None" if (inside := boxed(response)) is None else inside
    return response.strip()


def cut(response: str) -> str:
    """The answer in a response, in lower case: in a box ("None" if the word occurs without one), else in answer tags;
    of that what follows each lead-in in turn."""
    text = response.lower()
    if "boxed" in text:
        text = "None" if (inside := boxed(text)) is None else inside
    elif "<answer>" in text:
        text = tagged(text, "answer")
    for lead_in in _LEAD_INS:
        text = text.rpartition(lead_in)[2]
    return text


def yes_or_no(response: str, gold: str) -> Verdict:
    """Right if exactly one of "yes" and "no" occurs in the answer, as a word or inside one, and it is the gold one."""
    text = cut(response).replace("\n", "").replace(".", "")
    found = [word for word in ("yes", "no") if word in text]
    if len(found) != 1:
        return Verdict(0.0, f"{'Both yes and no occur' if found else 'Neither yes nor no occurs'} in {shown(text)}.")
    inside = "" if found[0] in text.split() else " inside a word"
    return Verdict(float(gold.lower() in text), f"'{found[0]}' occurs in {shown(text)}{inside}.")


def closed(response: str, gold: str) -> Verdict:
    """Right if the answer without full stops and line ends equals the gold answer in lower case."""
    return compared(cut(response).replace("\n", "").replace(".", ""), gold.lower())


def open_answer(response: str, gold: str) -> Verdict:
    """Right if the answer equals the gold answer in lower case: with a full stop or a blank more it is wrong."""
    return compared(cut(response), gold.lower())


def multiple_choice(response: str, options: Sequence[str], gold: str) -> Verdict:
    """Score a choice question.

    A first paragraph that is a letter counts, else a last one that begins with a letter and a full stop or is one. Of
    the answer (:func:`cut`), what stands before the first full stop and after the last colon must be the gold letter,
    a letter, or the text of an option. Otherwise the option that is most similar to the answer
    (``difflib.SequenceMatcher.ratio``) is taken, the first one if none is similar at all.

    Args:
        response: what the model wrote.
        options: the options as the harness compares them.
        gold: the letter of the right one.
    """
    names = LETTERS[: len(options)].lower()
    texts = [option.lower() for option in options]
    gold = gold.strip().lower()
    paragraphs = response.lower().split("\n\n")
    first, last = paragraphs[0], paragraphs[-1].partition(".")[0]
    response = first if _is_letter(first, names) else last if _is_letter(last, names) else response
    answer = cut(response).strip().lower().replace("\n", "")
    word = answer.partition(".")[0].rpartition(":")[2]
    if word == gold:
        return Verdict(1.0, f"{shown(word)} is the gold letter.")
    if _is_letter(word, names):
        return Verdict(float(texts[names.index(word)] == gold), f"It reads the letter {word.upper()}.")
    if word in texts:
        picked = texts[names.index(gold)] if gold in names else None
        return Verdict(float(word == picked), f"It reads the option {shown(word)}.")
    ratios = [difflib.SequenceMatcher(None, text, answer).ratio() for text in texts]
    index = ratios.index(max(ratios))
    why = f"{shown(answer)} is no option; {names[index].upper()} is the most similar ({ratios[index]:.2f})."
    return Verdict(float(gold in (names[index], texts[index])), why)


def _is_letter(text: str, names: str) -> bool:
    return len(text) == 1 and text in names
