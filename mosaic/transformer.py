"""FLUX with a reference branch (Eq. 4-8): stock modules and weights, one joint sequence [text, target, reference 1..K].

Text and target tokens see the bare base weights at timestep t; reference tokens see base + LoRA at timestep 0. Both block
classes only replace `forward`: weights, names and files are those of diffusers.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from mosaic.attention import AttentionRows, Capture, Layout, branch_attention, capture_rows, resolve_capture_blocks
from mosaic.lora import branch_linear

FLOAT16_LIMIT = 65504.0
RotaryEmbedding = tuple[Tensor, Tensor]


class BlockOutput(NamedTuple):
    """What every block returns.

    Attributes:
        encoder_hidden_states: [B, T, d], text tokens.
        hidden_states: [B, N_tgt + K * N_ref, d], target and reference tokens.
        rows: The block's attention rows; empty if nothing was asked for.
    """

    encoder_hidden_states: Tensor
    hidden_states: Tensor
    rows: AttentionRows


@dataclass(frozen=True)
class CaptureRequest:
    """Which attention rows the transformer shall return.

    Attributes:
        global_index: int64 [B, P], reference tokens G(u) of the supervised points, or None.
        reference_means: Whether to return the mean row over all tokens of each reference.
        blocks: "all", "double" (the double-stream blocks) or a list of block numbers, double-stream first.
    """

    global_index: Tensor | None = None
    reference_means: bool = False
    blocks: str | Sequence[int] = "all"


@dataclass
class MosaicTransformerOutput(BaseOutput):
    """Output of `MosaicFluxTransformer2DModel`.

    Attributes:
        sample: [B, N_tgt, C], the predicted velocity, noise - latents.
        attention_rows: float32 [B, P, N_tgt], mean over heads and captured blocks (Eq. 8 at G(u)), or None.
        reference_rows: float32 [B, K, N_tgt], the mean over all tokens of each reference, or None.
    """

    sample: Tensor
    attention_rows: Tensor | None = None
    reference_rows: Tensor | None = None


def _modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor, start: int) -> Tensor:
    """x * (1 + scale) + shift, with one vector for the main tokens and one for the references: shift, scale [B, 1 or 2, d]."""
    if shift.shape[1] == 1:
        return hidden_states * (1 + scale) + shift
    main = hidden_states[:, :start] * (1 + scale[:, :1]) + shift[:, :1]
    return torch.cat([main, hidden_states[:, start:] * (1 + scale[:, 1:]) + shift[:, 1:]], dim=1)


def _gate(hidden_states: Tensor, gate: Tensor, start: int) -> Tensor:
    """gate * x with one vector per branch: gate [B, 1 or 2, d]."""
    if gate.shape[1] == 1:
        return gate * hidden_states
    return torch.cat([gate[:, :1] * hidden_states[:, :start], gate[:, 1:] * hidden_states[:, start:]], dim=1)


def _clip_float16(hidden_states: Tensor) -> Tensor:
    return hidden_states.clip(-FLOAT16_LIMIT, FLOAT16_LIMIT) if hidden_states.dtype == torch.float16 else hidden_states


def _heads(attn: FluxAttention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (-1, attn.head_dim))


def _attend(attn: FluxAttention, query: Tensor, key: Tensor, value: Tensor, rotary: RotaryEmbedding, layout: Layout) -> tuple[Tensor, ...]:
    """RoPE, then attention in the layout's mode. Returns the output [B, S, H * D] and the rotated query and key."""
    query = apply_rotary_emb(query, rotary, sequence_dim=1)
    key = apply_rotary_emb(key, rotary, sequence_dim=1)
    attend = partial(dispatch_attention_fn, backend=attn.processor._attention_backend, parallel_config=attn.processor._parallel_config)
    output = branch_attention(query, key, value, layout, attend)
    return output.flatten(2, 3).to(query.dtype), query, key


