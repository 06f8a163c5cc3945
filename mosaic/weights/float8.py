"""Linear layers whose products run in 8 bits: frozen weights with a scale per row, inputs with a scale per token, found anew each time.

Forward y = x W^T + b and the gradient of x are products of float8 numbers (e4m3, three bits of mantissa) with float32 sums; a frozen weight
needs no gradient. On GPUs from compute capability 8.9 on they are `torch._scaled_mm`, at twice the rate of bfloat16. Elsewhere the same
numbers are multiplied in float32: slowly, for tests.
"""

from typing import Any

import torch
from torch import Tensor, nn

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
TINY = torch.finfo(torch.float32).tiny
CAPABILITY = (8, 9)  # of the first GPUs that multiply float8 numbers


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """float8 numbers [R, C] and float32 scales [R, 1] whose product is the values [R, C], rounded; a row's largest number is LARGEST."""
    scales = (values.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp_min(TINY)
    return (values / scales).to(FORMAT), scales


def scaled_product(left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """(left x left_scales) (right x right_scales)^T in `dtype`, [R, N].

    Args:
        left: float8 [R, C].
        left_scales: float32 [R, 1].
        right: float8 [N, C].
        right_scales: float32 [N, 1].
        dtype: Of the result.
        fast: Whether a GPU may shorten its sums on the way, as is usual in forward passes; else they are float32.
    """
    if left.is_cuda:  # row-wise scales give bfloat16 only
        product = torch._scaled_mm(left, right.t(), left_scales, right_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=fast)
        return product.to(dtype)
    return ((left.float() @ right.float().T) * left_scales * right_scales.T).to(dtype)


class Float8Linear(nn.Linear):
    """A frozen linear layer in 8 bits.

    Attributes:
        weight: uint8 [d_out, d_in], the bits of its float8 numbers: as whole numbers, whose format no adapter takes over.
        scale: float32 [d_out, 1].
    """

    scale: Tensor

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> "Float8Linear":
        """The layer in 8 bits, on its device; its bias stays as it is."""
        found = cls.empty_like(layer)
        codes, scales = quantize_rows(layer.weight.detach())
        found.weight = nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        found.scale = scales
        if layer.bias is not None:
            found.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return found

    @classmethod
    def empty_like(cls, layer: nn.Linear) -> "Float8Linear":
        """A layer of that shape without numbers, on the meta device."""
        found = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=layer.weight.dtype)
        found.weight = nn.Parameter(torch.empty_like(found.weight, dtype=torch.uint8), requires_grad=False)
        found.register_buffer("scale", torch.empty(layer.out_features, 1, device="meta"))
        return found.requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out], in the autocast type or that of what comes in."""
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        codes = self.weight.view(FORMAT)
        output = _Float8Product.apply(hidden_states.flatten(0, -2), codes, self.scale, dtype)
        output = output if self.bias is None else output + self.bias.to(dtype)
        return output.unflatten(0, hidden_states.shape[:-1])


class _Float8Product(torch.autograd.Function):
    """x W^T of a frozen W, both in 8 bits."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """values [R, d_in]; codes float8 [d_out, d_in]; scales float32 [d_out, 1]."""
        ctx.save_for_backward(codes, scales)
        ctx.dtype = values.dtype
        with torch.autocast(values.device.type, enabled=False):
            return scaled_product(*quantize_rows(values), codes, scales, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The sum over d_out runs over the weight's scales, so these go into the gradient before it gets its own."""
        codes, scales = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            scaled = quantize_rows(gradient.float() * scales.T)
            product = scaled_product(*scaled, codes.t().contiguous(), scales.new_ones(codes.shape[1], 1), ctx.dtype, fast=False)
        return product, None, None, None


def check_device(setting: str) -> None:
    """Check that the GPU here, if there is one, multiplies float8 numbers.

    Args:
        setting: What needs it, such as 'model.quantization "fp8_dynamic"'.

    Raises:
        ValueError: It does not.
    """
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < CAPABILITY:
        raise ValueError(
            f"{setting} needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or higher (Ada, Hopper, Blackwell), but "
            f'{torch.cuda.get_device_name()} has {".".join(map(str, found))}. "fp8" and "int8" store 8 bits and multiply in full precision.'
        )
