"""Render phantom scenes as 112 x 112 RGB images, identical on every platform.

Uses only operations that IEEE 754 defines exactly: addition, multiplication, division, square root, comparison and
integer arithmetic. exp, sin and array sums are avoided because their results differ between libraries. Values are
float32 in [0, 1] until the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medvqa_rl.core.randomness import Draws, address, integers
from medvqa_rl.data.phantom.world import VERSION, Finding, Scene

SIZE = 112
Plane = NDArray[Any]
"""(112, 112) float32; loosely typed because NumPy's stubs promote float32 with a Python float to float64."""

_AXIS = ((np.arange(SIZE, dtype=np.float32) * 2 + (1 - SIZE)) / SIZE).astype(np.float32)
X, Y = np.meshgrid(_AXIS, _AXIS)  # (112, 112) in (-1, 1); x to the right, y downwards


class Scanner(NamedTuple):
    """Imaging properties of a device; values are drawn from these ranges for every image."""

    contrast: tuple[float, float]
    offset: tuple[float, float]
    """Added after contrast, in grey levels of 255."""
    square: tuple[float, float]
    """Weight of the squared image; 1 is a gamma of 2."""
    bias: tuple[float, float]
    """Loss of signal from one lateral edge to the other, as a share."""
    noise: tuple[float, float]
    """Standard deviation of the noise in grey levels."""
    is_coarse: bool
    """Whether images have half the resolution."""


SCANNERS = {
    "home": Scanner((0.9, 1.1), (-8, 8), (0.0, 0.15), (0.0, 0.08), (2, 6), False),
    "unseen": Scanner((0.35, 0.45), (30, 50), (1.0, 1.0), (0.5, 0.6), (3, 6), False),
    "worn": Scanner((0.3, 0.4), (110, 130), (0.0, 0.3), (0.1, 0.25), (10, 16), True),
}
"""The checkpoints are trained on home. Unseen is bright and low in contrast and fades to one side; worn is hazy and
has low resolution."""


def _clip(plane: Plane) -> Plane:
    clipped: Plane = np.minimum(np.maximum(plane, np.float32(0)), np.float32(1))
    return clipped


def _ellipse(x: float, y: float, rx: float, ry: float, edge: float = 0.06) -> Plane:
    """Mask of an ellipse: 1 inside, 0 outside, with a linear edge whose width is given in units of the radius."""
    distance = np.sqrt(((X - x) / rx) ** 2 + ((Y - y) / ry) ** 2)
    return _clip((1 - distance) / edge + 0.5)


def _wave(phase: Plane) -> Plane:
    """A triangle wave in [0, 1] with period 1."""
    return np.abs(phase - np.floor(phase) - np.float32(0.5)) * 2


def _mix(base: Plane, value: Plane | float, alpha: Plane) -> Plane:
    return base + (value - base) * alpha


def _chest(jitter: Draws) -> Plane:
    tilt = jitter.uniform(-0.06, 0.06)
    image = _mix(np.zeros_like(X), 0.6, _ellipse(0, 0.15, 0.95, 1.15, 0.12))
    for side in (-1, 1):
        image = _mix(image, 0.2, _ellipse(0.43 * side + tilt, 0.0, 0.36, 0.74, 0.15))
    ribs = _wave((Y + X * X * 0.35) * 3.2 + jitter.uniform())
    image = image + (ribs - 0.5) * 0.10 * _ellipse(0, 0, 0.85, 0.8, 0.2)
    image = _mix(image, 0.78, _ellipse(tilt, 0, 0.09, 1.1, 0.5))
    return _mix(image, 0.66, _ellipse(0.16 + tilt, 0.42, 0.24, 0.3, 0.3))


