"""Measures of attention rows: do they peak where they should, look at another reference's tokens, are they sharp, and apart?"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.method.correspondence import Points
from mosaic.method.grids import Grid
from mosaic.method.losses import reference_distributions


class AttentionAccuracy(NamedTuple):
    """Shares over points, each beside the share that a uniformly random peak would reach.

    Attributes:
        exact: Share of points whose row peaks exactly at v.
        near: Share of points whose row peaks within one token of v, diagonals included.
        exact_chance: 1 / N_tgt.
        near_chance: Mean share of the grid that lies within one token of v.
        num_points: Number of points counted.
        leakage: Mean over points of the share of the row's mass that lies on target tokens owned by another reference
            (`attention_leakage`).
        leakage_chance: What a uniform row would leak: the mean share of target tokens owned by another reference.
        num_leakage_points: Number of points counted there.
    """

    exact: float
    near: float
    exact_chance: float
    near_chance: float
    num_points: int
    leakage: float = math.nan
    leakage_chance: float = math.nan
    num_leakage_points: int = 0


def attention_accuracy(attention_rows: Tensor, points: Points, target_grid: Grid) -> AttentionAccuracy:
    """Compare the peaks of attention rows with the target tokens of their points.

    Args:
        attention_rows: [B, P, N_tgt].
        points: The points of the rows.
        target_grid: Grid of the target tokens.
    """
    peak = attention_rows.argmax(dim=-1)[points.mask]
    v = points.target_index[points.mask]
    if not len(v):
        return pool_accuracies([])
    row, column = v // target_grid.columns, v % target_grid.columns
    near = ((peak // target_grid.columns - row).abs() <= 1) & ((peak % target_grid.columns - column).abs() <= 1)
    neighbours = _span(row, target_grid.rows) * _span(column, target_grid.columns)
    return AttentionAccuracy(
        exact=(peak == v).float().mean().item(),
        near=near.float().mean().item(),
        exact_chance=1 / target_grid.num_tokens,
        near_chance=(neighbours.float() / target_grid.num_tokens).mean().item(),
        num_points=len(v),
        **attention_leakage(attention_rows, points)._asdict(),
    )


def _span(index: Tensor, length: int) -> Tensor:
    """How many of index - 1, index, index + 1 lie on a side of `length` tokens."""
    return torch.clamp(index + 1, max=length - 1) - torch.clamp(index - 1, min=0) + 1


class AttentionLeakage(NamedTuple):
    """The last three fields of `AttentionAccuracy`."""

    leakage: float
    leakage_chance: float
    num_leakage_points: int


def attention_leakage(attention_rows: Tensor, points: Points) -> AttentionLeakage:
    """How much of a reference's attention lies on target tokens that another reference owns.

    Reference j owns the target tokens v of its own points; by Eq. 2 no token has two owners, and most have none. A row of reference k
    leaks sum(A[u, v] for v owned by j != k) / sum(A[u, v] for all v). The mean is over the points of samples in which another reference
    owns tokens at all; a sample with one reference cannot leak and is not counted.

    Args:
        attention_rows: [B, P, N_tgt], not negative.
        points: The points of the rows.
    """
    batch_size, _, num_tokens = attention_rows.shape
    owner = torch.full((batch_size, num_tokens), -1, device=attention_rows.device)
    sample = points.mask.nonzero()[:, 0]
    owner[sample, points.target_index[points.mask]] = points.reference[points.mask]
    owner, own = owner[sample], points.reference[points.mask][:, None]
    foreign = (owner >= 0) & (owner != own)
    counted = foreign.any(dim=-1)
    if not counted.any():
        return AttentionLeakage(math.nan, math.nan, 0)
    # Divided by the mass that there is: of the rows only that they are not negative is known here.
    rows, foreign = attention_rows[points.mask][counted].float(), foreign[counted].float()
    leaked = (rows * foreign).sum(dim=-1) / rows.sum(dim=-1)
    return AttentionLeakage(leaked.mean().item(), foreign.mean().item(), len(rows))


def leakage_matrix(attention_rows: Tensor, reference: Tensor, owner: Tensor, num_references: int) -> Tensor:
    """Where the attention of each reference of one sample lies, by owner; `attention_leakage` split by pairs of references.

    Args:
        attention_rows: [P, N_tgt], not negative.
        reference: int64 [P], the reference of each row.
        owner: int64 [N_tgt], the reference that owns a target token, or -1.
        num_references: K.

    Returns:
        float32 [K, K]: entry (i, j) is the mean, over the rows of reference i, of the share that lies on tokens owned by j. A row of the
        matrix lacks to 1 what lies on tokens without an owner; that of a reference without rows is not a number.
    """
    rows = attention_rows.float() / attention_rows.float().sum(dim=-1, keepdim=True)
    # Class 0 stands for tokens without an owner, for one_hot takes no -1; its column is dropped.
    owned = torch.nn.functional.one_hot(owner + 1, num_references + 1)[:, 1:].to(rows)
    total = torch.zeros(num_references, num_references, device=rows.device).index_add(0, reference, rows @ owned)
    return total / torch.bincount(reference, minlength=num_references)[:, None]


def pool_accuracies(parts: list[AttentionAccuracy]) -> AttentionAccuracy:
    """Join accuracies of several batches, weighted by their points; the shares of no points at all are not numbers."""
    names = AttentionAccuracy._fields
    shares = [_pooled(parts, names[:4], "num_points"), _pooled(parts, names[5:7], "num_leakage_points")]
    return AttentionAccuracy(**shares[0], **shares[1])


def _pooled(parts: Sequence[NamedTuple], shares: Sequence[str], count: str) -> dict[str, Any]:
    """By field: means of some shares, weighted by the number of points they are of, and that number's sum."""
    counted = [part for part in parts if getattr(part, count)]
    total = sum(getattr(part, count) for part in counted)
    means = {name: sum(getattr(part, count) / total * getattr(part, name) for part in counted) if total else math.nan for name in shares}
    return {**means, count: total}


