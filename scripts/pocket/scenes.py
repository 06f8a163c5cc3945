"""Scenes of the pocket world: identities and their split, poses, layouts, captions, and which subject is seen where.

Everything is a pure function of its arguments and independent of the resolution. A subject lives in the canonical
square [-1, 1]^2 (x right, y down; the long side of its bounding box is 2) and reaches a picture by an affine map:
mirror, then rotate, then scale, then move.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin

import numpy as np

from scripts.pocket import art, backgrounds, creatures

CLASSES: tuple[str, ...] = tuple(creatures.DRAWINGS)
PALETTES: tuple[str, ...] = tuple(art.PALETTES)
PATTERNS: tuple[str, ...] = tuple(art.PATTERNS)
MARKINGS: tuple[str, ...] = art.MARKINGS
BACKGROUNDS: tuple[str, ...] = tuple(backgrounds.DRAWERS)
SPLITS: tuple[str, ...] = ("train", "heldout")
MAX_SUBJECTS = 6
#: How the classes of a scene repeat, and the fewest subjects that can do so: all differ; all are one; at least two, of which one repeats.
REGIMES: dict[str, int] = {"distinct": 1, "twins": 2, "mixed": 3}

DISTINCT_SHARE = 0.85  # scenes whose subjects are all of different classes, where no regime is asked for
# What a regime adds to the seed of a scene. "repeated" is what the judge learns counting from: twins and mixed without their names.
_REGIME_CODES = {"repeated": 0, "distinct": 1, None: 2, "twins": 3, "mixed": 4}
MIN_VISIBLE = 0.45
TILT = 15.0  # degrees
SCENE_LATTICE = 16  # steps of 4 px along one side of a scene of 64 px
# Where the centres of subjects lie on it: in the order of the caption, row by row from the left, on few places each. So a caption says
# what stands where, as a small model needs it, and neighbours overlap in part: the later one, at the right or lower, stands in front.
# (_ANY is not symmetric: two subjects stand 4 px low on average, as the weights have learnt it.)
_LEFT, _MIDDLE, _RIGHT, _UP, _DOWN = (4, 6), (6, 8, 10), (10, 12), (4, 6), (10, 12)
_ANY, _THREE = (6, 8, 10, 12), ((3,), (8,), (13,))
Slot = tuple[tuple[int, ...], tuple[int, ...]]
SLOTS: dict[int, tuple[Slot, ...]] = {
    1: ((_MIDDLE, _MIDDLE),),
    2: ((_LEFT, _ANY), (_RIGHT, _ANY)),
    3: ((_LEFT, _UP), (_RIGHT, _UP), (_MIDDLE, _DOWN)),
    4: ((_LEFT, _UP), (_RIGHT, _UP), (_LEFT, _DOWN), (_RIGHT, _DOWN)),
    5: (*((x, _UP) for x in _THREE), (_LEFT, _DOWN), (_RIGHT, _DOWN)),
    6: (*((x, _UP) for x in _THREE), *((x, _DOWN) for x in _THREE)),
}
SCALES = {1: (0.375, 0.45), 2: (0.375, 0.45), 3: (0.375,), 4: (0.375,), 5: (0.34,), 6: (0.34,)}
_LAYOUT_GRID = 28  # cells per side on which layouts are checked
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Identity:
    """One individual: what it is and how it looks."""

    class_name: str
    palette: str
    pattern: str
    marking: str


@dataclass(frozen=True)
class Placement:
    """Where a subject stands.

    Attributes:
        identity: who.
        x, y: centre, as a fraction of the canvas.
        scale: long side of the subject / side of the canvas.
        angle: degrees, clockwise on the picture.
        mirrored: left and right swapped, before rotating.
    """

    identity: Identity
    x: float
    y: float
    scale: float
    angle: float
    mirrored: bool

    def matrix(self) -> np.ndarray:
        """Canonical (x, y, 1) -> canvas fractions, float64 `[2, 3]`."""
        c, s, half = cos(radians(self.angle)), sin(radians(self.angle)), self.scale / 2
        m = -1.0 if self.mirrored else 1.0
        return np.array([[half * c * m, -half * s, self.x], [half * s * m, half * c, self.y]])


@dataclass(frozen=True)
class Scene:
    """Subjects on a background, drawn in order: later ones stand in front."""

    background: str
    seed: int
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class RegimeShares:
    """Which share of drawn scenes is of a regime; all others are as `sample_scene` draws them without one.

    Attributes:
        twins: Of the scenes with two or more subjects.
        mixed: Of those with three or more.
    """

    twins: float = 0.0
    mixed: float = 0.0

    def __post_init__(self) -> None:
        if not (self.twins >= 0 and self.mixed >= 0 and self.twins + self.mixed <= 1):
            raise ValueError(f"the shares of twins and mixed scenes must be within 0..1, also together; got {self.twins} and {self.mixed}")

    def draw(self, seed: int, num_subjects: int) -> str | None:
        """The regime of a scene, None for none; the same arguments always give the same one."""
        drawn = np.random.default_rng([seed, 0x7415]).random()
        name = "twins" if drawn < self.twins else "mixed" if drawn < self.twins + self.mixed else None
        return name if name is not None and num_subjects >= REGIMES[name] else None


USUAL = RegimeShares()


def is_held_out(identity: Identity) -> bool:
    """Whether an identity is kept from training: one pattern per class and palette, 1 in 5 combinations."""
    shift = 2 * PALETTES.index(identity.palette) + CLASSES.index(identity.class_name)
    return PATTERNS.index(identity.pattern) == shift % len(PATTERNS)


def sample_identity(rng: np.random.Generator, class_name: str, split: str) -> Identity:
    """Draw an identity of a class from one split ("train" or "heldout")."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    while True:
        palette, pattern, marking = (names[rng.integers(len(names))] for names in (PALETTES, PATTERNS, MARKINGS))
        identity = Identity(class_name, palette, pattern, marking)
        if is_held_out(identity) == (split == "heldout"):
            return identity


