"""Mutations of bytes and of JSON values, by a seeded random generator."""

from __future__ import annotations

import json
import random
from typing import Any

TEXTS = [
    "", " ", "\0", "\x1b[2J", "\u2028", "\ufeff", "\ud800", "\U0001f600", "x" * 30_000, "<script>", "<|image_pad|>",
    "</think>", "NaN", "Infinity", "-1", "1e999", "9" * 5000, "null", "true", "[]", "{}", "../../etc/passwd",
    "/etc/passwd",
    "C:\\scan.png", "a|b|c", "A: x", "(B)", '"', "'", "\\", "%s%n", "{{ 7 * 7 }}", "{question}", "\r\n", "\t", "=1+1",
    "\u0663", "\uff21", "\u0130", "\u00df", "[" * 3000, "scan.dcm#frame=-1", "scan.nii.gz#axis=9", "e\u0301", "\u202e",
]  # fmt: skip
PRINTABLE = [text for text in TEXTS if "\ud800" not in text]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 10**30, 1e308, float("nan"), float("inf"), [], {}, [None], [[]], {"a": 1}, ["a", 2],
    *TEXTS,
]  # fmt: skip
PIECES = [
    b"\n",
    b"\r",
    b'"',
    b",",
    b"{",
    b"}",
    b"[",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
]


def mutate_bytes(rng: random.Random, data: bytes, most: int = 6) -> bytes:
    """Flip, insert, overwrite, repeat, delete or cut off bytes in 1 to ``most`` places."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randint(0, len(out))
        match rng.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at:at] = rng.randbytes(rng.randint(1, 8))
            case 2:
                piece = rng.choice(PIECES)
                out[at : at + len(piece)] = piece
            case 3:
                out[at:at] = out[at : at + rng.randint(1, 64)]
            case 4:
                del out[at : at + rng.randint(1, max(1, len(out) // 8))]
            case 5 if rng.random() < 0.3:
                del out[at:]
            case _:
                out[at:at] = rng.choice(PIECES)
    return bytes(out)


def mutate_json(rng: random.Random, value: Any, *, depth: int = 0) -> Any:
    """Return the JSON value with one change somewhere: a key, an item, a type, a number or a text."""
    goes_deeper = depth < 6 and rng.random() < (0.98 if depth == 0 else 0.9)
    if isinstance(value, dict) and value and goes_deeper:
        changed = dict(value)
        key = rng.choice(sorted(changed, key=str))
        match rng.randrange(9):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(["x", "", f"{key} ", str(key).upper(), "__class__"])] = changed.pop(key)
            case 2:
                changed["unknown"] = rng.choice(VALUES)
            case _:
                changed[key] = mutate_json(rng, changed[key], depth=depth + 1)
        return changed
    if isinstance(value, list) and value and goes_deeper:
        items = list(value)
        at = rng.randrange(len(items))
        match rng.randrange(7):
            case 0:
                del items[at]
            case 1:
                items.insert(at, items[at])
            case 2:
                rng.shuffle(items)
            case _:
                items[at] = mutate_json(rng, items[at], depth=depth + 1)
        return items
    if isinstance(value, str) and value and rng.random() < 0.3:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(TEXTS) + value[at:]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice([-value, value * 1000, value + 0.5, 0, str(value), 10**40])
    return rng.choice(VALUES)


def json_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


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
