"""How well a data set supervises: what is looked at in each sample, and the quick check that training makes before it starts."""

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.data.samples import Sample
from mosaic.method.grids import Grid

QUICK_SAMPLES = 64
_HASH_SIDE = 8  # cells per side of a fingerprint: 64 bits


@dataclass(frozen=True)
class Inspection:
    """One sample as it is stored, for the doctor.

    Attributes:
        id: Name of the sample.
        prompt: Caption.
        target: RGB picture as stored.
        references: K RGB pictures as stored.
        points: Per reference int [P_k, 2] of (u, v) on the stored grids.
        reference_grids: Per reference the grid of u.
        target_grid: Grid of v.
        masks: Per reference bool [N] over the cells of `target_grid`, where the reference is seen; None where no mask is known.
        missing: Parts that the data set lacks for this sample ("mask", "points").
        scores: Per reference what matching recorded, by name ("cyclic", "agreement"); () where it recorded nothing.
        mask_problems: Per reference "empty" or "full" where its mask is that, else "".
    """

    id: str
    prompt: str
    target: Image.Image
    references: tuple[Image.Image, ...]
    points: tuple[Tensor, ...]
    reference_grids: tuple[Grid, ...]
    target_grid: Grid
    masks: tuple[Tensor | None, ...]
    missing: tuple[str, ...] = ()
    scores: tuple[dict[str, float], ...] = ()
    mask_problems: tuple[str, ...] = ()


@dataclass
class Coverage:
    """How many of the references seen so far have correspondence points.

    Attributes:
        references: References seen.
        with_points: Those with at least one point.
        examples: Ids of samples of which a reference has none.
        missing: How many of those samples lack which part of the data ("mask", "points").
    """

    references: int = 0
    with_points: int = 0
    examples: list[str] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of references with points, in [0, 1]; 0 where none was seen."""
        return self.with_points / self.references if self.references else 0.0

    def add(self, sample_id: str, points: Sequence[Sized], missing: Sequence[str] = ()) -> None:
        """Count the references of one sample, and the parts it lacks."""
        found = sum(len(pairs) > 0 for pairs in points)
        self.references += len(points)
        self.with_points += found
        if found < len(points):
            self.examples.append(sample_id)
            self.missing.update(missing)


class _SampleSource(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def check_supervision(dataset: _SampleSource, minimum: float, count: int = QUICK_SAMPLES) -> Coverage:
    """Refuse to train where the attention losses would starve.

    Reads up to `count` samples, spread evenly over the data set.

    Args:
        dataset: What will be trained on.
        minimum: Smallest share of references that must have points; 0 lets everything pass.
        count: Samples to read.

    Raises:
        ValueError: The share is lower; the message names samples and the cure.
    """
    coverage = Coverage()
    for index in spread_evenly(len(dataset), count):
        sample = dataset[index]
        coverage.add(sample.id, sample.points, sample.missing)
    if coverage.share < minimum:
        lack = "".join(f" {count} of these samples lack their {part}." for part, count in coverage.missing.items())
        raise ValueError(
            f"only {coverage.with_points} of {coverage.references} references ({coverage.share:.0%}) have correspondence points, but "
            f"data.min_point_coverage asks for {minimum:.0%}: without points SCAL and MDL have nothing to supervise. Samples without: "
            f"{', '.join(coverage.examples[:3])}.{lack} `python scripts/doctor.py DATA` shows what is missing, `preprocess/match.py` finds "
            "points; data.min_point_coverage=0 trains without them."
        )
    return coverage


def spread_evenly(length: int, count: int) -> list[int]:
    """Up to `count` numbers of samples, spread evenly over `length` of them."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int)).tolist()


def fingerprint(image: Image.Image) -> int:
    """A 64-bit difference hash: equal pictures have equal ones, rescaled or recompressed pictures ones that differ in few bits."""
    small = np.asarray(image.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int(np.packbits(bits).view(">u8")[0])


def touched_cells(mask: np.ndarray, grid: Grid) -> Tensor:
    """bool [N]: the cells of a grid of which a mask, bool [H, W], covers any part."""
    covered = torch.from_numpy(mask.astype(np.float32))[None, None]
    return torch.nn.functional.adaptive_max_pool2d(covered, tuple(grid)).flatten() > 0


def token_masks(masks: Sequence[Image.Image | None], grid: Grid) -> Tensor:
    """How much of each target token shows each reference.

    Args:
        masks: Per reference a mask of 0 and 255 in the target's training frame; None where none is known.
        grid: The target's tokens.

    Returns:
        float32 [K, N_tgt], shares from 0 to 1; 0 everywhere where no mask is known.
    """
    shares = [torch.zeros(grid.num_tokens)] * len(masks)
    for k, mask in enumerate(masks):
        if mask is not None:
            seen = torch.from_numpy(np.asarray(mask, np.float32) / 255)
            shares[k] = torch.nn.functional.adaptive_avg_pool2d(seen[None, None], (grid.rows, grid.columns)).flatten()
    return torch.stack(shares)
