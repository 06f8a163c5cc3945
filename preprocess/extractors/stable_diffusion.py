"""What the Stable Diffusion extractors share: noised latents of a picture and the embedding of a prompt."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mosaic.weights.frozen import call_loader, load_into, load_model, read_state_dict

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ConfigMixin, UNet2DConditionModel

STRIDE = 64
"""Pixels of which both sides must be multiples: the VAE's 8 times three halvings in the U-Net."""


def noise_latents(latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Forward diffusion of Stable Diffusion 1 and 2: sqrt(a_t) latents + sqrt(1 - a_t) noise, betas "scaled_linear" 0.00085 to 0.012."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    return scheduler.add_noise(latents, noise, torch.full((len(noise),), timestep))


def prompt_embedding(model: str, prompt: str, what: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Embedding of a prompt by the text encoder of a Stable Diffusion folder, [1, length, width]; the encoder is not kept.

    Raises:
        FileNotFoundError, ValueError: As `load_model`.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = call_loader(CLIPTokenizer, model, what, subfolder="tokenizer")
    encoder = load_model(CLIPTextModel, model, what, device, dtype, "text_encoder")
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.inference_mode():
        return encoder(ids.to(device))[0].clone()


def load_unet(model: str, what: str, device: torch.device, dtype: torch.dtype) -> "UNet2DConditionModel":
    """The U-Net of a Stable Diffusion folder. Raises as `load_model`."""
    from diffusers import UNet2DConditionModel

    return load_model(UNet2DConditionModel, model, what, device, dtype, "unet")


def unet_from_weights(
    model: str, what: str, weights: str, weights_what: str, device: torch.device, dtype: torch.dtype
) -> "UNet2DConditionModel":
    """A U-Net of the geometry of a Stable Diffusion folder with the weights of a state dict. Raises as `load_model`, `read_state_dict`."""
    from diffusers import UNet2DConditionModel

    state = read_state_dict(weights, weights_what)
    unet = UNet2DConditionModel.from_config(load_config(UNet2DConditionModel, model, what, "unet"))
    load_into(unet, state, weights_what)
    return unet.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_config(cls: "type[ConfigMixin]", model: str, what: str, subfolder: str) -> dict[str, Any]:
    """The config of a model of diffusers, without its weights. Raises as `load_model`."""
    return call_loader(_ConfigOf(cls), model, what, subfolder=subfolder)


class _ConfigOf:
    """Makes a diffusers class's `load_config` look like `from_pretrained`, so that its errors are treated alike."""

    def __init__(self, cls: "type[ConfigMixin]") -> None:
        self.__name__ = f"the config of {cls.__name__}"
        self.from_pretrained = cls.load_config


def load_vae(model: str, what: str, device: torch.device, dtype: torch.dtype, subfolder: str = "vae") -> "AutoencoderKL":
    """The VAE of a Stable Diffusion folder. Raises as `load_model`."""
    from diffusers import AutoencoderKL

    return load_model(AutoencoderKL, model, what, device, dtype, subfolder)