def _knee(jitter: Draws) -> Plane:
    shift = jitter.uniform(-0.06, 0.06)
    image = _mix(np.zeros_like(X), 0.3, _clip((0.78 - np.abs(X - shift)) * 6))
    bone = _clip((0.42 + Y * Y * Y * Y * 0.08 - np.abs(X - shift)) * 14)
    gap = _clip((np.abs(Y - 0.05 - X * X * 0.2) - 0.035) * 25)
    image = _mix(image, 0.62, bone * gap)
    trabeculae = _wave(X * 9 + Y * 2 + jitter.uniform())
    image = image + (trabeculae - 0.5) * 0.06 * bone
    return _mix(image, 0.72, _ellipse(shift, -0.22, 0.17, 0.16, 0.3) * 0.6)


def _brain(jitter: Draws) -> Plane:
    shift = jitter.uniform(-0.04, 0.04)
    image = _mix(np.zeros_like(X), 0.8, _ellipse(shift, 0, 0.86, 0.97, 0.04))
    image = _mix(image, 0.08, _ellipse(shift, 0, 0.80, 0.91, 0.05))
    image = _mix(image, 0.45, _ellipse(shift, 0, 0.75, 0.86, 0.06))
    radius = (X - shift) * (X - shift) * 1.3 + Y * Y
    folds = _wave(radius * 4.5 + _wave(X * 2.5 + Y * 2 + jitter.uniform()) * 0.5)
    image = image + (folds - 0.5) * 0.12 * _ellipse(shift, 0, 0.74, 0.85, 0.06)
    for side in (-1, 1):
        image = _mix(image, 0.12, _ellipse(shift + side * 0.11, -0.02, 0.07, 0.26, 0.3))
    return _mix(image, 0.15, _clip((0.012 - np.abs(X - shift)) * 60) * _ellipse(0, 0, 0.7, 0.8) * 0.7)


def _spine(jitter: Draws) -> Plane:
    bend = X - (Y * Y - 0.3) * jitter.uniform(-0.12, 0.12)
    image = np.full_like(X, np.float32(0.22)) + _wave(bend * 2.0) * np.float32(0.08)
    column = _clip((0.17 - np.abs(bend)) * 20)
    blocks = _clip((_wave(Y * 2.6 + jitter.uniform()) - 0.22) * 9)
    image = _mix(image, 0.6, column * blocks)
    image = _mix(image, 0.12, column * (1 - blocks))
    canal = _clip((0.05 - np.abs(bend - 0.26)) * 40)
    return _mix(image, 0.75, canal)


def _abdomen(jitter: Draws) -> Plane:
    shift = jitter.uniform(-0.04, 0.04)
    image = _mix(np.zeros_like(X), 0.3, _ellipse(shift, 0, 0.97, 0.82, 0.04))
    image = _mix(image, 0.42, _ellipse(shift, 0, 0.86, 0.72, 0.05))
    image = _mix(image, 0.55, _ellipse(shift - 0.42, -0.12, 0.4, 0.5, 0.1))
    image = _mix(image, 0.58, _ellipse(shift + 0.55, -0.05, 0.2, 0.34, 0.15))
    for side in (-1, 1):
        image = _mix(image, 0.64, _ellipse(shift + side * 0.4, 0.36, 0.13, 0.17, 0.2))
    image = _mix(image, 0.92, _ellipse(shift, 0.48, 0.14, 0.14, 0.15))
    image = _mix(image, 0.62, _ellipse(shift + 0.02, 0.26, 0.075, 0.075, 0.2))
    return _mix(image, 0.1, _ellipse(shift + 0.12, -0.42, 0.15, 0.09, 0.3))


def _lungs(jitter: Draws) -> Plane:
    shift = jitter.uniform(-0.04, 0.04)
    image = _mix(np.zeros_like(X), 0.5, _ellipse(shift, 0, 0.97, 0.82, 0.04))
    for side in (-1, 1):
        lung = _ellipse(shift + side * 0.47, -0.02, 0.36, 0.62, 0.06)
        vessels = _wave(X * 6 + Y * side * 4 + jitter.uniform()) * _wave(Y * 7 - X * 3)
        image = _mix(image, 0.10 + vessels * 0.13, lung)
    image = _mix(image, 0.6, _ellipse(shift + 0.06, -0.1, 0.2, 0.32, 0.2))
    return _mix(image, 0.93, _ellipse(shift, 0.56, 0.13, 0.13, 0.15))


