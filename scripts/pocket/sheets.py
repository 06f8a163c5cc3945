"""Sheets and strips: pictures in which one identity appears several times, for training the pocket base."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from scripts.pocket.drawing import oversampling, paste_subject, render_reference, render_scene
from scripts.pocket.scenes import (
    CLASSES,
    SPLITS,
    USUAL,
    Identity,
    Placement,
    RegimeShares,
    Scene,
    caption,
    count_phrase,
    sample_identity,
    sample_pose,
    sample_scene,
)

PANEL_SCALES, PANEL_LATTICE = (0.75, 0.9), 4
BLANK_SHARE = 0.15  # bottom panels that stay white
FOUR_OF_A_KIND_SHARE = 0.3  # strips that show one identity four times


@dataclass(frozen=True)
class Sheet:
    """Columns of panels beside a scene.

    Attributes:
        scene: drawn at the right end.
        subjects: for column k (counted leftwards from the scene) the number of its subject, in any order.
        poses: for column k another pose of that subject, None for a blank panel.
    """

    scene: Scene
    subjects: tuple[int, ...]
    poses: tuple[Placement | None, ...]


@dataclass(frozen=True)
class Strip:
    """Four poses on white, side by side."""

    poses: tuple[Placement, Placement, Placement, Placement]


def sample_sheet(seed: int, num_panels: int, split: str = "train", shares: RegimeShares = USUAL) -> Sheet:
    """Draw a sheet of `num_panels` columns (1..4) beside a scene of that many to 4 subjects; `shares` of them are twins or mixed."""
    if not 1 <= num_panels <= 4:
        raise ValueError(f"num_panels must be within 1..4; got {num_panels}")
    rng = np.random.default_rng([seed, num_panels, 0x5EE7])
    count = int(rng.integers(num_panels, 5))
    scene = sample_scene(seed, split, count, shares.draw(seed, count))
    subjects = tuple(rng.permutation(len(scene.placements))[:num_panels].tolist())
    poses = [
        None if rng.random() < BLANK_SHARE else sample_pose(rng, scene.placements[k].identity, PANEL_SCALES, PANEL_LATTICE)
        for k in subjects
    ]
    return Sheet(scene, subjects, tuple(poses))


def render_sheet(sheet: Sheet, size: int) -> Image.Image:
    """Draw a sheet: RGB, `size` px high, K * size // 2 + size wide; panel columns left, the scene right."""
    half, columns = size // 2, len(sheet.poses)
    picture = Image.new("RGB", (columns * half + size, size), (255, 255, 255))
    picture.paste(render_scene(sheet.scene, size).image, (columns * half, 0))
    for column, (subject, pose) in enumerate(zip(sheet.subjects, sheet.poses, strict=True)):
        left = (columns - 1 - column) * half
        picture.paste(render_reference(sheet.scene.placements[subject].identity, half), (left, 0))
        if pose is not None:
            picture.paste(render_pose(pose, half), (left, half))
    return picture


def render_pose(pose: Placement, size: int) -> Image.Image:
    """Draw one subject on white, `size` px per side."""
    factor = oversampling(size)
    canvas = Image.new("RGB", (size * factor, size * factor), (255, 255, 255))
    paste_subject(canvas, pose)
    return canvas.reduce(factor)


def sheet_caption(sheet: Sheet) -> str:
    """The caption of a sheet is that of its scene."""
    return caption(sheet.scene)


def sample_strip(seed: int, split: str = "train") -> Strip:
    """Draw a strip: two identities twice each in any order, or one identity four times."""
    rng = np.random.default_rng([seed, SPLITS.index(split) if split in SPLITS else 9, 0x57F1])
    names = rng.choice(len(CLASSES), 2, replace=rng.random() < 0.15)
    first = sample_identity(rng, CLASSES[names[0]], split)
    second = sample_identity(rng, CLASSES[names[1]], split)
    order: list[Identity] = [first] * 4 if rng.random() < FOUR_OF_A_KIND_SHARE else [first, first, second, second]
    a, b, c, d = (sample_pose(rng, order[i], PANEL_SCALES, PANEL_LATTICE) for i in rng.permutation(4))
    return Strip((a, b, c, d))


def render_strip(strip: Strip, size: int) -> Image.Image:
    """Draw a strip: RGB, size // 2 high, 2 * size wide."""
    half = size // 2
    picture = Image.new("RGB", (4 * half, half), (255, 255, 255))
    for i, pose in enumerate(strip.poses):
        picture.paste(render_pose(pose, half), (i * half, 0))
    return picture


def strip_caption(strip: Strip) -> str:
    """Name what a strip shows, e.g. "drawings of two cats and two mugs"."""
    return f"drawings of {count_phrase([pose.identity for pose in strip.poses])}"
