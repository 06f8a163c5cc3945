"""Where target tokens look among the references: the direction in which looks travel, and which no loss supervises.

A target token takes values from the reference tokens that its query finds. SCAL and MDL supervise the other direction, queries of the
references over keys of the target (Eq. 8), by which a reference token gathers what the target shows.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mosaic.method.correspondence import Points
from mosaic.method.grids import Grid
from mosaic.model.transformer import MosaicFluxTransformer2DModel


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


@contextmanager
def reading_target_rows(transformer: MosaicFluxTransformer2DModel) -> Iterator[list[Tensor]]:
    """While active, every block that runs appends its rows: float32 [B, N_tgt, K * N_ref], head mean of softmax(Q_tgt K^T / sqrt(D)) over
    all keys, text and target among them, of which those of the references are kept.
    """
    rows: list[Tensor] = []
    with ExitStack() as hooks:
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            for handle in _hooks(block, rows):
                hooks.callback(handle.remove)
        yield rows


def _hooks(block: nn.Module, rows: list[Tensor]) -> Iterator[RemovableHandle]:
    """Hooks by which a block appends its rows: its norms put out query and key, its arguments say what stands where."""
    normed: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        normed[name] = output

    def read(_: nn.Module, arguments: tuple[Any, ...], __: Any) -> None:
        text, rotary, layout = arguments[1], arguments[3], arguments[4]
        # Double-stream blocks have norms of their own for the text, whose tokens come first.
        pairs = (("norm_added_q", "norm_q"), ("norm_added_k", "norm_k"))
        joined = (torch.cat([normed.pop(name) for name in names if name in normed], dim=1) for names in pairs)
        query, key = (apply_rotary_emb(tokens, rotary, sequence_dim=1) for tokens in joined)
        start = query.shape[1] - layout.length
        scores = torch.einsum("bthd,bshd->bhts", query[:, text.shape[1] : start].float(), key.float()) * query.shape[-1] ** -0.5
        rows.append(scores.softmax(dim=-1)[..., start:].mean(dim=1))

    for name, module in block.get_submodule("attn").named_children():
        if name.startswith("norm_"):
            yield module.register_forward_hook(partial(keep, name))
    yield block.register_forward_hook(read)


def target_looks(rows: Tensor, points: Points, reference_grid: Grid) -> TargetLooks:
    """Where the target tokens of points look.

    Args:
        rows: [B, N_tgt, K * N_ref], of `reading_target_rows`, averaged over blocks.
        points: The points, at least one.
        reference_grid: Grid of the tokens of one reference.
    """
    sample, place = points.mask.nonzero(as_tuple=True)
    weights = rows[sample, points.target_index[sample, place]].unflatten(1, (points.num_references, -1))  # (points, K, N_ref)
    wanted, reference = points.global_index[sample, place], points.reference[sample, place]
    on_references = weights.sum(dim=(1, 2))
    own = weights[torch.arange(len(weights)), reference].sum(dim=1)
    peak = weights.flatten(1).argmax(dim=1)
    u, found = wanted % reference_grid.num_tokens, peak % reference_grid.num_tokens
    down, across = (abs(part(u) - part(found)) for part in (lambda x: x // reference_grid.columns, lambda x: x % reference_grid.columns))
    near = (peak // reference_grid.num_tokens == reference) & (down <= 1) & (across <= 1)
    return TargetLooks(*(x.float().mean().item() for x in (on_references, own / on_references, peak == wanted, near)))
