"""The files of single components of a diffusers pipeline, and what tells their weights apart, without loading them."""

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from mosaic.files import read_json
from mosaic.weights.digests import file_digest
from mosaic.weights.hub import require_model_name, unreachable_message

TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
WEIGHTS = ("*.safetensors", "*.bin")  # the first kind that is there is the one that is loaded


def component_folder(pretrained: str, component: str) -> Path:
    """Folder of a component, such as "vae", downloaded if the pipeline is a hub repository.

    Raises:
        FileNotFoundError: There is no such pipeline or component.
        OSError: The repository is gated, missing or unreachable.
    """
    require_model_name(pretrained)
    root = Path(pretrained)
    if not root.is_dir():
        try:
            root = Path(snapshot_download(pretrained, allow_patterns=[f"{component}/*"]))
        except (HfHubHTTPError, OSError) as error:
            raise OSError(unreachable_message(pretrained, error)) from error
    if not (root / component).is_dir():
        raise FileNotFoundError(f"{pretrained}: has no folder {component}; model.pretrained must be a diffusers FLUX pipeline.")
    return root / component


def component_config(folder: Path) -> dict[str, Any]:
    """The component's config.json, without what diffusers and transformers note about the writing of the file ("_...")."""
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'}: must be a JSON object.")
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}


def component_revision(folder: Path) -> str:
    """sha256 over the names and contents of a component's files: config and weights of a model, all files of a tokenizer.

    It reads every byte, except of files in the hub's own store, which are named by their sha256.

    Raises:
        FileNotFoundError: There are no weights beside the config.
    """
    digest = hashlib.sha256()
    if (folder / "config.json").is_file():
        digest.update(repr(sorted(component_config(folder).items())).encode())
        files = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
        if not files:
            raise FileNotFoundError(f"{folder}: holds no weights ({', '.join(WEIGHTS)}).")
    else:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        digest.update(f"\0{path.name}\0{_sha256(path)}".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    stored = path.resolve()
    if stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", stored.name):
        return stored.name
    return file_digest(path)
