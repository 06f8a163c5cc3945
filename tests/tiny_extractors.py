"""Tiny random models in the folder layouts that the extractors read."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from preprocess.extractors.aggregation import AggregationNetwork
from scripts.pocket.tokenizers import build_clip_tokenizer
from tests.tiny import build_components, build_transformer, randomise

WIDTHS = (32, 32, 64, 64)
TEXT_WIDTH = 32
DINO_WIDTH = 32


def picture(height: int = 128, width: int = 128, seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)).mul(255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def save_stable_diffusion(folder: Path) -> Path:
    """A Stable Diffusion folder: unet, vae, text_encoder, tokenizer."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=WIDTHS,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
        attention_head_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.save_pretrained(folder / "unet")
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, **kinds).save_pretrained(folder / "vae")
    tokenizer = build_clip_tokenizer(["a", "cat"])
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def save_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    """A FLUX folder: 2 double and 2 single blocks, 4 px per token."""
    transformer = build_transformer(guidance_embeds, stock=True)
    FluxPipeline(**build_components(guidance_embeds) | {"transformer": transformer}).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    """A DINOv2 of patch 14."""
    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=DINO_WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14)
    model = Dinov2Model(config)
    randomise([model.layernorm.weight, model.layernorm.bias], 2)
    model.save_pretrained(folder)
    return folder


def save_dinov3(folder: Path) -> Path:
    """A DINOv3 ViT of patch 16 with registers."""
    torch.manual_seed(2)
    config = DINOv3ViTConfig(
        hidden_size=DINO_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=16, num_register_tokens=4
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder


def save_aggregation(path: Path, in_channels: list[int]) -> AggregationNetwork:
    """A published-looking adapter file, with the two unused scalars."""
    torch.manual_seed(3)
    network = AggregationNetwork(in_channels, 32, 64)
    randomise(network.parameters(), 4)
    torch.save({**network.state_dict(), "logit_scale": torch.tensor(1.0), "self_logit_scale": torch.tensor(1.0)}, path)
    return network.eval()
