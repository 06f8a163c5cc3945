"""Pocket FLUX: the real diffusers and transformers classes of FLUX.1 at toy size, as an ordinary diffusers folder."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from mosaic.files import replacing
from scripts.pocket.tokenizers import TEXT_LENGTH, build_clip_tokenizer, build_t5_tokenizer

#: By the side of a scene in pixels, the VAE's channels at each level and those of a latent. A token packs 2 x 2 latents, and a scene is
#: 8 x 8 tokens in any case. At 128 px the VAE is FLUX's: 8 px per latent, of 16 channels.
VAES = {64: ((16, 32, 64), 8), 128: ((16, 32, 64, 64), 16)}
SCENE_PIXELS, SCENE_GRID = 64, 8
TOKEN_CHANNELS = 4 * VAES[SCENE_PIXELS][1]

HEAD_DIM, HEADS = 32, 6
DOUBLE_BLOCKS, SINGLE_BLOCKS = 2, 5
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 128, 4, 2


def build_transformer(
    seed: int, heads: int = HEADS, guidance_embeds: bool = False, channels: int = TOKEN_CHANNELS
) -> FluxTransformer2DModel:
    """A FLUX transformer, freshly initialised; the output layer starts at zero."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_vae(seed: int, pixels: int = SCENE_PIXELS) -> AutoencoderKL:
    """A VAE with FLUX's habits (no quantisation convolutions, shift and scale) for scenes of `pixels` a side, a key of `VAES`."""
    torch.manual_seed(seed)
    levels, latent_channels = VAES[pixels]
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        block_out_channels=levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=pixels,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    # Latents start almost without noise (deviation e^-3): learning begins with what the decoder gets to see.
    torch.nn.init.constant_(vae.encoder.conv_out.bias[latent_channels:], -6.0)
    return vae


def build_clip_encoder(seed: int, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The pooled-text encoder."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_t5_encoder(seed: int, tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The per-token text encoder; no dropout, because it is trained together with the transformer."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // TEXT_HEADS,
        d_ff=2 * TEXT_WIDTH,
        num_layers=TEXT_LAYERS,
        num_heads=TEXT_HEADS,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=tokenizer.model_max_length,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The settings of FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def build_pocket_flux(seed: int, words: list[str], text_length: int = TEXT_LENGTH, pixels: int = SCENE_PIXELS) -> dict[str, Any]:
    """All components of a pocket FLUX, freshly initialised.

    Args:
        seed: seed of the weights.
        words: caption words, see `scripts.pocket.tokenizers.caption_words`.
        text_length: tokens per prompt; inference finds it as `tokenizer_2.model_max_length`.
        pixels: side of a scene, a key of `VAES`.

    Returns:
        The keyword arguments of `diffusers.FluxPipeline`.
    """
    tokenizer = build_clip_tokenizer(words, text_length)
    tokenizer_2 = build_t5_tokenizer(words, text_length)
    return {
        "scheduler": build_scheduler(),
        "vae": build_vae(seed, pixels),
        "text_encoder": build_clip_encoder(seed, tokenizer),
        "tokenizer": tokenizer,
        "text_encoder_2": build_t5_encoder(seed, tokenizer_2),
        "tokenizer_2": tokenizer_2,
        "transformer": build_transformer(seed, channels=4 * VAES[pixels][1]),
    }


def save_pocket_flux(components: dict[str, Any], folder: Path) -> None:
    """Writes an ordinary diffusers folder that `FluxPipeline.from_pretrained` loads, as a whole."""
    with replacing(Path(folder)) as aside:
        FluxPipeline(**components).save_pretrained(aside, safe_serialization=True)
        _drop_paths(aside)


def _drop_paths(folder: Path) -> None:
    """Removes the `_name_or_path` entries, which hold the path that a component was loaded from."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")
