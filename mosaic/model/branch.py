"""Where the reference LoRA acts: on the reference tokens of a packed sequence, and nowhere else.

`branch_linear` is the whole mechanism: one base matmul over the packed sequence, the reference delta on the reference
slice, every other adapter (a style LoRA) on the rest. Nothing is switched at run time.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mosaic.model.attention_rows import no_autocast

ADAPTER_NAME = "reference"


def branch_linear(layer: nn.Module, hidden_states: Tensor, start: int, references: Tensor | None = None) -> Tensor:
    """Eq. 6: a linear layer on [main; references]: base everywhere, the reference LoRA from `start` on, other adapters before it.

    y = W x + b;  y[:, start:] += B_ref A_ref x[:, start:];  y[:, :start] += s B A x[:, :start] for every other active adapter.

    Args:
        layer: A linear layer, quantised or not, adapted by PEFT or not. Only its forward is called, its weight is never read.
        hidden_states: [B, S, d_in].
        start: Index of the first reference token; S if there is none.
        references: hidden_states[:, start:] as a tensor with memory of its own, where the caller has one: the reference LoRA keeps its
            input for the backward pass, and a slice would keep all of `hidden_states`, which the frozen base does not need.

    Returns:
        [B, S, d_out].
    """
    # Token by token, not sample by sample: the product then is no view, and what is added to it costs the backward pass no copy.
    flat = hidden_states.flatten(0, 1)
    if not isinstance(layer, LoraLayer):
        return layer(flat).unflatten(0, hidden_states.shape[:2])  # in the same shape as with an adapter, for the same rounding
    output = layer.base_layer(flat)
    if type(layer.base_layer) is not nn.Linear and torch.is_grad_enabled():
        output = output.clone()  # what a quantised layer returns may be a view, to which autograd lets nobody write
    length = hidden_states.shape[1]
    if ADAPTER_NAME in layer.lora_A and start < length:
        tokens = hidden_states[:, start:] if references is None else references
        output = _add_delta(layer, ADAPTER_NAME, tokens, output)
    output = output.view(len(hidden_states), length, output.shape[1])
    for name in _style_adapters(layer):
        main = output.narrow(1, 0, start)
        main.add_(_delta(layer, name, hidden_states[:, :start], main), alpha=layer.scaling[name])
    return output


def branch_vectors(layer: nn.Module, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    """`branch_linear` for conditioning vectors, [B, 1 or 2, d_in]: base on both, the reference LoRA on the references' alone.

    Args:
        layer: A linear layer, as of `branch_linear`.
        vectors: The main one, and behind it the references' where there are references.

    Returns:
        [B, 1, d_out] each, apart: only the references' depends on what is trained, so that nothing is kept to train the main one.
    """
    if not isinstance(layer, LoraLayer):
        output = layer(vectors)
        return output[:, :1], output[:, 1:] if vectors.shape[1] > 1 else None
    output = layer.base_layer(vectors)
    main, reference = output[:, :1], output[:, 1:] if vectors.shape[1] > 1 else None
    if reference is not None and ADAPTER_NAME in layer.lora_A:
        reference = torch.add(reference, _delta(layer, ADAPTER_NAME, vectors[:, 1:], reference), alpha=layer.scaling[ADAPTER_NAME])
    for name in _style_adapters(layer):
        main = torch.add(main, _delta(layer, name, vectors[:, :1], main), alpha=layer.scaling[name])
    return main, reference


def _style_adapters(layer: LoraLayer) -> list[str]:
    """The active adapters of a layer beside the reference LoRA; those that are fused are in the base layer already."""
    if len(layer.lora_A) == 1 and ADAPTER_NAME in layer.lora_A:
        return []
    apart = [name for name in layer.active_adapters if name in layer.lora_A and name not in layer.merged_adapters]
    return [] if layer.disable_adapters else [name for name in apart if name != ADAPTER_NAME]


def _add_delta(layer: LoraLayer, name: str, tokens: Tensor, output: Tensor) -> Tensor:
    """Adds s B A x to the last rows of every sample's output [B * S, d_out], in place."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # nothing to be saved, but maybe hooks that bring the weights
        last = _last_rows(output, *tokens.shape[:2])
        last.add_(_delta(layer, name, tokens, last), alpha=layer.scaling[name])
        return output
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    device = "cpu" if tokens.is_meta else tokens.device.type  # the meta device knows no autocast
    # Under autocast the products run in its type, straight from the tokens'; else in the adapter's own, as PEFT does it.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else down.dtype
    return _AddDelta.apply(output, tokens.to(dtype), down.to(dtype), up.to(dtype), layer.scaling[name])


class _AddDelta(torch.autograd.Function):
    """output[b, S - R:] += s B A tokens[b]; the gradient of the output goes on as it is, which autograd by itself copies."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, tokens: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """output [B * S, d_out] (written to), tokens [B, R, d_in], down [r, d_in], up [d_out, r]; all but output of one dtype."""
        batch, length, width = tokens.shape
        flat = tokens.reshape(-1, width)
        inner = flat.mm(down.t())
        delta = inner.mm(up.t())
        _last_rows(output, batch, length).add_(delta.view(batch, length, -1), alpha=scale)
        ctx.save_for_backward(flat, inner, down, up)
        ctx.shape, ctx.scale = tokens.shape, scale
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Through the two products, for the last rows of every sample."""
        flat, inner, down, up = ctx.saved_tensors
        batch, length, _ = ctx.shape
        last = _last_rows(gradient, batch, length).reshape(-1, gradient.shape[1]).to(flat.dtype)
        with no_autocast(flat):
            inner_gradient = last.mm(up)
            up_gradient = last.t().mm(inner)
            if ctx.scale != 1:
                inner_gradient, up_gradient = inner_gradient * ctx.scale, up_gradient * ctx.scale
            tokens_gradient = inner_gradient.mm(down).view(ctx.shape) if ctx.needs_input_grad[1] else None
            return gradient, tokens_gradient, inner_gradient.t().mm(flat), up_gradient, None


def _last_rows(tokens: Tensor, batch: int, length: int) -> Tensor:
    """The last `length` of every sample's rows in [B * S, d], as a view [B, length, d]."""
    return tokens.view(batch, -1, tokens.shape[1])[:, -length:]


def _delta(layer: LoraLayer, name: str, tokens: Tensor, output: Tensor) -> Tensor:
    """B A x of tokens [B, R, d_in], without s, in the adapter's own dtype as PEFT does it; returned in shape and dtype of `output`."""
    down = layer.lora_A[name]
    return layer.lora_B[name](down(tokens.flatten(0, 1).to(down.weight.dtype))).to(output.dtype).view(output.shape)
