"""The attention rows that the losses supervise: of reference tokens over the target tokens, read out of a block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.model.recomputation import recompute

ROWS_PER_CHUNK = 256  # rows of a sample whose softmax is held at once when all tokens of the references are averaged
MAP_BYTES = 128 * 2**20  # of the float32 rows of some heads that are held at once; a pass holds two such maps
SAVED_BYTES = 4 * 2**20  # a block's rows of all heads are saved for the backward pass up to this size: FLUX.1-dev's never are


@dataclass(frozen=True)
class CaptureRequest:
    """Which attention rows a forward pass, and each captured block in it, shall return.

    Attributes:
        global_index: int64 [B, P], reference tokens G(u) of the supervised points, or None.
        all_tokens: Whether to return the mean row over all tokens of each reference.
        blocks: "all", "double" (the double-stream blocks) or a list of block numbers, double-stream first.
    """

    global_index: Tensor | None = None
    all_tokens: bool = False
    blocks: str | Sequence[int] = "all"

    @property
    def has_rows(self) -> bool:
        """Whether any rows are asked for."""
        return self.global_index is not None or self.all_tokens


class CapturedRows(NamedTuple):
    """Rows of softmax(Q_ref K_tgt / sqrt(D)) over the target tokens, head mean, float32; each row sums to 1.

    Attributes:
        attention_rows: [B, P, N_tgt], one row per supervised point, or None if not asked for.
        reference_rows: [B, K, N_tgt], mean over all tokens of a reference, or None if not asked for.
    """

    attention_rows: Tensor | None = None
    reference_rows: Tensor | None = None


def capture_rows(reference_query: Tensor, target_key: Tensor, num_references: int, capture: CaptureRequest) -> CapturedRows:
    """Read the wanted attention rows of one block, always in float32.

    A row is one summand of Eq. 8 at G(u), over all target tokens; read at the points u_j of a reference they are its a_j of Eq. 11. The
    mean over the blocks is taken by the transformer.

    The softmax runs over the target tokens only, so the block's own attention output cannot be reused. Each piece is
    computed anew in the backward pass: nothing of size [heads, rows, N_tgt] outlives the block.

    Args:
        reference_query: [B, K * N_ref, H, D] after RMSNorm and RoPE.
        target_key: [B, N_tgt, H, D] after RMSNorm and RoPE.
        num_references: K.
        capture: What is wanted; its choice of blocks is not looked at here.
    """
    attention_rows = reference_rows = None
    if capture.global_index is not None:
        attention_rows = _PointRows.apply(reference_query, target_key, capture.global_index)
    if capture.all_tokens:
        per_reference = reference_query.unflatten(1, (num_references, -1))
        chunks = per_reference.split(max(1, ROWS_PER_CHUNK // num_references), dim=2)
        # A checkpoint per chunk, not one around all: the backward pass too then holds the softmax of one chunk at a time.
        reference_rows = sum(_checkpointed(_sum_of_rows, chunk, target_key) for chunk in chunks) / per_reference.shape[2]
    return CapturedRows(attention_rows, reference_rows)


def _checkpointed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return recompute(function, *inputs) if torch.is_grad_enabled() else function(*inputs)


def _softmax_rows(rows: Tensor, target_key: Tensor) -> Tensor:
    """[B, P, H, D], [B, N, H, D] -> [B, H, P, N] float32, outside any autocast."""
    with no_autocast(rows):
        query, key = rows.float().transpose(1, 2), target_key.float().permute(0, 2, 3, 1)
        scores = torch.baddbmm(query.new_zeros(()), query.flatten(0, 1), key.flatten(0, 1), beta=0, alpha=rows.shape[-1] ** -0.5)
        return torch.softmax(scores, dim=-1).unflatten(0, (len(rows), -1))


class _PointRows(torch.autograd.Function):
    """Head-mean rows of some reference tokens, [B, P, N_tgt], computed anew in the backward pass, some heads at a time.

    Written out because it is part of every training step: it keeps only the query and key that the block keeps anyway, holds no map of
    all heads unless that is tiny, and costs less than a general checkpoint with its gathers and slices.
    """

    @staticmethod
    def forward(ctx: Any, reference_query: Tensor, target_key: Tensor, global_index: Tensor) -> Tensor:
        """reference_query [B, K * N_ref, H, D], target_key [B, N_tgt, H, D], global_index [B, P]."""
        rows, heads = _rows_at(reference_query, global_index), reference_query.shape[2]
        if 4 * heads * global_index.numel() * target_key.shape[1] <= SAVED_BYTES:
            attention = _softmax_rows(rows, target_key)
            ctx.save_for_backward(reference_query, target_key, global_index, attention)
            return attention.sum(dim=1) / heads
        ctx.save_for_backward(reference_query, target_key, global_index)
        total: Any = sum(_softmax_rows(*part).sum(dim=1) for part in _head_parts(rows, target_key))
        return total / heads

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Through the head mean, the softmax and the scaled product."""
        reference_query, target_key, global_index, *attention = ctx.saved_tensors
        rows = _rows_at(reference_query, global_index)
        # d(head mean) / d(scores) carries 1 / H and the scores' own 1 / sqrt(D): both once, on the small gradient.
        scaled = gradient[:, None] * (rows.shape[3] ** -0.5 / rows.shape[2])
        if attention:
            rows_gradient, key_gradient = _row_gradients(rows, target_key, scaled, attention[0])
        else:
            parts = [_row_gradients(*part, scaled, _softmax_rows(*part)) for part in _head_parts(rows, target_key)]
            rows_gradient, key_gradient = (torch.cat(gradients, dim=2) for gradients in zip(*parts, strict=True))
        rows_gradient, key_gradient = rows_gradient.to(reference_query), key_gradient.to(target_key)
        # A token may be asked for twice, and padding asks for token 0: gradients of one token are summed, not overwritten.
        query_gradient = reference_query.new_zeros(reference_query.shape)
        flat = global_index + torch.arange(len(rows), device=rows.device)[:, None] * reference_query.shape[1]
        query_gradient.flatten(0, 1).index_add_(0, flat.flatten(), rows_gradient.flatten(0, 1))
        return query_gradient, key_gradient, None


