"""A readable twin of the method, to hold the real code against: everything is computed for every token, then masked.

It reads a stock `FluxTransformer2DModel` and a dictionary of LoRA matrices, builds the dense attention mask, keeps the full
reference-to-target attention maps of all blocks, and computes the losses in plain loops.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional

LoraMatrices = Mapping[str, tuple[Tensor, Tensor]]  # module name -> (A [r, d_in], B [d_out, r])


@dataclass
class NaiveOutput:
    """velocity [B, N_tgt, C]; maps: per block [B, heads, K * N_ref, N_tgt], softmax over the target tokens; target_scores: per block
    [B, heads, N_tgt, S], scaled products of the target's queries with all keys.
    """

    velocity: Tensor
    maps: list[Tensor] = field(default_factory=list)
    target_scores: list[Tensor] = field(default_factory=list)


def lora_matrices(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """From the keys of a LoRA file to (A, B) by module name."""
    names = {key.removeprefix("transformer.").split(".lora_")[0] for key in tensors}
    return {n: (tensors[f"transformer.{n}.lora_A.weight"], tensors[f"transformer.{n}.lora_B.weight"]) for n in sorted(names)}


def attention_mask(token_reference: Tensor, mode: str) -> Tensor:
    """bool [S, S], True where query row may see key column. token_reference [S]: -1 for text and target, else k."""
    query, key = token_reference[:, None], token_reference[None, :]
    if mode == "joint":
        return torch.ones(len(token_reference), len(token_reference), dtype=torch.bool)
    if mode == "target":
        return (query == -1) | (key == -1) | (query == key)
    assert mode == "isolated"
    return (query == -1) | (query == key)


def rotate(x: Tensor, ids: Tensor, axes: Sequence[int]) -> Tensor:
    """FLUX's RoPE: x [B, S, H, D], ids [S, 3]. Neighbouring channels are the real and imaginary part of one number."""
    angles = []
    for axis, width in enumerate(axes):
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(ids[:, axis].double()[:, None] * frequency)
    angle = torch.cat(angles, dim=1)[:, None]  # (S, 1, D / 2)
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    real, imaginary = x[..., 0::2], x[..., 1::2]
    return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1).flatten(-2)


