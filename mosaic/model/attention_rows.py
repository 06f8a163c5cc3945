"""The attention rows that the losses supervise, read out of a block: of reference tokens over the target tokens, and where asked for of
target tokens over the references.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
        target_index: int64 [B, P], target tokens v of the points, or None. Only the two that follow need it.
        target_keys: Which keys the softmax of the rows of target tokens runs over: "all" or "references"; None: no such rows.
        each_head: Whether to return `HeadWeights`, in place of the target rows.
    """

    global_index: Tensor | None = None
    all_tokens: bool = False
    blocks: str | Sequence[int] = "all"
    target_index: Tensor | None = None
    target_keys: str | None = None
    each_head: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether any rows are asked for."""
        return self.global_index is not None or self.all_tokens or self.target_index is not None


class HeadWeights(NamedTuple):
    """What single heads give to the points, float32 [B, H, P] each: of one block, or of all captured blocks one after the other.

    Attributes:
        correspondence: Weight of the row of reference token G(u) at target token v.
        target_correspondence: Weight of the row of target token v at reference token G(u), or None if no target rows were asked for.
        own_reference: Sum of that row over the tokens of the point's own reference, or None likewise.
    """

    correspondence: Tensor
    target_correspondence: Tensor | None = None
    own_reference: Tensor | None = None


class CapturedRows(NamedTuple):
    """Rows of a block, head mean, float32; None each if not asked for.

    Attributes:
        attention_rows: [B, P, N_tgt], one row per supervised point: softmax(Q_ref K_tgt / sqrt(D)) over the target tokens; sums to 1.
        reference_rows: [B, K, N_tgt], the mean of such rows over all tokens of a reference.
        target_rows: [B, P, K * N_ref], one row per supervised point: softmax(Q_tgt K / sqrt(D)) over all keys or the references', at the
            references' tokens. Sums to the mass on the references, 1 where the softmax knows only these.
        head_weights: At the points, of every head apart.
    """

    attention_rows: Tensor | None = None
    reference_rows: Tensor | None = None
    target_rows: Tensor | None = None
    head_weights: HeadWeights | None = None


class TargetTokens(NamedTuple):
    """What rows of target tokens are read from.

    Attributes:
        query: [B, T + N_tgt, H, D], text and target, after RMSNorm and RoPE.
        key: [B, S, H, D], all keys with those of the references last, or these alone.
        start: Index of the first target token among the queries, T.
        key_bias: float32 [B, K * N_ref], added to the logits of the references' keys as in the block's attention, or None.
    """

    query: Tensor
    key: Tensor
    start: int
    key_bias: Tensor | None


def capture_rows(
    reference_query: Tensor, target_key: Tensor, num_references: int, capture: CaptureRequest, target: TargetTokens | None = None
) -> CapturedRows:
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
        target: Where the request has `target_keys`, what these rows are read from.
    """
    attention_rows = reference_rows = target_rows = head_weights = None
    if capture.global_index is not None:
        attention_rows = _PointRows.apply(reference_query, target_key, capture.global_index)
    if capture.all_tokens:
        per_reference = reference_query.unflatten(1, (num_references, -1))
        chunks = per_reference.split(max(1, ROWS_PER_CHUNK // num_references), dim=2)
        # A checkpoint per chunk, not one around all: the backward pass too then holds the softmax of one chunk at a time.
        reference_rows = sum(_checkpointed(_sum_of_rows, chunk, target_key) for chunk in chunks) / per_reference.shape[2]
    if capture.each_head:
        head_weights = _head_weights(reference_query, target_key, num_references, capture, target)
    elif target is not None:
        assert capture.target_index is not None
        first = target.key.shape[1] - reference_query.shape[1]
        target_rows = _PointRows.apply(target.query, target.key, target.start + capture.target_index, target.key_bias, first)
    return CapturedRows(attention_rows, reference_rows, target_rows, head_weights)


def _head_weights(
    reference_query: Tensor, target_key: Tensor, num_references: int, capture: CaptureRequest, target: TargetTokens | None
) -> HeadWeights:
    """The weights at the points, of every head; arguments as of `capture_rows`."""
    assert capture.global_index is not None
    assert capture.target_index is not None
    rows, length = _rows_at(reference_query, capture.global_index), reference_query.shape[1]
    parts = [_checkpointed(_weights_at, *part, capture.target_index) for part in _head_parts(rows, target_key)]
    correspondence = torch.cat(parts, dim=1)
    if target is None:
        return HeadWeights(correspondence)
    rows = _rows_at(target.query, target.start + capture.target_index)
    pairs = [
        _checkpointed(_weights_at_references, *part, capture.global_index, target.key_bias, num_references, length)
        for part in _head_parts(rows, target.key)
    ]
    return HeadWeights(correspondence, *(torch.cat(weights, dim=1) for weights in zip(*pairs, strict=True)))


def _weights_at(rows: Tensor, target_key: Tensor, index: Tensor) -> Tensor:
    """[B, P, H, D], [B, N, H, D] and [B, P] -> [B, H, P]: each row's weight at its index."""
    return _pick(_softmax_rows(rows, target_key), index)


def _weights_at_references(
    rows: Tensor, key: Tensor, global_index: Tensor, key_bias: Tensor | None, num_references: int, length: int
) -> tuple[Tensor, Tensor]:
    """[B, P, H, D] and [B, S, H, D] -> twice [B, H, P]: a row's weight at G(u), and its sum over that reference; `length` is K * N_ref."""
    of_references = _softmax_rows(rows, key, key_bias)[..., key.shape[1] - length :]
    sums = of_references.unflatten(-1, (num_references, -1)).sum(dim=-1)
    return _pick(of_references, global_index), _pick(sums, global_index // (length // num_references))


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """[B, H, P, N] at [B, P] -> [B, H, P]."""
    return rows.gather(3, index[:, None, :, None].expand(-1, rows.shape[1], -1, -1)).squeeze(3)


def _checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    return recompute(function, *inputs) if torch.is_grad_enabled() else function(*inputs)


def _softmax_rows(rows: Tensor, keys: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, P, H, D], [B, N, H, D] -> [B, H, P, N] float32, outside any autocast; bias [B, n] is added to the logits of the last keys."""
    with no_autocast(rows):
        scores = _product(rows.transpose(1, 2).flatten(0, 1), keys.permute(0, 2, 3, 1).flatten(0, 1), rows.shape[-1] ** -0.5)
        scores = scores.unflatten(0, (len(rows), -1))
        if bias is not None:
            scores = scores + torch.nn.functional.pad(bias, (keys.shape[1] - bias.shape[1], 0))[:, None, None]
        return torch.softmax(scores, dim=-1)


def _product(first: Tensor, second: Tensor, scale: float = 1.0) -> Tensor:
    """scale * first @ second, [M, P, D] and [M, D, N] -> [M, P, N] float32, with sums in float32 whatever the inputs are.

    A GPU takes bfloat16 and float16 as they are, at many times the speed of float32. Elsewhere, where no kernel does, float32 copies hold
    them exactly: the result is the same but for the order of sums.
    """
    is_half = first.dtype == second.dtype and first.dtype in (torch.bfloat16, torch.float16)
    needs_gradient = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)  # of which this product has none
    if is_half and (first.is_cuda or first.is_meta) and not needs_gradient:  # what is planned on the meta device is for GPUs
        return torch.bmm(first, second, out_dtype=torch.float32).mul_(scale)
    first, second = first.float(), second.float()
    return torch.baddbmm(first.new_zeros(()), first, second, beta=0, alpha=scale)


class _PointRows(torch.autograd.Function):
    """Head-mean rows of some tokens over keys, [B, P, N], computed anew in the backward pass, some heads at a time.

    Written out because it is part of every training step: it keeps only the query and key that the block keeps anyway, holds no map of
    all heads unless that is tiny, and costs less than a general checkpoint with its gathers and slices.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, index: Tensor, bias: Tensor | None = None, first: int = 0) -> Tensor:
        """query [B, M, H, D], key [B, S, H, D], index [B, P] of queries, bias [B, n] of the last keys -> [B, P, S - first], the weights at
        the keys from `first` on.
        """
        rows, heads = _rows_at(query, index), query.shape[2]
        ctx.first = first
        if 4 * heads * index.numel() * key.shape[1] <= SAVED_BYTES:
            attention = _softmax_rows(rows, key, bias)
            ctx.save_for_backward(query, key, index, bias, attention)
            return attention[..., first:].sum(dim=1) / heads
        ctx.save_for_backward(query, key, index, bias)
        total: Any = sum(_softmax_rows(*part, bias)[..., first:].sum(dim=1) for part in _head_parts(rows, key))
        return total / heads

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Through the head mean, the softmax and the scaled product."""
        query, key, index, bias, *attention = ctx.saved_tensors
        rows = _rows_at(query, index)
        # d(head mean) / d(scores) carries 1 / H and the scores' own 1 / sqrt(D): both once, on the small gradient.
        scaled = gradient[:, None] * (rows.shape[3] ** -0.5 / rows.shape[2])
        if ctx.first:  # weights that were not returned have no gradient of their own, but a share in the softmax
            scaled = torch.nn.functional.pad(scaled, (ctx.first, 0))
        if attention:
            rows_gradient, key_gradient = _row_gradients(rows, key, scaled, attention[0])
        else:
            parts = [_row_gradients(*part, scaled, _softmax_rows(*part, bias)) for part in _head_parts(rows, key)]
            rows_gradient, key_gradient = (torch.cat(gradients, dim=2) for gradients in zip(*parts, strict=True))
        rows_gradient, key_gradient = rows_gradient.to(query), key_gradient.to(key)
        # A token may be asked for twice, and padding asks for one token: gradients of one token are summed, not overwritten.
        query_gradient = query.new_zeros(query.shape)
        flat = index + torch.arange(len(rows), device=rows.device)[:, None] * query.shape[1]
        query_gradient.flatten(0, 1).index_add_(0, flat.flatten(), rows_gradient.flatten(0, 1))
        return query_gradient, key_gradient, None, None, None


def _row_gradients(rows: Tensor, keys: Tensor, gradient: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [B, P, H, D] and keys [B, N, H, D], float32; of bfloat16 ones by products of bfloat16 with float32 sums.

    The scores' gradient is rounded for that to the inputs' own 8 bits, as in attention kernels. With H = 24, D = 128, P = 64, N = 1024 the
    gradients are within 0.25 % of float64 (norm of the difference over norm), of which 0.17 % are the rounding of the result to bfloat16;
    the weights themselves, whose products and softmax are float32, within 2e-6.

    Args:
        rows: The queries of the supervised tokens.
        keys: What they are compared with.
        gradient: [B, 1, P, N], that of the head mean times its factors.
        attention: [B, H, P, N], their softmax.
    """
    with no_autocast(rows):
        # Through the softmax: d scores = A * (g - sum(A * g)), in two passes over one map.
        weighted = attention * gradient
        weighted.addcmul_(attention, weighted.sum(dim=-1, keepdim=True), value=-1)
        if keys.dtype == torch.bfloat16:  # float16 has no room for numbers that small
            weighted = weighted.to(keys.dtype)
        heads = weighted.flatten(0, 1)  # (B * H, P, N)
        rows_gradient = _product(heads, keys.transpose(1, 2).flatten(0, 1)).unflatten(0, weighted.shape[:2])  # (B, H, P, D)
        key_gradient = _product(heads.mT, rows.transpose(1, 2).flatten(0, 1)).unflatten(0, weighted.shape[:2])  # (B, H, N, D)
    return rows_gradient.transpose(1, 2), key_gradient.transpose(1, 2)


def _head_parts(rows: Tensor, keys: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows [B, P, H, D] and keys [B, N, H, D] of as many heads at a time as MAP_BYTES allow."""
    one_head = max(1, 4 * rows.shape[0] * rows.shape[1] * keys.shape[1])
    heads = min(rows.shape[2], max(1, MAP_BYTES // one_head))
    return list(zip(rows.split(heads, dim=2), keys.split(heads, dim=2), strict=True))


def _rows_at(query: Tensor, index: Tensor) -> Tensor:
    """[B, M, H, D] and [B, P] -> [B, P, H, D]."""
    return query[torch.arange(len(index), device=index.device)[:, None], index]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which operations on `x` take place in its own dtype."""
    device = "cpu" if x.is_meta else x.device.type  # the meta device knows no autocast
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


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
