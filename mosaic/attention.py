"""Joint attention over [text, target, reference 1..K] and the attention rows that the losses supervise (Eq. 7, 8, 11).

All tensors are [B, S, H, D] (batch, tokens, heads, head dim). Text and target tokens are the *main* tokens: their queries
see every key. What reference queries see is `reference_attention`; it is realised by folding the references into the batch,
so no mask is ever built and nothing is padded.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ReferenceAttention = Literal["target", "joint", "isolated"]
REFERENCE_ATTENTION_MODES: tuple[str, ...] = get_args(ReferenceAttention)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

ROWS_PER_CHUNK = 256  # rows of a reference whose softmax is held at once when all its tokens are averaged


class Layout(NamedTuple):
    """Where the references stand in the packed sequence, and what they attend to.

    Attributes:
        num_references: K.
        num_reference_tokens: N_ref, per reference.
        reference_attention: "target" (text, target and itself), "joint" (everything), "isolated" (only itself).
    """

    num_references: int = 0
    num_reference_tokens: int = 0
    reference_attention: str = "target"

    @property
    def length(self) -> int:
        """Number of reference tokens, K * N_ref; they close the sequence."""
        return self.num_references * self.num_reference_tokens


class Capture(NamedTuple):
    """What one block reads out of its attention.

    Attributes:
        global_index: int64 [B, P], the reference tokens G(u) whose rows are wanted, or None.
        reference_means: Whether the mean row over all tokens of each reference is wanted.
    """

    global_index: Tensor | None = None
    reference_means: bool = False


class AttentionRows(NamedTuple):
    """Rows of softmax(Q_ref K_tgt / sqrt(D)) over the target tokens, head mean, float32; each row sums to 1.

    Attributes:
        points: [B, P, N_tgt], one row per supervised point (Eq. 8 at G(u)), or None if not asked for.
        reference_means: [B, K, N_tgt], mean over all tokens of a reference, or None if not asked for.
    """

    points: Tensor | None = None
    reference_means: Tensor | None = None


def branch_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, attend: Attend) -> Tensor:
    """Attention of the whole sequence in one of the three modes, without a mask (Eq. 7).

    Args:
        query: [B, S, H, D], order [text, target, references].
        key: [B, S, H, D].
        value: [B, S, H, D].
        layout: The references' place and mode.
        attend: Plain attention on [B, S, H, D] tensors, scale 1/sqrt(D).

    Returns:
        [B, S, H, D].

    Raises:
        ValueError: If the mode is unknown.
    """
    if layout.reference_attention not in REFERENCE_ATTENTION_MODES:
        raise ValueError(f"reference_attention must be one of {REFERENCE_ATTENTION_MODES}, got {layout.reference_attention!r}.")
    if layout.length == 0 or layout.reference_attention == "joint":
        return attend(query, key, value)
    start = query.shape[1] - layout.length
    main = attend(query[:, :start], key, value)
    reference_query, reference_key, reference_value = (_fold(x[:, start:], layout) for x in (query, key, value))
    if layout.reference_attention == "target":
        reference_key = torch.cat([_repeat(key[:, :start], layout), reference_key], dim=1)
        reference_value = torch.cat([_repeat(value[:, :start], layout), reference_value], dim=1)
    reference = attend(reference_query, reference_key, reference_value)  # (B * K, N_ref, H, D)
    return torch.cat([main, reference.reshape(len(query), layout.length, *reference.shape[2:])], dim=1)


def _fold(x: Tensor, layout: Layout) -> Tensor:
    """[B, K * N_ref, H, D] -> [B * K, N_ref, H, D]."""
    return x.reshape(-1, layout.num_reference_tokens, *x.shape[2:])


def _repeat(x: Tensor, layout: Layout) -> Tensor:
    """[B, S, H, D] -> [B * K, S, H, D], each sample's main tokens once per reference."""
    return x[:, None].expand(-1, layout.num_references, -1, -1, -1).flatten(0, 1)


