"""Joint attention over [text, target, reference 1..K] in its three modes.

All tensors are [B, S, H, D] (batch, tokens, heads, head dim). Text and target tokens are the *main* tokens: their queries
see every key. What reference queries see is `reference_attention`; it is realised by folding the references into the batch,
so no mask is ever built and nothing is padded. References that are not in the sequence take part by keys and values of an earlier pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mosaic.model.attention_rows import CapturedRows, CaptureRequest, TargetTokens, capture_rows
from mosaic.model.recomputation import made_anew
from mosaic.model.strength import Attend, attend_with_bias

ReferenceAttention = Literal["target", "joint", "isolated"]
REFERENCE_ATTENTION_MODES: tuple[str, ...] = get_args(ReferenceAttention)


class BlockReferences(NamedTuple):
    """What attention needs of the references in one block: [B, K * N_ref, H, D] each, query and key after RMSNorm and RoPE.

    Attributes:
        key: What text and target tokens are compared with.
        value: What they take over.
        query: What attention rows are read from; None: no rows can be.
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
        block_references: This block's references from an earlier pass, which then are not in the sequence; None: they close it.
        keep_references: Whether the block returns its references for later passes.
        edit: What replaces the output of attention for some tokens, where a measurement asks what they carry; None: nothing does.
    """

    num_references: int = 0
    num_reference_tokens: int = 0
    reference_attention: str = "target"
    log_strength: Tensor | None = None
    block_references: BlockReferences | None = None
    keep_references: bool = False
    edit: "AttentionEdit | None" = None

    @property
    def length(self) -> int:
        """Number of reference tokens in the sequence: K * N_ref, or 0."""
        return self.num_references * self.num_reference_tokens if self.block_references is None else 0

    @property
    def key_bias(self) -> Tensor | None:
        """`log_strength` of every reference token, [B, K * N_ref]."""
        return None if self.log_strength is None else self.log_strength.repeat_interleave(self.num_reference_tokens, dim=1)


class AttentionInputs(NamedTuple):
    """What attention is computed from: [B, S, H, D] each, query and key after RMSNorm and RoPE, order [text, target, references].

    Attributes:
        query: Of all tokens.
        key: Of all tokens.
        value: Of all tokens.
        layout: The references' place and mode.
        text_length: T.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: Layout
    text_length: int


#: Of the inputs, the main tokens' output [B, T + N_tgt, H, D] and the references' [B, K * N_ref, H, D] makes both anew.
AttentionEdit = Callable[[AttentionInputs, Tensor, Tensor], tuple[Tensor, Tensor]]


class AttentionOutput(NamedTuple):
    """What comes out of one block's attention.

    Attributes:
        main: [B, T + N_tgt, H, D], the text and target tokens.
        references: [B, K * N_ref, H, D], or None without references in the sequence.
        rows: The rows that were wanted; empty if none were.
        block_references: The references for later passes, if they were wanted.
    """

    main: Tensor
    references: Tensor | None
    rows: CapturedRows = CapturedRows()
    block_references: BlockReferences | None = None


