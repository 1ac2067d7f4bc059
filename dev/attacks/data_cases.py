"""Damaged data: tables in the formats that people keep them in, published data sets, images and archives.

Each makes a valid input in the current folder, damages it and gives it to the command.
"""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

from .command import Fault, invoke
from .mutations import PRINTABLE, damage_json, damage_rows, json_lines, mutate_bytes, mutate_json
from .seeds import OMNIMED_ROWS, OWN_ROWS, PMC_ROW, RAD_ROWS, SLAKE_ROWS, images, png, spreadsheet, write_pngs


def check_data(**settings: Any) -> None:
    """Run ``data check`` on the current folder, with its page."""
    Path("config.yaml").write_text(json.dumps({"data": {"path": ".", "max_dropped": 1.0, **settings}}))
    invoke(["data", "check", "config.yaml", "--html", "check.html", "--workers", "1"])


def check_counts(reading: Any, written: int | None) -> None:
    """Every row is a sample, a dropped row or a row left out by name."""
    dropped = len({issue.row for issue in reading.issues if issue.action == "dropped"})
    if len(reading.rows) + dropped != reading.total:
        raise Fault(f"{len(reading.rows)} samples and {dropped} dropped rows are not {reading.total}")
    if written is not None and reading.total + sum(reading.left_out.values()) != written:
        raise Fault(f"{reading.total} of {written} rows were read")


def own_jsonl(rng: random.Random) -> None:
    from medvqa_rl.data.reading.folder import ImageFolder
    from medvqa_rl.data.sets.own import read_own

    write_pngs(Path("images"), ["a.png", "b.png", "c.png"])
    for split in ("val", "test"):
        Path(f"{split}.jsonl").write_bytes(json_lines(OWN_ROWS))
    rows = [{**rng.choice(OWN_ROWS), "id": number} for number in range(rng.randint(1, 10))]
    data, written = damage_rows(rng, rows)
    Path("train.jsonl").write_bytes(data)
    check_counts(read_own(Path("train.jsonl"), ImageFolder(Path("images")), split="train", needs_split=False), written)
    check_data(name="own")


def own_csv(rng: random.Random) -> None:
    write_pngs(Path("images"), ["a.png", "b.png", "c.png"])
    names = ["id", "image", "question", "answer", "options", "answer_type", "split", "patient"]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=rng.choice([",", ",", ";", "\t"]))
    writer.writerow(names)
    for number in range(rng.randint(3, 12)):
        row = OWN_ROWS[number % 2]
        cells = [
            number, row["image"], row["question"], row["answer"], "|".join(row.get("options", [])), "",
            ["train", "val", "test"][number % 3], f"p{number}",
        ]  # fmt: skip
        if rng.random() < 0.5:
            cells[rng.randrange(len(cells))] = rng.choice(PRINTABLE)
        writer.writerow(cells)
    data = out.getvalue().encode(rng.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "cp1252"]), "replace")
    Path("data.csv").write_bytes(mutate_bytes(rng, data, 3) if rng.random() < 0.3 else data)
    check_data(name="own")


def own_parquet(rng: random.Random) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_pngs(Path("images"), ["a.png"])
    for split in ("val", "test"):
        Path(f"{split}.jsonl").write_bytes(json_lines(OWN_ROWS[:1]))
    columns: dict[str, list[Any]] = {
        "id": list(range(8)),
        "image": ["a.png"] * 8,
        "question": [f"Is it {number}?" for number in range(8)],
        "answer": ["yes"] * 8,
    }
    if is_typed := rng.random() < 0.5:
        values = [1.5, b"x", ["a", "b"], {"a": 1}, None, True, 10**15]
        columns[rng.choice(sorted(columns))] = [rng.choice(values)] * 8
    pq.write_table(pa.table(columns), "train.parquet")
    if not is_typed:
        Path("train.parquet").write_bytes(mutate_bytes(rng, Path("train.parquet").read_bytes()))
    check_data(name="own")


def init(rng: random.Random) -> None:
    write_pngs(Path("scans"), ["a.png", "b.png", "c.png"])
    rows = [{**OWN_ROWS[number % 2], "question": f"Is it {number}?", "patient": f"p{number}"} for number in range(30)]
    if rng.random() < 0.5:  # too little to be refused, perhaps
        at = rng.randrange(len(rows))
        data = json_lines([*rows[:at], mutate_json(rng, rows[at]), *rows[at + 1 :]])
    else:
        data, _ = damage_rows(rng, rows)
    Path("table.jsonl").write_bytes(data)
    invoke(["init", "project", "--data", "table.jsonl", "--images", "scans"])


