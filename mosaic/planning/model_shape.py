"""The shape of a base model, known without loading it: from the files of a local folder, or FLUX.1-dev's constants."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from mosaic.model.costs import FLUX_DEV, base_parameter_count

ENCODERS = ("vae", "text_encoder", "text_encoder_2")
#: Parameters of FLUX.1-dev's frozen encoders: its VAE, CLIP-L's text model, T5-XXL's encoder.
FLUX_DEV_ENCODERS = {"vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}


#: `vae/config.json` and `text_encoder_2/config.json` of FLUX.1-dev, as far as they decide memory.
FLUX_DEV_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_DEV_T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on.

    Attributes:
        transformer: `transformer/config.json`.
        vae_scale_factor: Pixels per latent cell.
        encoders: Parameters of each frozen encoder by its folder's name.
        is_local: Whether this was read from a folder; else it is FLUX.1-dev's.
        vae: `vae/config.json`.
        t5: `text_encoder_2/config.json`; empty: there is none.
    """

    transformer: Mapping[str, Any]
    vae_scale_factor: int
    encoders: Mapping[str, int]
    is_local: bool
    vae: Mapping[str, Any] = field(default_factory=lambda: FLUX_DEV_VAE)
    t5: Mapping[str, Any] = field(default_factory=lambda: FLUX_DEV_T5)

    @property
    def base_parameters(self) -> int:
        """Parameters of the frozen transformer."""
        return base_parameter_count(self.transformer)

    @property
    def largest_linear(self) -> int:
        """Weights of the largest frozen layer, the single-stream blocks' exit: what a quantised base unpacks at a time."""
        d = self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]
        return 5 * d * d


FLUX_DEV_SHAPE = ModelShape(FLUX_DEV, 8, FLUX_DEV_ENCODERS, is_local=False)


def read_model_shape(pretrained: str) -> ModelShape:
    """The shape of `model.pretrained`: of a local diffusers FLUX folder, else (a hub id) FLUX.1-dev's.

    Raises:
        FileNotFoundError: If a file of the folder is missing.
        ValueError: If one is damaged.
    """
    folder = Path(pretrained)
    if not folder.is_dir():
        return FLUX_DEV_SHAPE
    transformer = _read_json(folder / "transformer/config.json")
    missing = [key for key in FLUX_DEV if key not in transformer]
    if missing:
        raise ValueError(f"{folder / 'transformer/config.json'}: must be the config of a FLUX transformer, but lacks {', '.join(missing)}.")
    vae = _read_json(folder / "vae/config.json")
    blocks = vae.get("block_out_channels", [0] * 4)
    t5 = _read_json(folder / "text_encoder_2/config.json") if (folder / "text_encoder_2").is_dir() else {}
    encoders = {name: sum(_parameters(file) for file in sorted((folder / name).glob("*.safetensors"))) for name in ENCODERS}
    vae, t5 = ({key: value for key, value in config.items() if not key.startswith("_")} for config in (vae, t5))
    return ModelShape({key: transformer[key] for key in FLUX_DEV}, 2 ** (len(blocks) - 1), encoders, is_local=True, vae=vae, t5=t5)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found; model.pretrained must be a complete diffusers FLUX folder.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a JSON object.")
    return values


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone."""
    with open(path, "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
            header.pop("__metadata__", None)
            size = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if path.stat().st_size != size:
                raise ValueError(f"{size:,} bytes are announced, {path.stat().st_size:,} are there")
            return sum(prod(entry["shape"]) for entry in header.values())
        except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a safetensors file ({error}).") from error
