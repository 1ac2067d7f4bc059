"""Archives and image columns that try to leave their folder, to fill the disk, or to hang."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from . import children
from .mutations import json_lines
from .seeds import png


def _entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, mode << 16
    return entry


_ZIPS: dict[str, list[tuple[zipfile.ZipInfo, bytes]]] = {
    "parent": [(_entry("../evil.txt"), b"x")],
    "parent below": [(_entry("a/../../evil.txt"), b"x")],
    "absolute": [(_entry("/evil.txt"), b"x")],
    "back slashes": [(_entry("..\\evil.txt"), b"x")],
    "drive": [(_entry("C:\\evil.txt"), b"x")],
    "link": [(_entry("link", stat.S_IFLNK | 0o777), b"/etc/passwd")],
    "file below a link": [(_entry("d", stat.S_IFLNK | 0o777), b"/tmp"), (_entry("d/evil.txt"), b"x")],
    "device": [(_entry("device", stat.S_IFCHR | 0o666), b"")],
    "set user id": [(_entry("suid", stat.S_IFREG | 0o4777), b"x")],
    "NUL": [(_entry("a\0/../../evil"), b"x")],
    "twice": [(_entry("a.png"), b"1"), (_entry("a.png"), b"2")],
    "file and folder": [(_entry("a"), b"1"), (_entry("a/b"), b"2")],
    "long name": [(_entry("x" * 5000), b"x")],
    "no name": [(_entry(""), b"x")],
    "dots": [(_entry("..."), b"x")],
}


def _unpack(archive: Path, cache: Path) -> str:
    """Unpack in a child; returns what is wrong."""

    def work() -> None:
        from medvqa_rl.data.reading.unpack import unpack_zips

        try:
            unpack_zips([archive], cache)
        except ValueError as error:
            assert len(str(error)) < 1000 and "None" not in str(error), error

    ended = children.run(work, cache.with_suffix(".log"), limit=60)
    if ended.code != 0:
        return ended.last_words
    left = [path for path in (cache / "unpacked").glob("*") if path.name.startswith("tmp")]
    odd = [
        path
        for path in cache.rglob("*")
        if not (path.is_dir() or path.is_file()) or path.is_symlink() or path.stat().st_mode & 0o6000
    ]
    return f"left {[path.name for path in (*left, *odd)]}" if left or odd else ""


def zips(out: Path) -> Iterator[tuple[str, str]]:
    for number, (name, entries) in enumerate(_ZIPS.items()):
        work = out / f"zip_{number}"
        (work / "given").mkdir(parents=True)
        archive = work / "given" / "a.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for entry, data in entries:
                file.writestr(entry, data)
        before = set(out.rglob("*"))
        wrong = _unpack(archive, work / "cache")
        outside = [
            path
            for path in set(out.rglob("*")) - before
            if not path.is_relative_to(work / "cache") and path.suffix != ".log"
        ]
        yield f"zip, {name}", wrong or (f"wrote {outside}" if outside else "")
    lies = out / "lies.zip"
    with zipfile.ZipFile(lies, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("big.bin", b"\0" * 50_000_000)
    data = bytearray(lies.read_bytes())
    for at in (data.find(b"PK\x03\x04") + 22, data.find(b"PK\x01\x02") + 24):
        data[at : at + 4] = struct.pack("<I", 10)
    lies.write_bytes(data)
    wrong = _unpack(lies, out / "lies")
    large = [path for path in (out / "lies").rglob("*") if path.is_file() and path.stat().st_size > 10]
    yield "zip, a wrong size in its header", wrong or (f"unpacked {large}" if large else "")
    cut = out / "cut.zip"
    cut.write_bytes(data[: len(data) // 2])
    yield "zip, cut off", _unpack(cut, out / "cut")


_NAMES = [
    "../../secret.png", "../secret.png", "SECRET", "sub/../../../secret.png", "link.png", "linked/secret.png",
    "loop.png", "fifo.png", "zero.png", "stdin.png", "file:///etc/passwd", "http://192.0.2.1/x.png", "//etc/passwd",
    "~/x.png", "$HOME/x.png", "..\\..\\secret.png", "ok.png\0.jpg", ".", "", "ok.png/",
    "x.dcm#../../secret.png", "../../secret.dcm#frame=0",
]  # fmt: skip


def columns(out: Path) -> Iterator[tuple[str, str]]:
    root, secret = out / "own", out / "secret.png"
    (root / "images" / "sub").mkdir(parents=True)
    secret.write_bytes(png(random.Random(0)))
    (root / "images" / "ok.png").write_bytes(png(random.Random(1)))
    links = {
        "link.png": secret,
        "linked": out,
        "loop.png": "loop.png",
        "zero.png": "/dev/zero",
        "stdin.png": "/dev/stdin",
    }
    for name, target in links.items():
        os.symlink(target, root / "images" / name)
    os.mkfifo(root / "images" / "fifo.png")
    for name in _NAMES:
        given = str(secret) if name == "SECRET" else name
        rows = [
            {"image": "ok.png", "question": "Is it?", "answer": "yes"},
            {"image": given, "question": "Is it here?", "answer": "no"},
        ]
        for split in ("train", "val", "test"):
            (root / f"{split}.jsonl").write_bytes(json_lines(rows))

        def work() -> None:
            from medvqa_rl.config import DataConfig
            from medvqa_rl.data import load_dataset

            data = load_dataset(DataConfig(name="own", path=str(root), max_dropped=1.0), "train")
            for sample in data:
                for image in sample.images:
                    if image.key == "ok.png":
                        continue
                    with contextlib.suppress(ValueError, OSError):
                        print("READ", image.key, image.load().size)

        ended = children.run(work, out / "column.log", limit=60)
        wrong = "hangs" if ended.code is None else ended.last_words if ended.code else ""
        yield f"image {name!r}", wrong or ("was read" if "READ" in ended.output else "")


def main(options: argparse.Namespace) -> bool:
    """Try every archive and image name; returns whether all held."""
    out, total, faults = options.out / "archives", 0, 0
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for attempt in (zips, columns):
        for name, wrong in attempt(out):
            total, faults = total + 1, faults + bool(wrong)
            if wrong:
                print(f"{name}: {wrong}", flush=True)
    print(f"{total} archives and image names, {total - faults} refused or harmless")
    return not faults
