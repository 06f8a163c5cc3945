"""The two FLUX blocks with a reference branch: they only replace `forward`; weights and names are those of diffusers."""

from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from mosaic.model.attention import AttentionOutput, BlockReferences, Layout, branch_attention
from mosaic.model.attention_rows import CapturedRows, CaptureRequest, no_autocast
from mosaic.model.branch import branch_linear, branch_vectors

FLOAT16_LIMIT = 65504.0
RotaryEmbedding = tuple[Tensor, Tensor] | Tensor
NO_REFERENCES = Layout()


class BlockOutput(NamedTuple):
    """What every block returns.

    Attributes:
        encoder_hidden_states: [B, T, d], text tokens.
        hidden_states: [B, N_tgt + K * N_ref, d], target and reference tokens; [B, N_tgt, d] where the references are
            of an earlier pass or came apart.
        rows: The block's attention rows; empty if nothing was asked for.
        block_references: The block's references for later passes, if they were asked for.
        reference_hidden_states: [B, K * N_ref, d], the reference tokens where they came apart.
    """

    encoder_hidden_states: Tensor
    hidden_states: Tensor
    rows: CapturedRows
    block_references: BlockReferences | None = None
    reference_hidden_states: Tensor | None = None


# In a block, main tokens and references go through the same layers but not the same numbers. Each helper below takes both and keeps them
# apart by `start`, the index of the first reference token; without references everything is main.


class _Branches(NamedTuple):
    """Tokens [B, S, d], or a shift, scale or gate [B, 1, d]: of the main tokens, and of the references (None without them)."""

    main: Tensor
    references: Tensor | None


class _Tokens(NamedTuple):
    """Image or joint tokens [B, S, d], and the references among them as a tensor of their own (None without them)."""

    joined: Tensor
    references: Tensor | None


def _vectors(layer: nn.Module, conditioning: Tensor, count: int) -> list[_Branches]:
    """The AdaLN vectors of both branches, `count` of them."""
    main, references = branch_vectors(layer, conditioning)
    return [
        _Branches(*pair)
        for pair in zip(main.chunk(count, -1), [None] * count if references is None else references.chunk(count, -1), strict=True)
    ]


