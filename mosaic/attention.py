"""Joint attention over [text, target, reference 1..K] and the attention rows that the losses supervise (Eq. 7, 8, 11).

All tensors are [B, S, H, D] (batch, tokens, heads, head dim). Text and target tokens are the *main* tokens: their queries
see every key. What reference queries see is `reference_attention`; it is realised by folding the references into the batch,
so no mask is ever built and nothing is padded. References that are not in the sequence take part by keys and values of an earlier pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mosaic.recomputation import recompute, recompute_copies
from mosaic.strength import Attend, attend_with_bias

ReferenceAttention = Literal["target", "joint", "isolated"]
REFERENCE_ATTENTION_MODES: tuple[str, ...] = get_args(ReferenceAttention)

ROWS_PER_CHUNK = 256  # rows of a sample whose softmax is held at once when all tokens of the references are averaged
MAP_BYTES = 128 * 2**20  # of the float32 rows of some heads that are held at once; a pass holds two such maps


class KeptReferences(NamedTuple):
    """What attention needs of the references in one block: [B, K * N_ref, H, D] each, query and key after RMSNorm and RoPE.

    Attributes:
        key: Their keys.
        value: Their values.
        query: Their queries, from which attention rows are read; None: no rows can be.
    """

    key: Tensor
    value: Tensor
    query: Tensor | None = None


class Layout(NamedTuple):
    """Where the references stand, what they attend to, and how strongly they are attended to.

    Attributes:
        num_references: K.
        num_reference_tokens: N_ref, per reference.
        reference_attention: "target" (text, target and itself), "joint" (everything), "isolated" (only itself).
        log_strength: float32 [B, K], added to the logits of each reference's keys; None: nothing is.
        kept: This block's references from an earlier pass, which then are not in the sequence; None: they close it.
    """

    num_references: int = 0
    num_reference_tokens: int = 0
    reference_attention: str = "target"
    log_strength: Tensor | None = None
    kept: KeptReferences | None = None

    @property
    def length(self) -> int:
        """Number of reference tokens in the sequence: K * N_ref, or 0."""
        return self.num_references * self.num_reference_tokens if self.kept is None else 0

    @property
    def key_bias(self) -> Tensor | None:
        """`log_strength` of every reference token, [B, K * N_ref]."""
        return None if self.log_strength is None else self.log_strength.repeat_interleave(self.num_reference_tokens, dim=1)


class Capture(NamedTuple):
    """What one block reads out of its attention.

    Attributes:
        global_index: int64 [B, P], the reference tokens G(u) whose rows are wanted, or None.
        reference_means: Whether the mean row over all tokens of each reference is wanted.
        references: Whether the references' keys and values are wanted, for later passes without them; with rows also their queries.
    """

    global_index: Tensor | None = None
    reference_means: bool = False
    references: bool = False

    @property
    def rows(self) -> bool:
        """Whether any rows are wanted."""
        return self.global_index is not None or self.reference_means


class AttentionRows(NamedTuple):
    """Rows of softmax(Q_ref K_tgt / sqrt(D)) over the target tokens, head mean, float32; each row sums to 1.

    Attributes:
        points: [B, P, N_tgt], one row per supervised point (Eq. 8 at G(u)), or None if not asked for.
        reference_means: [B, K, N_tgt], mean over all tokens of a reference, or None if not asked for.
    """

    points: Tensor | None = None
    reference_means: Tensor | None = None


class AttentionOutput(NamedTuple):
    """What comes out of one block's attention.

    Attributes:
        main: [B, T + N_tgt, H, D], the text and target tokens.
        references: [B, K * N_ref, H, D], or None without references in the sequence.
        rows: The rows that were wanted; empty if none were.
        kept: The references for later passes, if they were wanted.
    """

    main: Tensor
    references: Tensor | None
    rows: AttentionRows = AttentionRows()
    kept: KeptReferences | None = None


def branch_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, attend: Attend, text_length: int = 0, capture: Capture | None = None
) -> AttentionOutput:
    """Attention of the whole sequence in one of the three modes, without a mask (Eq. 7), and what is wanted of it.

    Args:
        query: [B, S, H, D] after RMSNorm and RoPE, order [text, target, references].
        key: [B, S, H, D] likewise.
        value: [B, S, H, D].
        layout: The references' place and mode.
        attend: Plain attention on [B, S, H, D] tensors, scale 1/sqrt(D); with strengths another scale is given by keyword.
        text_length: T; the target stands between the text and the references. Only `capture` needs it.
        capture: What is wanted; None: nothing.

    Raises:
        ValueError: If the mode is unknown.
    """
    if layout.reference_attention not in REFERENCE_ATTENTION_MODES:
        raise ValueError(f"reference_attention must be one of {REFERENCE_ATTENTION_MODES}, got {layout.reference_attention!r}.")
    if layout.kept is not None:
        return _attention_with_kept(query, key, value, layout, attend, text_length, capture)
    if layout.length == 0:
        return AttentionOutput(attend(query, key, value), None)
    # Every tensor is cut once: the gradient of a cut is one concatenation, that of separate slices a sum of padded copies.
    main_length = query.shape[1] - layout.length
    main_query, reference_query = query.split([main_length, layout.length], dim=1)
    text_key, target_key, reference_key = key.split([text_length, main_length - text_length, layout.length], dim=1)
    main_value, reference_value = value.split([main_length, layout.length], dim=1)
    if layout.reference_attention == "joint":
        main, references = attend_with_bias(attend, query, key, value, layout.key_bias).split([main_length, layout.length], dim=1)
    else:
        if layout.reference_attention == "isolated":
            # One number added to all the logits of a row changes nothing, so that strengths are left out here.
            alone = layout._replace(log_strength=None)
            references = _attend_per_reference(attend, alone, reference_query, [], reference_key, [], reference_value)
        else:
            # K copies of the main tokens' keys and values; kept for the backward pass they would be a quarter of all that is kept.
            per_reference = partial(_attend_per_reference, attend, layout)
            references = recompute_copies(per_reference, reference_query, [text_key, target_key], reference_key, [main_value], reference_value)
        main = attend_with_bias(attend, main_query, key, value, layout.key_bias)
    # Read last, so that in the backward pass the rows' gradients come first: what follows is added to them in place.
    rows = capture_rows(reference_query, target_key, layout, capture) if capture else AttentionRows()
    kept = _keep(reference_query, reference_key, reference_value, capture) if capture and capture.references else None
    return AttentionOutput(main, references, rows, kept)


def _attention_with_kept(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, attend: Attend, text_length: int, capture: Capture | None
) -> AttentionOutput:
    """Attention of text and target over themselves and references of an earlier pass, and their rows with today's target keys."""
    kept = layout.kept
    rows = capture_rows(kept.query, key[:, text_length:], layout, capture) if capture else AttentionRows()
    keys, values = torch.cat([key, kept.key], dim=1), torch.cat([value, kept.value], dim=1)
    return AttentionOutput(attend_with_bias(attend, query, keys, values, layout.key_bias), None, rows)


