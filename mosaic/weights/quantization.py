"""Frozen matrices in 4 or 8 bits: of the transformer (`model.quantization`, and in inference), and of T5 beside it.

"nf4", "int8" and "fp8" are formats of storage, "fp8_dynamic" one of the products as well (`mosaic.weights.float8`). The reference LoRA
stays in full precision. The branches only call a base layer's forward, so nothing else has to know. The libraries are optional. Layers are
replaced after loading and not by diffusers while it loads, because diffusers refuses nf4 on machines without a GPU.
"""

import importlib.util
import logging

import torch
from torch import nn

from mosaic.weights.float8 import Float8Linear, check_device

logger = logging.getLogger(__name__)
#: What makes each format, and decides its numbers.
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao", "fp8_dynamic": "torch"}
INSTALL = "pip install -r requirements-quantization.txt"
# Small, and at the ends of the network, where rounding shows most: of FLUX, then what FLUX.2 and Qwen-Image name otherwise.
FULL_PRECISION = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out", "time_guidance_embed", "img_in", "txt_in")
T5_EXIT = "wo"  # T5 casts what goes into this layer to the format of its weight, which packed integers have not


def require_package(package: str, setting: str) -> None:
    """Check that an optional package is there, without importing it.

    Args:
        package: Its name, for import and for pip alike.
        setting: What needs it, such as 'model.quantization "nf4"'.

    Raises:
        ValueError: If it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        fitting = f" (in a version that goes with the rest: {INSTALL})" if package in PACKAGES.values() else ""
        raise ValueError(f"{setting} needs the package {package}, which is not installed: pip install {package}{fitting}")


def check_quantization(quantization: str, setting: str = "model.quantization") -> None:
    """Check that the package of a number format is installed, and that the GPU can multiply in it.

    Raises:
        ValueError: If one is not so.
    """
    if quantization != "none":
        require_package(PACKAGES[quantization], f'{setting} "{quantization}"')
    if quantization == "fp8_dynamic":
        check_device(f'{setting} "{quantization}"')


def quantize_base(transformer: nn.Module, quantization: str, device: torch.device) -> None:
    """Quantise the blocks' matrices in place, one after the other; the model is frozen by this.

    Args:
        transformer: A FLUX transformer, or one like it, without adapters, or a T5 encoder.
        quantization: "none", "nf4" (bitsandbytes), "int8" or "fp8" (torchao, weights only), "fp8_dynamic" (products, too).
        device: Where nf4 layers are quantised and stay.

    Raises:
        ValueError: If the package is not installed, or the GPU does not multiply in this format.
    """
    if quantization == "none":
        return
    check_quantization(quantization)
    transformer.requires_grad_(False)
    if quantization == "nf4":
        for name, layer in list(transformer.named_modules()):
            if is_quantized(layer, name) and name.split(".")[-1] != T5_EXIT:
                transformer.set_submodule(name, _nf4(layer).to(device))
        return
    if quantization == "fp8_dynamic":
        if device.type == "cpu":
            logger.warning("fp8_dynamic: a CPU multiplies these numbers in float32, slower than without; for tests.")
        for name, layer in list(transformer.named_modules()):
            if is_quantized(layer, name) and name.split(".")[-1] != T5_EXIT:
                transformer.set_submodule(name, Float8Linear.from_linear(layer))
        return
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig() if quantization == "int8" else Float8WeightOnlyConfig(), is_quantized)


def is_quantized(layer: nn.Module, name: str) -> bool:
    """Whether a layer of that name is one of the matrices that are quantised."""
    return isinstance(layer, nn.Linear) and name.split(".")[0] not in FULL_PRECISION


def _nf4(layer: nn.Linear) -> nn.Module:
    """A layer of bitsandbytes with the same weights, which it quantises when it is moved to a device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"bias": layer.bias is not None, "compute_dtype": layer.weight.dtype, "quant_type": "nf4", "device": "meta"}
    quantized = Linear4bit(layer.in_features, layer.out_features, **options)
    quantized.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    quantized.bias = layer.bias
    return quantized
