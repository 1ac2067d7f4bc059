"""The server of ``medvqa-rl view``: pages of the runs below a folder, and the samples that they ask for. Imports no
torch until a model is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from medvqa_rl.cli.view.asking import MAX_COUNT, MAX_TOKENS, Asker, model_choices, read_question, read_upload
from medvqa_rl.cli.view.guard import Guard
from medvqa_rl.config.sharing import without_folders
from medvqa_rl.core.types import ImageSource, Sample
from medvqa_rl.evaluation.records import EvalRecord, read_records
from medvqa_rl.report.comparisons import Comparison, compare
from medvqa_rl.report.folder import RunsFolder, Version, version_of
from medvqa_rl.report.live import progress_line
from medvqa_rl.report.pages.answers import (
    PAGE,
    Query,
    Question,
    merge_answers,
    question_json,
    select,
    shown_evaluations,
)
from medvqa_rl.report.pages.ask_page import Chosen, render_ask
from medvqa_rl.report.pages.images import samples_of_records
from medvqa_rl.report.pages.overview import MAX_COMPARED, render_overview
from medvqa_rl.report.pages.rendering import script_json, thumbnail
from medvqa_rl.report.pages.report import Served, render_report
from medvqa_rl.report.pages.viewer import build_viewer, evenly
from medvqa_rl.report.runs import StoredEvaluation, StoredRun

MAX_SIDE = 448
"""Longest side in pixels of an image, twice what a page shows, for sharp displays."""
NUM_SUGGESTED = 12
"""Images to choose from, to ask about."""


class Pages:
    """The pages of one folder. What is costly to read is kept until its files change."""

    def __init__(self, folder: RunsFolder) -> None:
        self._folder = folder
        self._compare = lru_cache(8)(self._compare_anew)
        self._groups = lru_cache(2)(self._groups_anew)
        self._asker = Asker()

    def overview(self, request: Request) -> Response:
        """All runs."""
        runs, problems = self._folder.headlines()
        return _html(request, render_overview(runs, problems, folder=self._folder.root.name, now=_now()))

    def runs(self, request: Request) -> Response:
        """One run, or several compared."""
        names = self._names(request)
        runs = [self._folder.read(name) for name in names]
        versions = tuple(version_of(run.path, only_evaluations=True) for run in runs)
        address = urlencode([("run", name) for name in names])
        served = Served(
            answers=f"answers?{address}",
            groups=f"groups?{address}",
            ask=f"ask?{address}" if len(runs) == 1 and model_choices(runs[0]) else "",
            lines=[progress_line(run, _now()) for run in runs],
            compared=self._compare(names, versions),
        )
        return _html(request, render_report(runs, served=served))

    def _compare_anew(self, names: Sequence[str], versions: tuple[Version, ...]) -> tuple[list[Comparison], list[str]]:
        return compare([self._folder.read(name) for name in names])

    def groups(self, request: Request) -> Response:
        """The groups sampled during training, with their images."""
        names = self._names(request)
        versions = tuple(version_of(self._folder.path_of(name)) for name in names)
        return Response(self._groups(names, versions), media_type="application/json")

    def _groups_anew(self, names: Sequence[str], versions: tuple[Version, ...]) -> str:
        viewer = build_viewer([self._folder.read(name) for name in names])
        notes = list(map(without_folders, viewer.notes))
        return script_json({"groups": viewer.groups, "images": viewer.images, "notes": notes})

    def answers(self, request: Request) -> Response:
        """A page of the evaluated questions that a query finds."""
        runs = [self._folder.read(name) for name in self._names(request)]
        evaluations = shown_evaluations(runs, every=True)
        given = request.query_params
        query = Query(
            evaluation=given.get("eval", ""),
            words=given.get("q", ""),
            **{name: given.get(name, "") for name in ("against", "outcome", "flip", "group", "answer")},
        )
        names = [name for name in dict.fromkeys((query.evaluation, query.against)) if name in evaluations]
        questions = _merge(tuple((name, _file(evaluations[name])) for name in names))
        found = select(questions, query)
        last = max(0, len(found) - 1) // PAGE
        first = PAGE * min(max(0, _number(given.get("page", "1")) - 1), last)
        notes: dict[str, None] = {}
        entries = []
        for question in found[first : first + PAGE]:
            entry = question_json(question)
            for name in question:
                sample, note = _sample(evaluations[name], question[name].sample_id)
                if sample is not None:
                    run = _run_of(runs, evaluations[name])
                    entry["images"] = _addresses(run, evaluations[name], sample)
                    if model_choices(run):
                        entry["ask"] = _ask_address(run, evaluations[name], sample)
                    break
                notes[f"The images of {name} are not shown: {without_folders(note)}"] = None
            entries.append(entry)
        total = sum(query.evaluation in question for question in questions)
        return _json({"entries": entries, "matching": len(found), "total": total, "notes": list(notes)})

    def image(self, request: Request) -> Response:
        """An image of an evaluated question."""
        given = request.query_params
        _, sample = self._question(self._folder.read(given.get("run", "")), given)
        number = _number(given.get("number", "0"))
        if sample is None or not 0 <= number < len(sample.images):
            raise HTTPException(404, "There is no such image.")
        data, kind = thumbnail(sample.images[number].load(), MAX_SIDE, lossless_bytes=60_000)
        return Response(data, media_type=f"image/{kind}")

    def ask_page(self, request: Request) -> Response:
        """The form that asks a run's model."""
        given = request.query_params
        run = self._folder.read(given.get("run", ""))
        models = model_choices(run)
        if not models:
            raise HTTPException(404, f"{run.name} has no settings, so it has no model to ask.")
        evaluation, sample = self._question(run, given)
        chosen = None
        if evaluation is not None and sample is not None:
            images = _addresses(run, evaluation, sample)
            chosen = Chosen(evaluation.name, sample.id, sample.question, sample.options, sample.answer, images)
        address = urlencode({"run": run.name})
        rollout = run.config.get("rollout", {})
        page = render_ask(
            run,
            back=f"runs?{address}",
            send=f"ask?{address}",
            models=models,
            chosen=chosen,
            suggested=_suggestions(run),
            defaults={
                "max_length": rollout.get("max_completion_length", 256),
                "temperature": rollout.get("temperature", 1.0),
            },
            limits={"count": MAX_COUNT, "max_length": MAX_TOKENS},
        )
        return _html(request, page)

    async def ask(self, request: Request) -> Response:
        """Answer a question."""
        async with request.form(max_files=1, max_fields=12, max_part_size=100_000) as form:
            given = {name: value for name, value in form.items() if isinstance(value, str)}
            upload = form.get("image")
            data = await upload.read() if isinstance(upload, UploadFile) else b""
            name = (upload.filename or "") if isinstance(upload, UploadFile) else ""
        return await run_in_threadpool(self._answer, request.query_params.get("run", ""), given, name, data)

    def _answer(self, name: str, given: Mapping[str, str], upload: str, data: bytes) -> Response:
        run = self._folder.read(name)
        if data:
            images: Sequence[ImageSource] = (read_upload(upload, data),)
        else:
            _, sample = self._question(run, given)
            images = () if sample is None else sample.images
        return _json(self._asker.ask(run, given.get("model", ""), read_question(given, images)))

    def _question(self, run: StoredRun, given: Mapping[str, str]) -> tuple[StoredEvaluation | None, Sample | None]:
        """The evaluation and the sample that an address or a form names, as far as they exist."""
        evaluation = next((one for one in run.evaluations if one.name == given.get("eval")), None)
        return evaluation, None if evaluation is None else _sample(evaluation, given.get("id", ""))[0]

    def _names(self, request: Request) -> tuple[str, ...]:
        """The runs that a request is about."""
        names = tuple(dict.fromkeys(request.query_params.getlist("run")))
        if not 1 <= len(names) <= MAX_COMPARED:
            raise HTTPException(400, f"{len(names)} runs are chosen: go back, and check 1 to {MAX_COMPARED}.")
        return names


