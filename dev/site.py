"""Hooks of mkdocs: README.md and CHANGELOG.md become pages, and links to files that the site lacks become text."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository's root, and their names in the site."""
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
"""A link, whose text may be an image."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Point links to README.md at the first page, and keep only the text of links to other files outside docs/."""
    folder = PurePosixPath(page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, separator, anchor = target.partition("#")
        if "://" in target or target.startswith(("#", "mailto:")):
            return link[0]
        inside = _resolved(folder / path)
        if inside.startswith("../"):
            inside = PAGES.get(inside.removeprefix("../"), inside)
        if files.get_file_from_path(inside) is None:
            return text
        up = "../" * len(folder.parts)
        return f"[{text}]({up}{inside}{separator}{anchor})"

    return _LINK.sub(replaced, markdown)


def _resolved(path: PurePosixPath) -> str:
    """The path without ``..`` in its middle, relative to docs/."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)
