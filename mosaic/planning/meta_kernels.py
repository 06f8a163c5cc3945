"""Lets the meta device keep what a CPU or a GPU would keep: their fused kernels and their autocast.

On the meta device PyTorch computes attention as plain products, RMSNorm as a chain of small operations, and knows no autocast; the tensors
that a backward pass would find differ from those on a GPU by a factor. Here these few operations are done as the wanted device does them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode

NORMS = (functional.layer_norm, functional.rms_norm)


@contextmanager
def kernels_of(device_type: str, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Context in which `torch.nn.functional` computes meta tensors with the kernels of "cuda" or "cpu".

    Covers the functions that autocast changes inside FLUX's blocks: linear and attention run in `autocast_dtype`; on CUDA, LayerNorm
    and RMSNorm run in float32 (on a CPU they keep their input's format), but where autocast is off (`attention_rows.no_autocast`).
    Holds for the calling thread.

    Args:
        device_type: "cuda" or "cpu".
        autocast_dtype: Number format of autocast; None: no autocast.

    Raises:
        ValueError: If the device is neither.
    """
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f'device_type must be "cuda" or "cpu", got {device_type!r}.')
    autocast = torch.autocast("cpu", autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None)  # says only where it is on
    with autocast, _Kernels(device_type == "cuda", autocast_dtype):
        yield


class _Kernels(TorchFunctionMode):
    """Computes linear, attention and norms as the device does it; tensors that are not on the meta device go the usual way."""

    def __init__(self, on_cuda: bool, autocast_dtype: torch.dtype | None) -> None:
        super().__init__()
        self._on_cuda = on_cuda
        of_norms = torch.float32 if on_cuda and autocast_dtype is not None else None
        self._dtypes = {
            functional.linear: autocast_dtype,
            functional.scaled_dot_product_attention: autocast_dtype,
            **dict.fromkeys(NORMS, of_norms),
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:  # this mode is off while it takes a function, but what is recomputed then must meet it
            with self:
                return _engine_run_backward(
                    args, (torch.ones_like(args[0]),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if func not in self._dtypes or not next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).is_meta:
            return func(*args, **kwargs)
        dtype = self._dtypes[func]
        if dtype is not None and torch.is_autocast_enabled("cpu"):
            args = tuple(_cast(value, dtype) for value in args)
            kwargs = {key: _cast(value, dtype) for key, value in kwargs.items()}
        if func is functional.rms_norm and self._on_cuda:
            return torch.ops.aten._fused_rms_norm(*args, **kwargs)[0]
        if func is functional.scaled_dot_product_attention:
            aten = torch.ops.aten
            flash = aten._scaled_dot_product_flash_attention if self._on_cuda else aten._scaled_dot_product_flash_attention_for_cpu
            return flash(*args[:3], *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))[0]
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
