"""FLUX itself as a description of a picture: the hidden states of one noised pass (after DiTF, data fact B3).

Any diffusers FLUX.1 folder will do, the one that is trained on as well. Tokens carry their positions into every block, so that a part that
has moved is described a little differently, by its place: features are not shift-equivariant, as those of a convolution would be.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mosaic.config.schema import Section
from mosaic.config.sections import CountOrZero, Side, Text
from mosaic.method.grids import PATCH, Grid
from mosaic.method.tokens import pack_latents, position_ids, text_position_ids
from mosaic.pipeline.encoders import LiveEncoders, PromptEmbeddings
from mosaic.pipeline.flux import FluxPipeline
from mosaic.pipeline.latents import encode_images
from mosaic.weights.frozen import call_loader
from preprocess.extractors.hooks import outputs_until
from preprocess.extractors.protocol import fitted_grid, picture_tensor, require_multiple
from preprocess.extractors.stable_diffusion import load_config, load_vae

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

MODEL = "black-forest-labs/FLUX.1-dev"
GUIDANCE = 1.0
"""Of models with guidance distilled into them: the model of the data, not pushed beyond it."""
MAX_TEXT_LENGTH = 512
"""Tokens of T5 that FLUX.1-dev reads."""
LEAST_DEVIATION = 1e-6
"""Of a channel over a picture; what varies less is constant."""
NoiseLevel = Annotated[float, Field(ge=0, lt=1)]
Draws = Annotated[int, Field(ge=1, le=1024)]


class FluxOptions(Section):
    """Options of `flux`. The defaults are for FLUX.1-dev, for which nothing was measured: see docs/data.md."""

    path: ClassVar[str] = "flux"

    model: Text = MODEL
    """Folder or hub id of a FLUX.1 in the layout of diffusers. FLUX.1-dev is gated: accept its licence on the hub first."""
    size: Side = 1024
    """Long side in px to which pictures are resized; 1024 describes 64 x 64 tokens of FLUX.1-dev."""
    block: CountOrZero | None = None
    """Block whose output is taken, from 0, double blocks before single ones; null: the middle one, 28 of FLUX.1-dev's 57. Those after it
    are not kept in memory."""
    timestep: NoiseLevel = 0.26
    """Share of noise in the latents, from 0 (none) to 1."""
    prompt: str = ""
    """Prompt of the pass."""
    ensemble: Draws = 8
    """Draws of noise whose features are averaged."""
    batch_size: Draws = 1
    """Draws per pass of the transformer; less needs less memory."""


class Flux:
    """Hidden states of a picture's tokens after a block, averaged over draws of noise: [3072, 64, 64] at 1024 px with FLUX.1-dev.

    Every channel is brought to mean 0 and deviation 1 over the picture's cells. A few channels of a diffusion transformer are larger by
    orders of magnitude than all others, and nearly equal in all tokens: they alone would make the cosine of any two cells nearly 1.
    """

    def __init__(self, options: FluxOptions, device: torch.device, dtype: torch.dtype) -> None:
        """Load the models; the prompt is encoded once, and its encoders are not kept.

        Raises:
            FileNotFoundError, ValueError: The model cannot be had or is no FLUX.1 from text to pictures, it has no such block, or `size` is
                no multiple of its tokens' side.
        """
        self.options, self.device, self.dtype = options, device, dtype
        self.provenance: dict[str, str] = {}
        self.vae = load_vae(options.model, "flux.model", device, dtype)
        self.stride = PATCH * 2 ** (len(self.vae.config.block_out_channels) - 1)
        require_multiple("flux.size", options.size, self.stride)
        block = chosen_block(options, PATCH**2 * self.vae.config.latent_channels)
        self.prompt = prompt_embeddings(options.model, options.prompt, "flux.model", device, dtype)
        self.transformer = load_transformer(options.model, block + 1, "flux.model", device, dtype)

    def grid(self, height: int, width: int) -> Grid:
        """One cell per token of the resized picture."""
        return fitted_grid(height, width, self.options.size // self.stride)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture; all noise comes from one generator with this seed."""
        from mosaic.method.flow import add_noise  # imports diffusers' FLUX pipeline, which `mosaic.pipeline.flux` does quietly: after it

        options, grid = self.options, self.grid(image.height, image.width)
        pixels = picture_tensor(image, (grid.rows * self.stride, grid.columns * self.stride))
        latents = pack_latents(encode_images(self.vae, pixels.to(self.device, self.dtype)))
        noise = torch.randn((options.ensemble, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(latents)
        noisy = add_noise(latents, noise, torch.full((options.ensemble,), options.timestep))
        parts = [self.hidden_states(part, grid).float().sum(dim=0) for part in noisy.split(options.batch_size)]
        tokens = torch.stack(parts).sum(dim=0) / options.ensemble
        return standardised(tokens).T.reshape(-1, *grid)

    def hidden_states(self, noisy: Tensor, grid: Grid) -> Tensor:
        """Hidden states [B, N, d] after the chosen block, the last one that was kept, of packed noisy latents [B, N, C]."""
        transformer, count = self.transformer, len(noisy)
        text = self.prompt.prompt_embeds.expand(count, -1, -1)
        inputs = {
            "hidden_states": noisy,
            "encoder_hidden_states": text,
            "pooled_projections": self.prompt.pooled.expand(count, -1),
            "timestep": torch.full((count,), self.options.timestep, device=self.device),
            "img_ids": position_ids(grid, device=self.device),
            "txt_ids": text_position_ids(text.shape[1], self.device),
            "guidance": torch.full((count,), GUIDANCE, device=self.device) if transformer.config.guidance_embeds else None,
        }
        block = [*transformer.transformer_blocks, *transformer.single_transformer_blocks][-1]
        return outputs_until([block], lambda: transformer(**inputs), element=1)[0]  # text tokens are the first element


def standardised(tokens: Tensor) -> Tensor:
    """Tokens [N, d] whose channels have mean 0 and deviation 1; a channel that is equal in all of them is 0."""
    centred = tokens - tokens.mean(dim=0)
    return centred / centred.square().mean(dim=0).sqrt().clamp(min=LEAST_DEVIATION)


def chosen_block(options: FluxOptions, channels: int) -> int:
    """Index of the block to be taken, from the transformer's config alone.

    Args:
        options: Of the extractor.
        channels: Of a packed token of the VAE.

    Raises:
        FileNotFoundError, ValueError: The model is none that takes such tokens, or has no such block.
    """
    from diffusers import FluxTransformer2DModel

    config = load_config(FluxTransformer2DModel, options.model, "flux.model", "transformer")
    name = config.get("_class_name", "FluxTransformer2DModel")
    if name != "FluxTransformer2DModel" or config.get("in_channels", 64) != channels:
        raise ValueError(
            f"flux.model: {options.model} must be a FLUX.1 that makes pictures of text, whose tokens have the {channels} channels of its "
            f"VAE; got a {name} of {config.get('in_channels', 64)} channels."
        )
    count = config.get("num_layers", 19) + config.get("num_single_layers", 38)
    block = count // 2 if options.block is None else options.block
    if block >= count:
        raise ValueError(f"flux.block must be at most {count - 1}, the last of the {count} blocks of {options.model}, got {block}.")
    return block


def prompt_embeddings(model: str, prompt: str, what: str, device: torch.device, dtype: torch.dtype) -> PromptEmbeddings:
    """Embeddings of a prompt by the text encoders of a FLUX folder, which are not kept. Raises as `call_loader`."""
    absent = dict.fromkeys(("vae", "transformer"))
    pipeline = call_loader(FluxPipeline, model, what, dtype=dtype, use_safetensors=True, **absent).to(device)
    length = min(pipeline.tokenizer_2.model_max_length, MAX_TEXT_LENGTH)
    found = LiveEncoders(pipeline, warns=True, device=device).encode_prompts([prompt], length)
    return PromptEmbeddings(*(part.to(dtype) for part in found))


def load_transformer(model: str, num_blocks: int, what: str, device: torch.device, dtype: torch.dtype) -> "FluxTransformer2DModel":
    """The transformer of a FLUX folder with its first blocks alone, double ones before single ones. Raises as `call_loader`."""
    from diffusers import FluxTransformer2DModel

    transformer = call_loader(FluxTransformer2DModel, model, what, dtype=dtype, use_safetensors=True, subfolder="transformer")
    double = transformer.transformer_blocks
    transformer.transformer_blocks = double[:num_blocks]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[: max(0, num_blocks - len(double))]
    return transformer.to(device).eval().requires_grad_(False)
