"""Tiny models and batches with random, non-trivial weights, shared by the tests."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from mosaic.lora.adapter import attach_reference_lora, reference_lora_parameters
from mosaic.method.correspondence import Points, batch_points
from mosaic.method.grids import Grid
from mosaic.method.tokens import position_ids, reference_position_ids, text_position_ids
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from scripts.pocket.tokenizers import build_clip_tokenizer, build_t5_tokenizer

HEIGHT, WIDTH, GRID = 24, 16, Grid(6, 4)  # px and tokens of the pipeline's target: one token is 4 px
SIZE = 12  # px of its references: 3 x 3 tokens
CALL = {"height": HEIGHT, "width": WIDTH, "reference_size": SIZE, "num_inference_steps": 2, "output_type": "latent"}
CHANNELS = 16  # of a token: 4 latent channels x 2 x 2
TEXT_WIDTH = 32
TEXT_LENGTH = 8
TARGET_GRID, REFERENCE_GRID = Grid(4, 6), Grid(3, 3)
WORDS = ("a", "cat", "mug", "and", "on", "the", "beach", "two", "fish")


def transformer_config(guidance_embeds: bool = True, num_layers: int = 2, num_single_layers: int = 2) -> dict[str, Any]:
    """Arguments of a `FluxTransformer2DModel` with width 32."""
    return {
        "patch_size": 1,
        "in_channels": CHANNELS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": guidance_embeds,
    }


def randomise(parameters: Iterable[nn.Parameter], seed: int, std: float = 0.2) -> None:
    """Fill parameters with seeded noise, gains included, so that no term of the forward pass is neutral by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if parameter.ndim == 1 and bool((parameter == 1).all()) else noise)


def build_transformer(
    guidance_embeds: bool = True, seed: int = 0, stock: bool = False, num_layers: int = 2, num_single_layers: int = 2
) -> FluxTransformer2DModel:
    """Our transformer, or with `stock` the one of diffusers; equal weights for equal seeds.

    Frozen from the start: PyTorch may take another kernel for weights that require a gradient, which costs bit-equality.
    """
    cls = FluxTransformer2DModel if stock else MosaicFluxTransformer2DModel
    transformer = cls(**transformer_config(guidance_embeds, num_layers, num_single_layers)).eval()
    randomise(transformer.parameters(), seed)
    return transformer.requires_grad_(False)


def attach_random_lora(transformer: FluxTransformer2DModel, rank: int = 3, seed: int = 1) -> dict[str, nn.Parameter]:
    """Attach a reference LoRA with non-zero A and B; returns its trainable parameters by file key."""
    attach_reference_lora(transformer, rank)
    parameters = reference_lora_parameters(transformer)
    randomise(parameters.values(), seed)
    return parameters


def random_lora_file(module_shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Tensor]:
    """LoRA tensors by file key for modules of (in_features, out_features)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (fan_in, fan_out) in module_shapes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, fan_in, generator=generator) * 0.2
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(fan_out, rank, generator=generator) * 0.2
    return tensors


def linear_shapes(transformer: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of linear layers."""
    layers = {name: transformer.get_submodule(name) for name in names}
    return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}


@dataclass
class Batch:
    """A synthetic training batch.

    Attributes:
        inputs: Keyword arguments of the transformer's forward.
        noise: [B, N_tgt, C].
        latents: [B, N_tgt, C].
        samples: Per sample, per reference, int64 [P_k, 2] of (u, v).
        points: The same, batched.
        num_reference_tokens: N_ref.
    """

    inputs: dict[str, Any]
    noise: Tensor
    latents: Tensor
    samples: list[list[Tensor]]
    points: Points
    num_reference_tokens: int