class AttentionShape(NamedTuple):
    """How sharp the rows are and how far the references stand apart.

    Attributes:
        entropy: Mean entropy of a point's row, nats; 0 for a row that looks at one token only.
        entropy_chance: That of a uniform row, log N_tgt.
        num_points: Number of points counted.
        overlap: Mean over pairs of references of sum_n min(a_n, b_n), a and b their `reference_distributions`: 0 apart, 1 equal.
        num_pairs: Number of pairs counted.
    """

    entropy: float
    entropy_chance: float
    num_points: int
    overlap: float = math.nan
    num_pairs: int = 0


def attention_shape(attention_rows: Tensor, points: Points) -> AttentionShape:
    """Entropy of the rows and overlap between the references of each sample.

    Args:
        attention_rows: [B, P, N_tgt], not negative; each row sums to 1.
        points: The points of the rows. Pairs are those of references of one sample that both have points.
    """
    rows = attention_rows[points.mask].float()
    if not len(rows):
        return pool_shapes([])
    entropy = -torch.special.xlogy(rows, rows).sum(dim=-1)
    distributions = reference_distributions(attention_rows, points)  # (B, K, N)
    overlap = torch.minimum(distributions[:, :, None], distributions[:, None]).sum(dim=-1)
    pairs = (points.reference_mask[:, :, None] & points.reference_mask[:, None]).triu(diagonal=1)
    num_pairs = int(pairs.sum())
    return AttentionShape(
        entropy.mean().item(),
        math.log(rows.shape[-1]),
        len(rows),
        overlap[pairs].mean().item() if num_pairs else math.nan,
        num_pairs,
    )


def pool_shapes(parts: list[AttentionShape]) -> AttentionShape:
    """Join shapes of several batches, weighted by their points and pairs; those of nothing are not numbers."""
    names = AttentionShape._fields
    return AttentionShape(**_pooled(parts, names[:2], "num_points"), **_pooled(parts, names[3:4], "num_pairs"))