def _row_gradients(rows: Tensor, target_key: Tensor, gradient: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [B, P, H, D] and target_key [B, N, H, D], float32.

    Args:
        rows: The queries of the supervised tokens.
        target_key: The target's keys.
        gradient: [B, 1, P, N], that of the head mean times its factors.
        attention: [B, H, P, N], their softmax.
    """
    with no_autocast(rows):
        # Through the softmax: d scores = A * (g - sum(A * g)), in two passes over one map.
        weighted = attention * gradient
        weighted.addcmul_(attention, weighted.sum(dim=-1, keepdim=True), value=-1)
        rows_gradient = weighted @ target_key.float().transpose(1, 2)  # (B, H, P, D)
        key_gradient = weighted.transpose(2, 3) @ rows.float().transpose(1, 2)  # (B, H, N, D)
    return rows_gradient.transpose(1, 2), key_gradient.transpose(1, 2)


def _head_parts(rows: Tensor, target_key: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows [B, P, H, D] and keys [B, N, H, D] of as many heads at a time as MAP_BYTES allow."""
    one_head = max(1, 4 * rows.shape[0] * rows.shape[1] * target_key.shape[1])
    heads = min(rows.shape[2], max(1, MAP_BYTES // one_head))
    return list(zip(rows.split(heads, dim=2), target_key.split(heads, dim=2), strict=True))


def _rows_at(reference_query: Tensor, global_index: Tensor) -> Tensor:
    """[B, K * N_ref, H, D] and [B, P] -> [B, P, H, D]."""
    return reference_query[torch.arange(len(global_index), device=global_index.device)[:, None], global_index]


def no_autocast(x: Tensor) -> torch.autocast:
    """Context in which operations on `x` take place in its own dtype."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # the meta device knows no autocast


def _sum_of_rows(rows: Tensor, target_key: Tensor) -> Tensor:
    """[B, K, R, H, D], [B, N, H, D] -> [B, K, N]: head mean, summed over the R rows."""
    num_references = rows.shape[1]
    attention = _softmax_rows(rows.flatten(1, 2), target_key)  # (B, H, K * R, N)
    return attention.mean(dim=1).unflatten(1, (num_references, -1)).sum(dim=2)


def resolve_capture_blocks(capture_blocks: str | Sequence[int], num_double: int, num_single: int) -> frozenset[int]:
    """The block numbers that a `capture_blocks` setting names; double-stream blocks come first.

    Args:
        capture_blocks: "all", "double", or a non-empty list of block numbers.
        num_double: Number of double-stream blocks.
        num_single: Number of single-stream blocks.

    Raises:
        ValueError: If the setting is unknown, empty, or names a block that does not exist.
    """
    if isinstance(capture_blocks, str):
        named = {"all": range(num_double + num_single), "double": range(num_double)}
        if capture_blocks not in named:
            raise ValueError(f'capture_blocks must be "all", "double" or a list of block numbers, got {capture_blocks!r}.')
        return frozenset(named[capture_blocks])
    blocks = frozenset(capture_blocks)
    beyond = sorted(b for b in blocks if not 0 <= b < num_double + num_single)
    if beyond or not blocks:
        raise ValueError(
            f"capture_blocks must name blocks of 0..{num_double + num_single - 1} ({num_double} double-stream, then {num_single} "
            f"single-stream), got {sorted(blocks)}."
        )
    return blocks
