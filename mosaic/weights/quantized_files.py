"""Quantised models on disk, so that quantising is paid once: one safetensors file each, named by what decides its content.

A file holds the whole model, layers in full precision included: loading it needs neither the original weights nor their memory.
"""

import gc
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mosaic.files import in_one_line, replacing, save_tensors
from mosaic.weights.components import WEIGHTS, component_config
from mosaic.weights.digests import weights_digest
from mosaic.weights.float8 import Float8Linear
from mosaic.weights.quantization import PACKAGES, quantize_base

logger = logging.getLogger(__name__)
KEY, FORMAT = "mosaic_quantized", 1  # of the metadata; a new number makes all files anew
TORCHAO = "mosaic_torchao"  # metadata that torchao needs to put its tensors together
NF4_STATE = ".quant_state.bitsandbytes__nf4"


def quantized_model(
    component: Path,
    load: Callable[[], nn.Module],
    build: Callable[[], nn.Module],
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    cache: str | os.PathLike | None,
) -> nn.Module:
    """A quantised model from the cache, where it is put if it is not there.

    Args:
        component: Folder of the model's config and weights.
        load: Loads the model with its weights, in `dtype`, on the CPU.
        build: Makes the model without reading weights.
        quantization: "nf4", "int8", "fp8" or "fp8_dynamic".
        dtype: Number format of what is not quantised.
        device: Where nf4 layers are quantised.
        cache: Folder of the files; None: no cache.

    Returns:
        The frozen model: nf4 layers on `device`, what else there is on the CPU or there.

    Raises:
        ValueError: If a file is damaged, or the package of the number format is missing.
        OSError: If the file cannot be written.
    """
    if cache is None:
        model = load()
        quantize_base(model, quantization, device)
        return model
    key = quantized_key(component, quantization, dtype, device)
    path = Path(cache).expanduser() / f"{component.name}-{quantization}-{key[:24]}.safetensors"
    if not path.is_file():
        model = load()
        quantize_base(model, quantization, device)
        write_quantized(model, path, quantization)
        logger.info("%s: quantised to %s, kept in %s", component.name, quantization, path)
        del model
        gc.collect()  # modules refer to themselves in circles, which would keep gigabytes beside what is read now
    # The first run reads the file as every later one does: where weights lie in memory decides how products round.
    with init_empty_weights():
        model = build()
    read_quantized(model, path, quantization, device)
    return model


def quantized_key(component: Path, quantization: str, dtype: torch.dtype, device: torch.device) -> str:
    """SHA-256, in hex, of what decides a quantised model: config and weights, the number formats, and the library that quantises."""
    files = next((found for pattern in WEIGHTS if (found := sorted(component.glob(pattern)))), [])
    package = PACKAGES[quantization]
    content = {
        "format": FORMAT,
        "config": component_config(component),
        "weights": [weights_digest(path) for path in files],
        "quantization": [quantization, str(dtype), package, importlib.metadata.version(package), device.type],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_quantized(model: nn.Module, path: Path, quantization: str) -> None:
    """Write a quantised model, aside first, then renamed.

    Raises:
        OSError: If it cannot be written.
    """
    tensors, metadata = model.state_dict(), {}
    if PACKAGES[quantization] == "torchao":
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        tensors, described = flatten_tensor_state_dict(tensors)
        metadata[TORCHAO] = json.dumps(described)
    plain, aliases = _without_aliases(tensors)
    metadata[KEY] = json.dumps({"format": FORMAT, "quantization": quantization, "aliases": aliases})
    try:
        with replacing(path, shared=True) as aside:
            save_tensors(plain, aside, metadata)
    except (OSError, SafetensorError) as error:
        cure = "inference.quantized_cache=null does without it"
        raise OSError(f"the cache of quantised weights cannot be written to {path} ({error}); {cure}.") from error


def read_quantized(model: nn.Module, path: Path, quantization: str, device: torch.device) -> None:
    """Put the weights of a file into a model that has none, and freeze it.

    Args:
        model: On the meta device.
        path: Written by `write_quantized`.
        quantization: As it was written.
        device: Of nf4 layers.

    Raises:
        ValueError: If the file is damaged or is that of another model.
    """
    model.eval()  # before layers are replaced: as after quantising, those of bitsandbytes are not asked to pack themselves for a CPU
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        written = json.loads(metadata[KEY])
        tensors |= {alias: tensors[name] for alias, name in written["aliases"].items()}
        if (written["format"], written["quantization"]) != (FORMAT, quantization):
            raise ValueError(f"holds {written['quantization']}, not {quantization}")
        if PACKAGES[quantization] == "torchao":
            from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

            tensors, _ = unflatten_tensor_state_dict(tensors, json.loads(metadata[TORCHAO]))
        elif quantization == "fp8_dynamic":
            _put_float8(model, tensors)
        else:
            tensors = _put_nf4(model, tensors, device)
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
        unset = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if unexpected or unset:
            raise ValueError(f"keys do not fit the model: {[*unexpected, *missing, *unset][:4]}")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a usable file of quantised weights ({in_one_line(error, 300)}). Delete it, and it is made anew."
        ) from error
    model.requires_grad_(False)


def _without_aliases(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors on the CPU, each once, and the names of those left out with the name under which they are kept."""
    first: dict[tuple, str] = {}
    plain, aliases = {}, {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place], plain[name] = name, tensor.detach().cpu().contiguous()
    return plain, aliases


def _put_float8(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace the layers that are stored in 8 bits by ones without numbers."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.scale" in tensors:
            model.set_submodule(name, Float8Linear.empty_like(layer))


def _put_nf4(model: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Replace the layers that are stored in 4 bits; returns the tensors that are left."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    left = dict(tensors)
    for key in [key for key in tensors if key.endswith(NF4_STATE)]:
        weight = key.removesuffix(NF4_STATE)
        name = weight.removesuffix(".weight")
        stats = {part: left.pop(part) for part in tensors if part.startswith(f"{weight}.")}
        layer = model.get_submodule(name)
        codes = Params4bit.from_prequantized(left.pop(weight), stats, device=device)
        options = {"bias": layer.bias is not None, "compute_dtype": codes.quant_state.dtype, "quant_type": "nf4", "device": "meta"}
        quantized = Linear4bit(layer.in_features, layer.out_features, **options)
        quantized.weight, codes.module = codes, quantized
        if layer.bias is not None:
            quantized.bias = nn.Parameter(left.pop(f"{name}.bias").to(device), requires_grad=False)
        model.set_submodule(name, quantized)
    return left
