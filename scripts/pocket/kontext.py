"""The pocket Kontext: an editing LoRA of the pocket FLUX, which turns a posed cut-out into the subject's reference.

It is loaded into a `FluxKontextPipeline` of the folder assets/pocket/flux. The cut-out's clean tokens follow the noisy ones of the picture
to be made, at 1 on the first axis of the position ids, and the whole sequence is at one timestep, as FLUX.1-Kontext has it. Both pictures
have the size of a reference in training, half of a scene's: a subject is hardly larger in a scene.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageFilter
from torch import Tensor

from mosaic.files import replacing, save_tensors
from scripts.pocket.base_data import PANEL_GRID
from scripts.pocket.model import SCENE_PIXELS, TEXT_WIDTH

#: What the model is told: words of the captions alone, as strips of poses on white are called.
INSTRUCTION = "drawings of a {name}"
PIXELS = SCENE_PIXELS // 2  # side of a cut-out and of a reference
GUIDANCE_SCALE = 1.0  # at which it is trained, and to be asked
WEIGHTS = "pytorch_lora_weights.safetensors"
_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def instruction(class_name: str) -> str:
    """What is asked for a class."""
    return INSTRUCTION.format(name=class_name)


def cut_out(picture: Image.Image, mask: np.ndarray, fill: float, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """A subject alone on white, centred on a square of `PIXELS`; the long side of the mask's box is its share `fill`.

    Args:
        picture: RGB.
        mask: bool `[H, W]`, not empty.
        fill: In (0, 1].
        resampling: How it is resized.
    """
    pixels = np.where(mask[..., None], np.asarray(picture), 255).astype(np.uint8)
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(1, round(max(bottom - top, right - left) / fill))
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    part = Image.fromarray(pixels[top:bottom, left:right])
    canvas.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return canvas.resize((PIXELS, PIXELS), resampling)


def worn_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask as a segmenter may find it: moved by a pixel, grown or shrunk, coarse, or with a part missing; never empty. bool `[H, W]`."""
    found = Image.fromarray(mask.astype(np.uint8) * 255)
    if rng.random() < 0.5:
        found = found.filter((ImageFilter.MinFilter, ImageFilter.MaxFilter)[rng.integers(2)](3))
    if rng.random() < 0.25:
        half = (found.width // 2, found.height // 2)
        found = found.resize(half, Image.Resampling.BOX).resize(found.size, Image.Resampling.BILINEAR)
    worn = np.asarray(found) > 127
    if rng.random() < 0.3:
        worn = np.roll(worn, rng.integers(-1, 2, size=2), axis=(0, 1))
    if rng.random() < 0.15 and worn.any():
        rows, columns = np.nonzero(worn)
        place, reach = rng.integers(len(rows)), int(rng.integers(2, 6))
        worn = worn.copy()
        worn[max(0, rows[place] - reach) : rows[place] + reach, max(0, columns[place] - reach) : columns[place] + reach] = False
    return worn if worn.sum() >= 0.3 * mask.sum() else mask


def posed_cut_out(picture: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """An input of the training: a cut-out with a worn mask, of any fill, sometimes blurred."""
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.8))))
    if rng.random() < 0.7:
        mask = worn_mask(mask, rng)
    return cut_out(picture, mask, float(rng.uniform(0.7, 1.0)), _RESAMPLING[rng.integers(len(_RESAMPLING))])


def position_ids() -> Tensor:
    """Position ids of the picture's tokens, then of the cut-out's, float32 `[2 * grid^2, 3]`."""
    return torch.cartesian_prod(torch.arange(2.0), torch.arange(float(PANEL_GRID)), torch.arange(float(PANEL_GRID)))


def add_lora(transformer: FluxTransformer2DModel, rank: int) -> dict[str, Tensor]:
    """Add a fresh LoRA to all linear layers but those of time and pooled text; its parameters by name. All else is frozen."""
    transformer.requires_grad_(False)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if not name.startswith("time_text_embed")]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def predict_velocity(
    transformer: FluxTransformer2DModel, noisy: Tensor, cut_outs: Tensor, time: Tensor, texts: tuple[Tensor, Tensor]
) -> Tensor:
    """Velocity of noisy tokens.

    Args:
        transformer: Of the pocket FLUX, with the LoRA.
        noisy: `[batch, tokens, channels]`.
        cut_outs: `[batch, tokens, channels]`, clean.
        time: `[batch]`, 1 = pure noise.
        texts: Pooled `[batch, width]` and per token `[batch, length, width]`.

    Returns:
        `[batch, tokens, channels]`, float32.
    """
    pooled, text = texts
    # As in `scripts.pocket.sampling.predict_velocity`: autocast would round the time before its sines are taken.
    exact = transformer.time_text_embed.register_forward_pre_hook(lambda _, given: (1000.0 * time.float(), *given[1:]))
    try:
        output = transformer(
            hidden_states=torch.cat([noisy, cut_outs], dim=1),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time,
            guidance=torch.full([len(noisy)], GUIDANCE_SCALE),
            img_ids=position_ids(),
            txt_ids=torch.zeros(text.shape[1], 3),
            return_dict=False,
        )[0]
    finally:
        exact.remove()
    return output[:, : noisy.shape[1]].float()


@torch.no_grad()
def embed_instructions(components: dict[str, Any], class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Pooled `[classes, width]` and per-token `[classes, length, width]` embeddings of the instructions, as the pipeline makes them."""
    texts = [instruction(name) for name in class_names]
    ids = [
        torch.tensor(components[name](texts, padding="max_length", max_length=components[name].model_max_length).input_ids)
        for name in ("tokenizer", "tokenizer_2")
    ]
    pooled, text = components["text_encoder"](ids[0]).pooler_output, components["text_encoder_2"](ids[1])[0]
    assert pooled.shape[-1] == text.shape[-1] == TEXT_WIDTH, "the pocket FLUX has one width of text"
    return pooled.float(), text.float()


def save_lora(transformer: FluxTransformer2DModel, folder: Path) -> None:
    """Write the LoRA of a transformer in half precision, as diffusers' pipelines load it; the folder's file appears as a whole."""
    layers = {f"transformer.{name}": value.half().contiguous() for name, value in get_peft_model_state_dict(transformer).items()}
    with replacing(folder / WEIGHTS) as aside:
        save_tensors(layers, aside, {"format": "pt"})
