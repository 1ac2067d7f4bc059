"""Small valid inputs of every kind that the command reads; the attacks damage them."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import zipfile
import zlib
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from .command import PATIENT, invoke

CONFIG = Path(__file__).parents[2] / "configs" / "phantom_cpu.yaml"
STUDY = Path(__file__).with_name("study.yaml")
SETTINGS = [
    "data.num_val=8", "data.num_test=8", "eval.bootstrap=20", "eval.batch_size=8", "optimizer.warmup_steps=1",
    "train.prompts_per_step=2", "train.prompts_per_micro_batch=2", "rollout.num_generations=4",
    "rollout.max_completion_length=32", "model.device=cpu",
]  # fmt: skip
"""Make training and evaluation of configs/phantom_cpu.yaml take seconds."""


def png(rng: random.Random, width: int = 12, height: int = 9) -> bytes:
    pixels = np.frombuffer(rng.randbytes(width * height * 3), np.uint8).reshape(height, width, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_pngs(folder: Path, names: list[str]) -> None:
    """Write a different small image under each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(random.Random(number)))


OWN_ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "Is there a mass?", "answer": "yes", "patient": "p1", "modality": "CT"},
    {"image": "b.png", "question": "Which organ?", "answer": "B", "options": ["lung", "liver", "kidney"]},
    {"images": ["a.png", "b.png"], "question": "What?", "answer": "cyst", "answer_type": "open", "reasoning": "So."},
    {"image": "b.png", "question": "Is it large?", "answer": "no", "answer_type": "closed", "description": "A scan."},
    {"image": "c.png", "question": "How many?", "answer": 3, "organ": "chest"},
]
"""Rows of data of one's own; the images are a.png, b.png and c.png."""
PMC_ROW = {
    "Figure_path": "0.png", "Question": "Which?", "Answer": "lung", "Choice A": "A: lung", "Choice B": "B: liver",
    "Choice C": "C: brain", "Choice D": "D: skin", "Answer_label": "A",
}  # fmt: skip
RAD_ROWS = [
    {
        "qid": number, "phrase_type": ["freeform", "para", "test_freeform", "test_para"][number % 4],
        "qid_linked_id": f"l{number}", "image_case_url": f"https://example.org/{number}",
        "image_name": f"{number}.png",
        "image_organ": "CHEST", "evaluation": "evaluated", "question": f"Is there a mass in {number}?",
        "question_type": "PRES, POS", "answer": ["yes", "no", 3, "left lung"][number % 4],
        "answer_type": "CLOSED" if number % 2 else "OPEN ",
    }
    for number in range(40)
]  # fmt: skip
SLAKE_ROWS = [
    {
        "img_id": number, "img_name": f"xmlab{number % 3}/source.png", "question": f"Which organ is {number}?",
        "answer": "Lung", "q_lang": "en" if number % 3 else "zh", "location": "Chest", "modality": "CT",
        "answer_type": "OPEN", "base_type": "vqa", "triple": ["vhead", "_", "_"], "qid": number,
        "content_type": "Organ",
    }
    for number in range(9)
]  # fmt: skip
OMNIMED_ROWS = [
    {
        "dataset": "Chest", "question_id": f"chest_{number}", "question_type": "Modality Recognition",
        "question": f"What kind of image is {number}?", "gt_answer": "MRI", "image_path": f"Images/{number % 3}.png",
        "modality_type": "MRI", "option_A": "CT", "option_B": "MRI", "option_C": "X-ray", "option_D": "OCT",
    }
    for number in range(12)
]  # fmt: skip


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_of(width: int, height: int, *chunks: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IEND", b"")


@cache
def images() -> dict[str, bytes]:
    """Image files by name: formats, modes, DICOM, NIfTI, and some that are bombs or no images."""
    rng = random.Random(0)
    pixels = np.frombuffer(rng.randbytes(40 * 30 * 3), np.uint8).reshape(30, 40, 3)
    picture = Image.fromarray(pixels)
    modes = {mode: picture.convert(mode) for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK")}
    modes["I16"] = Image.fromarray(pixels[..., 0].astype(np.uint16) * 17)
    modes["F"] = Image.fromarray(pixels[..., 0].astype(np.float32))
    found: dict[str, bytes] = {}
    for kind in ("png", "jpeg", "tiff", "webp", "gif", "bmp"):
        for mode, image in modes.items():
            out = io.BytesIO()
            try:
                image.save(out, kind)
            except (OSError, ValueError):
                continue  # the format has no such mode
            found[f"{mode}.{kind}"] = out.getvalue()
    out = io.BytesIO()
    picture.save(out, "gif", save_all=True, append_images=[picture.rotate(90)])
    found["animation.gif"] = out.getvalue()
    for number, syntax, kind in (
        (0, ExplicitVRLittleEndian, "MONOCHROME2"),
        (1, ImplicitVRLittleEndian, "MONOCHROME1"),
        (2, ExplicitVRLittleEndian, "RGB"),
    ):
        found[f"{number}.dcm"] = _dicom(pixels, syntax, kind)
    volume = nibabel.Nifti1Image(np.arange(960, dtype=np.int16).reshape(10, 12, 8), np.diag([1.0, 2.0, 3.0, 1.0]))
    found["volume.nii"] = volume.to_bytes()
    found["volume.nii.gz"] = gzip.compress(volume.to_bytes())
    found["svg.png"] = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    found["postscript.jpeg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(x) run\n"
    found["empty.png"] = b""
    found["huge_bomb.png"] = _png_of(60_000, 60_000, _chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
    found["bomb.png"] = _png_of(8_000, 9_000, _chunk(b"IDAT", zlib.compress(b"\0" * (9_000 * 24_001), 9)))
    text = b"k\0\0" + zlib.compress(b"a" * 80_000_000, 9)
    found["text_bomb.png"] = _png_of(
        4, 4, _chunk(b"zTXt", text), _chunk(b"iCCP", text), _chunk(b"IDAT", zlib.compress(b"\0" * 52))
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * 1_000_000)
    found["zip.png"] = out.getvalue()
    return found


def _dicom(pixels: np.ndarray[Any, Any], syntax: str, kind: str) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        syntax,
        CTImageStorage,
        "1.2.3",
    )
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientName, data.PatientID, data.Modality = PATIENT, PATIENT, "CT"
    data.Rows, data.Columns, data.PhotometricInterpretation = 30, 40, kind
    is_colour = kind == "RGB"
    data.SamplesPerPixel = 3 if is_colour else 1
    data.BitsAllocated = data.BitsStored = 8 if is_colour else 16
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    if is_colour:
        data.PlanarConfiguration = 0
        data.PixelData = pixels.tobytes()
    else:
        data.RescaleSlope, data.RescaleIntercept, data.WindowCenter, data.WindowWidth = 2, -100, 40, 400
        data.PixelData = pixels[..., 0].astype("<u2").tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    return out.getvalue()


def spreadsheet(rows: list[list[str]]) -> bytes:
    """An Excel workbook of one sheet."""
    names = "http://schemas.openxmlformats.org"
    lines = ("".join(f"<c t='inlineStr'><is><t>{escape(cell)}</t></is></c>" for cell in row) for row in rows)
    cells = "".join(f"<row>{line}</row>" for line in lines)
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{names}/package/2006/content-types"/>',
        "xl/workbook.xml": f'<workbook xmlns="{names}/spreadsheetml/2006/main"><sheets/></workbook>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{names}/spreadsheetml/2006/main">{cells}</worksheet>',
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return out.getvalue()


STEPS = [
    "train", str(CONFIG), *SETTINGS, "train.steps=4", "train.save_steps=2", "train.eval_steps=2",
    "train.log_completions_steps=2",
]  # fmt: skip
"""Command of the run that the attacks damage, but for its folder."""
EVALUATED = ["eval", str(CONFIG), *SETTINGS]


def make_run(folder: Path) -> None:
    """Make what the attacks damage: ``run``, evaluations ``a`` and ``b``, ``model``, ``adapter`` and ``study``."""
    from medvqa_rl.core.embedded import checkpoint_path
    from medvqa_rl.study.plan.recipe import read_recipe
    from medvqa_rl.study.running import commands

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    invoke([*STEPS, f"output_dir={folder / 'run'}"])
    invoke([*EVALUATED, "--output", str(folder / "a")])
    invoke(["eval", str(folder / "run"), *SETTINGS, "--output", str(folder / "b")])
    shutil.copytree(checkpoint_path("instruct"), folder / "model")
    lora = ["model.lora.rank=2", "model.train_vision=false"]
    invoke([*STEPS, *lora, f"output_dir={folder / 'with_adapter'}"])
    shutil.copytree(folder / "with_adapter" / "checkpoints" / "step_000004", folder / "adapter")
    for cell in read_recipe(STUDY, folder / "study").cells:
        for words in commands(cell, folder / "study" / "configs"):
            invoke(words)


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