class MosaicFluxTransformerBlock(FluxTransformerBlock):
    """Double-stream block with a reference branch in the image stream."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: RotaryEmbedding,
        layout: Layout = Layout(),
        capture: Capture | None = None,
    ) -> BlockOutput:
        """Run the block.

        Args:
            hidden_states: [B, N_tgt + K * N_ref, d].
            encoder_hidden_states: [B, T, d].
            temb: [B, 1 or 2, d]: the main and, if there are references, the reference conditioning vector.
            image_rotary_emb: cos and sin, [T + N_tgt + K * N_ref, D] each.
            layout: The references' place and attention mode.
            capture: Which attention rows to return.
        """
        attn, text_length = self.attn, encoder_hidden_states.shape[1]
        start = hidden_states.shape[1] - layout.length
        modulation = branch_linear(self.norm1.linear, self.norm1.silu(temb), 1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        normed = _modulate(self.norm1.norm(hidden_states), shift_msa, scale_msa, start)
        text, text_gate_msa, text_shift_mlp, text_scale_mlp, text_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb[:, 0])

        query, key, value = (_heads(attn, branch_linear(layer, normed, start)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        text_query, text_key, text_value = (_heads(attn, layer(text)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        query = torch.cat([attn.norm_added_q(text_query), attn.norm_q(query)], dim=1)
        key = torch.cat([attn.norm_added_k(text_key), attn.norm_k(key)], dim=1)
        value = torch.cat([text_value, value], dim=1)
        attended, query, key = _attend(attn, query, key, value, image_rotary_emb, layout)
        rows = capture_rows(query, key, layout, start, capture) if capture else AttentionRows()

        attended_image = branch_linear(attn.to_out[0], attended[:, text_length:].contiguous(), start)
        hidden_states = hidden_states + _gate(attn.to_out[1](attended_image), gate_msa, start)
        normed = _modulate(self.norm2(hidden_states), shift_mlp, scale_mlp, start)
        inner = self.ff.net[0].gelu(branch_linear(self.ff.net[0].proj, normed, start))
        hidden_states = hidden_states + _gate(branch_linear(self.ff.net[2], self.ff.net[1](inner), start), gate_mlp, start)

        attended_text = attn.to_add_out(attended[:, :text_length].contiguous())
        encoder_hidden_states = encoder_hidden_states + text_gate_msa.unsqueeze(1) * attended_text
        text = self.norm2_context(encoder_hidden_states) * (1 + text_scale_mlp[:, None]) + text_shift_mlp[:, None]
        encoder_hidden_states = encoder_hidden_states + text_gate_mlp.unsqueeze(1) * self.ff_context(text)
        return BlockOutput(_clip_float16(encoder_hidden_states), hidden_states, rows)


class MosaicFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """Single-stream block with a reference branch."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: RotaryEmbedding,
        layout: Layout = Layout(),
        capture: Capture | None = None,
    ) -> BlockOutput:
        """Run the block; arguments as in `MosaicFluxTransformerBlock.forward`."""
        attn, text_length = self.attn, encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        start = residual.shape[1] - layout.length
        shift, scale, gate = branch_linear(self.norm.linear, self.norm.silu(temb), 1).chunk(3, dim=-1)
        normed = _modulate(self.norm.norm(residual), shift, scale, start)

        mlp = self.act_mlp(branch_linear(self.proj_mlp, normed, start))
        query, key, value = (_heads(attn, branch_linear(layer, normed, start)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        attended, query, key = _attend(attn, attn.norm_q(query), attn.norm_k(key), value, image_rotary_emb, layout)
        rows = capture_rows(query, key, layout, start - text_length, capture) if capture else AttentionRows()

        output = branch_linear(self.proj_out, torch.cat([attended, mlp], dim=2), start)
        output = _clip_float16(residual + _gate(output, gate, start))
        return BlockOutput(output[:, :text_length], output[:, text_length:], rows)


class MosaicFluxTransformer2DModel(FluxTransformer2DModel):
    """`FluxTransformer2DModel` with a reference branch; loads every diffusers FLUX folder with `from_pretrained`.

    Without references its output equals the stock model's. The reference LoRA is attached by `mosaic.lora`.
    """

    _no_split_modules = ["MosaicFluxTransformerBlock", "MosaicFluxSingleTransformerBlock"]
    _repeated_blocks = ["MosaicFluxTransformerBlock", "MosaicFluxSingleTransformerBlock"]

    @functools.wraps(FluxTransformer2DModel.__init__)
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        _adopt_blocks(self)

    @classmethod
    def adopt(cls, transformer: FluxTransformer2DModel) -> "MosaicFluxTransformer2DModel":
        """Turn a loaded stock transformer (quantised, placed or not) into this class, in place: no weight is touched."""
        if not isinstance(transformer, cls):
            transformer.__class__ = cls
            _adopt_blocks(transformer)
        return transformer

    def fuse_qkv_projections(self) -> None:
        """Refused: a fused projection has no place for the per-branch LoRA.

        Raises:
            ValueError: Always.
        """
        raise ValueError("fuse_qkv_projections() cannot be used with a reference branch: to_q, to_k and to_v carry the reference LoRA.")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        reference_hidden_states: Tensor | None = None,
        reference_ids: Tensor | None = None,
        reference_attention: str = "target",
        capture: CaptureRequest | None = None,
    ) -> MosaicTransformerOutput:
        """Predict the velocity of the target.

        Args:
            hidden_states: [B, N_tgt, C], packed noisy latents.
            encoder_hidden_states: [B, T, d_text], T5 text tokens.
            pooled_projections: [B, d_pooled], CLIP pooled text, used by both branches.
            timestep: [B] in [0, 1]; 1 is pure noise. References always see 0.
            img_ids: [N_tgt, 3] position ids.
            txt_ids: [T, 3] position ids.
            guidance: [B] embedded guidance for models with `guidance_embeds`; references always see 1.
            reference_hidden_states: [B, K, N_ref, C], packed clean latents of the references, or None.
            reference_ids: [K * N_ref, 3] position ids.
            reference_attention: "target", "joint" or "isolated".
            capture: Which attention rows to return; needs references.

        Raises:
            ValueError: If rows are asked for without references, or `capture.blocks` is wrong.
        """
        layout = Layout()
        if reference_hidden_states is not None and reference_hidden_states.shape[1]:
            layout = Layout(reference_hidden_states.shape[1], reference_hidden_states.shape[2], reference_attention)
            hidden_states = torch.cat([hidden_states, reference_hidden_states.flatten(1, 2)], dim=1)
            img_ids = torch.cat([img_ids, reference_ids.to(img_ids)], dim=0)
        elif capture is not None:
            raise ValueError("attention rows are read from reference tokens: capture needs reference_hidden_states with K >= 1.")
        num_target_tokens = hidden_states.shape[1] - layout.length

        # The latents' dtype, as in diffusers, but before the embedder: under autocast its output would round t to 8 bits.
        temb = self._conditioning(hidden_states.dtype, timestep, guidance, pooled_projections, layout)
        hidden_states = branch_linear(self.x_embedder, hidden_states, num_target_tokens)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        rotary = self.pos_embed(torch.cat([txt_ids.to(img_ids), img_ids], dim=0))

        rows, reference_rows = [], []
        captured = frozenset()
        if capture is not None:
            captured = resolve_capture_blocks(capture.blocks, len(self.transformer_blocks), len(self.single_transformer_blocks))
            block_capture = Capture(capture.global_index, capture.reference_means)
        for index, block in enumerate([*self.transformer_blocks, *self.single_transformer_blocks]):
            arguments = (hidden_states, encoder_hidden_states, temb, rotary, layout, block_capture if index in captured else None)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                output = self._gradient_checkpointing_func(block, *arguments)
            else:
                output = block(*arguments)
            encoder_hidden_states, hidden_states = output.encoder_hidden_states, output.hidden_states
            _accumulate(rows, output.rows.points, len(captured))
            _accumulate(reference_rows, output.rows.reference_means, len(captured))

        hidden_states = self.norm_out(hidden_states[:, :num_target_tokens], temb[:, 0])
        return MosaicTransformerOutput(self.proj_out(hidden_states), *rows or [None], *reference_rows or [None])

    def _conditioning(
        self, dtype: torch.dtype, timestep: Tensor, guidance: Tensor | None, pooled_projections: Tensor, layout: Layout
    ) -> Tensor:
        """The branches' conditioning vectors, [B, 1 or 2, d]: (t, guidance), and (0, 1) for the references.

        As `time_text_embed`, layer by layer, because a style LoRA on these layers must not reach the references' vector.
        """
        embed, branches = self.time_text_embed, 2 if layout.num_references else 1

        def sinusoid(main: Tensor, reference: float) -> Tensor:
            both = torch.stack([main.to(dtype), torch.full_like(main, reference, dtype=dtype)][:branches], dim=1) * 1000
            return embed.time_proj(both.flatten()).unflatten(0, both.shape).to(pooled_projections.dtype)

        def mlp(layers: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
            return branch_linear(layers.linear_2, activation(branch_linear(layers.linear_1, x, 1)), 1)

        vectors = mlp(embed.timestep_embedder, embed.timestep_embedder.act, sinusoid(timestep, 0.0))
        if guidance is not None:
            vectors = vectors + mlp(embed.guidance_embedder, embed.guidance_embedder.act, sinusoid(guidance, 1.0))
        pooled = pooled_projections[:, None].expand(-1, branches, -1)
        return vectors + mlp(embed.text_embedder, embed.text_embedder.act_1, pooled)


def _accumulate(total: list[Tensor], rows: Tensor | None, count: int) -> None:
    """Add one block's share of the mean over `count` captured blocks to the one tensor in `total`."""
    if rows is not None:
        total[:] = [rows / count if not total else total[0] + rows / count]


def _adopt_blocks(transformer: FluxTransformer2DModel) -> None:
    for block in transformer.transformer_blocks:
        block.__class__ = MosaicFluxTransformerBlock
    for block in transformer.single_transformer_blocks:
        block.__class__ = MosaicFluxSingleTransformerBlock