def _keep(query: Tensor, key: Tensor, value: Tensor, capture: Capture) -> KeptReferences:
    """Copies, because slices would keep the whole sequence."""
    return KeptReferences(key.clone(), value.clone(), query.clone() if capture.rows else None)


def _attend_per_reference(
    attend: Attend,
    layout: Layout,
    query: Tensor,
    shared_keys: Sequence[Tensor],
    key: Tensor,
    shared_values: Sequence[Tensor],
    value: Tensor,
) -> Tensor:
    """Each reference's queries over the shared keys and its own, [B, K * N_ref, H, D]."""
    bias = layout.key_bias
    folded = attend_with_bias(
        attend,
        _per_reference([], query, layout),
        _per_reference(shared_keys, key, layout),
        _per_reference(shared_values, value, layout),
        None if bias is None else bias.unflatten(1, (layout.num_references, -1)).flatten(0, 1),
    )  # (B * K, N_ref, H, D)
    return folded.reshape(query.shape)


def _per_reference(shared: Sequence[Tensor], references: Tensor, layout: Layout) -> Tensor:
    """Folds the references into the batch, behind the shared pieces: [B, S_i, H, D] and [B, K * N_ref, H, D] -> [B * K, S, H, D]."""
    own = references.unflatten(1, (layout.num_references, -1))
    pieces = [piece[:, None].expand(-1, layout.num_references, -1, -1, -1) for piece in shared]
    return (torch.cat([*pieces, own], dim=2) if pieces else own).flatten(0, 1)


def capture_rows(reference_query: Tensor, target_key: Tensor, layout: Layout, capture: Capture) -> AttentionRows:
    """Read the wanted attention rows of one block (Eq. 8, 11), always in float32.

    The softmax runs over the target tokens only, so the block's own attention output cannot be reused. Each piece is
    computed anew in the backward pass: nothing of size [heads, rows, N_tgt] outlives the block.

    Args:
        reference_query: [B, K * N_ref, H, D] after RMSNorm and RoPE.
        target_key: [B, N_tgt, H, D] after RMSNorm and RoPE.
        layout: The references' place.
        capture: What is wanted.
    """
    points = means = None
    if capture.global_index is not None:
        points = _PointRows.apply(reference_query, target_key, capture.global_index)
    if capture.reference_means:
        chunk_rows = max(1, ROWS_PER_CHUNK // layout.num_references)
        chunks = reference_query.unflatten(1, (layout.num_references, -1)).split(chunk_rows, dim=2)
        total = sum(_checkpointed(_sum_of_rows, chunk, target_key) for chunk in chunks)
        means = total / layout.num_reference_tokens
    return AttentionRows(points, means)


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
    all heads, and costs less than a general checkpoint with its gathers and slices.
    """

    @staticmethod
    def forward(ctx: Any, reference_query: Tensor, target_key: Tensor, global_index: Tensor) -> Tensor:
        """reference_query [B, K * N_ref, H, D], target_key [B, N_tgt, H, D], global_index [B, P]."""
        ctx.save_for_backward(reference_query, target_key, global_index)
        parts = _head_parts(_rows_at(reference_query, global_index), target_key)
        return sum(_softmax_rows(*part).sum(dim=1) for part in parts) / reference_query.shape[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Through the head mean, the softmax and the scaled product."""
        reference_query, target_key, global_index = ctx.saved_tensors
        rows = _rows_at(reference_query, global_index)
        scaled = gradient[:, None] * (rows.shape[3] ** -0.5 / rows.shape[2])
        parts = [_row_gradients(*part, scaled) for part in _head_parts(rows, target_key)]
        rows_gradient = torch.cat([part for part, _ in parts], dim=2).to(reference_query)
        key_gradient = torch.cat([part for _, part in parts], dim=2).to(target_key)
        query_gradient = reference_query.new_zeros(reference_query.shape)
        flat = global_index + torch.arange(len(rows), device=rows.device)[:, None] * reference_query.shape[1]
        query_gradient.flatten(0, 1).index_add_(0, flat.flatten(), rows_gradient.flatten(0, 1))
        return query_gradient, key_gradient, None


def _row_gradients(rows: Tensor, target_key: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [B, P, H, D] and target_key [B, N, H, D], float32, from that of their head mean times its factors, [B, 1, P, N]."""
    attention = _softmax_rows(rows, target_key)  # (B, H, P, N)
    with no_autocast(rows):
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
