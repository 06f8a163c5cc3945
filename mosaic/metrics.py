"""Attention accuracy: do supervised rows peak where they should?"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.correspondence import Points
from mosaic.tokens import Grid


class AttentionAccuracy(NamedTuple):
    """Shares over points, each beside the share that a uniformly random peak would reach.

    Attributes:
        exact: Share of points whose row peaks exactly at v.
        near: Share of points whose row peaks within one token of v, diagonals included.
        exact_chance: 1 / N_tgt.
        near_chance: Mean share of the grid that lies within one token of v.
        num_points: Number of points counted.
    """

    exact: float
    near: float
    exact_chance: float
    near_chance: float
    num_points: int


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
    )


def _span(index: Tensor, length: int) -> Tensor:
    """How many of index - 1, index, index + 1 lie on a side of `length` tokens."""
    return torch.clamp(index + 1, max=length - 1) - torch.clamp(index - 1, min=0) + 1


def pool_accuracies(parts: list[AttentionAccuracy]) -> AttentionAccuracy:
    """Join accuracies of several batches, weighted by their points; the shares of no points at all are not numbers."""
    total = sum(part.num_points for part in parts)
    if not total:
        return AttentionAccuracy(math.nan, math.nan, math.nan, math.nan, 0)
    counted = [part for part in parts if part.num_points]
    pooled = [sum(part.num_points / total * part[field] for part in counted) for field in range(4)]
    return AttentionAccuracy(*pooled, num_points=total)
