"""The result of an attack as tables and sentences, for the terminal and the report. Imports no torch."""

from __future__ import annotations

from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.text import number_of, printable
from medvqa_rl.rewards.attack.results import TOLERANCE, TOTAL, AttackResult, Number
from medvqa_rl.rewards.attack.texts import RIGHT, WRONG

_SHOWN = 400
"""Characters of the worst completion and of its question."""
_UNSEEN = (
    "a judge of text cannot tell coherent reasoning about another image: set judge.sees=image with a judge that sees, "
    "or lower the weight"
)
_REMEDIES = {
    "format": "it rewards the form alone, so give rewards.correctness at least its weight",
    "correctness": "the answer gets partial credit (rewards.open_correctness), or the scorer takes it for right",
    "semantic": _UNSEEN,
    "reasoning": f"lower rewards.reasoning_gate, the most that a wrong answer gets; {_UNSEEN}",
    "process": _UNSEEN,
    "ecr": "it rewards length alone: use rewards.cwr or rewards.composite, which need a right answer",
    "cosine": "wrong answers lose less when they are longer: lower the weight, or set rewards.cosine_wrong to equal "
    "numbers",
    "overlong": "it rewards being brief: lower the weight",
    "repetition": "it rewards being brief: lower the weight",
}
"""What to do about a reward that lets a wrong answer exceed, by name."""
_REMEDY_OF_FUNCTION = (
    "let it compare the answer that medvqa_rl.core.answers.parse_completion reads, instead of searching the text"
)


def attack_tables(result: AttackResult) -> list[TextTable]:
    """A table of the rewards and one of the attacks."""
    rewards = TextTable(
        "Rewards under attack",
        ("reward", "weight", RIGHT, WRONG, "highest wrong", "by", "exceeding, %"),
        [
            (
                "total" if row.name == TOTAL else row.name,
                "" if row.weight is None else f"{row.weight:g}",
                _score(row.right),
                _score(row.wrong),
                _score(row.highest),
                row.attack,
                _percent(row.exceeding),
            )
            for row in result.rewards
        ],
        rules=[len(result.rewards) - 1],
        bold=[len(result.rewards) - 1],
        prose=("by",),
        notes=[
            f"Means over {number_of(result.questions, 'question')}, each reward before its weight. Highest wrong: the "
            "wrong completion with the highest mean. Exceeding: questions on which any wrong completion scores above "
            "the honest right one."
        ],
    )
    attacks = TextTable(
        "Totals by attack",
        ("attack", "questions", "mean", "excess, worst", "worst question", "exceeding, %"),
        [
            (
                row.name,
                str(row.questions),
                _score(row.mean),
                _score(row.excess, "+"),
                printable(row.worst, 60),
                _percent(row.exceeding),
            )
            for row in result.attacks
        ],
        prose=("worst question",),
        drop=("worst question", "questions"),
        notes=["Excess: the total less that of the honest right completion of the same question."],
    )
    return [rewards, attacks]


def attack_lines(result: AttackResult) -> list[str]:
    """The verdict, the completion that comes closest or exceeds by most, and what to do."""
    worst, verdict = result.worst, _verdict(result)
    options = f" ({'; '.join(worst.options)})" if worst.options else ""
    taken = [row for row in result.attacks if row.taken_for_right]
    right = ", ".join(f"{row.name} ({_percent(row.taken_for_right)} %)" for row in taken)
    unscored = max(result.attacks, key=lambda row: row.unscored)
    lines = [
        verdict,
        f"Question: {printable(worst.question + options, _SHOWN)} Right: {printable(worst.gold)}.",
        f"Completion: {printable(worst.text, _SHOWN)}",
        f"Its scores: {_scores(worst.scores)}; the honest right one's: {_scores(worst.right)}.",
    ]
    if result.is_exceeded or result.excess > -TOLERANCE:
        lines.append(_remedy(result))
    if taken:
        lines.append(f"The scorer takes wrong completions for right, which is a defect of the scorer: {right}.")
    if unscored.unscored:
        lines.append(f"Up to {_percent(unscored.unscored)} % of an attack's completions are unscored and left out.")
    if any(row.name == "process" for row in result.rewards):
        lines.append("process is not in the total: it counts in the advantages of the steps' tokens.")
    if result.left_out:
        lines.append(f"Left out, because the policy's own probabilities decide it: {' and '.join(result.left_out)}.")
    if result.skipped:
        lines.append(
            f"Skipped, because no wrong answer is known or the right one does not fit the token limit: "
            f"{number_of(result.skipped, 'question')}."
        )
    return lines


def _verdict(result: AttackResult) -> str:
    by = f"{abs(result.excess):.3g}"
    what = (
        f"exceeds the honest right one by {by}"
        if result.excess > TOLERANCE
        else "equals the honest right one"
        if result.excess > -TOLERANCE
        else f"stays {by} below the honest right one"
    )
    return (
        f"{'Exceeded' if result.is_exceeded else 'Held'}: the best wrong completion ({result.worst.attack}, question "
        f"{printable(result.worst.sample_id, 80)}) {what}; the bound is {result.bound:g}."
    )


def _remedy(result: AttackResult) -> str:
    """What to do about the reward that contributes most."""
    weights = {row.name: row.weight or 0.0 for row in result.rewards}
    lead = {
        name: weights[name] * ((result.worst.scores.get(name) or 0.0) - (result.worst.right.get(name) or 0.0))
        for name in weights
        if name not in (TOTAL, "process")
    }
    if not lead:
        return "process alone rewards nothing but steps: set another reward."
    name = max(lead, key=lambda name: (lead[name], name not in _REMEDIES, name != "format"))
    how = "more than the right one" if lead[name] > TOLERANCE else "as much as the right one"
    text = f"{name} rewards it {how}: {_REMEDIES.get(name, _REMEDY_OF_FUNCTION)}."
    if result.cure is not None:
        text += f" With rewards.correctness={result.cure:g}, no completion of this suite exceeds the bound."
    return text


def _scores(scores: dict[str, Number]) -> str:
    return ", ".join(f"{'total' if name == TOTAL else name} {_score(value)}" for name, value in scores.items())


def _score(value: Number, sign: str = "") -> str:
    return "–" if value is None else f"{value + 0.0:{sign}.2f}"


def _percent(value: Number) -> str:
    return "–" if value is None else f"{100 * value:.0f}"
