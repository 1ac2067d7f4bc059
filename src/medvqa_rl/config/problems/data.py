"""Problems with the settings of a data set, as complete sentences. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from medvqa_rl.config import DataConfig


def data_problems(data: DataConfig) -> Iterator[tuple[str, ...]]:
    """Yield each problem: a sentence, then the dotted paths of the settings involved."""
    if not data.answer_types:
        yield (
            "data.answer_types is an empty list, which leaves no question: list some of choice, closed and open.",
            "data.answer_types",
        )
    yield from _pass_rate_problems(data)
    if data.name != "phantom":
        yield from _stored_data_problems(data)
        return
    for name, given in (("path", data.path), ("hub", data.hub), ("image_folder", data.image_folder)):
        if given is not None:
            yield (
                f"data.{name} is {given}, but data.name is phantom, which reads no files: remove data.{name}, or set "
                "data.name to the data set in that place (vqa_rad, pmc_vqa, own ...).",
                f"data.{name}",
                "data.name",
            )
    if data.skip_images:
        yield (
            f"data.skip_images is {list(data.skip_images)}, but data.name is phantom, which reads no files: remove "
            "data.skip_images.",
            "data.skip_images",
            "data.name",
        )
    if data.allow_text_only:
        yield (
            "data.allow_text_only is true, but data.name is phantom, whose questions all have an image: remove "
            "data.allow_text_only.",
            "data.allow_text_only",
            "data.name",
        )
    if data.answers_as == "set":
        yield (
            "data.answers_as is set, but data.name is phantom, whose answers are no lists: remove data.answers_as.",
            "data.answers_as",
            "data.name",
        )
    if data.split == "image":
        yield (
            "data.split is image, but data.name is phantom, whose splits never share an image: remove data.split.",
            "data.split",
            "data.name",
        )


def _pass_rate_problems(data: DataConfig) -> Iterator[tuple[str, ...]]:
    if data.pass_rate is not None and data.pass_rate[0] > data.pass_rate[1]:
        low, high = data.pass_rate
        yield (
            f"data.pass_rate is [{low:g}, {high:g}], but the lower bound comes first: write [{high:g}, {low:g}].",
            "data.pass_rate",
        )
    used = {"pass_rate": data.pass_rate is not None, "order": data.order != "shuffled"}
    for name in (name for name, is_used in used.items() if is_used and data.pass_rate_from is None):
        value = data.order if name == "order" else "[{:g}, {:g}]".format(*data.pass_rate or ())
        yield (
            f"data.{name} is {value}, but data.pass_rate_from is not set: set it to the folder of an evaluation of "
            "the training questions (`medvqa-rl eval CONFIG --split train --samples 8`).",
            f"data.{name}",
            "data.pass_rate_from",
        )
    if data.pass_rate_from is not None and data.name == "phantom" and data.num_train is None:
        yield (
            f"data.pass_rate_from is {data.pass_rate_from}, but data.name is phantom, whose training questions are "
            "endless: set data.num_train, and evaluate that many.",
            "data.pass_rate_from",
            "data.num_train",
        )


def unused_pass_rates(data: DataConfig) -> Iterator[tuple[str, ...]]:
    """Yield a problem if training would ignore ``data.pass_rate_from``, which ``data check`` shows by itself."""
    if data.pass_rate_from is not None and data.pass_rate is None and data.order == "shuffled":
        yield (
            f"data.pass_rate_from is {data.pass_rate_from}, but nothing uses the pass rates: set data.pass_rate (such "
            "as [0.1, 0.9]) or data.order=easy_to_hard, or remove data.pass_rate_from.",
            "data.pass_rate_from",
            "data.pass_rate",
            "data.order",
        )


FROM_HUB = ("pmc_vqa", "slake_en", "slake_zh", "path_vqa", "vqa_rad_hub", "mmmu_medical")
"""Data sets that can be read from the Hugging Face Hub as well as from a folder."""

NO_IMAGE_FOLDER = ("path_vqa", "vqa_rad_hub", "vqa_med", "mmmu_medical")
"""Data sets whose images are inside their tables or in folders with fixed names."""


def _stored_data_problems(data: DataConfig) -> Iterator[tuple[str, ...]]:
    if data.hub is None and not (data.path or "").strip():
        files = (
            "'VQA_RAD Dataset Public.json' and its images" if data.name == "vqa_rad" else "its files (docs/data.md)"
        )
        yield (
            f"data.path is missing, but data.name is {data.name}, which is read from disk: set data.path to the "
            f"folder that holds {files}.",
            "data.path",
            "data.name",
        )
    if data.hub is not None:
        if data.name not in FROM_HUB:
            yield (
                f"data.hub is {data.hub}, but data.name is {data.name}, which is read from a folder only: set "
                f"data.path, or data.name to one of {', '.join(FROM_HUB)}.",
                "data.hub",
                "data.name",
            )
        if data.path is not None:
            yield (
                f"data.hub is {data.hub} and data.path {data.path}, but only one of the two may be set: "
                "remove the other.",
                "data.hub",
                "data.path",
            )
        if data.revision is None:
            yield (
                f"data.revision is missing, but data.hub is {data.hub}: set it to a commit of that repository (40 "
                "hexadecimal digits), so that the data cannot change between runs.",
                "data.revision",
                "data.hub",
            )
    if data.hub is None and data.revision is not None:
        yield (
            f"data.revision is {data.revision}, but data.hub is not set: set data.hub to the repository, or remove "
            "data.revision.",
            "data.revision",
            "data.hub",
        )
    if data.image_folder is not None and (data.name in NO_IMAGE_FOLDER or data.hub is not None):
        yield (
            f"data.image_folder is {data.image_folder}, but the images of {data.name} come with its files: remove "
            "data.image_folder.",
            "data.image_folder",
            "data.name",
            "data.hub",
        )
    for name, value, default, owner in (
        ("scanner", data.scanner, "home", "phantom"),
        ("modalities", data.modalities, (), "phantom"),
        ("letter_skew", data.letter_skew, 0.0, "phantom"),
        ("reasoning", data.reasoning, "reference", "phantom"),
        ("home_share", data.home_share, 0.0, "phantom"),
        ("variant", data.variant, "v1", "pmc_vqa"),
        ("columns", data.columns.given, {}, "own"),
        ("allow_text_only", data.allow_text_only, False, "own"),
    ):
        if value != default and data.name != owner:
            yield (
                f"data.{name} is {value}, but only {owner} has this setting and data.name is {data.name}: remove "
                f"data.{name} or set data.name={owner}.",
                f"data.{name}",
                "data.name",
            )
