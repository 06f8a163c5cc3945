"""Backgrounds of the pocket world: calm bands of muted colour with a few things whose places depend on a seed."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from scripts.pocket.art import Color, Point, star

Random = np.random.Generator


class Brush:
    """Draws filled shapes in canvas fractions (0..1, y down)."""

    def __init__(self, size: int, ground: Color) -> None:
        self.image = Image.new("RGB", (size, size), ground)
        self._draw = ImageDraw.Draw(self.image)
        self._size = size

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        """Fill an axis-aligned box."""
        s = self._size
        self._draw.rectangle((x0 * s, y0 * s, x1 * s - 1, y1 * s - 1), fill=color)

    def disc(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        """Fill an ellipse."""
        s = self._size
        self._draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=color)

    def polygon(self, points: list[Point], color: Color) -> None:
        """Fill a polygon."""
        self._draw.polygon([(x * self._size, y * self._size) for x, y in points], fill=color)

    def hills(self, level: float, height: float, phase: float, waves: float, color: Color) -> None:
        """Fill everything below a wavy horizon."""
        xs = np.linspace(-0.02, 1.02, 48)
        ys = level - height * np.sin(2 * np.pi * (waves * xs + phase))
        self.polygon([(-0.02, 1.02), *zip(xs.tolist(), ys.tolist(), strict=True), (1.02, 1.02)], color)

    def cloud(self, x: float, y: float, size: float, color: Color) -> None:
        """Draw a flat-bottomed cloud."""
        for dx, dy, r in ((-0.9, 0.0, 0.6), (0.0, -0.25, 0.85), (0.9, 0.0, 0.6)):
            self.disc(x + dx * size, y + dy * size, r * size, r * size * 0.8, color)
        self.box(x - 0.9 * size, y, x + 0.9 * size, y + 0.48 * size, color)


def _meadow(brush: Brush, rng: Random) -> None:
    brush.box(0, 0, 1, 1, (206, 230, 240))
    for x in (rng.uniform(0.05, 0.4), rng.uniform(0.6, 0.95)):
        brush.cloud(x, rng.uniform(0.08, 0.26), rng.uniform(0.06, 0.09), (232, 242, 246))
    brush.hills(rng.uniform(0.46, 0.54), 0.05, rng.uniform(), 0.8, (182, 212, 170))
    brush.hills(rng.uniform(0.62, 0.68), 0.03, rng.uniform(), 1.1, (164, 202, 148))
    for _ in range(7):
        x, y = rng.uniform(0, 1), rng.uniform(0.74, 0.98)
        brush.disc(x, y, 0.018, 0.018, (240, 240, 214))
        brush.disc(x, y, 0.008, 0.008, (236, 206, 120))


def _beach(brush: Brush, rng: Random) -> None:
    brush.box(0, 0, 1, 1, (214, 234, 242))
    brush.disc(rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.2), 0.08, 0.08, (250, 234, 180))
    horizon = rng.uniform(0.36, 0.42)
    brush.box(0, horizon, 1, 1, (150, 204, 216))
    for _ in range(4):
        x, y = rng.uniform(0, 1), rng.uniform(horizon + 0.04, 0.56)
        brush.box(x - 0.06, y, x + 0.06, y + 0.014, (186, 224, 230))
    shore, phase = rng.uniform(0.6, 0.66), rng.uniform()
    brush.hills(shore - 0.025, 0.02, phase, 1.3, (232, 244, 242))
    brush.hills(shore, 0.02, phase, 1.3, (240, 224, 184))
    for _ in range(6):
        brush.disc(rng.uniform(0, 1), rng.uniform(0.76, 0.98), 0.014, 0.01, (222, 200, 156))


def _snow(brush: Brush, rng: Random) -> None:
    brush.box(0, 0, 1, 1, (196, 206, 224))
    far = rng.uniform(0.5, 0.56)
    for x in rng.uniform(0, 1, 4):
        height = rng.uniform(0.2, 0.3)
        for step in range(3):
            top, width = far + 0.05 - height * (1 - 0.26 * step), 0.05 + 0.022 * step
            brush.polygon([(x - width, top + height * 0.5), (x, top), (x + width, top + height * 0.5)], (150, 174, 180))
    brush.hills(far, 0.04, rng.uniform(), 0.7, (222, 228, 238))
    brush.hills(far + 0.16, 0.04, rng.uniform(), 0.9, (236, 240, 246))
    for _ in range(12):
        brush.disc(rng.uniform(0, 1), rng.uniform(0, 0.5), 0.012, 0.012, (238, 242, 248))


def _night(brush: Brush, rng: Random) -> None:
    brush.box(0, 0, 1, 1, (92, 100, 148))
    brush.box(0, 0.36, 1, 1, (99, 106, 153))
    brush.box(0, 0.56, 1, 1, (106, 113, 158))
    x, y = rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.22)
    brush.disc(x, y, 0.085, 0.085, (238, 230, 190))
    brush.disc(x + 0.04, y - 0.025, 0.068, 0.068, (92, 100, 148))
    for _ in range(10):
        brush.polygon(star(rng.uniform(0, 1), rng.uniform(0.02, 0.6), rng.uniform(0.014, 0.024)), (220, 216, 200))
    brush.hills(rng.uniform(0.68, 0.74), 0.05, rng.uniform(), 0.8, (76, 94, 124))
    brush.hills(rng.uniform(0.84, 0.88), 0.03, rng.uniform(), 1.2, (68, 84, 112))


def _desert(brush: Brush, rng: Random) -> None:
    brush.box(0, 0, 1, 1, (250, 222, 196))
    brush.disc(rng.uniform(0.15, 0.85), rng.uniform(0.2, 0.3), 0.12, 0.12, (252, 236, 206))
    x = rng.uniform(0, 0.7)
    brush.polygon([(x - 0.04, 0.56), (x + 0.04, 0.36), (x + 0.28, 0.36), (x + 0.36, 0.56)], (222, 174, 146))
    level = rng.uniform(0.5, 0.56)
    brush.hills(level, 0.03, rng.uniform(), 0.9, (232, 192, 146))
    brush.hills(level + 0.2, 0.05, rng.uniform(), 0.7, (222, 178, 130))
    for x in rng.uniform(0, 1, 2):
        foot = level + rng.uniform(0.04, 0.12)
        brush.box(x - 0.016, foot - 0.18, x + 0.016, foot, (148, 168, 128))
        brush.box(x - 0.06, foot - 0.11, x, foot - 0.085, (148, 168, 128))
        brush.box(x - 0.06, foot - 0.15, x - 0.036, foot - 0.085, (148, 168, 128))


def _room(brush: Brush, rng: Random) -> None:
    brush.box(0, 0, 1, 1, (226, 214, 224))
    for i in range(9):
        brush.box(i / 8 - 0.02, 0, i / 8 + 0.02, 0.66, (218, 204, 216))
    x = rng.uniform(0.04, 0.62)
    brush.box(x, 0.1, x + 0.34, 0.42, (246, 240, 232))
    brush.box(x + 0.025, 0.125, x + 0.315, 0.395, (192, 222, 234))
    brush.box(x + 0.16, 0.1, x + 0.18, 0.42, (246, 240, 232))
    floor = rng.uniform(0.62, 0.68)
    brush.box(0, floor, 1, 1, (206, 172, 140))
    brush.box(0, floor - 0.025, 1, floor + 0.01, (244, 236, 230))
    brush.disc(rng.uniform(0.3, 0.7), 0.85, 0.36, 0.09, (190, 150, 150))


DRAWERS: dict[str, Callable[[Brush, Random], None]] = {
    "in a meadow": _meadow,
    "on a beach": _beach,
    "in the snow": _snow,
    "under a night sky": _night,
    "in a desert": _desert,
    "in a room": _room,
}


def draw_background(name: str, seed: int, size: int) -> Image.Image:
    """Draw a background of `size` px per side; the same seed gives the same layout at every size."""
    brush = Brush(size, (255, 255, 255))
    DRAWERS[name](brush, np.random.default_rng([seed, 0xBAC6]))
    return brush.image
