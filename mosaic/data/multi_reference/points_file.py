"""The points of one sample as they are stored: one safetensors file (preprocess/FORMAT.md)."""

import json
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mosaic.images import MAX_FILE
from mosaic.method.grids import Grid

PICTURES = "pictures"  # key of the file's metadata
MATCH_SCORES = ("cyclic", "affine", "agreement")
"""What matching may record of reference k beside its points, as "k.cyclic" and so on: float32 [1], shares."""


def read_match_scores(data: bytes, num_references: int) -> tuple[dict[str, float], ...]:
    """Per reference, what matching recorded of `MATCH_SCORES`; nothing where it did not, or another program wrote other things there.

    Args:
        data: Content of a points file that `read_stored_points` takes.
        num_references: K.
    """
    tensors = load(data)
    found = [{name: tensors[f"{k}.{name}"] for name in MATCH_SCORES if f"{k}.{name}" in tensors} for k in range(num_references)]
    return tuple(
        {name: score.item() for name, score in own.items() if score.is_floating_point() and score.shape == (1,) and 0 <= score.item() <= 1}
        for own in found
    )


def most_bytes(target_grid: Grid) -> int:
    """Most bytes of the points file of a sample; a point takes 8 or 16 of them, and what a matcher adds has room."""
    return min(MAX_FILE, 2**20 + 1024 * target_grid.num_tokens)


def pictures_of(data: bytes) -> str | None:
    """The digest, in the header of a safetensors file that can be read, of what its points were found in; None: it does not say."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {}).get(PICTURES)


def read_stored_points(data: bytes, reference_grids: Sequence[Grid], target_grid: Grid, place: str) -> list[Tensor]:
    """Read and check the content of a points file.

    Args:
        data: Content of the file.
        reference_grids: Grid of u of each of the K references.
        target_grid: Grid of v.
        place: File and row, for messages.

    Returns:
        Per reference int32 or int64 [P_k, 2] of (u, v) on these grids; u may repeat.

    Raises:
        ValueError: The file is damaged, does not hold exactly one tensor per reference (beside "k.name" ones, which are left alone), or
            `check_stored_points` refuses them.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{place} is not a readable safetensors file ({error}).") from error
    names = [str(k) for k in range(len(reference_grids))]
    found = sorted(name for name in tensors if "." not in name)
    if found != sorted(names):
        raise ValueError(f"{place} must hold one tensor per reference, {names}, got {found}.")
    points = [tensors[name] for name in names]
    check_stored_points(points, reference_grids, target_grid, place)
    return points


def check_stored_points(points: Sequence[Tensor], reference_grids: Sequence[Grid], target_grid: Grid, place: str) -> None:
    """Check the points of one sample on the grids on which they were found; there, u may carry several points.

    Args:
        points: Per reference an integer tensor [P_k, 2] of (u, v).
        reference_grids: Per reference the grid on which u must lie.
        target_grid: v must lie on it.
        place: File and row, for messages.

    Raises:
        ValueError: Wrong shape or type, an index out of range, or a v that belongs to two references (Eq. 2).
    """
    for k, (pairs, reference_grid) in enumerate(zip(points, reference_grids, strict=True)):
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
            raise ValueError(f'{place}: tensor "{k}" must be int32 of shape [P, 2], got {pairs.dtype} {list(pairs.shape)}.')
        for column, name, grid in ((0, "u", reference_grid), (1, "v", target_grid)):
            outside = (pairs[:, column] < 0) | (pairs[:, column] >= grid.num_tokens)
            if outside.any():
                first = int(outside.int().argmax())
                raise ValueError(
                    f'{place}: tensor "{k}", point {first}: {name} must lie in [0, {grid.num_tokens}) (grid {grid.rows} x {grid.columns}), '
                    f"got {int(pairs[first, column])}."
                )
    v, order = torch.sort(torch.cat([pairs[:, 1].long() for pairs in points]), stable=True)
    owner = torch.arange(len(points)).repeat_interleave(torch.tensor([len(pairs) for pairs in points]))[order]
    twice = (v[1:] == v[:-1]) & (owner[1:] != owner[:-1])
    if twice.any():
        at = int(twice.int().argmax())
        raise ValueError(
            f"{place}: v = {int(v[at])} belongs to references {int(owner[at])} and {int(owner[at + 1])}; points must be disjoint (Eq. 2)."
        )
