"""Drawing kit of the pocket world: a vector pen, palettes, patterns and the sprites made of them.

A sprite is drawn in two steps. The pen rasterises a class (and its marking) into a map of *materials*
(ink, body, glass, ...) in the canonical square [-1, 1]^2, x to the right, y down. Colours then come from a
lookup: the same material map serves every palette, and patterns recolour the body material only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Color = tuple[int, int, int]

# Canonical half-width of a sprite canvas: a thin empty frame keeps resampling off the border.
CANVAS_REACH = 1.06
INK_WIDTH = 0.10  # visible outline, in the units in which a class is drawn
SHADE_SHIFT = (-0.09, -0.11)  # light comes from the upper left
SHADE_FACTOR = 0.86
MEASURE_SIDE = 768  # resolution at which bounding boxes are measured

(NONE, INK, BODY, TRIM, WHITE, BLUSH, GLASS, WARM, CREAM, TYRE, ACCENT, SUN, PLAIN) = range(13)
FIXED_COLORS: dict[int, Color] = {
    INK: (43, 34, 48),
    WHITE: (255, 253, 248),
    BLUSH: (246, 150, 152),
    GLASS: (190, 228, 240),
    WARM: (246, 150, 48),
    CREAM: (250, 234, 206),
    TYRE: (78, 72, 86),
    SUN: (255, 214, 84),
}


@dataclass(frozen=True)
class Palette:
    """Colours of one identity: body, pattern (`trim`) and marking (`accent`), RGB in 0..255."""

    body: Color
    trim: Color
    accent: Color


PALETTES: dict[str, Palette] = {
    "ember": Palette((216, 62, 48), (255, 226, 176), (38, 150, 158)),
    "ocean": Palette((44, 98, 196), (158, 222, 246), (255, 146, 40)),
    "fern": Palette((70, 154, 66), (232, 244, 140), (206, 52, 140)),
    "honey": Palette((248, 190, 40), (134, 78, 32), (40, 84, 190)),
    "plum": Palette((120, 62, 164), (246, 182, 232), (176, 216, 48)),
    "rose": Palette((244, 136, 170), (152, 24, 72), (84, 206, 170)),
    "slate": Palette((98, 106, 124), (212, 216, 222), (226, 50, 50)),
    "mint": Palette((84, 206, 188), (22, 78, 100), (252, 108, 88)),
}


class Pen:
    """Draws shapes as materials on a square canvas.

    Args:
        side: pixels per side of the canvas, which covers [-CANVAS_REACH, CANVAS_REACH] on both axes.
        factor: drawing units -> canonical units.
        shift: canonical offset added after `factor`.
    """

    def __init__(self, side: int, factor: float = 1.0, shift: Point = (0.0, 0.0)) -> None:
        self.side = side
        self._factor = factor * side / (2 * CANVAS_REACH)
        self._shift = tuple((s + CANVAS_REACH) * side / (2 * CANVAS_REACH) for s in shift)
        self.materials = Image.new("L", (side, side), NONE)
        self.shade = Image.new("L", (side, side), 0)
        self._draw = ImageDraw.Draw(self.materials)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self._factor + self._shift[0], y * self._factor + self._shift[1]) for x, y in points]

    def fill(self, points: Sequence[Point], material: int) -> None:
        """Fill a polygon without outline."""
        self._draw.polygon(self._pixels(points), fill=material)

    def stroke(self, points: Sequence[Point], material: int, width: float) -> None:
        """Draw an open path with round ends; `width` in drawing units."""
        pixels = self._pixels(points)
        thick = max(1, round(width * self._factor))
        self._draw.line(pixels, fill=material, width=thick, joint="curve")
        for x, y in pixels:
            r = thick / 2
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=material)

    def shape(self, points: Sequence[Point], material: int, ink: float = INK_WIDTH, shaded: bool = True) -> None:
        """Fill a polygon inside a bold outline; `shaded` darkens its lower right rim."""
        self.stroke([*points, points[0]], INK, 2 * ink)
        self.fill(points, material)
        mask = Image.new("L", self.materials.size, 0)
        ImageDraw.Draw(mask).polygon(self._pixels(points), fill=255)
        lit = Image.new("L", self.materials.size, 255 if not shaded else 0)
        if shaded:
            moved = [(x + SHADE_SHIFT[0], y + SHADE_SHIFT[1]) for x, y in points]
            ImageDraw.Draw(lit).polygon(self._pixels(moved), fill=255)
        self.shade.paste(Image.eval(lit, lambda value: 255 - value), mask=mask)

    def tube(self, points: Sequence[Point], material: int, width: float, ink: float = INK_WIDTH) -> None:
        """Draw an outlined thick path (tails, handles, legs)."""
        self.stroke(points, INK, width + 2 * ink)
        self.stroke(points, material, width)

    def eye(self, x: float, y: float, radius: float = 0.11) -> None:
        """Draw a dark eye with a glint."""
        self.fill(ellipse(x, y, radius, radius * 1.15), INK)
        self.fill(ellipse(x - radius * 0.3, y - radius * 0.4, radius * 0.42, radius * 0.42), WHITE)


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> list[Point]:
    """Points of an ellipse (or of an arc of it, degrees, clockwise from the right)."""
    steps = 72
    angles = [(start + (stop - start) * i / steps) * pi / 180 for i in range(steps + 1)]
    return [(x + rx * cos(a), y + ry * sin(a)) for a in angles]


def smooth(points: Sequence[Point], closed: bool = True, steps: int = 12) -> list[Point]:
    """Catmull-Rom curve through the given points."""
    count = len(points)
    result: list[Point] = []
    for i in range(count if closed else count - 1):
        around = [points[(i + j) % count] if closed else points[min(max(i + j, 0), count - 1)] for j in (-1, 0, 1, 2)]
        for step in range(steps):
            t = step / steps
            weights = (
                (-t + 2 * t**2 - t**3) / 2,
                (2 - 5 * t**2 + 3 * t**3) / 2,
                (t + 4 * t**2 - 3 * t**3) / 2,
                (-(t**2) + t**3) / 2,
            )
            x, y = (sum(w * p[axis] for w, p in zip(weights, around, strict=True)) for axis in (0, 1))
            result.append((x, y))
    return result if closed else [*result, points[-1]]


def rounded(points: Sequence[Point], radius: float) -> list[Point]:
    """Polygon with corners cut by quadratic curves that start `radius` before each corner."""
    result: list[Point] = []
    for i, corner in enumerate(points):
        ends = []
        for other in (points[i - 1], points[(i + 1) % len(points)]):
            length = max(np.hypot(other[0] - corner[0], other[1] - corner[1]), 1e-6)
            reach = min(radius, length / 2) / length
            ends.append(tuple(corner[axis] + (other[axis] - corner[axis]) * reach for axis in (0, 1)))
        for step in range(9):
            t = step / 8
            result.append(tuple((1 - t) ** 2 * ends[0][axis] + 2 * t * (1 - t) * corner[axis] + t**2 * ends[1][axis] for axis in (0, 1)))
    return result


def star(x: float, y: float, radius: float, inner: float = 0.5) -> list[Point]:
    """Five-pointed star, one tip up."""
    return [(x + r * sin(i * pi / 5), y - r * cos(i * pi / 5)) for i, r in enumerate([radius, radius * inner] * 5)]


def _belly(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return ((x / (0.64 * half_width)) ** 2 + ((y - 0.5 * half_height) / (0.62 * half_height)) ** 2) < 1


def _stripes(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.mod((x + 0.45 * y) / 0.52 + 0.25, 1.0) < 0.5


def _dots(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    row = np.round(y / 0.42)
    across = np.mod(x / 0.56 + 0.5 * np.mod(row, 2) + 0.5, 1.0) - 0.5
    return (across * 0.56) ** 2 + (y - row * 0.42) ** 2 < 0.155**2


def _checks(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.mod(np.floor(x / 0.38) + np.floor(y / 0.38), 2) == 0


def _half(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return x > 0.04


# Each takes canonical coordinates relative to the centre of the body and the body's half extents.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]] = {
    "belly": _belly,
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "half": _half,
}
MARKINGS: tuple[str, ...] = ("none", "hat", "scarf", "star")


def draw_hat(pen: Pen, x: float, y: float, tilt: float) -> None:
    """Party hat whose base is centred on (x, y), leaning by `tilt` drawing units at its tip."""
    pen.shape([(x - 0.3, y), (x + tilt, y - 0.62), (x + 0.3, y), (x, y + 0.07)], ACCENT)
    pen.shape(ellipse(x + tilt, y - 0.62, 0.13, 0.13), SUN, shaded=False)


def draw_star(pen: Pen, x: float, y: float) -> None:
    """Star badge centred on (x, y)."""
    pen.shape(star(x, y, 0.34), ACCENT, ink=0.08, shaded=False)


def draw_scarf(pen: Pen, start: Point, end: Point) -> None:
    """Band from one side of the body to the other; it sags a little in the middle."""
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.07)
    curve = smooth([start, middle, end], closed=False)
    pen.tube(curve, ACCENT, 0.23, ink=0.07)


def colorize(
    materials: np.ndarray,
    shade: np.ndarray,
    pattern: np.ndarray,
    palette: Palette,
) -> np.ndarray:
    """Look the colours up.

    Args:
        materials: uint8 `[S, S]`.
        shade: bool `[S, S]`, True where the surface is in shade.
        pattern: bool `[S, S]`; it changes the body material only.
        palette: colours of the identity.

    Returns:
        uint8 RGBA `[S, S, 4]`. Empty pixels carry the ink colour with alpha 0, so that resampling never bleeds.
    """
    table = np.zeros((2, 16, 4), dtype=np.uint8)
    table[:, NONE, :3] = FIXED_COLORS[INK]
    colors = FIXED_COLORS | {BODY: palette.body, PLAIN: palette.body, TRIM: palette.trim, ACCENT: palette.accent}
    for material, color in colors.items():
        table[0, material] = (*color, 255)
        table[1, material] = (*(round(c * SHADE_FACTOR) for c in color), 255)
    table[1, INK] = table[0, INK]
    index = np.where(pattern & (materials == BODY), np.uint8(TRIM), materials) + np.uint8(16) * shade
    packed = table.reshape(32, 4).view(np.uint32).ravel().take(index)  # one word per pixel: faster than four bytes
    return packed.view(np.uint8).reshape(*index.shape, 4)


@lru_cache(maxsize=16)
def canvas_coordinates(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Canonical (x, y) of the pixel centres of a sprite canvas, each float32 `[side]`."""
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * CANVAS_REACH
    return axis, axis