def _sample_identities(rng: np.random.Generator, split: str, count: int, regime: str) -> list[Identity]:
    """Draw different identities, of classes as the regime has them; "repeated": some class twice or more, where there are two subjects."""
    names = [CLASSES[i] for i in rng.permutation(len(CLASSES))[:count]]
    if regime == "twins":
        names = names[:1] * count
    elif regime == "mixed":
        kinds = int(rng.integers(2, count))
        again = [names[i] for i in rng.integers(kinds, size=count - kinds)]
        names = sorted(names[:kinds] + again, key=names.index)  # as the caption counts them
    elif regime == "repeated" and count > 1:  # few classes, so that some repeat
        kinds = int(rng.integers(1, count))
        names = sorted((names[i % kinds] for i in range(count)), key=names.index)
    identities: list[Identity] = []
    while len(identities) < count:
        identity = sample_identity(rng, names[len(identities)], split)
        if identity not in identities:
            identities.append(identity)
    return identities


def sample_pose(
    rng: np.random.Generator, identity: Identity, scales: tuple[float, ...], lattice: int, slot: Slot | None = None
) -> Placement:
    """Draw a pose whose bounding box stays on the canvas.

    Poses come from small sets, which a toy model learns much sooner than a continuum: a few scales, mostly upright, else tilted by
    `TILT` either way, mirrored or not, and a centre on a lattice.

    Args:
        rng: Source of the draws.
        identity: Who poses.
        scales: Long sides to choose from, as shares of the canvas; made smaller only where the subject would not fit.
        lattice: Steps of the centre's lattice along one side of the canvas.
        slot: Columns and rows of the lattice from which the centre is drawn; None: all.
    """
    scale, angle = scales[rng.integers(len(scales))], TILT * (0, 0, 0, 0, -1, 1)[rng.integers(6)]
    wide, tall = creatures.half_extents(identity.class_name, identity.marking)
    c, s = abs(cos(radians(angle))), abs(sin(radians(angle)))
    turned = np.array([wide * c + tall * s, wide * s + tall * c])  # half extents of the turned box
    scale = min(scale, 0.98 / turned.max())
    first, last = np.ceil(turned * scale / 2 * lattice), np.floor((1 - turned * scale / 2) * lattice)
    if slot is None:
        centre = rng.integers(first, np.maximum(first, last) + 1)
    else:
        centre = np.clip([axis[rng.integers(len(axis))] for axis in slot], first, last)
    x, y = np.where(first <= last, centre, lattice / 2) / lattice
    return Placement(identity, float(x), float(y), float(scale), float(angle), bool(rng.random() < 0.5))


def sample_scene(
    seed: int,
    split: str = "train",
    num_subjects: int | None = None,
    regime: str | None = None,
) -> Scene:
    """Draw a scene; the same arguments always give the same one.

    Args:
        seed: non-negative integer.
        split: whose identities stand in it, "train" or "heldout".
        num_subjects: 1..6, None draws 1..4 (of twins 2..4, of mixed 3..4).
        regime: of `REGIMES`; "repeated": twins or mixed, where there are two subjects; None: "distinct" in 85 % of the scenes, else
            "repeated".

    Raises:
        ValueError: there is no such split, number or regime, or too few subjects for it.
    """
    if num_subjects is not None and not 1 <= num_subjects <= MAX_SUBJECTS:
        raise ValueError(f"num_subjects must be within 1..{MAX_SUBJECTS}; got {num_subjects}")
    if regime not in _REGIME_CODES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}, repeated; got {regime!r}")
    least = REGIMES.get(regime or "", 1)
    if num_subjects is not None and num_subjects < least:
        raise ValueError(f"a scene of the regime {regime!r} has at least {least} subjects; got num_subjects {num_subjects}")
    rng = np.random.default_rng([seed, SPLITS.index(split) if split in SPLITS else 9, num_subjects or 0, _REGIME_CODES[regime]])
    count = num_subjects or int(rng.integers(least, 5))
    drawn = "distinct" if rng.random() < DISTINCT_SHARE else "repeated"
    identities = _sample_identities(rng, split, count, regime or drawn)
    return arrange(rng, identities, BACKGROUNDS[rng.integers(len(BACKGROUNDS))], seed)


