"""LoRA files as they come: safetensors, read one tensor at a time, written aside and then renamed."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mosaic.files import replacing, save_tensors

METADATA_KEY = "mosaic"  # key of the safetensors metadata that marks a file as a reference LoRA
DIFFUSERS_METADATA = "lora_adapter_metadata"  # key under which diffusers keeps PEFT's config, and with it the alpha

MOST_ROUNDING = 2.0**-8  # share of a matrix's norm: bfloat16 rounds a number by at most 2^-9 of it


class LoraFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by key, each read when it is asked for. Nothing is unpickled.

    Attributes:
        path: The file.
        metadata: Its metadata.
    """

    def __init__(self, path: str | os.PathLike, what: str = "LoRA") -> None:
        """Open a file.

        Args:
            path: A safetensors file.
            what: The thing's name in messages.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no safetensors file, or is cut off.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{what} not found: {path}. Give a .safetensors file, or a hub repository as user/name.")
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            kind = f"{what[0].upper()}{what[1:]}s"
            raise ValueError(f"{path}: not a safetensors file ({error}). {kind} are read from .safetensors only.") from error
        self._keys = dict.fromkeys(self._file.keys())
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})

    def __getitem__(self, key: str) -> Tensor:
        """The tensor of a key, read from the file; ValueError if it is of a number format that PyTorch does not have."""
        if key not in self._keys:
            raise KeyError(key)
        try:
            return self._file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: {key} of the number format {self.dtype(key)} cannot be read ({error}).") from error

    def __contains__(self, key: object) -> bool:
        """Whether the file has a key; nothing is read."""
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._keys)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """Number format of a tensor as safetensors names it, such as "BF16", from the file's header."""
        return self._file.get_slice(key).get_dtype()


def check_finite(tensor: Tensor, key: str, where: str) -> None:
    """Check that a tensor of a file has no NaN and nothing infinite.

    Raises:
        ValueError: Naming the file and the key.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where}: {key} holds values that are not finite. The file is damaged, or its training failed.")


def narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 or float64 matrix in a number format; in float32 where that format would make numbers infinite, or small ones zero."""
    narrow = wide.to(dtype)
    lost = torch.linalg.matrix_norm(narrow.double() - wide.double())
    return narrow if lost <= MOST_ROUNDING * torch.linalg.matrix_norm(wide.double()) else wide.float()


def metadata_object(metadata: Mapping[str, str], key: str, where: str) -> dict[str, Any]:
    """The JSON object under a key of a file's metadata; empty if there is none.

    Args:
        metadata: Of the file.
        key: Its key.
        where: The file, for messages.

    Raises:
        ValueError: If it is no JSON object.
    """
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the metadata under {key!r} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: the metadata under {key!r} must be a JSON object.")
    return value


def reference_metadata(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """Our metadata of a reference LoRA's file; empty if it has none, as the published file.

    Raises:
        ValueError: If it is no JSON object, or its config is none.
    """
    value = metadata_object(metadata, METADATA_KEY, where)
    if not isinstance(value.get("config", {}), dict):
        raise ValueError(f"{where}: the metadata under {METADATA_KEY!r} must be a JSON object with a config object.")
    return value


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that stay true when the tensors change: without PEFT's ranks and alphas, and without kohya's digests."""
    return {key: text for key, text in metadata.items() if key != DIFFUSERS_METADATA and not key.startswith("sshs_")}


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> Path:
    """Write tensors as one safetensors file; its folder is made."""
    path = Path(path)
    with replacing(path) as aside:
        save_tensors(tensors, aside, {"format": "pt"} | dict(metadata))
    return path
