"""What one use of a model costs, in FLOPs: by its config where it is a local folder, by a table where it is a known id of the hub.

Multiply-adds times two, as in `mosaic.model.costs`. Nothing is loaded, and a model that is neither has no cost here: None.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mosaic.model.costs import FLUX_DEV, Workload, base_parameter_count, forward_flops
from mosaic.planning.model_shape import FLUX_DEV_ENCODERS, read_model_shape

TOKEN = 16  # px, side of what a token of FLUX's and Qwen-Image's transformers shows
BYTES = 2  # of a weight, as it is read and as it lies on the hub


class Use(NamedTuple):
    """What a call of a model costs.

    Attributes:
        flops: Of its products.
        bytes_read: Of weights that are read for every token of an answer, one after the other: what a language model waits for.
    """

    flops: float
    bytes_read: float = 0.0

    def times(self, count: float) -> "Use":
        """That of several calls."""
        return Use(self.flops * count, self.bytes_read * count)


@dataclass(frozen=True)
class Painter:
    """A pipeline that makes pictures.

    Attributes:
        parameters: Of its transformer.
        encoder_parameters: Of its text encoders, as far as they are met by every token.
        text_tokens: T.
        blocks: Of the transformer.
        forward: FLOPs of a pass by text and picture tokens.
        vae: Its VAE's size over that of FLUX.1, by parameters.
    """

    parameters: float
    encoder_parameters: float
    text_tokens: int
    blocks: int
    forward: Callable[[int, int], float]
    vae: float = 1.0

    def call(self, height: int, width: int, steps: int, pictures: int = 0, passes: int = 1) -> Use:
        """One picture.

        Args:
            height: Of the picture, px.
            width: Of the picture, px.
            steps: Of sampling.
            pictures: How many of the same size are given, to be edited: their tokens are seen by all.
            passes: Of the transformer a step: 2 where there is a negative prompt.
        """
        tokens = (height // TOKEN) * (width // TOKEN)
        transformer = steps * passes * self.forward(self.text_tokens, tokens * (1 + pictures))
        encoders = passes * 2 * self.encoder_parameters * self.text_tokens
        vae = self.vae * (decode_flops(height * width) + pictures * encode_flops(height * width))
        return Use(transformer + encoders + vae)


def encode_flops(pixels: float) -> float:
    """FLOPs of FLUX.1's VAE encoder: by torch's FlopCounterMode 1.12e12 at 512 px and 4.88e12 at 1024 px, attention included."""
    return _between(pixels, 1.12e12, 4.88e12)


def decode_flops(pixels: float) -> float:
    """FLOPs of FLUX.1's VAE decoder: 2.51e12 at 512 px, 10.47e12 at 1024 px, counted alike."""
    return _between(pixels, 2.51e12, 10.47e12)


def _between(pixels: float, at_512: float, at_1024: float) -> float:
    """a p + b p^2 through both values, p in pictures of 512 x 512."""
    square = (at_1024 - 4 * at_512) / 12
    share = pixels / 512**2
    return (at_512 - square) * share + square * share**2


def stack_flops(width: int, blocks: int, weights: int, text_tokens: int, picture_tokens: int) -> float:
    """FLOPs of a pass through blocks whose tokens all see each other: a token meets `weights` width^2 of each, a pair costs 4 width."""
    tokens = text_tokens + picture_tokens
    return 2.0 * weights * width**2 * blocks * tokens + 4.0 * width * blocks * tokens**2


def _flux_1(config: Mapping[str, Any], encoders: Mapping[str, int], text_tokens: int = 512) -> Painter:
    def forward(text: int, pictures: int) -> float:
        return forward_flops(config, Workload(1, 0, pictures, 0, text, 0, "target")).total

    blocks = config["num_layers"] + config["num_single_layers"]
    size = encoders.get("vae", 0) / FLUX_DEV_ENCODERS["vae"]
    # T5's tokens meet nearly all of its weights; CLIP's 77 are few beside.
    return Painter(base_parameter_count(config), encoders.get("text_encoder_2", 0), text_tokens, blocks, forward, size)


def _stacked(width: int, blocks: int, streams: int, weights: int, encoder_parameters: float, text_tokens: int = 512) -> Painter:
    """A transformer of blocks alike; `streams` counts the weights of blocks that have them twice, for text and for pictures."""
    return Painter(
        float(weights * width**2 * streams),
        encoder_parameters,
        text_tokens,
        blocks,
        lambda text, pictures: stack_flops(width, blocks, weights, text, pictures),
    )


# Shapes by the transformers' config.json. FLUX.2's blocks hold 13 width^2 weights per stream and token (q, k, v, out; a gated MLP of three
# matrices of 3 width^2), Qwen-Image's 12, as FLUX.1's. Encoders: Qwen3-4B, Qwen3-8B, Qwen2.5-VL-7B's language model, without embeddings.
PAINTERS: dict[str, Painter] = {
    "black-forest-labs/FLUX.1-dev": _flux_1(FLUX_DEV, FLUX_DEV_ENCODERS),
    "black-forest-labs/FLUX.1-Kontext-dev": _flux_1(FLUX_DEV, FLUX_DEV_ENCODERS),  # the same transformer
    "black-forest-labs/FLUX.2-klein-4B": _stacked(3072, 5 + 20, 2 * 5 + 20, 13, 3.6e9),
    "black-forest-labs/FLUX.2-klein-9B": _stacked(4096, 8 + 24, 2 * 8 + 24, 13, 6.9e9),
    "Qwen/Qwen-Image": _stacked(3072, 60, 2 * 60, 12, 6.5e9),
    "Qwen/Qwen-Image-Edit-2509": _stacked(3072, 60, 2 * 60, 12, 6.5e9, text_tokens=1024),  # its prompt holds the picture, too
    "Qwen/Qwen-Image-Edit-2511": _stacked(3072, 60, 2 * 60, 12, 6.5e9, text_tokens=1024),
}