def _retina(jitter: Draws) -> Plane:
    disc_side = 1.0 if jitter.chance(0.5) else -1.0
    image = _ellipse(0, 0, 0.97, 0.97, 0.05) * (0.62 - (X * X + Y * Y) * 0.16)
    for k in (-1.0, 1.0):
        for bend in (0.5, 1.1):
            away = (X - 0.72 * disc_side) * -disc_side
            path = k * bend * np.sqrt(np.maximum(away, np.float32(0))) * 0.55
            vessel = _clip((0.022 - np.abs(Y - path)) * 45) * _clip(away * 8)
            image = _mix(image, image * 0.55, vessel * _ellipse(0, 0, 0.95, 0.95))
    image = _mix(image, 0.42, _ellipse(-0.12 * disc_side, 0.02, 0.12, 0.12, 0.9))
    return _mix(image, 0.97, _ellipse(0.74 * disc_side, 0, 0.13, 0.15, 0.25))


def _sector(jitter: Draws) -> Plane:
    """The fan of an ultrasound probe at the top edge."""
    depth = np.sqrt(X * X + (Y + 1.7) * (Y + 1.7))
    inside = _clip((2.68 - depth) * 18) * _clip((depth - 0.62) * 18)
    return inside * _clip(((Y + 1.7) * 0.62 - np.abs(X)) * 14)


def _kidney(jitter: Draws) -> Plane:
    image = np.full_like(X, np.float32(0.4)) + _wave(Y * 3 + X * 0.6 + jitter.uniform()) * np.float32(0.08)
    image = _mix(image, 0.25, _ellipse(0.02, 0.05, 0.66, 0.6, 0.12))
    image = _mix(image, 0.62, _ellipse(0.02, 0.05, 0.26, 0.2, 0.5))
    return image * _sector(jitter)


def _thyroid(jitter: Draws) -> Plane:
    image = np.full_like(X, np.float32(0.28)) + _wave(Y * 5 + jitter.uniform()) * np.float32(0.1)
    for side in (-1, 1):
        image = _mix(image, 0.5, _ellipse(side * 0.4, -0.02, 0.3, 0.62, 0.12))
    image = _mix(image, 0.85, _ellipse(0, 0.02, 0.13, 0.17, 0.2))
    return _mix(image, 0.05, _ellipse(0, 0.08, 0.12, 0.17, 0.2)) * _sector(jitter)


def _colon(jitter: Draws) -> Plane:
    u = X * 2.6 + jitter.uniform()
    v = Y * 2.6 + np.floor(u) * 0.5 + jitter.uniform()
    du, dv = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    radius = np.sqrt(du * du + dv * dv)
    image = np.full_like(X, np.float32(0.62)) + _wave(X * 7 + Y * 5) * np.float32(0.06)
    image = _mix(image, 0.35, _clip((0.36 - radius) * 14))
    return _mix(image, 0.85, _clip((0.2 - radius) * 14))


def _skin(jitter: Draws) -> Plane:
    border = -0.62 + _wave(X * 1.6 + jitter.uniform()) * 0.16
    image = np.full_like(X, np.float32(0.66)) + (_wave(Y * 5 + X * 1.5 + _wave(X * 1.7) * 0.8) - 0.5) * np.float32(
        0.12
    )
    image = _mix(image, 0.36, _clip((border - Y) * 12))
    return _mix(image, 0.93, _clip((-0.88 - Y) * 25))


