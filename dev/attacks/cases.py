"""The kinds of input: each makes a valid one in the current folder, damages it and gives it to the command."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .command import Fault, invoke
from .mutations import TEXTS, VALUES, json_lines, mutate_bytes, mutate_json
from .seeds import OMNIMED_ROWS, OWN_ROWS, PMC_ROW, RAD_ROWS, SLAKE_ROWS, images, read_lines, write_pngs

ROOT = Path(__file__).parents[2]
PRINTABLE = [text for text in TEXTS if "\ud800" not in text]
Case = Callable[[random.Random], None]


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


def damage_rows(rng: random.Random, rows: list[Any]) -> tuple[bytes, int | None]:
    """JSON Lines with damaged rows, and their number; None if bytes were damaged."""
    if rng.random() < 0.7:
        return json_lines([mutate_json(rng, row) if rng.random() < 0.5 else row for row in rows]), len(rows)
    return mutate_bytes(rng, json_lines(rows)), None


def damage_json(rng: random.Random, value: Any) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(rng, json.dumps(value).encode())
    for _ in range(rng.randint(1, 4)):
        value = mutate_json(rng, value)
    return json.dumps(value).encode()


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


def settings(rng: random.Random) -> None:
    from medvqa_rl.config import Config, leaves

    text = rng.choice(sorted((ROOT / "configs").glob("*.yaml"))).read_bytes()
    kind = rng.random()
    if kind < 0.5:
        text = mutate_bytes(rng, text)
    elif kind < 0.7:
        text = rng.choice(
            [
                b"a: " + b"[" * 20_000, b"{" * 5_000, b"a: &x [1]\nb: *x\n", b"!!python/object/apply:os.system [id]",
                b"? [a]\n: b\n", b"- " * 2_000, b"train: {steps: 0x10}", b"train: {steps: .inf}", b"x" * 200_000,
                b"---\n---\n", b"%YAML 9.9\n---\na: b", b"train: {steps: " + b"9" * 6_000 + b"}", b"\t\ta: b",
                b"a: !<x> b",
                b"train: {steps: 1" + b"0" * 400 + b".0}", b'data: {path: "\\0"}', b'data: {path: "\\ud800"}',
                b"a: \xed\xa0\x80",
            ]
        )  # fmt: skip
    Path("config.yaml").write_bytes(text)
    names = sorted(leaves(Config().model_dump(mode="json")))
    overrides = []
    for _ in range(rng.randint(0, 3)):
        key = rng.choice(names) if rng.random() < 0.85 else rng.choice(TEXTS) + rng.choice(names)
        overrides.append(f"{key}={rng.choice([*map(str, VALUES), '0', '1e-3', '[1, 2]', '{a: b}', 'phantom:base'])}")
    verb = rng.choice([["show"], *(["check", "--for", verb] for verb in ("train", "sft", "eval"))])
    invoke(["config", *verb, "config.yaml", "--", *overrides])


def recipe(rng: random.Random) -> None:
    from medvqa_rl.config.yaml import read_yaml, write_yaml

    folder = ROOT / "src" / "medvqa_rl" / "study" / "recipes"
    text = rng.choice(sorted(folder.glob("*phantom*.yaml"))).read_bytes()
    if rng.random() < 0.85:
        value = read_yaml(text.decode())
        for _ in range(rng.randint(1, 3)):
            value = mutate_json(rng, value)
        text = write_yaml(value).encode("utf-8", "surrogatepass")
    else:
        text = mutate_bytes(rng, text, 3)
    Path("recipe.yaml").write_bytes(text)
    invoke(["study", "plan", "recipe.yaml", "--output", "out", *(["--quick"] if rng.random() < 0.5 else [])])
    if list(Path("..").glob("*/passwd*")):
        raise Fault("a file outside the folder")


def records(rng: random.Random) -> None:
    """Damage one evaluation and compare it, judge it and make a rating sheet."""
    for name in "ab":
        shutil.copytree(Path("../seed") / name, name)
    file = Path("b") / rng.choice(["samples.jsonl", "samples.jsonl", "results.json"])
    if file.suffix == ".jsonl":
        data, _ = damage_rows(rng, read_lines(file))
    else:
        data = damage_json(rng, json.loads(file.read_bytes()))
    file.write_bytes(data)
    match rng.randrange(3):
        case 0:
            invoke(["compare", "a", "b", "--output", "comparison.json"])
        case 1:
            invoke(["judge", "sheet", "a", "b", "--output", "sheet.html", "--samples", "5", "--no-images"])
        case _:
            invoke(["compare", "b", "a"])


def ratings(rng: random.Random) -> None:
    for name in "ab":
        shutil.copytree(Path("../seed") / name, name)
    invoke(["judge", "sheet", "a", "b", "--output", "sheet.html", "--samples", "6", "--no-images"])
    key_file = next(Path(".").glob("*.key.json"))
    key = json.loads(key_file.read_bytes())
    files = []
    for rater in ("one", "two"):
        given = [
            {
                "item": item["item"],
                "correct": rng.choice([True, False, None]),
                "reasoning": rng.choice([0, 3, None]),
                "comment": "",
            }
            for item in key["items"]
        ]
        value = {"format": "medvqa-rl ratings 1", "sheet": key["sheet"], "rater": rater, "ratings": given}
        Path(f"{rater}.json").write_bytes(
            damage_json(rng, value) if rng.random() < 0.7 else json.dumps(value).encode()
        )
        files.append(f"{rater}.json")
    if rng.random() < 0.3:
        key_file.write_bytes(damage_json(rng, key))
    invoke(["judge", "ratings", str(key_file), *files, "--output", "out.json"])


def run_folder(rng: random.Random) -> None:
    """Damage one to three files of a finished run and make its pages."""
    shutil.copytree("../seed/run", "run")
    found = sorted(
        path for path in Path("run").rglob("*") if path.suffix in (".json", ".jsonl", ".yaml") and path.is_file()
    )
    for path in rng.sample(found, rng.randint(1, 3)):
        if path.suffix == ".jsonl":
            data, _ = damage_rows(rng, read_lines(path))
        elif path.suffix == ".json" and rng.random() < 0.8:
            data = damage_json(rng, json.loads(path.read_bytes()))
        else:
            data = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
    if rng.random() < 0.1:
        path.unlink()
    invoke(
        rng.choice(
            [
                ["report", "run", "--output", "report.html"],
                ["report", "run", "--card"],
                ["watch", "run", "--once"],
                ["report", "run", "--figures", "figures"],
            ]
        )
    )


WORDS = [
    "yes", "no", "A", "b.", "(C)", "lung", "left", "not", "no evidence of", "mass", "<think>", "</think>", "<answer>",
    "</answer>", "<describe>", "...", "\n", "\u2028", "\0", "\uff21", "\u00b2", "10", "\ud800", "<|im_end|>", "{", '"',
    "score", "`",
]  # fmt: skip


def completions(rng: random.Random) -> None:
    """Parse and score completions, those that are long, nested and repetitive included."""
    from medvqa_rl.core.answers import is_correct, parse_completion, read_choice, token_f1
    from medvqa_rl.core.prompts import INSTRUCTIONS, render_prompt
    from medvqa_rl.core.text import normalise
    from medvqa_rl.core.types import Sample
    from medvqa_rl.rewards.guards import conflict

    def text() -> str:
        kind = rng.random()
        if kind < 0.05:
            return rng.choice(WORDS) * rng.choice([1_000, 20_000])
        if kind < 0.1:
            return "a" + rng.choice([".", "(", "'", " ", "-", "no ", "*", "\\boxed{", "$"]) * 20_000 + "a"
        if kind < 0.5:
            think, answer = (" ".join(rng.choices(WORDS, k=count)) for count in (5, 2))
            return f"<think>{think}</think><answer>{answer}</answer>"
        return "".join(rng.choice([" ", ""]) + rng.choice(WORDS + TEXTS[:12]) for _ in range(rng.randint(0, 30)))

    kind = rng.choice(["choice", "closed", "open"])
    options = tuple(f"{rng.choice(WORDS)} {number}" for number in range(rng.randint(2, 6))) if kind == "choice" else ()
    gold = "A" if options else rng.choice(["yes", text()[:200] or "x"])
    sample = Sample(id="s", question=text()[:2000], answer=gold, answer_type=kind, images=(), options=options)  # type: ignore[arg-type]
    completion = text()
    for template in INSTRUCTIONS:
        is_correct(sample, parse_completion(completion, template).answer)
        render_prompt(sample, template)
    answer = parse_completion(completion, "think_answer").answer or completion
    read_choice(answer, options)
    if normalise(normalise(answer)) != normalise(answer):
        raise Fault("normalising twice changes the text")
    if not 0 <= token_f1(answer, gold) <= 1:
        raise Fault("token F1 outside 0 to 1")
    conflict(answer, gold)


CASES: dict[Case, float] = {
    own_jsonl: 1.2, own_csv: 1.0, own_parquet: 0.6, init: 0.5, pmc_vqa: 0.8, vqa_rad: 0.8, slake: 0.8, omnimed: 0.5,
    image: 3.0, settings: 2.0, recipe: 1.0, records: 1.5, ratings: 0.8, run_folder: 1.5, completions: 2.0,
}  # fmt: skip
"""Each kind of input with its share of the inputs."""
