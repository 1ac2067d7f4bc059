"""Questions to the models of runs, one at a time, with votes and reward parts. Imports no torch until the first."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from medvqa_rl.cli.ask import NO_ANSWER, make_sample, read_vote, sample_answers
from medvqa_rl.cli.common import use_threads
from medvqa_rl.config import Config
from medvqa_rl.core.files import list_checkpoints, read_best, step_of
from medvqa_rl.core.text import shown
from medvqa_rl.core.types import DEFAULT_WORDING, LETTERS, Group, ImageSource, Sample, Template
from medvqa_rl.data.images.files import FileImage, MemoryImage
from medvqa_rl.data.images.windowing import medical_kind
from medvqa_rl.report.runs import StoredRun

if TYPE_CHECKING:
    from medvqa_rl.models.loading import Policy

MAX_COUNT = 32
"""Answers to a question."""
MAX_TOKENS = 8192

_FROM_TEXT = ("format", "ecr", "overlong", "repetition")
"""Reward parts that need nothing but the completion."""
_WITH_GOLD = ("correctness", "cwr", "cosine")
"""Those that also need the gold answer. Others need a judge, a function of the user's or another pass of the model."""


@dataclass(frozen=True)
class Question:
    """A question, and how it is answered."""

    sample: Sample
    has_gold: bool
    count: int
    temperature: float
    max_length: int
    seed: int


def model_choices(run: StoredRun) -> dict[str, str]:
    """Return the models of a run that can be asked: what to show, by name. Empty without settings."""
    if not run.config:
        return {}
    found = {}
    if (run.path / "best").is_dir():
        try:
            found["best"] = f"best checkpoint, of step {read_best(run.path / 'best' / 'best.json').step}"
        except (ValueError, OSError):
            found["best"] = "best checkpoint"
    for path in reversed(list_checkpoints(run.path)):
        found[path.name] = f"checkpoint of step {step_of(path)}"
    return found | {"initial": "the model before training"}


def read_question(given: Mapping[str, str], images: Sequence[ImageSource]) -> Question:
    """Read a question from the fields of a form.

    Raises:
        ValueError: a field is missing or not allowed.
    """
    options = tuple(line.strip() for line in given.get("options", "").splitlines() if line.strip())
    gold = given.get("gold", "").strip()
    if not images:
        raise ValueError("There is no image: choose a file, or the image of a question.")
    sample = make_sample("question", given.get("question", "").strip(), options, images, gold)
    return Question(
        sample,
        has_gold=bool(gold),
        count=int(_number(given, "count", 1, MAX_COUNT, whole=True)),
        temperature=_number(given, "temperature", 0.001, 10),
        max_length=int(_number(given, "max_length", 1, MAX_TOKENS, whole=True)),
        seed=int(_number(given, "seed", 0, 2**31, whole=True)),
    )


def _number(given: Mapping[str, str], name: str, low: float, high: float, *, whole: bool = False) -> float:
    try:
        value = int(given[name]) if whole else float(given[name])
    except (KeyError, ValueError):
        value = float("nan")
    if not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} is {shown(given.get(name, ''))}: give {kind} from {low:g} to {high:g}.")
    return value


def read_upload(name: str, data: bytes) -> ImageSource:
    """Decode an uploaded image of any format that data sets may have. Nothing of it stays on disk, and its name is
    forgotten.

    Raises:
        ValueError: it cannot be decoded, or has too many pixels.
    """
    kind = medical_kind(name)
    own = f"image.{'nii' if kind == 'nifti' else 'dcm'}{'.gz' if name.lower().endswith('.gz') else ''}"
    with TemporaryDirectory(prefix="medvqa-rl-") as folder:
        path = own if kind else "image"
        (Path(folder) / path).write_bytes(data)
        return MemoryImage("image", FileImage(path, Path(folder)).load())