_BACKGROUNDS: dict[str, Callable[[Draws], Plane]] = {
    "chest": _chest,
    "knee": _knee,
    "brain": _brain,
    "spine": _spine,
    "abdomen": _abdomen,
    "lungs": _lungs,
    "retina": _retina,
    "kidney": _kidney,
    "thyroid": _thyroid,
    "colon": _colon,
    "skin": _skin,
}

_RADIUS = {"small": 0.075, "medium": 0.125, "large": 0.2}
_CENTRE_X = {"left": -0.45, "right": 0.45}
_CENTRE_Y = {"upper": -0.46, "middle": 0.02, "lower": 0.5}


def _specks(x: float, y: float, r: float, jitter: Draws) -> Plane:
    plane = np.zeros_like(X)
    for dx, dy in ((0, 0), (0.8, 0.3), (-0.7, 0.5), (0.2, -0.85), (-0.5, -0.5), (0.5, 0.9)):
        speck = _ellipse(x + dx * r, y + dy * r, 0.028, 0.028, 0.9)
        plane = np.maximum(plane, speck)
    return plane


def _paint(image: Plane, kind: str, x: float, y: float, r: float, jitter: Draws) -> Plane:
    """One lesion. Bright ones get a dark rim and dark ones a bright rim, so that they show on any background."""
    if kind in ("nodule", "exudate"):  # solid, sharp, bright
        image = _mix(image, image * 0.5, _ellipse(x, y, r * 1.3, r * 1.3, 0.2))
        return _mix(image, 0.95, _ellipse(x, y, r, r, 0.15))
    if kind == "tumor":  # solid, bright, lobed
        turn = jitter.uniform(-0.3, 0.3)
        for dx, dy in ((0.5, turn), (-0.5, -turn), (turn, 0.5)):
            image = _mix(image, 0.84, _ellipse(x + dx * r, y + dy * r, r * 0.75, r * 0.75, 0.3))
        return _mix(image, 0.6, _ellipse(x, y, r * 0.35, r * 0.35, 0.5))
    if kind == "opacity":  # soft, bright
        return _mix(image, 0.9, _ellipse(x, y, r * 1.45, r * 1.2, 1.3) * 0.9)
    if kind in ("infarct", "necrosis"):  # soft, dark (pale where the stain is inverted)
        return _mix(image, 0.02, _ellipse(x, y, r * 1.45, r * 1.2, 1.1) * 0.95)
    if kind == "cyst":  # dark with a thin bright rim
        image = _mix(image, 0.9, _ellipse(x, y, r * 1.15, r * 1.15, 0.15))
        return _mix(image, 0.03, _ellipse(x, y, r * 0.88, r * 0.88, 0.15))
    if kind in ("abscess", "granuloma"):  # a thick bright ring around a grey core
        image = _mix(image, 0.97, _ellipse(x, y, r * 1.25, r * 1.25, 0.2))
        return _mix(image, 0.32, _ellipse(x, y, r * 0.6, r * 0.6, 0.25))
    if kind in ("calcification", "plaque", "drusen"):  # a cluster of bright specks
        return _mix(image, 1.0, _specks(x, y, r * 1.1, jitter))
    if kind == "stone":  # a bright cap with a black shadow below
        shadow = _clip((r * 0.8 - np.abs(X - x)) * 25) * _clip((Y - y) * 20) * _clip((y + r * 2.6 - Y) * 20)
        return _mix(_mix(image, 0.02, shadow), 1.0, _ellipse(x, y, r * 1.05, r * 0.5, 0.25))
    if kind in ("fracture", "scar"):  # a slanted bright streak between dark borders
        slope = jitter.pick((-0.6, 0.6))
        along = _clip((r * 1.5 - np.abs(X - x)) * 20)
        off = np.abs(Y - y - (X - x) * slope)
        image = _mix(image, 0.03, along * _clip((0.075 - off) * 30))
        return _mix(image, 1.0, along * _clip((0.035 - off) * 40))
    assert kind == "hemorrhage", kind  # dark, flame-shaped
    for dx, dy in ((0.0, 0.0), (0.7, 0.35), (-0.7, -0.35)):
        image = _mix(image, 0.04, _ellipse(x + dx * r, y + dy * r, r * 0.85, r * 0.6, 0.3))
    return image


