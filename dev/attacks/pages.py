"""Hostile text in every page and on the terminal: nothing may run, and no escape sequence may get through.

Pages are opened in headless Chromium as written, and once more without their content security policy, so that the
escaping is tested by itself. A payload that runs leaves a mark in the document.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import typer

from medvqa_rl.report.folder import RunsFolder

from . import children, viewing
from .command import Fault, invoke
from .mutations import json_lines
from .seeds import STUDY, read_lines, write_pngs

_MARK = "ATTACK" + "RAN"
_RUN = "document.documentElement.setAttribute('data-mark','ATTACK'+'RAN')"
PAYLOADS = [
    f"<script>{_RUN}</script>", f'"><img src=x onerror="{_RUN}">', f"'><svg onload=\"{_RUN}\">",
    f"</script><script>{_RUN}</script>", f"</style></title></textarea><img src=x onerror={_RUN}>",
    f"--><!--<script>{_RUN}</script>", f"javascript:{_RUN}", f"\u2028';{_RUN};//",
    "{{ 1234*5678 }}{% for x in range(3) %}y{% endfor %}", f"&lt;script&gt;{_RUN}&lt;/script&gt;",
]  # fmt: skip
ALL = " ".join(PAYLOADS)
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\x08"
_STRUCTURE = {
    "answer_type",
    "gold",
    "template",
    "state",
    "kind",
    "fingerprint",
    "prompt_hash",
    "image_hash",
    "image_key",
    "choice",
    "name",
    "sample_id",
    "dataset",
    "answers_as",
}
"""Keys whose texts the readers check against a list, or look files up by. Settings are checked as well."""


def poison(value: Any, text: str, key: str = "") -> Any:
    """Append a text to every text of a JSON value, and to the names and values of groups."""
    if isinstance(value, dict):
        return {
            (f"{name} {text}" if key == "groups" else name): item if name == "config" else poison(item, text, name)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [poison(item, text, key) for item in value]
    return f"{value} {text}" if isinstance(value, str) and key not in _STRUCTURE else value


def poison_folder(folder: Path, text: str) -> None:
    for path in folder.rglob("*"):
        if path.suffix == ".jsonl":
            path.write_bytes(json_lines([poison(row, text) for row in read_lines(path)]))
        elif path.name in ("results.json", "env.json", "status.json", "data.json"):
            path.write_text(json.dumps(poison(json.loads(path.read_bytes()), text)))


def write_data(folder: Path, text: str, name: str) -> Path:
    """Data of one's own with the text everywhere and an image of that name; returns its config."""
    write_pngs(folder / "images", [name, "a.png"])
    rows = [
        {
            "image": image,
            "question": f"{number} {text}?",
            "answer": f"{number} {text}",
            "id": f"{number} {text}",
            "modality": f"CT {text}",
        }
        for number, image in enumerate([name, "a.png", f"missing {text}"[:200]])
    ]
    for split in ("train", "val", "test"):
        (folder / f"{split}.jsonl").write_bytes(json_lines(rows))
    config = folder / "config.yaml"
    config.write_text(json.dumps({"data": {"name": "own", "path": str(folder), "max_dropped": 1.0}}))
    return config


def ways_to_run(page: Path) -> Iterator[str]:
    """Open a page and name the ways in which a payload ran."""
    text = page.read_text(encoding="utf-8")
    bare = page.with_name(f"bare_{page.name}")
    stripped, found = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    bare.write_text(stripped, encoding="utf-8")
    if not found:
        yield "has no content security policy"
    for way, path in (("as written", page), ("without its policy", bare)):
        yield from _ways(path.as_uri(), way)
    if "7006652" in text:
        yield "a template ran"


def _ways(address: str, way: str, *, has_samples: bool = False) -> Iterator[str]:
    """Open an address and name the ways in which a payload ran; also if samples should be there, but are not."""
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        "--dump-dom",
        address,
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    if len(shown) < 500:
        yield f"does not open {way}"
    if has_samples and '<article class="entry"' not in shown:
        yield f"shows no samples {way}"
    if f'data-mark="{_MARK}"' in shown:
        yield f"a payload ran, {way}"
    if re.search(r"(href|src|action)=[\"']?javascript:", shown):
        yield f"a javascript: link, {way}"
    if "7006652" in shown:
        yield f"a template ran, {way}"


