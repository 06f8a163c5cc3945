"""FLUX with a reference branch: stock modules and weights, one joint sequence [text, target, reference 1..K].

Text and target tokens see the bare base weights at timestep t; reference tokens see base + LoRA at timestep 0.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, MagCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from mosaic.model.attention import AttentionEdit, BlockReferences, Layout
from mosaic.model.attention_rows import CaptureRequest, HeadWeights, resolve_capture_blocks
from mosaic.model.blocks import BlockOutput, MosaicFluxSingleTransformerBlock, MosaicFluxTransformerBlock, RotaryEmbedding, turns
from mosaic.model.branch import branch_linear
from mosaic.model.reference_cache import KeptReferences
from mosaic.model.strength import log_strength


@dataclass
class MosaicTransformerOutput(BaseOutput):
    """Output of `MosaicFluxTransformer2DModel`.

    Attributes:
        sample: [B, N_tgt, C], the predicted velocity, noise - latents.
        attention_rows: float32 [B, P, N_tgt], mean over heads and captured blocks, or None.
        reference_rows: float32 [B, K, N_tgt], the mean over all tokens of each reference, or None.
        target_rows: float32 [B, P, K * N_ref], rows of target tokens at the references' tokens, mean over heads and captured blocks, or
            None.
        head_weights: The weights at the points of every head of the captured blocks, or None.
        kept_references: The references for passes without them, or None.
    """

    sample: Tensor
    attention_rows: Tensor | None = None
    reference_rows: Tensor | None = None
    target_rows: Tensor | None = None
    head_weights: HeadWeights | None = None
    kept_references: KeptReferences | None = None


signature_of_stock: Any = functools.wraps(FluxTransformer2DModel.__init__)  # from which diffusers reads the keys of the config


class MosaicFluxTransformer2DModel(FluxTransformer2DModel):
    """`FluxTransformer2DModel` with a reference branch; loads every diffusers FLUX folder with `from_pretrained`.

    Without references its output equals the stock model's. The reference LoRA is attached by `mosaic.lora.adapter`.
    """

    _no_split_modules: ClassVar[list[str]] = ["MosaicFluxTransformerBlock", "MosaicFluxSingleTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["MosaicFluxTransformerBlock", "MosaicFluxSingleTransformerBlock"]

    @signature_of_stock
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        _adopt_blocks(self)

    @classmethod
    def adopt(cls, transformer: FluxTransformer2DModel) -> "MosaicFluxTransformer2DModel":
        """Turn a loaded stock transformer (quantised, placed or not) into this class, in place: no weight is touched."""
        if not isinstance(transformer, cls):
            transformer.__class__ = cls
            _adopt_blocks(transformer)
        return cast(MosaicFluxTransformer2DModel, transformer)

    def fuse_qkv_projections(self) -> None:
        """Refused: a fused projection has no place for the per-branch LoRA.

        Raises:
            ValueError: Always.
        """
        raise ValueError("fuse_qkv_projections() cannot be used with a reference branch: to_q, to_k and to_v carry the reference LoRA.")

    def enable_cache(self, config: FirstBlockCacheConfig | MagCacheConfig) -> None:
        """Leave blocks out in sampling steps that change little, and repeat the last change of the target instead; `disable_cache` ends it.

        The references have no part in it: neither in the decision nor in what is repeated. Attention rows cannot be read meanwhile.

        Raises:
            ValueError: For diffusers' other caches, which hook layers that these blocks do not call, or know other models only.
        """
        if not isinstance(config, FirstBlockCacheConfig | MagCacheConfig):
            raise ValueError(
                f"enable_cache takes a FirstBlockCacheConfig or MagCacheConfig with a reference branch, got {type(config).__name__}."
            )
        for block in (MosaicFluxTransformerBlock, MosaicFluxSingleTransformerBlock):
            metadata = TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
            TransformerBlockRegistry.register(block, metadata)
        super().enable_cache(config)

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
        reference_strength: Tensor | None = None,
        keep_references: bool = False,
        kept_references: KeptReferences | None = None,
        attention_edit: AttentionEdit | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> MosaicTransformerOutput | tuple[Tensor]:
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
            reference_strength: [B, K] of at least 0: its logarithm is added to the logits of the reference's keys. None: 1.
            keep_references: Whether to return the references' keys and values (and queries, where rows are captured).
            kept_references: What was returned so, in place of the references.
            attention_edit: What replaces the output of attention for some tokens in every block, for measurements; needs references.
            joint_attention_kwargs: Must be empty; here for the pipelines of diffusers, which may share this transformer.
            return_dict: False, as those pipelines ask: (sample,).

        Raises:
            ValueError: If rows are asked for without references or their queries or with a step cache, references are given twice or
                without ids or not at all with an edit, `capture.blocks` is wrong, or guidance is missing or has no embedding.
        """
        self._check_arguments(joint_attention_kwargs, guidance, capture, reference_hidden_states, keep_references, kept_references)
        num_target_tokens, blocks = hidden_states.shape[1], [*self.transformer_blocks, *self.single_transformer_blocks]

        # The sequence: [text, target, references]; references of an earlier pass are not in it.
        bias = None if reference_strength is None else log_strength(reference_strength)
        layouts = [Layout()] * len(blocks)
        if kept_references is not None:
            size = kept_references.num_references, kept_references.num_reference_tokens
            layouts = [Layout(*size, reference_attention, bias, block) for block in kept_references.blocks]
        elif reference_hidden_states is not None and reference_hidden_states.shape[1]:
            hidden_states, img_ids = join_references(hidden_states, img_ids, reference_hidden_states, reference_ids)
            num_references, length = reference_hidden_states.shape[1:3]
            layout = Layout(num_references, length, reference_attention, bias, keep_references=keep_references, edit=attention_edit)
            layouts = [layout] * len(blocks)
        num_reference_tokens = layouts[0].length
        if attention_edit is not None and not num_reference_tokens:
            raise ValueError("attention_edit needs reference_hidden_states with K >= 1.")
        captures = self._captures(capture, layouts)

        # The conditioning vectors. In the latents' dtype, as in diffusers, but before the embedder: under autocast its output would round
        # t to 8 bits.
        branches = 2 if num_reference_tokens else 1
        temb = self._conditioning(hidden_states.dtype, timestep, guidance, pooled_projections, branches)
        hidden_states = branch_linear(self.x_embedder, hidden_states, num_target_tokens)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        rotary: RotaryEmbedding = self.pos_embed(torch.cat([txt_ids.to(img_ids), img_ids], dim=0))
        if torch.compiler.is_compiling() or any(block._compiled_call_impl is not None for block in blocks):
            # No views, as linear layers return them: the first block would be compiled apart for them.
            hidden_states, encoder_hidden_states = hidden_states.clone(), encoder_hidden_states.clone()
        else:
            rotary = turns(*rotary)

        # The blocks. A step cache compares and repeats a block's image tokens: the references go apart then, so it sees the target only.
        references = None
        if self.is_cache_enabled and num_reference_tokens:
            hidden_states, references = hidden_states.split([num_target_tokens, num_reference_tokens], dim=1)
        collected = _Collected(sum(wanted is not None and wanted.has_rows for wanted in captures))
        for block, layout, wanted in zip(blocks, layouts, captures, strict=True):
            output = self._run(block, hidden_states, encoder_hidden_states, temb, rotary, layout, wanted, references)
            encoder_hidden_states, hidden_states = output[:2]
            if isinstance(output, BlockOutput):  # else a step cache has left the block out
                references = output.reference_hidden_states
                collected.add(output)

        # The output: of the target alone.
        hidden_states = self.norm_out(hidden_states[:, :num_target_tokens], temb[:, 0])
        sample = self.proj_out(hidden_states)
        if not return_dict:
            return (sample,)
        complete = len(collected.references) == len(blocks)
        kept = KeptReferences(tuple(collected.references), *layouts[0][:2]) if complete else None
        rows = collected.attention_rows, collected.reference_rows, collected.target_rows, collected.head_weights
        return MosaicTransformerOutput(sample, *rows, kept)

    def _check_arguments(
        self,
        joint_attention_kwargs: dict[str, Any] | None,
        guidance: Tensor | None,
        capture: CaptureRequest | None,
        reference_hidden_states: Tensor | None,
        keep_references: bool,
        kept_references: KeptReferences | None,
    ) -> None:
        """Refuse arguments of `forward` that do not go together.

        Raises:
            ValueError: Rows are asked for with a step cache, or those of target tokens with kept references; references are given twice;
                or guidance is missing or has no embedding.
        """
        if joint_attention_kwargs:
            raise ValueError(f"joint_attention_kwargs must be empty with a reference branch, got {', '.join(joint_attention_kwargs)}.")
        if (guidance is None) == self.config.guidance_embeds:
            raise ValueError(
                f"guidance must be {'given: this model embeds it' if guidance is None else 'None: this model has no embedding for it'} "
                "(guidance_embeds in its config)."
            )
        if capture is not None and self.is_cache_enabled:
            raise ValueError("attention rows are read in every block, some of which a step cache leaves out: disable_cache() first.")
        if capture is not None and capture.target_index is not None and (keep_references or kept_references is not None):
            raise ValueError("rows of target tokens are read in passes that neither keep references nor take kept ones.")
        if kept_references is not None and reference_hidden_states is not None:
            raise ValueError("give reference_hidden_states or kept_references, not both.")

    def _run(self, block: nn.Module, *arguments: Any) -> BlockOutput | tuple[Tensor, Tensor]:
        """One block, in training maybe under a checkpoint; where a step cache leaves it out, text and target tokens alone."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def _captures(self, request: CaptureRequest | None, layouts: Sequence[Layout]) -> list[CaptureRequest | None]:
        """What each block is asked for: the request, where it names the block.

        Raises:
            ValueError: If rows are asked for without references or their queries, or of blocks that there are not.
        """
        if request is None:
            return [None] * len(layouts)
        captured = resolve_capture_blocks(request.blocks, len(self.transformer_blocks), len(self.single_transformer_blocks))
        for index in captured:
            if not layouts[index].num_references:
                raise ValueError("attention rows are read from reference tokens: capture needs reference_hidden_states with K >= 1.")
            earlier = layouts[index].block_references
            if earlier is not None and earlier.query is None:
                raise ValueError(f"kept_references hold no queries of block {index}: they were kept without this capture.")
        return [request if index in captured else None for index in range(len(layouts))]

    def _conditioning(
        self, dtype: torch.dtype, timestep: Tensor, guidance: Tensor | None, pooled_projections: Tensor, branches: int
    ) -> Tensor:
        """The branches' conditioning vectors, [B, 1 or 2, d]: (t, guidance), and (0, 1) for the references.

        As `time_text_embed`, layer by layer, because a style LoRA on these layers must not reach the references' vector.
        """
        embed = self.time_text_embed

        def sinusoid(main: Tensor, reference: float) -> Tensor:
            both = torch.stack([main.to(dtype), torch.full_like(main, reference, dtype=dtype)][:branches], dim=1) * 1000
            return embed.time_proj(both.flatten()).unflatten(0, both.shape).to(pooled_projections.dtype)

        def mlp(layers: Any, activation: nn.Module, x: Tensor) -> Tensor:
            return branch_linear(layers.linear_2, activation(branch_linear(layers.linear_1, x, 1)), 1)

        vectors = mlp(embed.timestep_embedder, embed.timestep_embedder.act, sinusoid(timestep, 0.0))
        if guidance is not None:
            vectors = vectors + mlp(embed.guidance_embedder, embed.guidance_embedder.act, sinusoid(guidance, 1.0))
        pooled = pooled_projections[:, None].expand(-1, branches, -1)
        return vectors + mlp(embed.text_embedder, embed.text_embedder.act_1, pooled)


def join_references(
    hidden_states: Tensor, img_ids: Tensor, reference_hidden_states: Tensor, reference_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eq. 5: all references in a row, here behind the target; and the position ids of both.

    Args:
        hidden_states: [B, N_tgt, C], the target.
        img_ids: [N_tgt, 3].
        reference_hidden_states: [B, K, N_ref, C].
        reference_ids: [K * N_ref, 3].

    Returns:
        [B, N_tgt + K * N_ref, C] and float32 [N_tgt + K * N_ref, 3].

    Raises:
        ValueError: If there are no reference_ids.
    """
    if reference_ids is None:
        raise ValueError("reference_hidden_states need reference_ids, [K * N_ref, 3]: see mosaic.method.tokens.reference_position_ids.")
    joined = torch.cat([hidden_states, reference_hidden_states.flatten(1, 2)], dim=1)
    return joined, torch.cat([img_ids.float(), reference_ids.to(img_ids.device, torch.float32)], dim=0)