def branch_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, attend: Attend, text_length: int = 0, capture: CaptureRequest | None = None
) -> AttentionOutput:
    """Joint attention, Eq. 7: of the whole sequence, in one of the three modes and without a mask; and the rows wanted of it.

    Args:
        query: [B, S, H, D] after RMSNorm and RoPE, order [text, target, references].
        key: [B, S, H, D] after RMSNorm and RoPE, in the same order.
        value: [B, S, H, D], in the same order.
        layout: The references' place and mode.
        attend: Plain attention on [B, S, H, D] tensors, scale 1/sqrt(D); with strengths another scale is given by keyword.
        text_length: T; the target stands between the text and the references. Only `capture` needs it.
        capture: The rows that are wanted; None: none.

    Raises:
        ValueError: If the mode is unknown.
    """
    if layout.reference_attention not in REFERENCE_ATTENTION_MODES:
        raise ValueError(f"reference_attention must be one of {REFERENCE_ATTENTION_MODES}, got {layout.reference_attention!r}.")
    if layout.block_references is not None:
        return _attention_with_earlier(query, key, value, layout, layout.block_references, attend, text_length, capture)
    if layout.length == 0:
        return AttentionOutput(attend(query, key, value), None)
    # Every tensor is cut once: the gradient of a cut is one concatenation, that of separate slices a sum of padded copies.
    main_length = query.shape[1] - layout.length
    main_query, reference_query = query.split([main_length, layout.length], dim=1)
    text_key, target_key, reference_key = key.split([text_length, main_length - text_length, layout.length], dim=1)
    main_value, reference_value = value.split([main_length, layout.length], dim=1)
    # One reference alone sees the same in both modes.
    if layout.reference_attention == "joint" or (layout.reference_attention == "target" and layout.num_references == 1):
        attended = attend_with_bias(attend, query, key, value, layout.key_bias)
        main, references = attended.split([main_length, layout.length], dim=1)
    else:
        if layout.reference_attention == "isolated":
            # One number added to all the logits of a row changes nothing, so that strengths are left out here.
            alone = layout._replace(log_strength=None)
            references = _attend_per_reference(attend, alone, reference_query, [], reference_key, [], reference_value)
        else:
            main_keys = [text_key, target_key]
            references = _attend_per_reference(attend, layout, reference_query, main_keys, reference_key, [main_value], reference_value)
        main = attend_with_bias(attend, main_query, key, value, layout.key_bias)
    if layout.edit is not None:
        main, references = layout.edit(AttentionInputs(query, key, value, layout, text_length), main, references)
    # Read last, so that in the backward pass the rows' gradients come first: what follows is added to them in place.
    rows, target = CapturedRows(), None
    if capture is not None:
        if capture.target_keys is not None:
            # Text and target see every key in all modes, with its strength.
            keys = key if capture.target_keys == "all" else reference_key
            target = TargetTokens(main_query, keys, text_length, layout.key_bias)
        rows = capture_rows(reference_query, target_key, layout.num_references, capture, target)
    if not layout.keep_references:
        return AttentionOutput(main, references, rows)
    # Copies, because slices would keep the whole sequence. Queries are needed only where rows will be read from them again.
    query_again = reference_query.clone() if capture is not None and capture.has_rows else None
    return AttentionOutput(main, references, rows, BlockReferences(reference_key.clone(), reference_value.clone(), query_again))


def _attention_with_earlier(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    earlier: BlockReferences,
    attend: Attend,
    text_length: int,
    capture: CaptureRequest | None,
) -> AttentionOutput:
    """Attention of text and target over themselves and references of an earlier pass, and their rows with today's target keys."""
    rows = CapturedRows()
    if capture is not None:
        assert earlier.query is not None  # the transformer has asked for it
        rows = capture_rows(earlier.query, key[:, text_length:], layout.num_references, capture)
    keys, values = torch.cat([key, earlier.key], dim=1), torch.cat([value, earlier.value], dim=1)
    return AttentionOutput(attend_with_bias(attend, query, keys, values, layout.key_bias), None, rows)


def _attend_per_reference(
    attend: Attend,
    layout: Layout,
    query: Tensor,
    shared_keys: Sequence[Tensor],
    key: Tensor,
    shared_values: Sequence[Tensor],
    value: Tensor,
) -> Tensor:
    """Each reference's queries over the shared keys and its own, [B, K * N_ref, H, D].

    References that must not see each other become rows of the batch, each with its own copy of the shared keys: that is the mask, exactly
    and in any attention kernel.
    """
    bias = layout.key_bias
    keys, values = _per_reference(shared_keys, key, layout), _per_reference(shared_values, value, layout)
    # K copies of the main tokens' keys and values; kept for the backward pass they would be a quarter of all that is kept.
    copies = []
    if shared_keys and torch.is_grad_enabled():
        copies = [
            (keys, partial(_per_reference, [piece.detach() for piece in shared_keys], key.detach(), layout)),
            (values, partial(_per_reference, [piece.detach() for piece in shared_values], value.detach(), layout)),
        ]
    with made_anew(copies):
        folded = attend_with_bias(
            attend,
            _per_reference([], query, layout),
            keys,
            values,
            None if bias is None else bias.unflatten(1, (layout.num_references, -1)).flatten(0, 1),
        )  # (B * K, N_ref, H, D)
    return folded.reshape(query.shape)


def _per_reference(shared: Sequence[Tensor], references: Tensor, layout: Layout) -> Tensor:
    """Folds the references into the batch, behind the shared pieces: [B, S_i, H, D] and [B, K * N_ref, H, D] -> [B * K, S, H, D]."""
    own = references.unflatten(1, (layout.num_references, -1))
    pieces = [piece[:, None].expand(-1, layout.num_references, -1, -1, -1) for piece in shared]
    return (torch.cat([*pieces, own], dim=2) if pieces else own).flatten(0, 1)