def _paint_finding(image: Plane, finding: Finding, jitter: Draws) -> Plane:
    r = _RADIUS[finding.size] * jitter.uniform(0.93, 1.07)
    step = max(2.5 * r, 0.2)
    x0 = _CENTRE_X[finding.side] + jitter.uniform(-0.06, 0.06)
    y0 = _CENTRE_Y[finding.level] + jitter.uniform(-0.06, 0.06)
    for i in range(finding.count):
        offset = (i - (finding.count - 1) / 2) * step
        image = _paint(image, finding.kind, x0 + offset, y0 + jitter.uniform(-0.03, 0.03), r, jitter)
    return image


_COLOURS: dict[str, tuple[tuple[float, float], ...]] = {
    # value at 0 and at 1 of the red, green and blue channel
    "fundus": ((0.0, 1.15), (-0.12, 0.82), (-0.1, 0.38)),
    "histology": ((0.36, 1.0), (0.08, 0.92), (0.48, 0.98)),
}


def _noise(key: int) -> Plane:
    """(112, 112) noise of mean 0 and standard deviation 1: the sum of the four bytes of a hash per pixel."""
    words = integers(key, SIZE * SIZE // 2)
    halves = words.view(np.uint32) if np.little_endian else words.byteswap().view(np.uint32)
    total = (halves & 255) + (halves >> 8 & 255) + (halves >> 16 & 255) + (halves >> 24)
    noise: Plane = (total.astype(np.float32) - np.float32(510)) / np.float32(147.80)
    return noise.reshape(SIZE, SIZE)


def render(scene: Scene, scanner: str = "home") -> NDArray[np.uint8]:
    """Render a scene as imaged by a scanner.

    Returns:
        (112, 112, 3) RGB.
    """
    device = SCANNERS[scanner]
    jitter = Draws("phantom image", VERSION, scene.key)
    image = _BACKGROUNDS[scene.organ](jitter)
    for finding in scene.findings:
        image = _paint_finding(image, finding, jitter)

    take = Draws("phantom scan", VERSION, scene.key, scanner)
    contrast, offset, square, bias, sigma = (take.uniform(*bounds) for bounds in device[:5])
    direction = take.pick((-1.0, 1.0))
    noise = _noise(address("phantom noise", VERSION, scene.key, scanner))
    image = _clip(image)
    if scene.modality == "ultrasound":
        image = image * (1 + noise * 0.16)  # speckle grows with the signal
    image = image + (image * image - image) * square
    image = image * (1 - (X * direction + 1) * (bias / 2))
    image = image * contrast + offset / 255
    image = image + noise * (sigma / 255)
    channels = [image * (high - low) + low for low, high in _COLOURS.get(scene.modality, ((0.0, 1.0),) * 3)]
    pixels = np.stack([_clip(channel) for channel in channels], axis=-1)
    if device.is_coarse:
        pixels = np.repeat(np.repeat(pixels[::2, ::2], 2, axis=0), 2, axis=1)
    levels: NDArray[np.uint8] = (pixels * 255 + np.float32(0.5)).astype(np.uint8)
    return levels


@dataclass(frozen=True)
class PhantomImage:
    """An image that is rendered when it is loaded."""

    scene: Scene
    scanner: str

    @property
    def key(self) -> str:
        return f"{self.scanner}:{self.scene.key}"

    def load(self) -> Image.Image:
        """Render the image. Never fails."""
        return Image.fromarray(render(self.scene, self.scanner), "RGB")

    def header_pixels(self) -> None:
        """None: there is no header."""
