"""Whether points lie on their subjects, by masks of the target and the white around a reference's subject; and why not, by trying it out.

Points that lie elsewhere supervise the background. What mixed them up (a grid written wrong, rows and columns, the two sides, masks of
other samples) is found by undoing each such mistake: the one that puts the points on their subjects is named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.data.inspection import Inspection, spread_evenly
from mosaic.method.grids import Grid

QUICK_SAMPLES = 32
WHITE_LEVELS = 5  # a pixel within so many levels of 255 in all channels is background (data fact A7)
_KEPT = 32  # references that the search for a cause looks at, and subjects of others that it compares with
_FACTORS = (1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1, 3 / 2, 2, 3, 4, 8)  # by which a side of a grid may be written wrong
_MASKS, _WHITE = "the masks over the target", "what is not white in the reference pictures"


class Placing(NamedTuple):
    """How points lie: the share of them outside the subject, and the share of the picture that it takes."""

    outside: float
    area: float


@dataclass(frozen=True)
class Placed:
    """The points of one reference on one of their sides, with the cells that show the subject there.

    Attributes:
        sample: Id of the sample.
        reference: k.
        cells: int64 [P], v of the target or u of the reference.
        grid: Grid of the cells.
        subject: bool [N], which cells of the grid show the subject.
        other: int64 [P], the points' cells on the other side.
    """

    sample: str
    reference: int
    cells: Tensor
    grid: Grid
    subject: Tensor
    other: Tensor

    @property
    def placing(self) -> Placing:
        """How the points lie."""
        return _placing(self.cells, self.subject)

    @property
    def outside(self) -> float:
        """Share of the points whose cell does not show the subject."""
        return share_outside(self.cells, self.subject)


@dataclass
class Placement:
    """Where the points of the samples seen so far lie. Keeps a few references whose points lie wrong, worst first.

    Attributes:
        limit: Largest share of points that may lie outside; what a reference is kept by.
        target: Per reference with a mask and points, the share of its points outside the mask.
        reference: Per reference with points, the share of its points on the white around the subject.
        examples: Ids of samples with a point outside a mask.
    """

    limit: float
    target: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    _wrong_targets: list[Placed] = field(default_factory=list)
    _wrong_references: list[Placed] = field(default_factory=list)
    _subjects: list[Placed] = field(default_factory=list)

    def add(self, found: Inspection) -> None:
        """Count the points of one sample."""
        on_target, on_reference = list(target_sides(found)), list(reference_sides(found))
        self.target += [side.outside for side in on_target]
        self.reference += [side.outside for side in on_reference]
        if any(side.outside > 0 for side in on_target):
            self.examples.append(found.id)
        if len(self._subjects) < _KEPT:
            self._subjects += on_target
        for kept, sides in ((self._wrong_targets, on_target), (self._wrong_references, on_reference)):
            kept += [side for side in sides if side.outside > self.limit]
            kept.sort(key=lambda side: -side.outside)
            del kept[_KEPT:]

    def reasons(self) -> list[str]:
        """What is wrong, with the likely cause; empty where no more points than `limit` lie outside."""
        reasons = []
        for shares, wrong, name, where in (
            (self.target, self._wrong_targets, "target_grid", _MASKS),
            (self.reference, self._wrong_references, "reference_grid", _WHITE),
        ):
            share = float(np.mean(shares)) if shares else 0.0
            if share > self.limit:
                cause = likely_cause(wrong, name, self._subjects if name == "target_grid" else ())
                examples = ", ".join(dict.fromkeys(side.sample for side in wrong[:3]))
                reasons.append(f"{share:.1%} of the points lie outside {where}, at most {self.limit:.1%} may: {cause}. Worst: {examples}")
        return reasons


def share_outside(cells: Tensor, subject: Tensor) -> float:
    """Share of some cells, int [P], that do not show a subject, bool [N]; 0 without cells."""
    return 1.0 - subject[cells.long()].float().mean().item() if len(cells) else 0.0


def target_sides(found: Inspection) -> Iterator[Placed]:
    """The target side of each reference that has a mask and points."""
    for k, (pairs, mask) in enumerate(zip(found.points, found.masks, strict=True)):
        if mask is not None and len(pairs):
            yield Placed(found.id, k, pairs[:, 1].long(), found.target_grid, mask, pairs[:, 0].long())


def reference_sides(found: Inspection) -> Iterator[Placed]:
    """The reference side of each reference that has points."""
    for k, (pairs, picture, grid) in enumerate(zip(found.points, found.references, found.reference_grids, strict=True)):
        if len(pairs):
            yield Placed(found.id, k, pairs[:, 0].long(), grid, subject_cells(picture, grid), pairs[:, 1].long())


def subject_cells(reference: Image.Image, grid: Grid) -> Tensor:
    """The cells of a reference that show more than the white around its subject.

    Background are the cells that are white all over and joined to the border by such cells: white parts within the subject belong to it,
    and a picture without a white border is subject all over.

    Args:
        reference: RGB picture.
        grid: Grid over it.

    Returns:
        bool [N].
    """
    pixels = np.asarray(reference)
    darkest = np.minimum(
        np.minimum(pixels[..., 0], pixels[..., 1]), pixels[..., 2]
    )  # a minimum along the last axis takes many times as long
    coloured = torch.from_numpy((darkest < 255 - WHITE_LEVELS).astype(np.float32))[None, None]
    white = torch.nn.functional.adaptive_max_pool2d(coloured, tuple(grid))[0, 0] == 0
    border = torch.ones_like(white)
    border[1:-1, 1:-1] = False
    background, reached = torch.zeros_like(white), white & border
    while reached.sum() > background.sum():
        background = reached
        reached = background.clone()
        reached[1:] |= background[:-1]
        reached[:-1] |= background[1:]
        reached[:, 1:] |= background[:, :-1]
        reached[:, :-1] |= background[:, 1:]
        reached &= white
    return ~background.flatten()


def likely_cause(wrong: Sequence[Placed], name: str, subjects: Sequence[Placed] = ()) -> str:
    """The mistake that explains best why points lie outside, in words.

    Args:
        wrong: References whose points lie outside, on one side.
        name: What the manifest calls the grid of that side: "target_grid" or "reference_grid".
        subjects: Target sides whose masks may have been exchanged for those of `wrong`.

    Returns:
        The cause; where undoing no single mistake puts most of the points on their subjects, what remains.
    """
    empty = sum(not side.subject.any() for side in wrong)
    if 2 * empty > len(wrong):
        return f"the masks of {empty} of {len(wrong)} such references are black all over, so that no point can lie within"
    now = _mean([side.placing for side in wrong])
    inverted = "the masks are inverted (white must be the subject)"
    if name == "target_grid" and now.outside > 0.98 and now.area > 0.5:
        return f"nearly all points of such references lie outside masks that are mostly white: {inverted}"
    tried = [(placing, words) for placing, words in _mistakes(wrong, name, subjects) if placing.outside < now.outside / 4]
    if tried:  # a mistake that is undone moves at least three of four points onto their subjects
        placing, words = min(tried, key=lambda found: found[0].outside + 0.1 * found[0].area)  # large areas hold whatever is thrown at them
        return f"{words}, where {placing.outside:.1%} lie outside"
    if name == "target_grid" and now.outside > 0.95:
        return f"nearly all points of such references lie outside: {inverted}, or of other pictures"
    remains = "the masks are of other pictures" if name == "target_grid" else "the points are of other pictures"
    return f"no other grid or order of the points fits either: {remains}, or the points are wrong; find them anew with preprocess/match.py"


def _mistakes(wrong: Sequence[Placed], name: str, subjects: Sequence[Placed]) -> Iterator[tuple[Placing, str]]:
    """Of each mistake: how the points lie once it is undone, a mean over the references, and what to say of it."""
    grid = wrong[0].grid
    for rows, columns in product(_FACTORS, _FACTORS):
        if (rows, columns) != (1, 1):
            actual = [round(grid.rows * rows), round(grid.columns * columns)]
            words = (
                f"{name} is written wrong: [{grid.rows}, {grid.columns}] stands there, and the points fit when they are read on {actual}"
            )
            yield _mean([_on_grid(side, rows, columns) for side in wrong]), words
    words = "rows and columns are exchanged (the index must be row * columns + column): the points fit when transposed"
    yield (
        _mean([_placing(side.cells % side.grid.rows * side.grid.columns + side.cells // side.grid.rows, side.subject) for side in wrong]),
        words,
    )
    words = "the two sides are exchanged (a point is u of the reference, then v of the target): the points fit the other way"
    fits = [side.other.max() < side.grid.num_tokens for side in wrong]
    yield _mean([_placing(side.other, side.subject) if fit else side.placing for side, fit in zip(wrong, fits, strict=True)]), words
    words = "the masks of a sample's references are exchanged: the points fit the mask of another reference"
    yield _mean([_with_mask_of([one for one in subjects if one.sample == side.sample], side) for side in wrong]), words
    words = "the masks are those of other samples: the points fit the mask of another one"
    yield _mean([_with_mask_of([one for one in subjects if one.sample != side.sample], side) for side in wrong]), words


def _placing(cells: Tensor, subject: Tensor) -> Placing:
    return Placing(share_outside(cells, subject), subject.float().mean().item())


def _mean(placings: Sequence[Placing]) -> Placing:
    return Placing(*np.mean(placings, axis=0).tolist())


def _on_grid(side: Placed, rows: float, columns: float) -> Placing:
    """How the points lie when their cells are read on a grid of other sides, if they fit on it."""
    actual = Grid(round(side.grid.rows * rows), round(side.grid.columns * columns))
    is_whole = abs(actual.rows - side.grid.rows * rows) < 1e-6 and abs(actual.columns - side.grid.columns * columns) < 1e-6
    if not is_whole or int(side.cells.max()) >= actual.num_tokens:
        return side.placing
    subject = torch.nn.functional.adaptive_max_pool2d(side.subject.float().reshape(1, 1, *side.grid), tuple(actual))
    return _placing(side.cells, subject.flatten() > 0)


def _with_mask_of(others: Sequence[Placed], side: Placed) -> Placing:
    """How the points lie with the best mask of another reference that is not much larger than the own one."""
    own = side.placing
    found = [
        _placing(side.cells, other.subject)
        for other in others
        if (other.sample, other.reference) != (side.sample, side.reference) and other.grid == side.grid
    ]
    return min((placing for placing in found if placing.area <= 1.5 * own.area), default=own)


class _StoredSamples(Protocol):
    def __len__(self) -> int: ...

    def inspect(self, index: int) -> Inspection: ...


def check_placement(dataset: _StoredSamples, limit: float, count: int = QUICK_SAMPLES) -> Placement:
    """Refuse to train where points lie beside their subjects.

    Reads the pictures and masks of up to `count` samples, spread evenly over the data set.

    Args:
        dataset: What will be trained on.
        limit: Largest share of points outside (`data.max_points_outside`); 1 lets everything pass, and nothing is read then.
        count: Samples to read.

    Raises:
        FileNotFoundError, ValueError: A sample cannot be read, or the share is larger; the message names samples and the likely cause.
    """
    placement = Placement(limit)
    for index in spread_evenly(len(dataset), count) if limit < 1 else ():
        placement.add(dataset.inspect(index))
    reasons = placement.reasons()
    if reasons:
        raise ValueError(
            f"{'; '.join(reasons)}. {min(count, len(dataset))} of {len(dataset)} samples were looked at; `python scripts/doctor.py DATA "
            "--html PAGE` looks at all and draws them; data.max_points_outside sets how many may lie outside."
        )
    return placement