class NaiveFlux:
    """The whole forward pass over a stock transformer's weights."""

    def __init__(self, transformer: FluxTransformer2DModel, lora: LoraMatrices, styles: Sequence[tuple[LoraMatrices, float]] = ()) -> None:
        self.transformer, self.lora, self.styles = transformer, lora, styles
        self.heads = transformer.config.num_attention_heads

    def linear(self, name: str, x: Tensor, is_reference: Tensor) -> Tensor:
        """y = W x + b, plus every LoRA computed on all tokens and multiplied by 0 where it does not belong."""
        output = self.transformer.get_submodule(name)(x)
        mask = is_reference.to(x.dtype)[:, None]
        if name in self.lora:
            down, up = self.lora[name]
            output = output + (x @ down.T @ up.T) * mask
        for style, weight in self.styles:
            if name in style:
                down, up = style[name]
                output = output + weight * (x @ down.T @ up.T) * (1 - mask)
        return output

    def conditioning(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """[B, 2, d]: the vectors of the main tokens (t, guidance) and of the references (0, 1)."""
        embed, branch = self.transformer.time_text_embed, torch.tensor([False, True])

        def mlp(name: str, x: Tensor, act: str) -> Tensor:
            inner = getattr(self.transformer.get_submodule(f"time_text_embed.{name}"), act)
            return self.linear(
                f"time_text_embed.{name}.linear_2", inner(self.linear(f"time_text_embed.{name}.linear_1", x, branch)), branch
            )

        def sinusoid(main: Tensor, reference: float) -> Tensor:
            both = torch.stack([main * 1000, torch.full_like(main, reference * 1000)], dim=1)
            return embed.time_proj(both.flatten()).unflatten(0, both.shape).to(pooled.dtype)

        vector = mlp("timestep_embedder", sinusoid(timestep, 0.0), "act")
        if guidance is not None:
            vector = vector + mlp("guidance_embedder", sinusoid(guidance, 1.0), "act")
        return vector + mlp("text_embedder", torch.stack([pooled, pooled], dim=1), "act_1")

    def __call__(
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
    ) -> NaiveOutput:
        """Arguments as for our transformer."""
        model, (batch, num_target, _) = self.transformer, hidden_states.shape
        if reference_hidden_states is None:
            reference_hidden_states, reference_ids = hidden_states.new_zeros(batch, 0, 0, hidden_states.shape[2]), img_ids[:0]
        _, num_references, num_reference_tokens, _ = reference_hidden_states.shape
        num_text = encoder_hidden_states.shape[1]
        reference_of_image = torch.tensor([-1] * num_target + [k for k in range(num_references) for _ in range(num_reference_tokens)])
        self.token_reference = torch.cat([torch.full((num_text,), -1), reference_of_image])
        self.mask = attention_mask(self.token_reference, reference_attention)
        self.ids = torch.cat([txt_ids, img_ids, reference_ids])
        self.target = slice(num_text, num_text + num_target)
        self.temb = self.conditioning(timestep, guidance, pooled_projections)

        image = torch.cat([hidden_states, reference_hidden_states.flatten(1, 2)], dim=1)
        image = self.linear("x_embedder", image, reference_of_image >= 0)
        text = self.linear("context_embedder", encoder_hidden_states, torch.zeros(num_text, dtype=torch.bool))
        output = NaiveOutput(torch.empty(0))
        self.target_scores = output.target_scores
        for index in range(len(model.transformer_blocks)):
            text, image = self.double_block(f"transformer_blocks.{index}", text, image, output.maps)
        for index in range(len(model.single_transformer_blocks)):
            text, image = self.single_block(f"single_transformer_blocks.{index}", text, image, output.maps)
        output.velocity = self.final_layer(image[:, :num_target])
        return output

    def final_layer(self, target: Tensor) -> Tensor:
        """The output layer, on target tokens."""
        main = torch.zeros(1, dtype=torch.bool)
        scale, shift = self.linear("norm_out.linear", functional.silu(self.temb[:, :1]), main).chunk(2, dim=-1)
        target = self.transformer.norm_out.norm(target) * (1 + scale) + shift
        return self.linear("proj_out", target, torch.zeros(target.shape[1], dtype=torch.bool))

    def modulation(self, name: str, is_reference: Tensor, count: int) -> tuple[Tensor, ...]:
        """`count` tensors [B, S, d]: each token gets the vector of its branch."""
        both = self.linear(name, functional.silu(self.temb), torch.tensor([False, True]))
        return both[:, is_reference.long()].chunk(count, dim=-1)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, maps: list[Tensor]) -> Tensor:
        """Joint attention under the dense mask; appends the full map of this block. [B, S, H, D] -> [B, S, H * D]."""
        axes = self.transformer.config.axes_dims_rope
        query, key = rotate(query, self.ids, axes).transpose(1, 2), rotate(key, self.ids, axes).transpose(1, 2)
        reference_query, target_key = query[:, :, self.token_reference >= 0], key[:, :, self.target]
        logits = reference_query @ target_key.transpose(2, 3) / math.sqrt(query.shape[-1])
        maps.append(torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1))
        self.target_scores.append(query[:, :, self.target] @ key.transpose(2, 3) / math.sqrt(query.shape[-1]))
        attended = functional.scaled_dot_product_attention(query, key, value.transpose(1, 2), attn_mask=self.mask)
        return attended.transpose(1, 2).flatten(2)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, S, H * D] -> [B, S, H, D]."""
        return x.unflatten(-1, (self.heads, -1))

    def double_block(self, name: str, text: Tensor, image: Tensor, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A double-stream block."""
        block, num_text = self.transformer.get_submodule(name), text.shape[1]
        is_reference = self.token_reference[num_text:] >= 0
        is_text = torch.zeros(num_text, dtype=torch.bool)  # of text tokens none is a reference
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(f"{name}.norm1.linear", is_reference, 6)
        text_modulation = self.modulation(f"{name}.norm1_context.linear", is_text, 6)
        text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = text_modulation

        normed = block.norm1.norm(image) * (1 + scale) + shift
        text_normed = block.norm1_context.norm(text) * (1 + text_scale) + text_shift
        image_qkv = [self.split_heads(self.linear(f"{name}.attn.to_{x}", normed, is_reference)) for x in "qkv"]
        text_qkv = [self.split_heads(self.linear(f"{name}.attn.add_{x}_proj", text_normed, is_text)) for x in "qkv"]
        query = torch.cat([block.attn.norm_added_q(text_qkv[0]), block.attn.norm_q(image_qkv[0])], dim=1)
        key = torch.cat([block.attn.norm_added_k(text_qkv[1]), block.attn.norm_k(image_qkv[1])], dim=1)
        attended = self.attention(query, key, torch.cat([text_qkv[2], image_qkv[2]], dim=1), maps)

        image = image + gate * self.linear(f"{name}.attn.to_out.0", attended[:, num_text:], is_reference)
        inner = self.linear(f"{name}.ff.net.0.proj", block.norm2(image) * (1 + mlp_scale) + mlp_shift, is_reference)
        image = image + mlp_gate * self.linear(f"{name}.ff.net.2", functional.gelu(inner, approximate="tanh"), is_reference)

        text = text + text_gate * self.linear(f"{name}.attn.to_add_out", attended[:, :num_text], is_text)
        inner = block.norm2_context(text) * (1 + text_mlp_scale) + text_mlp_shift
        inner = functional.gelu(self.linear(f"{name}.ff_context.net.0.proj", inner, is_text), approximate="tanh")
        return text + text_mlp_gate * self.linear(f"{name}.ff_context.net.2", inner, is_text), image

    def single_block(self, name: str, text: Tensor, image: Tensor, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A single-stream block."""
        block, num_text = self.transformer.get_submodule(name), text.shape[1]
        is_reference = self.token_reference >= 0
        tokens = torch.cat([text, image], dim=1)
        shift, scale, gate = self.modulation(f"{name}.norm.linear", is_reference, 3)
        normed = block.norm.norm(tokens) * (1 + scale) + shift
        mlp = functional.gelu(self.linear(f"{name}.proj_mlp", normed, is_reference), approximate="tanh")
        query, key, value = (self.split_heads(self.linear(f"{name}.attn.to_{x}", normed, is_reference)) for x in "qkv")
        attended = self.attention(block.attn.norm_q(query), block.attn.norm_k(key), value, maps)
        tokens = tokens + gate * self.linear(f"{name}.proj_out", torch.cat([attended, mlp], dim=2), is_reference)
        return tokens[:, :num_text], tokens[:, num_text:]


def target_maps(scores: Sequence[Tensor], num_reference_tokens: int, keys: str) -> list[Tensor]:
    """Per block [B, heads, N_tgt, K * N_ref]: the target's attention to the references, which stand last, among "all" keys or alone."""
    if keys == "references":
        return [torch.softmax(block[..., -num_reference_tokens:], dim=-1) for block in scores]
    return [torch.softmax(block, dim=-1)[..., -num_reference_tokens:] for block in scores]


# ---- rows and losses, one sample at a time, float64

Samples = Sequence[Sequence[Tensor]]  # per sample, per reference, int64 [P_k, 2] of (u, v)


def mean_maps(maps: Sequence[Tensor], blocks: Sequence[int] | None = None) -> Tensor:
    """float64 [B, K * N_ref, N_tgt]: mean over heads and over the given blocks (None: all)."""
    chosen = list(range(len(maps))) if blocks is None else list(blocks)
    return sum(maps[block].double().mean(dim=1) for block in chosen) / len(chosen)


def flow_matching(velocity: Tensor, noise: Tensor, latents: Tensor) -> list[Tensor]:
    """Eq. 3 on latents, per sample."""
    return [((v.double() - (n.double() - x.double())) ** 2).mean() for v, n, x in zip(velocity, noise, latents, strict=True)]


def correspondence(maps: Tensor, samples: Samples, num_reference_tokens: int, reduction: str = "reference") -> list[Tensor]:
    """Eq. 10, per sample: over the points of a reference, then over the references that have points; or over all points pooled."""
    losses = []
    for attention, references in zip(maps, samples, strict=True):
        of_references: list[list[Tensor]] = []
        for k, pairs in enumerate(references):
            terms = []
            for u, v in pairs.tolist():
                terms.append(-torch.log(attention[k * num_reference_tokens + u, v] + 1e-8))
            of_references.append(terms)
        losses.append(mean_over_points(of_references, reduction))
    return losses


def mean_over_points(of_references: list[list[Tensor]], reduction: str) -> Tensor:
    """The mean of Eq. 10 over a sample's terms, reference by reference; 0 where there are none."""
    means = [sum(terms) / len(terms) for terms in of_references if terms]
    kept = means if reduction == "reference" else [term for terms in of_references for term in terms]
    return sum(kept) / len(kept) if kept else torch.zeros((), dtype=torch.float64)


def target_correspondence(
    maps: Tensor, samples: Samples, num_reference_tokens: int, own: bool = False, reduction: str = "reference"
) -> list[Tensor]:
    """Eq. 10 from the target's side, per sample; maps [B, N_tgt, K * N_ref]. With `own` of the mass on the point's whole reference."""
    losses = []
    for attention, references in zip(maps, samples, strict=True):
        of_references: list[list[Tensor]] = []
        for k, pairs in enumerate(references):
            first, terms = k * num_reference_tokens, []
            for u, v in pairs.tolist():
                weight = attention[v, first : first + num_reference_tokens].sum() if own else attention[v, first + u]
                terms.append(-torch.log(weight + 1e-8))
            of_references.append(terms)
        losses.append(mean_over_points(of_references, reduction))
    return losses


def mean_of_heads(loss_of: Callable[[Tensor], list[Tensor]], maps: Sequence[Tensor]) -> list[Tensor]:
    """Per sample the mean of a loss over every head of every block, each by itself; maps per block [B, heads, rows, columns]."""
    apart = [loss_of(block[:, head].double()) for block in maps for head in range(block.shape[1])]
    return [sum(losses) / len(losses) for losses in zip(*apart, strict=True)]


def distribution(attention: Tensor, k: int, pairs: Tensor, num_reference_tokens: int, rows: str = "points") -> Tensor | None:
    """Eq. 12: a^(k) of one sample; `rows` "points" (renormalised) or "all" (release). None if there is nothing to average."""
    if rows == "all":
        return attention[k * num_reference_tokens : (k + 1) * num_reference_tokens].mean(dim=0)
    picked = []
    for u, _ in pairs.tolist():
        picked.append(attention[k * num_reference_tokens + u])
    if not picked:
        return None
    mean = sum(picked) / len(picked)
    return mean / mean.sum()


def divergence_of(p: Tensor, q: Tensor, divergence: str) -> Tensor:
    """Eq. 13 (symmetric KL), or Jensen-Shannon."""

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first * (torch.log(first + 1e-8) - torch.log(second + 1e-8))).sum()

    if divergence == "symmetric_kl":
        return 0.5 * kl(p, q) + 0.5 * kl(q, p)
    return 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)


def disentanglement(
    maps: Tensor,
    samples: Samples,
    num_reference_tokens: int,
    divergence: str = "symmetric_kl",
    rows: str = "points",
    cap: float | None = None,
) -> list[Tensor]:
    """Eq. 14, per sample: minus the mean over ordered pairs of references that have a distribution."""
    losses = []
    for attention, references in zip(maps, samples, strict=True):
        distributions = [distribution(attention, k, pairs, num_reference_tokens, rows) for k, pairs in enumerate(references)]
        terms = []
        for i, p in enumerate(distributions):
            for j, q in enumerate(distributions):
                if i != j and p is not None and q is not None:
                    term = divergence_of(p, q, divergence)
                    terms.append(term if cap is None else term.clamp(max=cap))
        losses.append(-sum(terms) / len(terms) if terms else attention.new_zeros(()))
    return losses
