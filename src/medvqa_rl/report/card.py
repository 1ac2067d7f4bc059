"""Model cards: the README.md of a checkpoint, generated from the run folder. Imports no torch.

Every number is read from results, settings and data.json. Local paths are reduced to their last part, because cards
are published with the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medvqa_rl.config import Config, EvalConfig, is_hub_id, leaves
from medvqa_rl.config.sharing import shareable, without_folders
from medvqa_rl.core.files import find_checkpoint, list_checkpoints, read_best, write_text
from medvqa_rl.evaluation.judging.judged_tables import in_short
from medvqa_rl.evaluation.statistics.summary import paired_gain
from medvqa_rl.report.figures.style import percent
from medvqa_rl.report.health import check_health
from medvqa_rl.report.runs import StoredEvaluation, StoredRun, read_run

LIMITS = (
    "Not for clinical use. This is not a medical device, it is not validated for any clinical purpose, and its "
    "answers must not inform the care of a patient.",
    "Its reasoning can sound convincing and be wrong. A correct answer does not show that the reasoning led to it.",
    "It was evaluated on the questions above only: not on other scanners, hospitals, languages or age groups, and not "
    "by clinicians.",
    "Intervals resample the images of one evaluation. They do not cover the variation between training seeds.",
)
"""Limits stated in every card."""

_METHODS = {
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "cispo": "CISPO",
    "sapo": "SAPO",
    "dpo": "online DPO",
}


class Average(NamedTuple):
    """Weights of a checkpoint that were averaged with those that training started from."""

    share: float
    """Of the checkpoint, 0 to 1."""
    folder: Path
    """Where the average is."""


def write_cards(run: Path) -> list[Path]:
    """Write cards into the best and the last checkpoint, if they exist.

    Returns:
        The paths of the cards.

    Raises:
        ValueError: the folder is not a run, or has no checkpoint.
    """
    stored = read_run(run)
    written = []
    for checkpoint in dict.fromkeys([find_checkpoint(run), *list_checkpoints(run)[-1:]]):
        written.append(write_text(checkpoint / "README.md", model_card(stored, checkpoint), errors="replace"))
    return written


def model_card(run: StoredRun, checkpoint: Path, *, is_merged: bool = False, average: Average | None = None) -> str:
    """Return the card of a checkpoint as Markdown with the front matter of the Hugging Face Hub.

    Args:
        is_merged: the checkpoint is an adapter, and the card is of the model that it was merged into.
        average: the card is of this average of the checkpoint.
    """
    settings = leaves(run.config)
    is_best, step = checkpoint.name == "best", _step(checkpoint)
    is_adapter = (checkpoint / "adapter_config.json").is_file() and not is_merged
    base = _base(settings)
    lines = [
        *_front_matter(base, settings, is_adapter, is_sft=run.status.get("kind") == "sft"),
        f"# {_plain(run.name)}, {'best' if is_best else 'last'} checkpoint",
        "",
        "**Research software. Not for clinical use.**",
        "",
        f"{'LoRA adapter for' if is_adapter else 'Weights of'} `{base}`{_in_4_bits(settings)}"
        f"{' with a merged LoRA adapter' if is_merged else ''}, fine-tuned for visual "
        f"question answering on medical images by {_method(run, settings)}. "
        f"These are the weights after step {'unknown' if step is None else step}"
        + (
            ", which had the highest validation accuracy of the evaluated steps."
            if is_best
            else ", the last checkpoint of the run."
        ),
        *([] if average is None else ["", _averaged(base, average.share)]),
        "",
        "## Use",
        "",
        *_use(base, is_adapter),
        "",
        "## Results",
        "",
        *(
            _results(run, checkpoint, step, is_best)
            if average is None
            else _results(run, average.folder, None, False, is_average=True)
        ),
        "",
        "## Data",
        "",
        *_data(run),
        "",
        "## Method",
        "",
        *_settings(settings),
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in LIMITS),
        *(f"- {warning}" for warning in _warnings(run)),
        *(f"- Missing when this card was written: {_plain(without_folders(problem))}" for problem in run.problems),
        "",
        "## Versions",
        "",
        _versions(run),
        "",
    ]
    return "\n".join(lines)


def _averaged(base: str, share: float) -> str:
    return (
        f"They were then averaged with those of `{base}`: {share:g} of the trained weights plus {1 - share:g} of the "
        "others, which often keeps most of what was gained and forgets less. The results below are of the average."
    )


def _step(checkpoint: Path) -> int | None:
    """Return the training step of a checkpoint; None if unknown."""
    number = checkpoint.name.removeprefix("step_")
    if number != checkpoint.name and number.isdecimal():
        return int(number)
    best = checkpoint / "best.json"
    return read_best(best).step if best.is_file() else None


def _plain(text: object) -> str:
    """Escape text for Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _base(settings: Mapping[str, Any]) -> str:
    """Return the name of the initial model; for a folder, its last part."""
    path = str(settings.get("model.path", "unknown"))
    return str(shareable({"model.path": path})["model.path"]).replace("`", "")


