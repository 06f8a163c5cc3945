"""Lets the meta device keep what a CPU or a GPU would keep: their fused kernels and their autocast.

On the meta device PyTorch computes attention as plain products, RMSNorm as a chain of small operations, and knows no autocast; the tensors
that a backward pass would find differ from those on a GPU by a factor. Here these few operations are done as the wanted device does them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FUNCTIONS = ("linear", "layer_norm", "rms_norm", "scaled_dot_product_attention")


@contextmanager
def kernels_of(device_type: str, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Context in which `torch.nn.functional` computes meta tensors with the kernels of "cuda" or "cpu".

    Covers the functions that autocast changes inside FLUX's blocks: linear and attention run in `autocast_dtype`; on CUDA, LayerNorm
    and RMSNorm run in float32 (on a CPU they keep their input's format), but where autocast is off (`attention_rows.no_autocast`).
    Not for several threads: the functions are replaced.

    Args:
        device_type: "cuda" or "cpu".
        autocast_dtype: Number format of autocast; None: no autocast.

    Raises:
        ValueError: If the device is neither.
    """
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f'device_type must be "cuda" or "cpu", got {device_type!r}.')
    originals = {name: getattr(functional, name) for name in FUNCTIONS}
    for name in FUNCTIONS:
        setattr(functional, name, _replacement(name, originals[name], device_type, autocast_dtype))
    try:
        with torch.autocast("cpu", autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None):  # says only where it is on
            yield
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)


def _replacement(name: str, original: Callable[..., Any], device_type: str, autocast_dtype: torch.dtype | None) -> Callable[..., Any]:
    """The function of that name as the device does it; tensors that are not on the meta device go to the original."""
    is_norm, on_cuda = name.endswith("_norm"), device_type == "cuda"
    dtype = autocast_dtype if not is_norm else torch.float32 if on_cuda else None
    if autocast_dtype is None:
        dtype = None

    def function(*args: Any, **kwargs: Any) -> Any:
        if not next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).is_meta:
            return original(*args, **kwargs)
        if dtype is not None and torch.is_autocast_enabled("cpu"):
            args = tuple(_cast(value, dtype) for value in args)
            kwargs = {key: _cast(value, dtype) for key, value in kwargs.items()}
        if name == "rms_norm" and on_cuda:
            return torch.ops.aten._fused_rms_norm(*args, **kwargs)[0]
        if name == "scaled_dot_product_attention":
            flash = (
                torch.ops.aten._scaled_dot_product_flash_attention
                if on_cuda
                else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            )
            return flash(*args[:3], *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))[0]
        return original(*args, **kwargs)

    return function


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