def pmc_vqa(rng: random.Random) -> None:
    from medvqa_rl.data.reading.folder import ImageFolder
    from medvqa_rl.data.sets.pmc_vqa import read_pmc_vqa

    names = [f"{number}.png" for number in range(40)]
    write_pngs(Path("images"), names)
    rows = [{**PMC_ROW, "Figure_path": name, "Question": f"Which is in {name}?"} for name in names]
    for row in rows:
        if rng.random() < 0.2:
            row[rng.choice(sorted(row))] = rng.choice(PRINTABLE)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(PMC_ROW))
    writer.writeheader()
    writer.writerows(rows)
    data, written = out.getvalue().encode(), len(rows)
    is_damaged = rng.random() < 0.5
    for file in ("train.csv", "test.csv"):
        Path(file).write_bytes(mutate_bytes(rng, data) if is_damaged else data)
    if not is_damaged:
        check_counts(read_pmc_vqa(Path("train.csv"), ImageFolder(Path("images"))), written)
    check_data(name="pmc_vqa", split=rng.choice(["official", "image"]))


def vqa_rad(rng: random.Random) -> None:
    write_pngs(Path("images"), [f"{number}.png" for number in range(40)])
    Path("VQA_RAD Dataset Public.json").write_bytes(damage_json(rng, RAD_ROWS))
    check_data(name="vqa_rad", split=rng.choice(["official", "image"]), seed=rng.randrange(9))


def slake(rng: random.Random) -> None:
    write_pngs(Path("imgs"), [f"xmlab{number}/source.png" for number in range(3)])
    for file in ("train.json", "validate.json", "test.json"):
        rows = [{**row, "qid": f"{file} {row['qid']}"} for row in SLAKE_ROWS]
        Path(file).write_bytes(damage_json(rng, rows) if rng.random() < 0.7 else json.dumps(rows).encode())
    check_data(name=rng.choice(["slake_en", "slake_zh"]))


def omnimed(rng: random.Random) -> None:
    write_pngs(Path("Images"), [f"{number}.png" for number in range(3)])
    folder = Path("QA_information/Open-access")
    folder.mkdir(parents=True)
    (folder / "Chest.json").write_bytes(damage_json(rng, OMNIMED_ROWS))
    check_data(name="omnimed")


def image(rng: random.Random) -> None:
    """Decode an image as ``data check``, training and the report do."""
    from medvqa_rl.data.images.files import FileImage, shrink
    from medvqa_rl.data.images.fingerprints import measure

    name = rng.choice(sorted(images()))
    data = images()[name]
    if "bomb" not in name and rng.random() < 0.9:
        data = mutate_bytes(rng, data, 4)
    if rng.random() < 0.1:
        name = Path(name).stem + rng.choice([".png", ".dcm", ".nii", ".nii.gz", ".jpeg"])
    Path(name).write_bytes(data)
    fragments = [
        "",
        "",
        "#frame=0",
        "#window=40,400",
        "#slice=3",
        "#axis=1&slice=2",
        "#window=0,0",
        "#frame=9999999999",
        "#x",
    ]
    found = FileImage(name + (rng.choice(fragments) if name.endswith((".dcm", ".nii", ".gz")) else ""), Path("."))
    list(measure([found], workers=1))
    found.check()
    picture = found.load()
    if picture.mode != "RGB" or picture.width * picture.height > 80_000_000:
        raise Fault(f"an image of {picture.mode}, {picture.size}")
    shrink(picture, 28 * 28)