def make_app(folder: RunsFolder, token: str) -> ASGIApp:
    """Return the server's application.

    Args:
        folder: the runs.
        token: the first part of every address; without it nothing is answered.
    """
    pages = Pages(folder)
    routes = [
        Route("/", pages.overview),
        Route("/runs", pages.runs),
        Route("/answers", pages.answers),
        Route("/groups", pages.groups),
        Route("/image", pages.image),
        Route("/ask", pages.ask_page, methods=["GET"]),
        Route("/ask", pages.ask, methods=["POST"]),
    ]
    app = Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        exception_handlers={ValueError: _refuse, OSError: _refuse},
    )
    return Guard(app, token)


def _refuse(request: Request, error: Exception) -> Response:
    """Answer what cannot be shown with its sentence."""
    status = 404 if request.method == "GET" else 400
    return Response(without_folders(str(error)), status_code=status, media_type="text/plain")


def _html(request: Request, page: str) -> Response:
    """A page, or that it has not changed."""
    data = page.encode("utf-8", "replace")
    tag = f'"{sha256(data).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return HTMLResponse(data, headers={"ETag": tag})


def _json(value: Any) -> Response:
    return Response(script_json(value), media_type="application/json")


def _now() -> datetime:
    return datetime.now(UTC)


def _number(text: str) -> int:
    """A number in an address; 0 for anything else."""
    return int(text) if text.isdecimal() and len(text) < 10 else 0