def _in_4_bits(settings: Mapping[str, Any]) -> str:
    """Return a clause about the quantization of the base model; empty without quantization."""
    return ", whose linear layers were quantized to 4 bits (NF4)" if settings.get("model.load_in_4bit") else ""


def _use(base: str, is_adapter: bool) -> list[str]:
    """Say how to open the checkpoint; tests run these lines."""
    if is_adapter and base.startswith("phantom:"):
        return [
            "Its base model is part of medvqa-rl. In this folder, `medvqa-rl ask IMAGE QUESTION --model .` and "
            "`medvqa-rl serve .` answer questions, and `medvqa-rl export . FOLDER --merge` writes a model that "
            "transformers opens."
        ]
    needs = "transformers and PEFT" if is_adapter else "transformers"
    return [
        f'With {needs}, in this folder or with the name of its repository in place of `"."`:',
        "",
        "```python",
        "from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer",
        "",
        'model = AutoModelForImageTextToText.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'images = AutoImageProcessor.from_pretrained(".")',
        "```",
        "",
        "`AutoProcessor`, which joins the last two, and pipelines also need torchvision for models that read videos, "
        "in a build that matches torch. In transformers 5.17, `AutoImageProcessor` needs it, too. Without it, "
        "`medvqa-rl ask IMAGE QUESTION --model .` and `medvqa-rl serve .` answer questions.",
    ]


def _front_matter(base: str, settings: Mapping[str, Any], is_adapter: bool, *, is_sft: bool) -> list[str]:
    lines = ["---", f"library_name: {'peft' if is_adapter else 'transformers'}", "pipeline_tag: image-text-to-text"]
    if is_hub_id(str(settings.get("model.path", ""))):
        lines += [f"base_model: {base}", f"base_model_relation: {'adapter' if is_adapter else 'finetune'}"]
    tags = [
        "medical-visual-question-answering",
        *(["sft"] if is_sft else ["reinforcement-learning", "grpo"]),
        "medvqa-rl",
    ]
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _method(run: StoredRun, settings: Mapping[str, Any]) -> str:
    done = run.status.get("step", "an unknown number of")
    if run.status.get("kind") == "sft":
        return f"supervised fine-tuning ({done} steps of {settings.get('sft.batch_size', '?')} samples)"
    name = _METHODS.get(str(settings.get("loss.type")), "reinforcement learning")
    details = {
        "sequence-level ratios (GSPO)": settings.get("loss.importance_sampling_level") == "sequence",
        "the leave-one-out baseline of RLOO": settings.get("advantage.baseline") == "leave_one_out",
    }
    if any(details.values()):
        name += " with " + " and ".join(detail for detail, is_on in details.items() if is_on)
    return (
        f"{name} ({done} steps of {settings.get('train.prompts_per_step', '?')} prompts with "
        f"{settings.get('rollout.num_generations', '?')} sampled completions each)"
    )