def _as_table(rows: list[dict[str, Any]], suffix: str) -> bytes:
    """Rows as a file of a format; cells that are lists become text where the format has no lists."""
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet as pq

    flat = [{name: str(value) for name, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    match suffix:
        case ".jsonl":
            return json_lines(rows)
        case ".json":
            return json.dumps(rows).encode()
        case ".xlsx":
            return spreadsheet([columns, *([row.get(name, "") for name in columns] for row in flat)])
        case ".parquet" | ".arrow" | ".feather":
            out = io.BytesIO()
            table = pa.Table.from_pylist(flat)
            if suffix == ".parquet":
                pq.write_table(table, out)
            else:
                pyarrow.feather.write_feather(table, out, compression="uncompressed")
            return out.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter="\t" if suffix == ".tsv" else ",", restval="")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().encode()


def table(rng: random.Random) -> None:
    """A table of one's own in any format, whole or damaged, sometimes under the suffix of another."""
    write_pngs(Path("images"), ["a.png", "b.png", "c.png"])
    rows = [
        {"id": n, "image": f"{'abc'[n % 3]}.png", "question": f"Is it {n}?", "answer": "yes", "patient": f"p{n}"}
        for n in range(12)
    ]
    suffixes = [".csv", ".tsv", ".xlsx", ".parquet", ".jsonl", ".json", ".arrow", ".feather", ".txt"]
    suffix = rng.choice(suffixes)
    data = _as_table(rows, suffix)
    if rng.random() < 0.6:
        data = mutate_bytes(rng, data, 4)
    name = rng.choice([*suffixes, ".CSV", ".xls", "", ".parquet.gz"]) if rng.random() < 0.2 else suffix
    Path(f"data{name}").write_bytes(data)
    match rng.randrange(3):
        case 0:
            invoke(["init", "project", "--data", f"data{name}", "--images", "images"])
        case 1:
            invoke(["data", "split", f"data{name}", "--output", rng.choice(["new.jsonl", "new.csv", "new.parquet"])])
        case _:
            check_data(name="own", split=rng.choice(["official", "image"]))


def vqa_med(rng: random.Random) -> None:
    from medvqa_rl.data.sets.vqa_med import FILES, IMAGE_FOLDERS

    for split, file in FILES.items():
        write_pngs(Path(IMAGE_FOLDERS[split]), [f"synpic{n}.jpg" for n in range(3)])
        middle = "modality|" if split == "test" else ""
        lines = [f"synpic{n % 3}|{middle}is this a {n} study?|{rng.choice(PRINTABLE)[:500]}" for n in range(6)]
        data = "\n".join(lines).encode()
        Path(file).write_bytes(mutate_bytes(rng, data) if rng.random() < 0.6 else data)
    check_data(name="vqa_med", split=rng.choice(["official", "image"]))


def path_vqa(rng: random.Random) -> None:
    """Parquet with embedded images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "validation", "test"):
        rows = [
            {"image": {"bytes": png(random.Random(n)), "path": None}, "question": f"is it {n}?", "answer": "no"}
            for n in range(5)
        ]
        for row in rows:
            match rng.randrange(8):
                case 0:
                    row["image"]["bytes"] = mutate_bytes(rng, row["image"]["bytes"])  # type: ignore[index]
                case 1:
                    row[rng.choice(["question", "answer"])] = rng.choice(PRINTABLE)
                case 2:
                    row[rng.choice(sorted(row))] = None  # type: ignore[assignment]
        pq.write_table(pa.Table.from_pylist(rows), f"{split}-00000-of-00001.parquet")
        if rng.random() < 0.2:
            path = Path(f"{split}-00000-of-00001.parquet")
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    check_data(name=rng.choice(["path_vqa", "vqa_rad_hub"]), cache_dir="cache")


def archive(rng: random.Random) -> None:
    """A zip with damaged bytes or odd names; nothing may be written elsewhere, and nothing is left half-unpacked."""
    from medvqa_rl.data.reading.unpack import unpack_zips

    names = ["imgs/a.png", "imgs/b/c.png", "d.json"]
    if rng.random() < 0.4:
        names[rng.randrange(3)] = rng.choice(["", "imgs/", "../"]) + rng.choice(PRINTABLE)[:60_000]
    with zipfile.ZipFile("a.zip", "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        for name in names:
            file.writestr(name.replace("\0", "") or "x", png(rng))
    if rng.random() < 0.8:
        Path("a.zip").write_bytes(mutate_bytes(rng, Path("a.zip").read_bytes(), 4))
    try:
        unpack_zips([Path("a.zip")], Path("cache"))
    finally:
        if odd := [path for path in Path(".").iterdir() if path.name not in ("a.zip", "cache")]:
            raise Fault(f"wrote {odd[0].name!r}")
        if left := [path for path in Path("cache").rglob("*") if path.name.startswith("tmp")]:
            raise Fault(f"left {left[0].name}")


def data_export(rng: random.Random) -> None:
    """Export own data whose images and texts are damaged, and read the export again."""
    names = sorted(name for name in images() if "bomb" not in name)
    rows = []
    for number in range(4):
        name = rng.choice(names)
        data = images()[name]
        Path("images").mkdir(exist_ok=True)
        Path(f"images/{number}{name}").write_bytes(mutate_bytes(rng, data, 2) if rng.random() < 0.3 else data)
        rows.append(
            {"image": f"{number}{name}", "question": f"{number} {rng.choice(PRINTABLE)[:300]}", "answer": "no"}
        )
    for split in ("train", "val", "test"):
        Path(f"{split}.jsonl").write_bytes(json_lines(rows))
    Path("config.yaml").write_text(
        json.dumps({"data": {"name": "own", "path": ".", "max_dropped": 1.0, "hide_names": rng.random() < 0.5}})
    )
    form = rng.choice(["jsonl", "parquet", "csv"])
    more = ["--keep-metadata"] if rng.random() < 0.3 else []
    invoke(["data", "export", "config.yaml", "--format", form, "--output", "out", *more])
