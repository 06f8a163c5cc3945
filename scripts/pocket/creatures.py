"""The eight classes of the pocket world, drawn in the canonical pose, and the sprites made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from scripts.pocket.art import (
    BLUSH,
    BODY,
    CANVAS_REACH,
    CREAM,
    GLASS,
    INK,
    MEASURE_SIDE,
    NONE,
    PALETTES,
    PATTERNS,
    PLAIN,
    SUN,
    TRIM,
    TYRE,
    WARM,
    WHITE,
    Pen,
    Point,
    canvas_coordinates,
    colorize,
    draw_hat,
    draw_scarf,
    draw_star,
    ellipse,
    rounded,
    smooth,
)

SPRITE_SIDES = (64, 128, 256, 512, 1024)


def draw_cat(pen: Pen) -> None:
    """Sitting cat with a big head, seen from the front, tail raised to the right."""
    pen.tube(smooth([(0.45, 0.82), (0.88, 0.78), (1.0, 0.42), (0.84, 0.12), (0.98, -0.1)], closed=False), PLAIN, 0.22)
    pen.shape(smooth([(-0.3, -0.1), (0.3, -0.1), (0.62, 0.5), (0.6, 0.96), (0, 1.02), (-0.6, 0.96), (-0.62, 0.5)]), BODY)
    for x in (-0.24, 0.24):
        pen.shape(ellipse(x, 0.93, 0.19, 0.12), CREAM, ink=0.06, shaded=False)
    for side in (-1, 1):
        pen.shape(rounded([(side * 0.68, -0.45), (side * 0.66, -1.08), (side * 0.12, -0.72)], 0.1), BODY)
        pen.fill(rounded([(side * 0.54, -0.62), (side * 0.56, -0.9), (side * 0.3, -0.72)], 0.06), BLUSH)
    pen.shape(smooth([(-0.7, -0.38), (-0.5, -0.75), (0, -0.84), (0.5, -0.75), (0.7, -0.38), (0.46, 0.03), (0, 0.12), (-0.46, 0.03)]), BODY)
    pen.fill(ellipse(0, -0.13, 0.29, 0.2), CREAM)
    pen.fill(smooth([(-0.09, -0.25), (0.09, -0.25), (0, -0.15)]), BLUSH)
    pen.stroke(smooth([(-0.12, -0.08), (-0.05, -0.05), (0, -0.13), (0.05, -0.05), (0.12, -0.08)], closed=False), INK, 0.035)
    for x in (-0.34, 0.34):
        pen.fill(ellipse(x, -0.36, 0.16, 0.17), WHITE)
        pen.eye(x, -0.35, 0.125)


def draw_bird(pen: Pen) -> None:
    """Round bird in profile, beak to the right."""
    for x in (-0.1, 0.24):
        pen.stroke([(x, 0.7), (x, 1.0)], INK, 0.1)
        pen.stroke([(x - 0.12, 1.02), (x + 0.16, 1.02)], INK, 0.1)
    pen.shape(rounded([(-0.55, 0.2), (-1.16, -0.28), (-1.2, 0.16), (-0.6, 0.56)], 0.14), PLAIN)
    pen.shape(rounded([(0.66, -0.5), (1.16, -0.26), (0.7, -0.06)], 0.1), WARM)
    body = [(-0.78, 0.3), (-0.5, -0.28), (0.0, -0.78), (0.46, -0.84), (0.82, -0.42), (0.8, 0.2), (0.44, 0.72), (-0.12, 0.82), (-0.56, 0.66)]
    pen.shape(smooth(body), BODY)
    pen.shape(smooth([(-0.6, 0.1), (-0.32, 0.04), (-0.04, 0.18), (-0.1, 0.44), (-0.38, 0.48), (-0.7, 0.38)]), TRIM, ink=0.07)
    pen.fill(ellipse(0.44, -0.38, 0.19, 0.2), WHITE)
    pen.eye(0.48, -0.37, 0.14)


def draw_fish(pen: Pen) -> None:
    """Fish in profile, swimming to the right."""
    pen.shape(rounded([(-0.52, 0.0), (-1.14, -0.58), (-1.02, 0.0), (-1.14, 0.58)], 0.16), TRIM)
    pen.shape(smooth([(-0.4, -0.5), (-0.2, -0.86), (0.3, -0.78), (0.36, -0.46)]), TRIM)
    pen.shape(smooth([(-0.2, 0.5), (-0.2, 0.8), (0.16, 0.82), (0.22, 0.5)]), TRIM)
    body = [(-0.74, 0.0), (-0.4, -0.42), (0.2, -0.62), (0.78, -0.38), (1.06, 0.04), (0.78, 0.42), (0.2, 0.62), (-0.4, 0.42)]
    pen.shape(smooth(body), BODY)
    pen.stroke(smooth([(0.36, -0.36), (0.24, 0.0), (0.36, 0.36)], closed=False), INK, 0.055)
    pen.fill(ellipse(0.64, -0.12, 0.19, 0.2), WHITE)
    pen.eye(0.69, -0.11, 0.13)
    pen.stroke(smooth([(0.98, 0.16), (0.86, 0.24), (0.74, 0.2)], closed=False), INK, 0.055)


def draw_mug(pen: Pen) -> None:
    """Smiling mug, handle to the right."""
    pen.tube(smooth([(0.5, -0.36), (0.98, -0.36), (1.08, 0.06), (0.9, 0.44), (0.46, 0.46)], closed=False), PLAIN, 0.2)
    pen.shape(rounded([(-0.82, -0.7), (0.6, -0.7), (0.54, 0.86), (-0.76, 0.86)], 0.26), BODY)
    pen.shape(ellipse(-0.11, -0.68, 0.71, 0.2), WHITE, shaded=False)
    pen.fill(ellipse(-0.11, -0.65, 0.55, 0.11), TYRE)
    for x in (-0.4, 0.2):
        pen.fill(ellipse(x, -0.12, 0.14, 0.15), WHITE)
        pen.eye(x, -0.12, 0.11)
    pen.stroke(smooth([(-0.24, 0.06), (-0.1, 0.14), (0.04, 0.06)], closed=False), INK, 0.06)


def draw_mushroom(pen: Pen) -> None:
    """Toadstool with a wide cap and a face on its stem."""
    pen.shape(smooth([(-0.34, 0.0), (0.34, 0.0), (0.36, 0.5), (0.5, 0.92), (0, 1.02), (-0.5, 0.92), (-0.36, 0.5)]), CREAM)
    body = [
        (-1.05, 0.14),
        (-0.98, -0.34),
        (-0.6, -0.82),
        (0, -1.0),
        (0.6, -0.82),
        (0.98, -0.34),
        (1.05, 0.14),
        (0.6, 0.28),
        (0, 0.32),
        (-0.6, 0.28),
    ]
    pen.shape(smooth(body), BODY)
    for side in (-1, 1):
        pen.eye(side * 0.17, 0.56, 0.085)
        pen.fill(ellipse(side * 0.32, 0.7, 0.08, 0.06), BLUSH)
    pen.stroke(smooth([(-0.07, 0.7), (0, 0.75), (0.07, 0.7)], closed=False), INK, 0.05)


def draw_rocket(pen: Pen) -> None:
    """Rocket pointing up, fins to both sides, flame below."""
    pen.shape(smooth([(-0.22, 0.6), (0.22, 0.6), (0.2, 0.9), (0, 1.18), (-0.2, 0.9)]), WARM, shaded=False)
    pen.fill(smooth([(-0.1, 0.66), (0.1, 0.66), (0.08, 0.82), (0, 0.96), (-0.08, 0.82)]), SUN)
    for side in (-1, 1):
        pen.shape(rounded([(side * 0.5, 0.06), (side * 0.96, 0.46), (side * 0.96, 0.92), (side * 0.42, 0.66)], 0.14), TRIM)
    body = [
        (0, -1.14),
        (0.46, -0.74),
        (0.64, -0.16),
        (0.6, 0.34),
        (0.42, 0.68),
        (-0.42, 0.68),
        (-0.6, 0.34),
        (-0.64, -0.16),
        (-0.46, -0.74),
    ]
    pen.shape(smooth(body), BODY)
    pen.shape(ellipse(0, -0.34, 0.25, 0.25), GLASS, ink=0.08, shaded=False)
    pen.fill(ellipse(-0.07, -0.42, 0.09, 0.07), WHITE)


def draw_car(pen: Pen) -> None:
    """Little round car driving to the right."""
    outline = [
        (-1.08, 0.5),
        (-1.1, 0.0),
        (-0.92, -0.2),
        (-0.7, -0.28),
        (-0.54, -0.74),
        (-0.2, -0.9),
        (0.24, -0.88),
        (0.52, -0.66),
        (0.72, -0.24),
        (1.0, -0.12),
        (1.12, 0.14),
        (1.08, 0.52),
        (0.5, 0.6),
        (-0.5, 0.6),
    ]
    pen.shape(smooth(outline), BODY)
    pen.fill(rounded([(-0.5, -0.3), (-0.38, -0.66), (-0.06, -0.72), (-0.06, -0.3)], 0.1), GLASS)
    pen.fill(rounded([(0.1, -0.3), (0.1, -0.72), (0.34, -0.64), (0.5, -0.3)], 0.1), GLASS)
    pen.fill(ellipse(1.0, 0.14, 0.09, 0.12), SUN)
    for x in (-0.6, 0.6):
        pen.shape(ellipse(x, 0.62, 0.23, 0.23), TYRE, shaded=False)
        pen.fill(ellipse(x, 0.62, 0.11, 0.11), CREAM)


def draw_snail(pen: Pen) -> None:
    """Snail creeping to the right under a large round shell."""
    for x, top in ((0.62, -0.62), (0.94, -0.56)):
        pen.stroke([(0.76, -0.1), (x, top)], INK, 0.12)
        pen.fill(ellipse(x, top, 0.11, 0.11), INK)
    body = [
        (-1.15, 0.86),
        (-0.7, 0.56),
        (0.3, 0.54),
        (0.54, 0.2),
        (0.58, -0.14),
        (0.8, -0.26),
        (1.02, -0.1),
        (1.02, 0.26),
        (0.84, 0.72),
        (0.5, 0.88),
        (-0.3, 0.9),
    ]
    pen.shape(smooth(body), CREAM)
    pen.shape(ellipse(-0.22, 0.0, 0.74, 0.74), BODY)
    turns, radii = np.linspace(0.4, 9.6, 60), np.linspace(0.62, 0.05, 60)
    spiral = [(-0.22 + r * np.cos(a), r * np.sin(a)) for a, r in zip(turns, radii, strict=True)]
    pen.stroke(spiral, INK, 0.05)
    pen.eye(0.84, 0.02, 0.09)
    pen.fill(ellipse(0.7, 0.2, 0.09, 0.06), BLUSH)


@dataclass(frozen=True)
class Drawing:
    """How to draw a class, and where its markings sit (drawing units).

    Attributes:
        draw: draws the class without marking.
        plural: plural of the class name.
        hat: (x, y, tilt) of the base of a hat.
        scarf: both ends of a scarf.
        star: centre of a star badge.
    """

    draw: Callable[[Pen], None]
    plural: str
    hat: tuple[float, float, float]
    scarf: tuple[Point, Point]
    star: Point


DRAWINGS: dict[str, Drawing] = {
    "cat": Drawing(draw_cat, "cats", (0.0, -0.78, 0.0), ((-0.52, 0.22), (0.52, 0.22)), (0.0, 0.5)),
    "bird": Drawing(draw_bird, "birds", (0.3, -0.82, -0.1), ((-0.46, -0.34), (0.88, 0.04)), (0.4, 0.34)),
    "fish": Drawing(draw_fish, "fish", (0.3, -0.62, -0.1), ((0.12, -0.56), (0.12, 0.5)), (-0.16, 0.02)),
    "mug": Drawing(draw_mug, "mugs", (-0.11, -0.74, 0.0), ((-0.74, 0.38), (0.5, 0.38)), (-0.1, 0.48)),
    "mushroom": Drawing(draw_mushroom, "mushrooms", (0.0, -0.96, 0.0), ((-0.96, -0.1), (0.96, -0.1)), (0.0, -0.36)),
    "rocket": Drawing(draw_rocket, "rockets", (0.0, -1.0, 0.0), ((-0.6, 0.16), (0.6, 0.16)), (0.0, 0.28)),
    "car": Drawing(draw_car, "cars", (-0.02, -0.88, -0.08), ((-1.06, 0.14), (0.92, 0.14)), (0.02, 0.16)),
    "snail": Drawing(draw_snail, "snails", (-0.3, -0.7, -0.1), ((-0.22, -0.68), (-0.22, 0.6)), (-0.22, 0.02)),
}


def _draw_marking(pen: Pen, drawing: Drawing, marking: str) -> None:
    """Draw a marking over the class; all but hats are clipped to the body."""
    if marking == "hat":
        draw_hat(pen, *drawing.hat)
    before = pen.materials.copy()
    if marking == "star":
        draw_star(pen, *drawing.star)
    elif marking == "scarf":
        draw_scarf(pen, *drawing.scarf)
    else:
        return
    old = np.asarray(before)
    on_body = np.isin(old, (BODY, TRIM) if marking == "scarf" else (BODY, TRIM, PLAIN, INK))
    pen.materials.paste(Image.fromarray(np.where(on_body, np.asarray(pen.materials), old)))


def _draw(class_name: str, marking: str, pen: Pen) -> Pen:
    drawing = DRAWINGS[class_name]
    drawing.draw(pen)
    _draw_marking(pen, drawing, marking)
    return pen


@cache
def _measure(class_name: str, marking: str) -> tuple[float, Point, Point]:
    """Normalisation of a drawing: (factor, shift, half extents) so that its box is centred and its long side is 2."""
    shrink = 0.55  # drawing units may exceed the canonical square before they are normalised
    pen = _draw(class_name, marking, Pen(MEASURE_SIDE, shrink))
    box = pen.materials.getbbox()
    assert box is not None, "every creature leaves marks"
    x0, y0, x1, y1 = (v / MEASURE_SIDE * 2 * CANVAS_REACH - CANVAS_REACH for v in box)
    scale = 2 / max(x1 - x0, y1 - y0)
    shift = (-(x0 + x1) / 2 * scale, -(y0 + y1) / 2 * scale)
    return shrink * scale, shift, ((x1 - x0) / 2 * scale, (y1 - y0) / 2 * scale)


def half_extents(class_name: str, marking: str) -> Point:
    """Half width and half height of the sprite's bounding box, canonical units; the larger one is 1."""
    return _measure(class_name, marking)[2]


