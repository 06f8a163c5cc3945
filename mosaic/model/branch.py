"""Where the reference LoRA acts: on the reference tokens of a packed sequence, and nowhere else.

`branch_linear` is the whole mechanism: one base matmul over the packed sequence, the reference delta on the reference
slice, every other adapter (a style LoRA) on the rest. Nothing is switched at run time.
"""

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

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
    if not isinstance(layer, LoraLayer):
        return layer(hidden_states)
    output = layer.base_layer(hidden_states)
    if type(layer.base_layer) is not nn.Linear:  # what a quantised layer returns may be a view that must not be written to
        output = output.clone()
    length = hidden_states.shape[1]
    if ADAPTER_NAME in layer.lora_A and start < length:
        tokens = hidden_states[:, start:] if references is None else references
        output.narrow(1, start, length - start).add_(_delta(layer, ADAPTER_NAME, tokens).to(output.dtype))
    for name in _style_adapters(layer):
        output.narrow(1, 0, start).add_(_delta(layer, name, hidden_states[:, :start]).to(output.dtype))
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
        reference = reference + _delta(layer, ADAPTER_NAME, vectors[:, 1:]).to(output.dtype)
    for name in _style_adapters(layer):
        main = main + _delta(layer, name, vectors[:, :1]).to(output.dtype)
    return main, reference


def _style_adapters(layer: LoraLayer) -> list[str]:
    """The active adapters of a layer beside the reference LoRA; those that are fused are in the base layer already."""
    apart = [name for name in layer.active_adapters if name in layer.lora_A and name not in layer.merged_adapters]
    return [] if layer.disable_adapters else [name for name in apart if name != ADAPTER_NAME]


def _delta(layer: LoraLayer, name: str, tokens: Tensor) -> Tensor:
    """s B A x, in the adapter's own dtype as PEFT does it."""
    tokens = tokens.to(layer.lora_A[name].weight.dtype)
    return layer.lora_B[name](layer.lora_A[name](tokens)) * layer.scaling[name]