class _Collected:
    """What the blocks return beside their tokens: the mean of their rows, and their references for later passes."""

    def __init__(self, num_captured: int) -> None:
        self.num_captured = num_captured
        self.attention_rows: Tensor | None = None
        self.reference_rows: Tensor | None = None
        self.target_rows: Tensor | None = None
        self._head_weights: list[HeadWeights] = []
        self.references: list[BlockReferences] = []

    def add(self, output: BlockOutput) -> None:
        """Add one block's share; the mean over blocks is a running sum, so that no block's rows are kept."""
        self.attention_rows = self._mean(self.attention_rows, output.rows.attention_rows)
        self.reference_rows = self._mean(self.reference_rows, output.rows.reference_rows)
        self.target_rows = self._mean(self.target_rows, output.rows.target_rows)
        if output.rows.head_weights is not None:
            self._head_weights.append(output.rows.head_weights)
        if output.block_references is not None:
            self.references.append(output.block_references)

    @property
    def head_weights(self) -> HeadWeights | None:
        """Those of all blocks, one after the other: a few numbers a point, of which no mean is taken before their logarithm."""
        if not self._head_weights:
            return None
        of_fields = zip(*self._head_weights, strict=True)
        return HeadWeights._make(None if blocks[0] is None else torch.cat(blocks, dim=1) for blocks in of_fields)

    def _mean(self, so_far: Tensor | None, rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return so_far
        return rows / self.num_captured if so_far is None else so_far + rows / self.num_captured


def _adopt_blocks(transformer: FluxTransformer2DModel) -> None:
    for block in transformer.transformer_blocks:
        block.__class__ = MosaicFluxTransformerBlock
    for block in transformer.single_transformer_blocks:
        block.__class__ = MosaicFluxSingleTransformerBlock