class Asker:
    """Keeps the model that was asked last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[object, ...] = ()
        self._policy: Policy | None = None

    def ask(self, run: StoredRun, model: str, question: Question) -> dict[str, Any]:
        """Sample the answers of a run's model and return them as JSON for the page's script.

        Args:
            model: one of :func:`model_choices`.

        Raises:
            ValueError: the run has no such model, it cannot be loaded, or another question is being answered.
        """
        if model not in model_choices(run):
            raise ValueError(f"The run {run.name} has no model {shown(model)}: reload the page.")
        try:
            config = Config.model_validate(run.config)
        except ValueError as error:
            raise ValueError(f"The settings of {run.name} are of another version, so its model is unknown.") from error
        if not self._lock.acquire(blocking=False):
            raise ValueError("Another question is being answered: ask again when it is done.")
        try:
            policy, template = self._load(run, config, model)
            group = sample_answers(
                policy,
                question.sample,
                template,
                count=question.count,
                temperature=question.temperature,
                seed=question.seed,
                max_length=question.max_length,
            )
            return _json(group, question, config, policy)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; it is not imported here
                raise
            raise ValueError(
                "The model does not fit into the free memory of the GPU: ask when nothing else runs there, or for "
                "fewer answers."
            ) from error
        finally:
            self._lock.release()

    def _load(self, run: StoredRun, config: Config, model: str) -> tuple[Policy, Template]:
        """The model and its prompt template; as evaluations of the run use them."""
        folder = run.path / ("best" if model == "best" else f"checkpoints/{model}")
        settings = config.model
        use_threads(settings.path)
        from medvqa_rl.models.checkpoints import with_checkpoint
        from medvqa_rl.models.loading import load_policy
        from medvqa_rl.models.processor import trained_wording

        if model != "initial":
            settings = with_checkpoint(settings, folder)
        wording = config.prompt.wording
        if wording == DEFAULT_WORDING:
            wording = trained_wording(settings.adapter, settings.path)
        key = (settings, wording, folder.stat().st_mtime_ns if model != "initial" else 0)
        if self._policy is None or key != self._key:
            self._policy = None  # frees its memory first
            self._policy, self._key = load_policy(settings), key
            self._policy.processor.use(wording)
        return self._policy, wording.template if wording.instruction else config.prompt.template


def _json(group: Group, question: Question, config: Config, policy: Policy) -> dict[str, Any]:
    sample = question.sample
    parts, notes = _reward_parts(group, question, config, policy)
    votes = [read_vote(sample, completion, group.template, group.wording) for completion in group.completions]
    shown_answers = []
    for index, (completion, vote) in enumerate(zip(group.completions, votes)):
        outcome = "none" if vote == NO_ANSWER else "answered"
        if question.has_gold and outcome != "none":
            outcome = "right" if _is_right(group, index) else "wrong"
        shown_answers.append(
            {
                "text": completion.text,
                "outcome": outcome,
                "vote": vote,
                "tokens": len(completion.token_ids),
                "cut": completion.is_truncated,
                "parts": [[name, values[index]] for name, values in parts.items()],
            }
        )
    return {
        "id": "",
        "question": sample.question,
        "options": [f"{letter}: {text}" for letter, text in zip(LETTERS, sample.options)],
        "gold": sample.reference if question.has_gold else "",
        "tags": {},
        "images": [],
        "answers": shown_answers,
        "votes": Counter(votes).most_common(),
        "notes": notes,
    }


def _is_right(group: Group, index: int) -> bool:
    from medvqa_rl.core.answers import read_group

    return read_group(group)[index].is_right


def _reward_parts(
    group: Group, question: Question, config: Config, policy: Policy
) -> tuple[dict[str, list[float | None]], list[str]]:
    """The run's reward parts that can be computed here, by name, and a sentence about the others."""
    from medvqa_rl.rewards.compose import Rewards

    enabled = {name: weight for name, weight in config.rewards.weights.items() if weight != 0}
    usable = _FROM_TEXT + (_WITH_GOLD if question.has_gold else ())
    here = {name: weight for name, weight in enabled.items() if name in usable}
    missing = [name for name in (*enabled, *config.rewards.functions) if name not in here]
    notes = []
    if waiting := [name for name in missing if name in _WITH_GOLD]:
        notes.append(f"Give the gold answer to see {', '.join(waiting)}.")
    if others := [name for name in missing if name not in _WITH_GOLD]:
        notes.append(f"Not computed here: {', '.join(others)} (a judge, a function or training is needed).")
    if not here:
        return {}, notes
    off = dict.fromkeys(config.rewards.weights, 0.0) | here
    if config.rewards.open_correctness != "token_f1":
        off["open_correctness"] = "exact"  # type: ignore[assignment]
    rewards = Rewards(
        config.rewards.model_copy(update={**off, "functions": {}}), max_completion_length=question.max_length
    )
    scores = rewards.score([group], step=0, count_tokens=policy.processor.count_tokens)
    return {name: [round(float(value), 4) for value in values[0]] for name, values in scores.parts.items()}, notes
