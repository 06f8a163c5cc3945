"""Where target tokens look among the references: the direction in which looks travel, and which the paper's losses leave alone.

A target token takes values from the reference tokens that its query finds. SCAL and MDL supervise the other direction, queries of the
references over keys of the target (Eq. 8), by which a reference token gathers what the target shows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.method.correspondence import Points
from mosaic.method.grids import Grid


class TargetLooks(NamedTuple):
    """Means over the points of a batch, of attention averaged over heads and blocks.

    Attributes:
        on_references: Share of a target token's attention that falls on any reference; the rest is on text and target.
        own_reference: Of that, the share on the reference of its point.
        peak_exact: Share of the points whose largest weight on a reference token is at u.
        peak_near: Share of the points where it is at u or one of the up to eight tokens around u, in the same reference.
    """

    on_references: float
    own_reference: float
    peak_exact: float
    peak_near: float


def target_looks(rows: Tensor, points: Points, reference_grid: Grid) -> TargetLooks:
    """Where the target tokens of points look.

    Args:
        rows: [B, P, K * N_ref], `target_rows` of a pass with all keys.
        points: The points, at least one.
        reference_grid: Grid of the tokens of one reference.
    """
    weights = rows[points.mask].unflatten(1, (points.num_references, -1))  # (points, K, N_ref)
    wanted, reference = points.global_index[points.mask], points.reference[points.mask]
    on_references = weights.sum(dim=(1, 2))
    own = weights[torch.arange(len(weights)), reference].sum(dim=1)
    peak = weights.flatten(1).argmax(dim=1)
    u, found = wanted % reference_grid.num_tokens, peak % reference_grid.num_tokens
    down, across = (abs(part(u) - part(found)) for part in (lambda x: x // reference_grid.columns, lambda x: x % reference_grid.columns))
    near = (peak // reference_grid.num_tokens == reference) & (down <= 1) & (across <= 1)
    return TargetLooks(*(x.float().mean().item() for x in (on_references, own / on_references, peak == wanted, near)))
