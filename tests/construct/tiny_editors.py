"""Tiny random pipelines that edit pictures."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.evaluation.tiny_models import chat_tokenizer

WIDTH = 8


def save_klein(folder: Path) -> Path:
    """A FLUX.2-klein: 4 px per token."""
    torch.manual_seed(0)
    words, tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}USER {{ m.content }}{% endfor %} ASSISTANT"
    # The pipeline reads the layers 9, 18 and 27 of its text encoder.
    text = Qwen3Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=27,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, Qwen3ForCausalLM(text), tokenizer, transformer
    ).save_pretrained(folder)
    return folder


class PictureProcessor:
    """What Qwen2VLProcessor does with texts and pictures; it itself cannot be made without torchvision, for its videos."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.pictures = tokenizer, Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)

    def __call__(self, text: list[str], images: list[Any], **arguments: Any) -> Any:
        """Each place of a picture becomes as many tokens as it has patches, four of which are one."""
        found = self.pictures(images=images, return_tensors="pt")
        for grid in found["image_grid_thw"]:
            text = [one.replace("<|image_pad|>", "<place>" * (int(grid.prod()) // 4), 1) for one in text]
        found.update(self.tokenizer([one.replace("<place>", "<|image_pad|>") for one in text], **arguments))
        return found


def build_qwen() -> QwenImageEditPlusPipeline:
    """A Qwen-Image-Edit: 4 px per token. It brings pictures to the areas that its module states."""
    torch.manual_seed(0)
    _, tokenizer = chat_tokenizer()
    extra = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    extra |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    tokenizer.add_tokens(list(extra.values()), special_tokens=True)
    shape = {"hidden_size": 16, "intermediate_size": 16}
    text = shape | {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = shape | {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in extra.items()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    return QwenImageEditPlusPipeline(scheduler, vae, text_encoder, tokenizer, PictureProcessor(tokenizer), transformer)
