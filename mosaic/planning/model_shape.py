"""The shape of a base model, known without loading it: from the files of a local folder, or FLUX.1-dev's constants."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mosaic.planning.costs import FLUX_DEV, base_parameter_count

ENCODERS = ("vae", "text_encoder", "text_encoder_2")
#: Parameters of FLUX.1-dev's frozen encoders: its VAE, CLIP-L's text model, T5-XXL's encoder.
FLUX_DEV_ENCODERS = {"vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on.

    Attributes:
        transformer: `transformer/config.json`.
        vae_scale_factor: Pixels per latent cell.
        encoders: Parameters of each frozen encoder by its folder's name.
        is_local: Whether this was read from a folder; else it is FLUX.1-dev's.
    """

    transformer: Mapping[str, Any]
    vae_scale_factor: int
    encoders: Mapping[str, int]
    is_local: bool

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
    blocks = _read_json(folder / "vae/config.json").get("block_out_channels", [0] * 4)
    encoders = {name: sum(_parameters(file) for file in sorted((folder / name).glob("*.safetensors"))) for name in ENCODERS}
    return ModelShape({key: transformer[key] for key in FLUX_DEV}, 2 ** (len(blocks) - 1), encoders, is_local=True)


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
            return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a safetensors file ({error}).") from error
