"""Digests that tell pictures and weights apart, and what a model folder says without being loaded."""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from mosaic.files import read_json
from mosaic.weights.hub import download, require_model_name, unreachable_message

WHOLE = 64 * 2**20  # bytes up to which a file of weights is read completely
NUM_BLOCKS, BLOCK = 256, 64 * 2**10  # of a larger one, evenly spread
SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(path: Path) -> str:
    """SHA-256 of a file of weights, in hex: of its size and 256 evenly spread blocks where it has more than 64 MiB."""
    size = path.stat().st_size
    if size <= WHOLE:
        return file_digest(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(NUM_BLOCKS):
            file.seek(number * (size - BLOCK) // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def model_digest(name: str) -> str:
    """What tells a model from another: of a folder a SHA-256 of its files, of a hub id the commit.

    Raises:
        FileNotFoundError: It is neither a folder nor of a hub id's form.
        OSError: The id is gated, missing or unreachable, or the folder damaged.
    """
    index = model_file(name, "model_index.json")
    if not Path(name).is_dir():
        return index.parent.name  # the hub's cache names a snapshot's folder by its commit
    digest = hashlib.sha256()
    for path in sorted(Path(name).rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            digest.update(f"{path.relative_to(name).as_posix()}\n{weights_digest(path)}\n".encode())
    return digest.hexdigest()


def model_file(name: str, file: str) -> Path:
    """Path of a small file of a model, downloaded if the model is a hub repository.

    Raises:
        FileNotFoundError, OSError: A local folder or the repository is missing, or cannot be reached (`model_digest`).
    """
    require_model_name(name)
    try:
        if Path(name).is_dir():
            return (Path(name) / file).resolve(strict=True)
        return download(name, file)
    except (HfHubHTTPError, OSError) as error:
        raise OSError(unreachable_message(name, error)) from error


def vae_scale_factor(name: str) -> int:
    """Pixels per latent of a model, read from the VAE's config.

    Raises:
        FileNotFoundError, OSError: A local folder or the repository is missing, or cannot be reached (`model_digest`).
    """
    path = model_file(name, "vae/config.json")
    try:
        channels: Any = read_json(path)["block_out_channels"]
        return 2 ** (len(channels) - 1)
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(unreachable_message(name, error)) from error