File = tuple[Path, int, int]
"""Records of an evaluation: path, time of the last change, and size, by which what was read is kept."""


def _file(evaluation: StoredEvaluation) -> File:
    state = evaluation.samples.stat()
    return evaluation.samples, state.st_mtime_ns, state.st_size


@lru_cache(maxsize=4)
def _read(file: File) -> Sequence[EvalRecord]:
    return read_records(file[0])


@lru_cache(maxsize=2)
def _merge(named: tuple[tuple[str, File], ...]) -> list[Question]:
    return merge_answers({name: _read(file) for name, file in named})


def _sample(evaluation: StoredEvaluation, id: str) -> tuple[Sample | None, str]:
    """The sample of an evaluated question, or a sentence why there is none."""
    samples, problem = _find(_file(evaluation))
    return samples.get(id), problem


@lru_cache(maxsize=4)
def _find(file: File) -> tuple[dict[str, Sample], str]:
    try:
        return samples_of_records(file[0].parent, _read(file), remedy="do without its images"), ""
    except (ValueError, OSError) as error:
        return {}, str(error)


def _run_of(runs: Sequence[StoredRun], evaluation: StoredEvaluation) -> StoredRun:
    return next(run for run in runs if any(one is evaluation for one in run.evaluations))


def _addresses(run: StoredRun, evaluation: StoredEvaluation, sample: Sample) -> list[str]:
    """Addresses of a sample's images."""
    named = {"run": run.name, "eval": evaluation.name, "id": sample.id}
    return [f"image?{urlencode(named | {'number': number})}" for number in range(len(sample.images))]


def _ask_address(run: StoredRun, evaluation: StoredEvaluation, sample: Sample) -> str:
    return f"ask?{urlencode({'run': run.name, 'eval': evaluation.name, 'id': sample.id})}"


def _suggestions(run: StoredRun) -> list[tuple[str, str]]:
    """Addresses of some images of the last evaluation, and of the form with each; an image once."""
    if not run.evaluations:
        return []
    evaluation = run.evaluations[-1]
    try:
        samples, _ = _find(_file(evaluation))
    except (ValueError, OSError):  # its answers cannot be read, as the run's page says
        return []
    by_image = {sample.images[0].key: sample for sample in reversed(samples.values()) if len(sample.images) == 1}
    some = evenly(list(by_image.values()), NUM_SUGGESTED)
    return [(_addresses(run, evaluation, one)[0], _ask_address(run, evaluation, one)) for one in some]
