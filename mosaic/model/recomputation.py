"""What the backward pass computes anew instead of keeping it: whole blocks, blocks but for their attention, or copies of keys and values.

The modes are those of `model.gradient_checkpointing`. All give the same numbers: the same operations run again on the same inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# Every kernel behind scaled_dot_product_attention; the plain matrix products of its "math" backend are computed anew.
ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
]


_in_a_checkpoint: ContextVar[bool] = ContextVar("in_a_checkpoint", default=False)


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function, keep its inputs only, and call it again in the backward pass. Nothing in these models is random."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def recompute_around_attention(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function and call it again in the backward pass, but for attention kernels: what they returned is saved, so they run once."""
    contexts = partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def made_anew(copies: Sequence[tuple[Tensor, Callable[[], Tensor]]]) -> Iterator[None]:
    """Within it, operations that keep one of these tensors for the backward pass keep how it is made instead.

    Changes nothing in a compiled block, where the compiler decides, and in one that is computed again as a whole.

    Args:
        copies: Tensors that are copies of what is kept anyway, and what makes each again, bit for bit and in the same order in memory.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _in_a_checkpoint.get():
        yield
        return
    makers = {tensor.untyped_storage().data_ptr(): maker for tensor, maker in copies}

    def pack(tensor: Tensor) -> Tensor | tuple[Callable[[], Tensor], tuple[Any, ...]]:
        maker = makers.get(tensor.untyped_storage().data_ptr())
        return tensor if maker is None else (maker, (tensor.size(), tensor.stride(), tensor.storage_offset()))

    def unpack(kept: Tensor | tuple[Callable[[], Tensor], tuple[Any, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        maker, view = kept
        with torch.no_grad():
            return maker().as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _inside(function: Callable[..., Any], *inputs: Any) -> Any:
    """A checkpoint within a selective one would keep the attention's output of every block."""
    token = _in_a_checkpoint.set(True)
    try:
        return function(*inputs)
    finally:
        _in_a_checkpoint.reset(token)


MODES = {"block": partial(recompute, _inside), "keep_attention": partial(recompute_around_attention, _inside)}


def set_gradient_checkpointing(transformer: FluxTransformer2DModel, mode: str) -> None:
    """Choose what the backward pass keeps of the transformer's blocks.

    Args:
        transformer: Its blocks.
        mode: "none", "block" (a block's input is kept) or "keep_attention" (and its attention's output).

    Raises:
        ValueError: If the mode is unknown.
    """
    if mode not in ("none", *MODES):
        raise ValueError(f"gradient checkpointing must be one of {('none', *MODES)}, got {mode!r}.")
    if mode == "none":
        transformer.disable_gradient_checkpointing()
    else:
        transformer.enable_gradient_checkpointing(MODES[mode])