def capture_rows(query: Tensor, key: Tensor, layout: Layout, num_target_tokens: int, capture: Capture) -> AttentionRows:
    """Read the wanted attention rows of one block (Eq. 8, 11), always in float32.

    The softmax runs over the target tokens only, so the block's own attention output cannot be reused. Each piece is
    computed anew in the backward pass: nothing of size [heads, rows, N_tgt] outlives the block.

    Args:
        query: [B, S, H, D] after RMSNorm and RoPE.
        key: [B, S, H, D] after RMSNorm and RoPE.
        layout: The references' place.
        num_target_tokens: N_tgt; the target stands right before the references.
        capture: What is wanted.
    """
    start = query.shape[1] - layout.length
    points = means = None
    if capture.global_index is not None:
        points = _PointRows.apply(query, key, start + capture.global_index, start - num_target_tokens, start)
    if capture.reference_means:
        target_key = key[:, start - num_target_tokens : start]
        chunks = query[:, start:].unflatten(1, (layout.num_references, -1)).split(ROWS_PER_CHUNK, dim=2)
        total = sum(_checkpointed(_sum_of_rows, chunk, target_key) for chunk in chunks)
        means = total / layout.num_reference_tokens
    return AttentionRows(points, means)


def _checkpointed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _softmax_rows(rows: Tensor, target_key: Tensor) -> Tensor:
    """[B, P, H, D], [B, N, H, D] -> [B, H, P, N] float32, outside any autocast."""
    with _no_autocast(rows):
        query, key = rows.float().transpose(1, 2) * rows.shape[-1] ** -0.5, target_key.float().permute(0, 2, 3, 1)
        return torch.softmax(query @ key, dim=-1)


class _PointRows(torch.autograd.Function):
    """Head-mean rows at some positions, [B, P, N_tgt], computed anew in the backward pass.

    Written out because it is part of every training step: it keeps only the query and key that the block keeps anyway, and costs
    less than a general checkpoint with its gathers and slices.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, position: Tensor, first: int, last: int) -> Tensor:
        """query, key [B, S, H, D]; position [B, P] of the rows; the target tokens are first..last - 1."""
        ctx.save_for_backward(query, key, position)
        ctx.first, ctx.last = first, last
        rows, _ = _rows_at(query, position)
        return _softmax_rows(rows, key[:, first:last]).mean(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Through the head mean, the softmax and the scaled product."""
        query, key, position = ctx.saved_tensors
        rows, flat = _rows_at(query, position)
        target_key = key[:, ctx.first : ctx.last]
        with _no_autocast(query):
            attention = _softmax_rows(rows, target_key)  # (B, H, P, N)
            weighted = attention * (gradient[:, None] * (query.shape[3] ** -0.5 / query.shape[2]))
            weighted -= attention * weighted.sum(dim=-1, keepdim=True)
            rows_gradient = (weighted @ target_key.float().transpose(1, 2)).transpose(1, 2)  # (B, P, H, D)
            target_gradient = (weighted.transpose(2, 3) @ rows.float().transpose(1, 2)).transpose(1, 2)  # (B, N, H, D)
        query_gradient, key_gradient = query.new_zeros(query.shape), key.new_zeros(key.shape)
        query_gradient.flatten(0, 1).index_add_(0, flat, rows_gradient.to(query.dtype).flatten(0, 1))
        key_gradient[:, ctx.first : ctx.last] = target_gradient
        return query_gradient, key_gradient, None, None, None


def _rows_at(query: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] and [B, P] -> rows [B, P, H, D], and their indices [B * P] among all B * S tokens."""
    offset = torch.arange(len(query), device=query.device)[:, None] * query.shape[1]
    flat = (position + offset).flatten()
    return query.flatten(0, 1).index_select(0, flat).unflatten(0, position.shape), flat


def _no_autocast(x: Tensor) -> torch.autocast:
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