def painter(model: str, text_tokens: int | None = None) -> Painter | None:
    """The shape of a pipeline: of a local FLUX.1 folder, or a known id; None: it is not known.

    Args:
        model: Folder or id.
        text_tokens: T, where the caller decides it.

    Raises:
        FileNotFoundError, ValueError: The folder is damaged.
    """
    found = _flux_folder(model) if Path(model).is_dir() else PAINTERS.get(model)
    return found if found is None or text_tokens is None else replace(found, text_tokens=text_tokens)


def _flux_folder(model: str) -> Painter | None:
    if _config(Path(model) / "transformer").get("_class_name") != "FluxTransformer2DModel":
        return None
    shape = read_model_shape(model)
    return _flux_1(shape.transformer, shape.encoders)


class Vit(NamedTuple):
    """A vision transformer, by its config.json."""

    layers: int
    width: int
    inner: int
    patch: int
    size: int

    def use(self, size: int | None = None) -> Use:
        """One square picture of `size` px, the model's own where None."""
        tokens = ((size or self.size) // self.patch) ** 2 + 1
        linear = 2.0 * (4 * self.width**2 + 2 * self.width * self.inner) * tokens
        return Use(self.layers * (linear + 4.0 * self.width * tokens**2))


_SO400M, _L14 = Vit(27, 1152, 4304, 14, 384), Vit(24, 1024, 4096, 14, 224)
VITS: dict[str, Vit] = {
    "google/siglip-so400m-patch14-384": _SO400M,
    "google/siglip2-so400m-patch14-384": _SO400M,
    "openai/clip-vit-base-patch32": Vit(12, 768, 3072, 32, 224),
    "openai/clip-vit-large-patch14": _L14,
    "facebook/dino-vits16": Vit(12, 384, 1536, 16, 224),
    "facebook/dinov2-small": Vit(12, 384, 1536, 14, 224),
    "facebook/dinov2-base": Vit(12, 768, 3072, 14, 224),
    "facebook/dinov2-large": _L14,
    "facebook/dinov3-vitb16-pretrain-lvd1689m": Vit(12, 768, 3072, 16, 224),
    "google/owlv2-base-patch16-ensemble": Vit(12, 768, 3072, 16, 960),
    "google/owlv2-large-patch14-ensemble": Vit(24, 1024, 4096, 14, 1008),
    "CIDAS/clipseg-rd64-refined": Vit(12, 768, 3072, 16, 352),
}
# By FlopCounterMode on the meta device, with transformers' and diffusers' classes in the models' shapes: Sam2Model's encoder at 1024 px;
# GroundingDino's Swin at 800 px (0.47e12 base, 0.12e12 tiny), and 0.38e12 for 13,294 tokens in its encoder, in closed form; SD 2.1's U-Net
# up to its second upward block at 1024 px, with the VAE's encoder before it.
PICTURES: dict[str, Use] = {
    "facebook/sam2.1-hiera-large": Use(1.82e12),
    "IDEA-Research/grounding-dino-base": Use(0.85e12),
    "IDEA-Research/grounding-dino-tiny": Use(0.50e12),
}
UNET_PASS = 2.35e12


def picture_use(model: str, size: int | None = None) -> Use | None:
    """A pass of an encoder, detector or segmenter over one picture, by a local config or the tables; None: not known."""
    if Path(model).is_dir():
        config = _config(Path(model))
        config = config.get("vision_config", config)
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "patch_size", "image_size")
        values = [config.get(name) for name in names]
        return Vit(*(int(value) for value in values if value)).use(size) if all(isinstance(value, int) for value in values) else None
    return VITS[model].use(size) if model in VITS else PICTURES.get(model)


def unet_use(size: int, draws: int) -> Use:
    """DIFT's features of a picture: the VAE once, the U-Net once a draw of noise; about by pixels from what it costs at 1024 px."""
    share = (size / 1024) ** 2
    return Use(encode_flops(size**2) * 0.4 + draws * UNET_PASS * share)  # SD's VAE has 34 of FLUX's 84 million parameters in its encoder


def flux_features_use(found: Painter, size: int, draws: int, share_of_blocks: float) -> Use:
    """FLUX's own features of a picture: the VAE once, the blocks up to the chosen one once a draw."""
    tokens = (size // TOKEN) ** 2
    return Use(encode_flops(size**2) * found.vae + draws * share_of_blocks * found.forward(found.text_tokens, tokens))


#: Parameters of the language model, of the vision encoder, and px of a picture's side that become one token.
CHATS: dict[str, tuple[float, float, int]] = {
    "Qwen/Qwen3-VL-2B-Instruct": (1.7e9, 0.4e9, 32),
    "Qwen/Qwen3-VL-4B-Instruct": (4.0e9, 0.4e9, 32),
    "Qwen/Qwen3-VL-8B-Instruct": (8.2e9, 0.6e9, 32),
}


def chat_use(model: str, text_tokens: int, pixels: float, answer_tokens: int) -> Use | None:
    """A question to a language model: all it reads at once, then its weights anew for every token of the answer."""
    if model not in CHATS:
        return None
    language, vision, side = CHATS[model]
    read = text_tokens + pixels / side**2
    seen = 2 * vision * 4 * pixels / side**2  # patches of half the side
    return Use(2 * language * (read + answer_tokens) + seen, answer_tokens * language * BYTES)


def _config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; empty where there is none that can be read."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