def random_points(num_references: int, counts: list[int], num_reference_tokens: int, num_target_tokens: int, seed: int) -> list[Tensor]:
    """Disjoint random points of one sample; v may repeat within a reference. counts[k] points for reference k."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randperm(num_target_tokens, generator=generator).tensor_split(num_references)
    points = []
    for own, count in zip(owners, counts, strict=True):
        u = torch.randperm(num_reference_tokens, generator=generator)[:count]
        v = own[torch.randint(len(own), (count,), generator=generator)]
        points.append(torch.stack([u, v], dim=1))
    return points


def build_batch(
    num_references: int = 2,
    batch: int = 2,
    target_grid: Grid = TARGET_GRID,
    reference_grid: Grid = REFERENCE_GRID,
    guidance_embeds: bool = True,
    seed: int = 2,
) -> Batch:
    """A batch with a target that is not square, ragged points, and (K >= 3) one reference without points."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    counts = [[(1 + b + 2 * k) % 5 if (b, k) != (0, 2) else 0 for k in range(num_references)] for b in range(batch)]
    size = reference_grid.num_tokens, target_grid.num_tokens
    samples = [random_points(num_references, counts[b], *size, seed=seed + b) for b in range(batch)]
    noise, latents = draw(batch, target_grid.num_tokens, CHANNELS), draw(batch, target_grid.num_tokens, CHANNELS)
    timestep = torch.rand(batch, generator=generator)
    inputs = {
        "hidden_states": (1 - timestep[:, None, None]) * latents + timestep[:, None, None] * noise,
        "encoder_hidden_states": draw(batch, 5, TEXT_WIDTH),
        "pooled_projections": draw(batch, TEXT_WIDTH),
        "timestep": timestep,
        "guidance": torch.full((batch,), 3.5) if guidance_embeds else None,
        "img_ids": position_ids(target_grid),
        "txt_ids": text_position_ids(5),
        "reference_hidden_states": draw(batch, num_references, reference_grid.num_tokens, CHANNELS),
        "reference_ids": reference_position_ids(reference_grid, num_references),
    }
    return Batch(inputs, noise, latents, samples, batch_points(samples, *size), reference_grid.num_tokens)


def without_references(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a stock transformer knows."""
    return {key: value for key, value in inputs.items() if not key.startswith("reference")}


def build_vae(seed: int = 3) -> AutoencoderKL:
    """A VAE with 2 levels: 2 px per latent cell, 4 px per token, with a shift and a scale."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS // 4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        shift_factor=0.1,
        scaling_factor=0.5,
    )
    return vae.eval()


@functools.cache
def tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Both tokenizers of a few words, learnt once: learning byte pairs may number equally frequent ones anew each time."""
    return build_clip_tokenizer(list(WORDS), TEXT_LENGTH), build_t5_tokenizer(list(WORDS), TEXT_LENGTH)


def build_components(guidance_embeds: bool = True, seed: int = 0) -> dict[str, Any]:
    """All components of a FLUX pipeline with a stock transformer: the real classes, tiny."""
    tokenizer, tokenizer_2 = tokenizers()
    torch.manual_seed(seed)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=TEXT_WIDTH, d_kv=16, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        "vae": build_vae(),
        "text_encoder": CLIPTextModel(clip).eval(),
        "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer_2": tokenizer_2,
        "transformer": build_transformer(guidance_embeds, seed, stock=True, num_layers=1, num_single_layers=1),
    }


def build_pipeline(guidance_embeds: bool = True, seed: int = 0, lora_rank: int | None = 3) -> MosaicFluxPipeline:
    """Our pipeline, by default with a random reference LoRA."""
    pipeline = MosaicFluxPipeline(**build_components(guidance_embeds, seed))
    pipeline.set_progress_bar_config(disable=True)
    if lora_rank is not None:
        attach_random_lora(pipeline.transformer, lora_rank)
    return pipeline


def build_stock_pipeline(guidance_embeds: bool = True, seed: int = 0) -> FluxPipeline:
    """The pipeline of diffusers with the same weights."""
    pipeline = FluxPipeline(**build_components(guidance_embeds, seed))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed: int, size: int = 20) -> Image.Image:
    """A noisy rectangle on white, off centre."""
    generator = torch.Generator().manual_seed(seed)
    array = torch.full((size, size, 3), 255, dtype=torch.uint8)
    array[2 : size - 5, 4 : size - 1] = torch.randint(0, 250, (size - 7, size - 5, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(array.numpy())


def noise(count: int, seed: int = 0) -> Tensor:
    """Packed start noise of `count` pictures."""
    return torch.randn(count, GRID.num_tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))


def run(pipeline: MosaicFluxPipeline, **arguments: object) -> Tensor:
    """Latents of a small call."""
    return pipeline(**CALL | arguments).images