def served_ways_to_run(folder: Path) -> Iterator[str]:
    """Open the pages of `medvqa-rl view` on a folder of hostile runs."""
    names = list(RunsFolder(folder).find())
    both = urlencode([("run", name) for name in names])
    for bare in (False, True):
        with viewing.serve(folder, without_policy=bare) as address:
            own = [f"{page}?{urlencode({'run': name})}" for name in names for page in ("runs", "ask")]
            for path in ("", *own, f"runs?{both}"):
                way = f"at /{path}{', without its policy' if bare else ''}"
                yield from _ways(address + path, way, has_samples=path.startswith("runs"))


def _make_pages(out: Path) -> None:
    from medvqa_rl.config.yaml import read_yaml

    for name in ("run", "a", "b"):
        poison_folder(out / "seed" / name, ALL)
    run = out / "runs" / "<img src=x onerror=document.documentElement.setAttribute('data-mark','ATTACK'+'RAN')>"
    shutil.copytree(out / "seed" / "run", run)
    shutil.copytree(out / "seed" / "run", out / "runs" / "run")
    evaluations = [str(out / "seed" / name) for name in "ab"]
    config = write_data(
        out / "data", ALL, "<img src=x onerror=document.documentElement.setAttribute('data-mark','ATTACKRAN')>.png"
    )
    invoke(["report", str(run), str(out / "seed" / "run"), "--output", str(out / "report.html")])
    invoke(["report", str(run), "--card"])
    shutil.copy(run / "best" / "README.md", out / "card.md")
    with suppress(typer.Exit):  # the check finds faults, as it should
        invoke(["data", "check", str(config), "--html", str(out / "data.html")])
    invoke(["judge", "sheet", *evaluations, "--output", str(out / "sheet.html")])
    poison_folder(out / "seed" / "study", ALL)
    recipe = out / "recipe.yaml"
    recipe.write_text(json.dumps({**read_yaml(STUDY.read_text()), "title": ALL, "note": ALL}))
    invoke(["study", "collect", str(recipe), "--output", str(out / "seed" / "study")])
    shutil.copy(out / "seed" / "study" / "tables" / "study.html", out)


def _print_escapes(out: Path) -> None:
    """Print data with escape sequences by every verb; :func:`invoke` finds those that get through."""
    for name in ("run", "a", "b"):
        poison_folder(out / "escaped" / name, ESCAPES)
    config = str(write_data(out / "escaped" / "data", ESCAPES, "b.png"))
    run, a, b = (str(out / "escaped" / name) for name in ("run", "a", "b"))
    for words in (
        ["data", "check", config],
        ["data", "show", config, "--output", str(out / "show.png")],
        ["compare", a, b, "--flips", "3"],
        ["report", run, "--output", str(out / "escaped" / "report.html")],
        ["config", "check", config, "--", f"model.path=a{ESCAPES}", f"data.nam{ESCAPES}=1"],
        ["ask", str(out / f"none{ESCAPES}.png"), "Is it?"],
    ):
        try:
            with suppress(typer.Exit):
                invoke(words, debug=False)
        except Fault as fault:
            print(f"BAD {fault}")


def main(options: argparse.Namespace) -> bool:
    """Make and open all pages; returns whether nothing ran."""
    out = options.out / "pages"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    faults = []
    shutil.copytree(options.out / "seed", out / "seed")
    shutil.copytree(out / "seed", out / "escaped")
    for work in (_make_pages, _print_escapes):
        ended = children.run(partial(work, out), out / "pages.log")
        faults += [line for line in ended.output.splitlines() if line.startswith("BAD ")]
        if ended.code != 0:
            faults.append(f"{work.__name__} failed: {ended.last_words}")
    pages = [path for path in sorted(out.glob("*.html")) if not path.name.startswith("bare_")]
    has_browser = shutil.which("chromium") is not None
    if has_browser:
        faults += [f"{page.name}: {way}" for page in pages for way in ways_to_run(page)]
        faults += [f"view: {way}" for way in served_ways_to_run(out / "runs")]
    if (out / "card.md").exists():
        card = re.sub(r"(`{3,})text\n.*?\n\1|`[^`]*`", "", (out / "card.md").read_text(), flags=re.DOTALL)
        if found := re.search(r"(?<!\\)<(script|img|svg)", card):
            faults.append(f"card.md: raw HTML {found[0]}")
    for fault in faults:
        print(fault)
    unopened = "" if has_browser else " (not opened: no Chromium)"
    print(f"{len(pages)} pages with {len(PAYLOADS)} payloads each{unopened}, {len(faults)} faults")
    return not faults