def _normalize(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """LayerNorm or RMSNorm in the tokens' own dtype (its sums are float32 in any case), of which autocast would keep float32 copies."""
    with no_autocast(hidden_states):
        return norm(hidden_states)


def _modulate(hidden_states: Tensor, shift: _Branches, scale: _Branches, start: int) -> _Tokens:
    """shift + (1 + scale) * x, each branch with its own vectors."""
    factor = _Branches(1 + scale.main, None if scale.references is None else 1 + scale.references)
    return _add_product(shift, factor, _branches(hidden_states, start))


def _add_gated(residual: Tensor, gate: _Branches, hidden_states: Tensor, start: int) -> Tensor:
    """residual + gate * x, each branch with its own vector."""
    return _add_product(_branches(residual, start), gate, _branches(hidden_states, start)).joined


def _branches(tokens: Tensor, start: int) -> _Branches:
    length = tokens.shape[1] - start
    return _Branches(*tokens.split_with_sizes([start, length], dim=1)) if length else _Branches(tokens, None)


def _add_product(added: _Branches, factor: _Branches, tokens: _Branches) -> _Tokens:
    """added + factor * tokens of both branches, in one tensor."""
    if tokens.references is None or added.references is None or factor.references is None:
        return _Tokens((factor.main * tokens.main).add_(added.main), None)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        main = (factor.main * tokens.main).add_(added.main)
        references = (factor.references * tokens.references).add_(added.references)
        return _Tokens(torch.cat([main, references], dim=1), references)
    # Where nothing is kept, both are written into their place at once.
    start, length = tokens.main.shape[1], tokens.references.shape[1]
    joined = tokens.main.new_empty(len(tokens.main), start + length, tokens.main.shape[2])
    main, references = joined.split_with_sizes([start, length], dim=1)
    torch.mul(factor.main, tokens.main, out=main).add_(added.main)
    torch.mul(factor.references, tokens.references, out=references).add_(added.references)
    return _Tokens(joined, references)


def _join(main: Tensor, references: Tensor | None) -> _Tokens:
    return _Tokens(main if references is None else torch.cat([main, references], dim=1), references)


def _with_references(hidden_states: Tensor, start: int) -> _Tokens:
    """Copies the references out where a backward pass will keep them, see `branch_linear`."""
    if not torch.is_grad_enabled() or start == hidden_states.shape[1]:
        return _Tokens(hidden_states, None)
    if torch.compiler.is_compiling():
        return _Tokens(hidden_states, hidden_states[:, start:].clone())
    return _Tokens(*_CopyOut.apply(hidden_states, start))


class _CopyOut(torch.autograd.Function):
    """Tokens as they are, and a copy of the last ones; autograd by itself would add two gradients of full length, one of them zeros."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """tokens [B, S, d]; the copy is of [:, start:]."""
        ctx.start = start
        return tokens.view_as(tokens), tokens[:, start:].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_copy: Tensor) -> tuple[Tensor, None]:
        """Adds the copy's gradient where it belongs, in place: a linear layer's backward pass has made the other for nobody else."""
        gradient[:, ctx.start :].add_(of_copy)
        return gradient, None


def _linear(layer: nn.Module, tokens: _Tokens, start: int) -> Tensor:
    return branch_linear(layer, tokens.joined, start, tokens.references)


def _with_apart(hidden_states: Tensor, references: Tensor | None) -> Tensor:
    return hidden_states if references is None else torch.cat([hidden_states, references], dim=1)


def _output(encoder_hidden_states: Tensor, hidden_states: Tensor, attended: AttentionOutput, start: int, apart: bool) -> BlockOutput:
    """A block's output; `apart`: the references were given apart and come so."""
    captured = attended.rows, attended.block_references
    if not apart:
        return BlockOutput(encoder_hidden_states, hidden_states, *captured)
    return BlockOutput(encoder_hidden_states, hidden_states[:, :start], *captured, hidden_states[:, start:])


def _cut(hidden_states: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first tokens and the others. Compiled blocks give copies, which costs nothing there: the next one then finds its inputs in memory
    as the first one did, and is not compiled anew for slices.
    """
    first, others = hidden_states[:, :length], hidden_states[:, length:]
    if torch.compiler.is_compiling():
        return first.clone(memory_format=torch.contiguous_format), others.clone(memory_format=torch.contiguous_format)
    return first, others


def _clip_float16(hidden_states: Tensor) -> Tensor:
    return hidden_states.clip(-FLOAT16_LIMIT, FLOAT16_LIMIT) if hidden_states.dtype == torch.float16 else hidden_states


def _heads(attn: FluxAttention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (-1, attn.head_dim))


def joint_projections(attn: FluxAttention, text: Tensor, image: _Tokens, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 4: query, key and value of text and target by the bare weights; the references behind them also by their LoRA (`branch_linear`).

    Args:
        attn: The attention module of a double-stream block: `to_q|k|v` for the image stream, `add_q|k|v_proj` for the text.
        text: [B, T, d], modulated.
        image: [B, N_tgt + K * N_ref, d], modulated.
        start: N_tgt, where the references begin.

    Returns:
        [B, T + N_tgt + K * N_ref, H, D] each, query and key after RMSNorm.
    """
    query, key, value = (_heads(attn, _linear(layer, image, start)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    text_query, text_key, text_value = (_heads(attn, layer(text)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    query = torch.cat([_normalize(attn.norm_added_q, text_query), _normalize(attn.norm_q, query)], dim=1)
    key = torch.cat([_normalize(attn.norm_added_k, text_key), _normalize(attn.norm_k, key)], dim=1)
    return query, key, torch.cat([text_value, value], dim=1)


def _attend(
    attn: FluxAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: RotaryEmbedding,
    layout: Layout,
    text_length: int,
    capture: CaptureRequest | None,
) -> AttentionOutput:
    """RoPE, then attention in the layout's mode, its outputs as [B, S, H * D]."""
    query, key = rotate(query, key, rotary)
    attend = partial(dispatch_attention_fn, backend=attn.processor._attention_backend, parallel_config=attn.processor._parallel_config)
    output = branch_attention(query, key, value, layout, attend, text_length, capture)
    references = None if output.references is None else output.references.flatten(2, 3).to(query.dtype)
    return output._replace(main=output.main.flatten(2, 3).to(query.dtype), references=references)


def turns(cosine: Tensor, sine: Tensor) -> Tensor:
    """Cosine and sine of every token, [S, D] each, in which pairs of channels have one angle, as complex numbers [S, 1, D / 2]."""
    return torch.complex(cosine[:, ::2].float(), sine[:, ::2].float())[:, None]


def rotate(query: Tensor, key: Tensor, rotary: RotaryEmbedding) -> tuple[Tensor, Tensor]:
    """RoPE of queries and keys [B, S, H, D], in float32: what diffusers' `apply_rotary_emb` does in six passes, as one complex product."""
    if isinstance(rotary, tuple):
        return apply_rotary_emb(query, rotary, sequence_dim=1), apply_rotary_emb(key, rotary, sequence_dim=1)
    pairs = (torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2)) * rotary for x in (query, key))
    turned_query, turned_key = (torch.view_as_real(pair).flatten(-2).to(query.dtype) for pair in pairs)
    return turned_query, turned_key


class MosaicFluxTransformerBlock(FluxTransformerBlock):
    """Double-stream block with a reference branch in the image stream."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: RotaryEmbedding,
        layout: Layout = NO_REFERENCES,
        capture: CaptureRequest | None = None,
        reference_hidden_states: Tensor | None = None,
    ) -> BlockOutput:
        """Run the block.

        Args:
            hidden_states: [B, N_tgt + K * N_ref, d]; without the references where the layout has those of an earlier pass, or they come
                apart.
            encoder_hidden_states: [B, T, d].
            temb: [B, 1 or 2, d]: the main and, if there are reference tokens, the reference conditioning vector.
            image_rotary_emb: cos and sin of every token, [T + N_tgt + K * N_ref, D] each, or the same as `turns`: less work, but compiled
                blocks know no complex numbers (and fuse the passes that it saves).
            layout: The references' place and attention mode.
            capture: Which attention rows to return.
            reference_hidden_states: [B, K * N_ref, d], the reference tokens apart, for a step cache that looks at the target only.
        """
        hidden_states = _with_apart(hidden_states, reference_hidden_states)
        attn, text_length = self.attn, encoder_hidden_states.shape[1]
        start = hidden_states.shape[1] - layout.length
        conditioning = self.norm1.silu(temb)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = _vectors(self.norm1.linear, conditioning, 6)
        normed = _modulate(_normalize(self.norm1.norm, hidden_states), shift_msa, scale_msa, start)
        text_vectors = _vectors(self.norm1_context.linear, conditioning[:, :1], 6)  # of the main branch, as the text is
        text_shift_msa, text_scale_msa, text_gate_msa, text_shift_mlp, text_scale_mlp, text_gate_mlp = text_vectors
        text = _modulate(_normalize(self.norm1_context.norm, encoder_hidden_states), text_shift_msa, text_scale_msa, text_length).joined

        query, key, value = joint_projections(attn, text, normed, start)
        attended = _attend(attn, query, key, value, image_rotary_emb, layout, text_length, capture)
        attended_text, attended_target = attended.main.split([text_length, start], dim=1)

        attended_image = _linear(attn.to_out[0], _join(attended_target, attended.references), start)
        hidden_states = _add_gated(hidden_states, gate_msa, attn.to_out[1](attended_image), start)
        normed = _modulate(_normalize(self.norm2, hidden_states), shift_mlp, scale_mlp, start)
        inner = _with_references(self.ff.net[1](self.ff.net[0].gelu(_linear(self.ff.net[0].proj, normed, start))), start)
        hidden_states = _add_gated(hidden_states, gate_mlp, _linear(self.ff.net[2], inner, start), start)

        attended_text = attn.to_add_out(attended_text.contiguous())
        encoder_hidden_states = _add_gated(encoder_hidden_states, text_gate_msa, attended_text, text_length)
        text = _modulate(_normalize(self.norm2_context, encoder_hidden_states), text_shift_mlp, text_scale_mlp, text_length).joined
        encoder_hidden_states = _add_gated(encoder_hidden_states, text_gate_mlp, self.ff_context(text), text_length)
        return _output(_clip_float16(encoder_hidden_states), hidden_states, attended, start, apart=reference_hidden_states is not None)


class MosaicFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """Single-stream block with a reference branch."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: RotaryEmbedding,
        layout: Layout = NO_REFERENCES,
        capture: CaptureRequest | None = None,
        reference_hidden_states: Tensor | None = None,
    ) -> BlockOutput:
        """Run the block; arguments as in `MosaicFluxTransformerBlock.forward`."""
        hidden_states = _with_apart(hidden_states, reference_hidden_states)
        attn, text_length = self.attn, encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        start = residual.shape[1] - layout.length
        shift, scale, gate = _vectors(self.norm.linear, self.norm.silu(temb), 3)
        normed = _modulate(_normalize(self.norm.norm, residual), shift, scale, start)

        mlp = self.act_mlp(_linear(self.proj_mlp, normed, start))
        query, key, value = (_heads(attn, _linear(layer, normed, start)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = _normalize(attn.norm_q, query), _normalize(attn.norm_k, key)
        attended = _attend(attn, query, key, value, image_rotary_emb, layout, text_length, capture)

        joined = _with_references(torch.cat([_join(attended.main, attended.references).joined, mlp], dim=2), start)
        output = _linear(self.proj_out, joined, start)
        output = _clip_float16(_add_gated(residual, gate, output, start))
        apart = reference_hidden_states is not None
        return _output(*_cut(output, text_length), attended, start - text_length, apart)
