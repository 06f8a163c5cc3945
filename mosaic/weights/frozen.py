"""Loading models that are not trained, and the state dicts users bring. Never unpickles objects."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mosaic.files import in_one_line
from mosaic.weights.digests import file_digest
from mosaic.weights.hub import require_model_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(cls: Any, name: str, what: str, device: torch.device, dtype: torch.dtype, subfolder: str = "") -> Any:
    """Load a frozen model of diffusers or transformers, from safetensors only.

    Args:
        cls: Class with `from_pretrained`.
        name: Folder or hub id.
        what: The option that names it, such as "dift.model", for messages.
        device: Where it goes.
        dtype: Of its weights.
        subfolder: Of the folder or repository.

    Raises:
        FileNotFoundError: `name` is neither a folder nor a hub id.
        ValueError: It cannot be had, is damaged, or holds no safetensors.
    """
    arguments = {"subfolder": subfolder} if subfolder else {}
    model = call_loader(cls, name, what, torch_dtype=dtype, use_safetensors=True, **arguments)
    return model.to(device).eval().requires_grad_(False)


def call_loader(cls: Any, name: str, what: str, **arguments: Any) -> Any:
    """Call `cls.from_pretrained`, its many kinds of errors turned into one. Raises as `load_model`."""
    try:
        require_model_name(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}: {error}") from error
    try:
        return cls.from_pretrained(name, **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        part = f"the {arguments['subfolder']} of {name}" if arguments.get("subfolder") else name
        raise ValueError(
            f"{what}: {part} cannot be loaded as {cls.__name__} ({in_one_line(error, 300, with_kind=True)}). "
            "Name a complete folder with safetensors weights, or a hub id that you have access to."
        ) from error


def read_state_dict(path: str, what: str) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from a `torch.save` file (`weights_only`, so that nothing in it is executed).

    Args:
        path: File ending in .safetensors, or in anything else for `torch.save` files.
        what: The option that names it, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Damaged, holds pickled objects, or is no dict of tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what}: file not found: {path}.")
    try:
        state = load_file(path) if path.endswith(".safetensors") else _load_tensors(path)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"{what}: {path} is damaged or holds more than tensors; it is not loaded ({in_one_line(error, 200, with_kind=True)})."
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{what}: {path} must hold a dict of named tensors.")
    return state


def _load_tensors(path: str) -> object:
    """What a `torch.save` file holds, if that is nothing but tensors and plain containers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # said of files that are refused a moment later
        return torch.load(path, map_location="cpu", weights_only=True)


def load_into(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict strictly, or raise ValueError naming the first differences."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for text, names in (("lacks", expected.keys() - found.keys()), ("has the unknown", found.keys() - expected.keys())):
        if names:
            raise ValueError(f"{what}: the file {text} {sorted(names)[0]} ({len(names)} such keys); it belongs to another model.")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{what}: {name} must have the shape {list(shape)}, got {list(found[name])}; it belongs to another model.")
    module.load_state_dict(state)


def short_digest(path: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of a file."""
    return file_digest(Path(path))[:16]
