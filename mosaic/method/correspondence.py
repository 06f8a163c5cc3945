"""Correspondence points, their disjointness, change of grid, and the global index G(u).

A point is (u, v): u = token index in one reference, v = token index in the target. The points of one reference are `pairs`, [P_k, 2];
those of a sample a list of such tensors, one per reference; `Points` holds a batch of samples, flat over their references.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic.devices import to_device
from mosaic.method.grids import Grid

LEAST_POINTS = 2  # of a padded sample in a compiled model: torch.compile takes sizes of 0 and 1 apart, each of which it would compile for


@dataclass(frozen=True)
class Points:
    """The supervised points of a batch, flat over the references of each sample and padded to the longest sample.

    Attributes:
        global_index: int64 [B, P], G(u) in [0, K * N_ref); 0 where padded.
        target_index: int64 [B, P], v in [0, N_tgt); 0 where padded.
        reference: int64 [B, P], the reference k in [0, K); 0 where padded.
        mask: bool [B, P], False where padded.
        num_references: K, shared by the batch.
    """

    global_index: Tensor
    target_index: Tensor
    reference: Tensor
    mask: Tensor
    num_references: int

    @property
    def reference_mask(self) -> Tensor:
        """bool [B, K]: which references have points."""
        counts = torch.zeros(len(self.mask), self.num_references, device=self.mask.device)
        return counts.scatter_add(1, self.reference, self.mask.float()) > 0

    def to(self, device: torch.device | str) -> "Points":
        """The same points on another device."""
        global_index, target_index = to_device(self.global_index, device), to_device(self.target_index, device)
        return Points(global_index, target_index, to_device(self.reference, device), to_device(self.mask, device), self.num_references)


def global_index(u: Tensor, reference: Tensor | int, num_reference_tokens: int) -> Tensor:
    """Eq. 9: G(u) = k * N_ref + u; k counted from 0, and all references share one grid."""
    return reference * num_reference_tokens + u


def validate_points(points: Sequence[Tensor], num_reference_tokens: int, num_target_tokens: int, where: str = "points") -> None:
    """Check the points of one sample.

    Args:
        points: Per reference an integer tensor [P_k, 2] of (u, v).
        num_reference_tokens: N_ref; u must lie in [0, N_ref).
        num_target_tokens: N_tgt; v must lie in [0, N_tgt).
        where: The sample's name for the message.

    Raises:
        ValueError: Wrong shape or dtype, an index out of range, u twice within one reference, v in two references (Eq. 2).
    """
    _join([points], num_reference_tokens, num_target_tokens, [where])


def _join(
    samples: Sequence[Sequence[Tensor]], num_reference_tokens: int, num_target_tokens: int, names: Sequence[str]
) -> tuple[Tensor, ...]:
    """All points of samples of one K in a row: u, v, reference, sample, int64 [N] each. Raises as `validate_points`."""
    for name, references in zip(names, samples, strict=True):
        for k, pairs in enumerate(references):
            if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
                raise ValueError(f"{name}[{k}]: must be an integer tensor of shape [P, 2], got {pairs.dtype} {tuple(pairs.shape)}.")
    # All samples are checked at once: this runs in every training step, and a loop would take many small calls.
    lists, num_references = [pairs for references in samples for pairs in references], len(samples[0])
    if not lists:
        return (torch.zeros(0, dtype=torch.long),) * 4
    u, v = torch.cat(lists).long().unbind(1)
    # Lists are numbered sample * K + reference, so that one number says both.
    owner = torch.arange(len(lists)).repeat_interleave(torch.tensor([len(pairs) for pairs in lists]))
    sample, reference = owner // num_references, owner % num_references

    def first(bad: Tensor) -> tuple[int, str]:
        """The first bad point, and the name of its list."""
        index = int(bad.nonzero()[0])
        return index, f"{names[int(sample[index])]}[{int(reference[index])}]"

    for index, name, limit in ((u, "u", num_reference_tokens), (v, "v", num_target_tokens)):
        if (bad := (index < 0) | (index >= limit)).any():
            at, where = first(bad)
            raise ValueError(f"{where}: {name} must lie in [0, {limit}), got {int(index[at])} in point {[int(u[at]), int(v[at])]}.")
    # One number per (sample, reference, u): a number that occurs twice is a u with two points.
    place = owner * num_reference_tokens + u
    if (bad := torch.bincount(place)[place] > 1).any():
        at, where = first(bad)
        raise ValueError(f"{where}: a reference token u may carry one point only; u = {int(u[at])} stands twice. Use reduce_points().")
    # Every target cell is offered to the lowest reference that has a point on it: a point of another one breaks Eq. 2.
    cell = sample * num_target_tokens + v
    lowest = torch.full((len(samples) * num_target_tokens,), num_references).scatter_reduce(0, cell, reference, "amin")[cell]
    if (bad := lowest != reference).any():
        at, _ = first(bad)
        raise ValueError(
            f"{names[int(sample[at])]}: target token v = {int(v[at])} belongs to references {int(lowest[at])} and {int(reference[at])}; "
            "points must be disjoint (Eq. 2). Use make_disjoint()."
        )
    return u, v, reference, sample


def batch_points(
    samples: Sequence[Sequence[Tensor]],
    num_reference_tokens: int,
    num_target_tokens: int,
    device: torch.device | str | None = None,
    at_least: int = 0,
) -> Points:
    """Join the correspondence sets C^(i,k) of Eq. 1 of several samples, which share K and both grids, into one `Points`.

    Args:
        samples: Per sample, per reference, an integer tensor [P_k, 2] of (u, v); P_k may be 0.
        num_reference_tokens: N_ref.
        num_target_tokens: N_tgt.
        device: Where the result lives.
        at_least: The least P to which samples are padded.

    Raises:
        ValueError: If the samples differ in K, or by `validate_points`.
    """
    counts = {len(sample) for sample in samples}
    if len(counts) != 1:
        raise ValueError(f"all samples of a batch must have one number of references K, got {sorted(counts)}. Group samples by K.")
    names = [f"points[{index}]" for index in range(len(samples))]
    u, v, k, sample = _join(samples, num_reference_tokens, num_target_tokens, names)
    lengths = torch.bincount(sample, minlength=len(samples))
    # A True per point, sample by sample: assigning through the mask then fills the padded rows in the order of the points.
    mask = torch.arange(max(int(lengths.max()), at_least))[None] < lengths[:, None]
    padded = torch.zeros(3, *mask.shape, dtype=torch.long)
    padded[:, mask] = torch.stack([global_index(u, k, num_reference_tokens), v, k])
    index, target_index, reference = padded
    return Points(index, target_index, reference, mask, counts.pop()).to(device or "cpu")


def draw_points(samples: Sequence[Sequence[Tensor]], max_points: int, generator: torch.Generator | None = None) -> list[list[Tensor]]:
    """Keep at most `max_points` points of each sample, drawn anew and uniformly over all its references."""
    drawn = []
    for sample in samples:
        total = sum(len(pairs) for pairs in sample)
        if total <= max_points:
            drawn.append(list(sample))
            continue
        # Drawn over the references together: a reference with more points keeps more, and the order of its points stays.
        keep = torch.zeros(total, dtype=torch.bool)
        keep[torch.randperm(total, generator=generator)[:max_points]] = True
        parts = keep.split([len(pairs) for pairs in sample])
        drawn.append([pairs[part] for pairs, part in zip(sample, parts, strict=True)])
    return drawn


def reduce_points(pairs: Tensor, reference_grid: Grid, target_grid: Grid, to_reference_grid: Grid, to_target_grid: Grid) -> Tensor:
    """Carry the points of one reference to coarser grids by majority vote.

    Every fine point votes for the pair of coarse cells it falls into. Each coarse v keeps the u with most votes (ties: the
    lowest u); then each u keeps the v with most votes (ties: the lowest v). So u is unique; nothing is averaged.

    Args:
        pairs: int64 [P, 2] (u, v) on `reference_grid` and `target_grid`.
        reference_grid: The grid that u was found on.
        target_grid: The grid that v was found on.
        to_reference_grid: The grid wanted for u; its sides must divide those of `reference_grid`.
        to_target_grid: The grid wanted for v; its sides must divide those of `target_grid`.

    Returns:
        int64 [P', 2], sorted by u.

    Raises:
        ValueError: If a grid does not divide into the coarser one.
    """
    u = coarse_index(pairs[:, 0].long(), reference_grid, to_reference_grid, "reference grid")
    v = coarse_index(pairs[:, 1].long(), target_grid, to_target_grid, "target grid")
    return majority_points(u, v, to_reference_grid.num_tokens, to_target_grid.num_tokens)


def majority_points(u: Tensor, v: Tensor, num_u: int, num_v: int) -> Tensor:
    """The vote of `reduce_points` on points that are on the coarse grids already, one entry per fine point.

    Args:
        u: int64 [P], coarse reference cell of each fine point.
        v: int64 [P], its coarse target cell.
        num_u: Cells of the coarse reference grid.
        num_v: Cells of the coarse target grid.

    Returns:
        int64 [P', 2] of (u, v), u unique, sorted by u.
    """
    pairs, votes = torch.unique(u * num_v + v, return_counts=True)  # sorted by u, then v
    u, v = pairs // num_v, pairs % num_v
    # Two rounds, v first: a v that loses its u in the second round does not go to another, for its vote was for that u.
    keep = _winners(group=v, votes=votes, tie=u, num_groups=num_v, num_ties=num_u)
    u, v, votes = u[keep], v[keep], votes[keep]
    keep = _winners(group=u, votes=votes, tie=v, num_groups=num_u, num_ties=num_v)
    return torch.stack([u[keep], v[keep]], dim=1)


def coarse_index(index: Tensor, grid: Grid, to_grid: Grid, name: str) -> Tensor:
    """Cells of a coarser grid in which cells of a grid lie; ValueError, naming `name`, if it does not divide into the coarser one."""
    if grid.rows % to_grid.rows or grid.columns % to_grid.columns:
        coarse = f"{to_grid.rows} x {to_grid.columns}"
        raise ValueError(f"{name} {grid.rows} x {grid.columns} must be a whole multiple of {coarse} in both sides.")
    row = torch.div(index, grid.columns, rounding_mode="floor") // (grid.rows // to_grid.rows)
    column = (index % grid.columns) // (grid.columns // to_grid.columns)
    return row * to_grid.columns + column


def _winners(group: Tensor, votes: Tensor, tie: Tensor, num_groups: int, num_ties: int) -> Tensor:
    """bool [N]: per group, the entry with most votes, ties to the lowest `tie` (unique within a group)."""
    # Votes and tie in one integer, votes first, so that one maximum per group decides both and no two scores of a group are equal.
    # The tie enters reversed, because the largest score wins and the lowest tie shall.
    score = votes * num_ties + (num_ties - 1 - tie)
    best = torch.full((num_groups,), -1, dtype=score.dtype).scatter_reduce(0, group, score, reduce="amax")
    return score == best[group]


def make_disjoint(points: Sequence[Tensor]) -> list[Tensor]:
    """Establish Eq. 2: every target token v keeps the points of one reference only.

    The reference with most points on v keeps it, ties to the lowest reference. To be applied after every change of grid.

    Args:
        points: Per reference int64 [P_k, 2] (u, v).

    Returns:
        Per reference int64 [P'_k, 2], in the given order.
    """
    if not points:
        return []
    reference, v, num_targets = _owners(points)
    # Coarser grids can give one v several points of a reference; their number is its claim on v.
    claims = torch.zeros(num_targets, len(points), dtype=torch.long)
    claims.index_put_((v, reference), torch.ones_like(v), accumulate=True)
    return [pairs[keep] for pairs, keep in zip(points, _owned(points, claims), strict=True)]


def owned_by_similarity(points: Sequence[Tensor], similarities: Sequence[Tensor]) -> list[Tensor]:
    """Establish Eq. 2 where matches have a quality: the reference with the most similar point on v owns it, ties to the lowest reference.

    Args:
        points: Per reference int64 [P_k, 2] (u, v).
        similarities: Per reference float [P_k], higher is better, finite.

    Returns:
        Per reference bool [P_k]: the points that stay.
    """
    if not points:
        return []
    reference, v, num_targets = _owners(points)
    # Minus infinity where a reference has no point on v, so that it can own no v that another one claims.
    best = torch.full((num_targets * len(points),), -torch.inf, dtype=torch.float64)
    best = best.scatter_reduce(0, v * len(points) + reference, torch.cat(list(similarities)).double(), "amax")
    return _owned(points, best.reshape(num_targets, len(points)))


def _owners(points: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Reference and v of all points in one row, int64 [N] each, and one more than the largest v."""
    reference = torch.arange(len(points)).repeat_interleave(torch.tensor([len(pairs) for pairs in points]))
    v = torch.cat([pairs[:, 1].long() for pairs in points])
    return reference, v, int(v.max()) + 1 if len(v) else 0


def _owned(points: Sequence[Tensor], claims: Tensor) -> list[Tensor]:
    """Per reference bool [P_k]: the points on those v for which its claim in `claims` [N, K] is largest, ties to the lowest reference."""
    if not len(claims):
        return [torch.zeros(0, dtype=torch.bool) for _ in points]
    owner = claims.argmax(dim=1)  # the first of several maxima
    return [owner[pairs[:, 1].long()] == k for k, pairs in enumerate(points)]