def arrange(rng: np.random.Generator, identities: Sequence[Identity], background: str, seed: int) -> Scene:
    """Draw poses, in the order in which the caption names the subjects, until each is visible enough.

    Args:
        rng: Source of the draws.
        identities: 1..6 subjects.
        background: of `BACKGROUNDS`.
        seed: of the scene, which decides the background's details.
    """
    count = len(identities)
    shrink, wanted = 1.0, rng.uniform(MIN_VISIBLE, 0.95)
    while True:
        for _ in range(30):
            sizes = tuple(shrink * x for x in SCALES[count])
            poses = (sample_pose(rng, who, sizes, SCENE_LATTICE, slot) for who, slot in zip(identities, SLOTS[count], strict=True))
            scene = Scene(background, seed, tuple(poses))
            if count == 1 or visible_fractions(scene, _LAYOUT_GRID).min() >= wanted:
                return scene
        # A crowd first stands closer together, only then it shrinks: scales stay few.
        shrink, wanted = shrink if wanted > MIN_VISIBLE else shrink * 0.97, max(MIN_VISIBLE, wanted - 0.1)


def caption(scene: Scene) -> str:
    """Say what is in a scene and where, never how the subjects look, e.g. "a cat and two mugs on a beach"."""
    return f"{count_phrase([p.identity for p in scene.placements])} {scene.background}"


def count_phrase(identities: list[Identity]) -> str:
    """Count the classes in words, in order of first appearance, e.g. "a cat, two mugs and a fish"."""
    parts = []
    for name, count in Counter(identity.class_name for identity in identities).items():
        parts.append(f"a {name}" if count == 1 else f"{_NUMBERS[count]} {creatures.DRAWINGS[name].plural}")
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def reference_order(scene: Scene, ordered: str = "stored") -> list[int]:
    """The subject that each reference of a scene shows, by `data.reference_order`.

    As stored in a data set references come in any order, not in that of the caption, so that an adapter cannot tell by their order which
    subject is which.
    """
    if ordered == "left_to_right":
        return sorted(range(len(scene.placements)), key=lambda k: scene.placements[k].x)
    return np.random.default_rng([scene.seed, len(scene.placements)]).permutation(len(scene.placements)).tolist()


def cell_centres(grid: int) -> np.ndarray:
    """(x, y) of the cell centres in canvas fractions, row-major, float64 `[grid * grid, 2]`."""
    axis = (np.arange(grid) + 0.5) / grid
    across, down = np.meshgrid(axis, axis)
    return np.stack([across.ravel(), down.ravel()], axis=1)


def to_canonical(placement: Placement, points: np.ndarray) -> np.ndarray:
    """Map canvas fractions `[N, 2]` back to the canonical square of a subject."""
    matrix = placement.matrix()
    return (points - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T


def covers(identity: Identity, canonical: np.ndarray) -> np.ndarray:
    """Whether canonical points `[N, 2]` lie on the subject, bool `[N]`."""
    silhouette = creatures.silhouette(identity.class_name, identity.marking)
    side = silhouette.shape[0]
    cells = np.floor((canonical / art.CANVAS_REACH + 1) / 2 * side).astype(np.int64)
    inside = ((cells >= 0) & (cells < side)).all(axis=1)
    cells = cells.clip(0, side - 1)
    return inside & silhouette[cells[:, 1], cells[:, 0]]


def front_index(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the subject seen at each cell centre (-1: background) `[grid^2]`, and covered cells per subject `[K]`."""
    centres = cell_centres(grid)
    front = np.full(len(centres), -1, dtype=np.int64)
    areas = np.zeros(len(scene.placements))
    for k, placement in enumerate(scene.placements):
        covered = covers(placement.identity, to_canonical(placement, centres))
        front[covered] = k
        areas[k] = covered.sum()
    return front, areas


def visible_fractions(scene: Scene, grid: int) -> np.ndarray:
    """Visible share of each subject's area, counted at the cell centres of a `grid` x `grid` raster, float64 `[K]`."""
    front, areas = front_index(scene, grid)
    seen = np.bincount(front[front >= 0], minlength=len(scene.placements))
    return seen / np.maximum(areas, 1)