@lru_cache(maxsize=160)
def material_map(class_name: str, marking: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Materials (uint8) and shade (bool) of a class with a marking, each `[side, side]`."""
    factor, shift, _ = _measure(class_name, marking)
    pen = _draw(class_name, marking, Pen(side, factor, shift))
    materials = np.array(pen.materials)
    shade = (np.array(pen.shade) > 127) & np.isin(materials, (BODY, PLAIN, TRIM, CREAM, WARM))
    return materials, shade


@lru_cache(maxsize=160)
def _pattern_mask(class_name: str, marking: str, pattern: str, side: int) -> np.ndarray:
    """Where a pattern recolours the body, bool `[side, side]`, laid out about the centre of the body."""
    materials, _ = material_map(class_name, "none" if marking != "hat" else "hat", side)
    rows, columns = np.nonzero(materials == BODY)
    x, y = canvas_coordinates(side)
    left, right, top, bottom = x[columns.min()], x[columns.max()], y[rows.min()], y[rows.max()]
    across, down = np.meshgrid(x - (left + right) / 2, y - (top + bottom) / 2)
    return PATTERNS[pattern](across, down, (right - left) / 2, (bottom - top) / 2)


def _build_sprite(class_name: str, palette: str, pattern: str, marking: str, side: int) -> Image.Image:
    oversampling = 4 if side <= 128 else 2
    fine = side * oversampling
    materials, shade = material_map(class_name, marking, fine)
    mask = _pattern_mask(class_name, marking, pattern, fine)
    return Image.fromarray(colorize(materials, shade, mask, PALETTES[palette])).reduce(oversampling)


_small_sprite = lru_cache(maxsize=8192)(_build_sprite)
_large_sprite = lru_cache(maxsize=48)(_build_sprite)


def sprite(class_name: str, palette: str, pattern: str, marking: str, side: int) -> Image.Image:
    """RGBA picture of an identity on its canvas (which covers [-CANVAS_REACH, CANVAS_REACH]^2), cached.

    `side` in px is one of SPRITE_SIDES.
    """
    cached = _small_sprite if side <= 128 else _large_sprite
    return cached(class_name, palette, pattern, marking, side)


@cache
def silhouette(class_name: str, marking: str) -> np.ndarray:
    """Which canonical points the subject covers, bool `[512, 512]` over the sprite canvas."""
    return material_map(class_name, marking, 512)[0] != NONE