def _results(
    run: StoredRun, checkpoint: Path, step: int | None, is_best: bool, *, is_average: bool = False
) -> list[str]:
    """Tabulate the evaluations of these weights and of the initial model, with their paired difference."""
    steps = {evaluation.step: evaluation for evaluation in run.evaluations if evaluation.step is not None}
    start, own = None if is_average else steps.get(0), steps.get(step) if step is not None else None
    rows = [("before training", start)] if start is not None and own is not start else []
    rows += [("these weights", own)] if own is not None else []
    rows += [("these weights", evaluation) for evaluation in run.evaluations if _is_of(evaluation, checkpoint)]
    pairs = [(start, own)] if start is not None and own is not None and own is not start else []
    named = {evaluation.name: evaluation for evaluation in run.evaluations}
    if not (is_best or is_average):  # written by a demo: the initial model and the last weights
        for name, after in named.items():
            before = named.get("before_" + name.removeprefix("after_"))
            if name.startswith("after_") and before is not None:
                rows += [("before training", before), ("these weights", after)]
                pairs.append((before, after))
    if not rows:
        return ["No evaluation of these weights is stored in the run."]
    lines = [
        "| weights | evaluation | questions | images | accuracy, % | 95 % interval | majority, % | no answer, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, evaluation in rows:
        results = evaluation.results
        shown = {name: f"{percent(results, name):.1f}".replace("nan", "–") for name in _SHOWN if name in results}
        lines.append(
            f"| {label} | {_plain(_name(evaluation))} | {results['num_scored']} | {results['num_clusters']} | "
            f"{shown['accuracy']} | {shown['accuracy_low']} to {shown['accuracy_high']} | "
            f"{shown['majority_baseline']} | {shown.get('no_answer_rate', '–')} |"
        )
    for before, after in pairs:
        lines += ["", _difference(before, after)]
    for label, evaluation in rows:
        for sentence in _judged(evaluation):
            lines += ["", f"{label[0].upper()}{label[1:]} on {_plain(_name(evaluation))}. {_plain(sentence)}"]
    if is_best:
        lines += [
            "",
            "These weights were selected by validation accuracy, which is therefore biased upwards: use a test set to "
            "judge them.",
        ]
    return lines


_SHOWN = ("accuracy", "accuracy_low", "accuracy_high", "majority_baseline", "no_answer_rate")


def _is_of(evaluation: StoredEvaluation, checkpoint: Path) -> bool:
    """Whether a standalone evaluation is of these weights."""
    model = evaluation.results.get("model")
    if evaluation.step is not None or not isinstance(model, dict) or model.get("average_with"):
        return False
    folder = model.get("adapter") or model.get("path")
    return isinstance(folder, str) and Path(folder).resolve() == checkpoint.resolve()


def _judged(evaluation: StoredEvaluation) -> list[str]:
    """Summarise judge results in sentences; empty without judges."""
    return in_short(evaluation.judged) if evaluation.judged else []


def _name(evaluation: StoredEvaluation) -> str:
    dataset = evaluation.results.get("dataset")
    name = dataset.get("name", evaluation.name) if isinstance(dataset, dict) else evaluation.name
    return f"{name}, after step {evaluation.step}" if evaluation.step else str(name)


def _difference(before: StoredEvaluation, after: StoredEvaluation) -> str:
    """Describe the paired difference of two evaluations in a sentence."""
    try:
        gain = paired_gain(before.records(), after.records(), EvalConfig())
    except (ValueError, TypeError) as error:
        return f"The paired difference on {_plain(_name(after))} is unknown: {_plain(error)}"
    low, high = (f"{100 * float(gain[name]):+.1f}" for name in ("gain_low", "gain_high"))
    return (
        f"On {_plain(_name(after))}, the same {gain['n']} questions about {gain['num_clusters']} images before and "
        f"after: {100 * float(gain['gain']):+.1f} points, 95 % interval {low} to {high} (paired, images resampled); "
        f"{gain['improved']} questions improved, {gain['worsened']} worsened."
    )


def _data(run: StoredRun) -> list[str]:
    splits = [(split, data) for split, data in run.data.items() if isinstance(data, dict)]
    if not splits:
        return ["data.json is missing."]
    lines = ["| split | data | samples | fingerprint | notes |", "|---|---|---|---|---|"]
    for split, data in splits:
        samples = data.get("samples")
        noted = data["notes"].items() if isinstance(data.get("notes"), dict) else ()
        notes = ", ".join(f"{_plain(key)}: {count}" for key, count in noted) or "–"
        size = "endless" if samples is None else samples
        name, fingerprint = _plain(data.get("name")), _plain(data.get("fingerprint"))
        lines.append(f"| {_plain(split)} | {name} | {size} | {fingerprint} | {notes} |")
    return lines


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ from the defaults, as YAML paths."""
    defaults = leaves(Config().model_dump(mode="json"))
    lines = []
    for name, value in shareable(settings).items():
        if name == "output_dir" or (name in defaults and defaults[name] == settings[name]):
            continue
        lines.append(f"{name}={json.dumps(value)}".replace("```", ""))
    if not settings:
        return ["The settings are missing."]
    return ["Settings that differ from the defaults of medvqa-rl:", "", "```text", *(lines or ["none"]), "```"]


def _warnings(run: StoredRun) -> list[str]:
    """Return the signs of failure found in the run."""
    return [
        f"Sign of failure during training: {check.name.lower()}. {check.figure}"
        for check in check_health(run.metrics)
        if check.verdict == "look"
    ]


def _versions(run: StoredRun) -> str:
    packages = run.env.get("packages")
    if not isinstance(packages, dict):
        return "env.json is missing."
    return ", ".join(f"{_plain(name)} {_plain(number)}" for name, number in packages.items()) + "."
