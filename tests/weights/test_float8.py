"""Products in 8 bits: equal to a float64 twin of the same rounding, forward and backward, with a scale for each token and each row."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mosaic.model.branch import branch_linear
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.weights.float8 import FORMAT, Float8Linear, check_device, quantize_rows, scaled_product
from mosaic.weights.quantization import quantize_base
from tests import tiny

TOKENS, IN, OUT = 10, 32, 48


def rounded(values: Tensor) -> Tensor:
    """The twin of the rounding, in float64: to the nearest number of three bits of mantissa, 448 for the largest of a row, 2^-9 the step of
    the smallest.
    """
    values = values.double()
    scale = values.abs().amax(dim=1, keepdim=True) / 448
    numbers = values / scale
    step = 2.0 ** (numbers.abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (numbers / step).round() * step * scale


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 3, OUT)[:, None])
    return layer


@pytest.fixture
def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS // 2, IN, generator=generator) * torch.logspace(-4, 4, TOKENS).view(2, -1, 1)


def test_forward_and_backward_are_the_twins(layer: nn.Linear, tokens: Tensor) -> None:
    float8 = Float8Linear.from_linear(layer)
    tokens.requires_grad_()
    output = float8(tokens)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)) * torch.logspace(4, -4, TOKENS).view(2, -1, 1)
    output.backward(gradient)

    weight, flat = rounded(layer.weight.detach()), tokens.detach().flatten(0, 1)
    want = rounded(flat) @ weight.T + layer.bias.double()
    relative = (output.detach().flatten(0, 1) - want).norm(dim=1) / want.norm(dim=1)
    assert relative.max() < 1e-6
    scale = layer.weight.detach().double().abs().amax(dim=1) / 448
    want = rounded(gradient.flatten(0, 1).double() * scale) @ (weight / scale[:, None])
    relative = (tokens.grad.flatten(0, 1) - want).norm(dim=1) / want.norm(dim=1)
    assert relative.max() < 1e-6
    # And both are the layer's up to three bits: a scale for all tokens, or for all rows, would lose the small ones.
    exact = flat @ layer.weight.T
    assert ((output.detach().flatten(0, 1) - layer.bias - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.2
    of_rows = (output.detach().flatten(0, 1) - layer.bias - exact)[-1] / exact[-1].abs().clamp_min(1e-6)
    assert of_rows.abs().median() < 0.2
    exact = gradient.flatten(0, 1) @ layer.weight.detach()
    assert ((tokens.grad.flatten(0, 1) - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.2


def test_the_kernel_gets_the_same_numbers(layer: nn.Linear, tokens: Tensor) -> None:
    """What a GPU multiplies, in the layout that it wants, is what is multiplied here."""
    left, right = quantize_rows(tokens.flatten(0, 1)), quantize_rows(layer.weight.detach())
    ours = scaled_product(*left, *right, torch.float32, fast=True)
    theirs = torch._scaled_mm(left[0], right[0].t(), left[1], right[1].t(), out_dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_zeros_stay_zeros(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[3] = 0
    float8 = Float8Linear.from_linear(layer)
    tokens = torch.zeros(4, IN, requires_grad=True)
    output = float8(tokens)
    assert torch.equal(output, layer.bias.expand(4, -1))
    output.backward(torch.zeros_like(output))
    assert not tokens.grad.any()
    assert torch.equal(float8(torch.randn(4, IN))[:, 3], layer.bias[3].expand(4))


def test_numbers_that_are_not_finite_are_seen(layer: nn.Linear) -> None:
    tokens = torch.randn(3, IN)
    tokens[0, 5], tokens[1, 5] = torch.nan, torch.inf
    output = Float8Linear.from_linear(layer)(tokens)
    assert not output[:2].isfinite().any()
    assert output[2].isfinite().all()


def test_under_autocast_products_are_in_its_type(layer: nn.Linear, tokens: Tensor) -> None:
    float8 = Float8Linear.from_linear(layer)
    exact = float8(tokens)
    tokens.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = float8(tokens)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=2e-2, atol=1e-2)
    output.sum().backward()
    assert tokens.grad.dtype == torch.float32
    assert Float8Linear.from_linear(layer.bfloat16())(tokens.bfloat16()).dtype == torch.bfloat16


def test_text_and_target_are_the_bare_layers_and_the_adapter_keeps_its_format() -> None:
    transformer = tiny.build_transformer()
    quantize_base(transformer, "fp8_dynamic", torch.device("cpu"))
    name = "single_transformer_blocks.0.proj_mlp"
    tokens = torch.randn(2, 9, 32)
    want = transformer.get_submodule(name)(tokens)
    parameters = tiny.attach_random_lora(transformer)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    adapted = transformer.get_submodule(name)
    assert type(adapted.base_layer) is Float8Linear
    assert not adapted.base_layer.weight.requires_grad
    found = branch_linear(adapted, tokens, 5)
    assert torch.equal(found[:, :5], want[:, :5])
    delta = tokens[:, 5:] @ adapted.lora_A["reference"].weight.T @ adapted.lora_B["reference"].weight.T
    torch.testing.assert_close(found[:, 5:], want[:, 5:] + delta)
    assert type(transformer.x_embedder.base_layer) is type(transformer.proj_out) is nn.Linear


def test_a_copy_and_another_format_of_the_model_change_no_number(layer: nn.Linear) -> None:
    float8 = Float8Linear.from_linear(layer)
    tokens = torch.randn(3, IN)
    again = copy.deepcopy(float8)
    assert torch.equal(again(tokens), float8(tokens))
    assert again.bfloat16().weight.dtype == torch.uint8
    assert float8.weight.view(FORMAT).shape == (OUT, IN)
    assert float8.weight.nbytes == OUT * IN


def test_a_gpu_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r'model.quantization "fp8_dynamic" needs a GPU of compute capability 8.9 .* but A100 has 8.0'):
        quantize_base(nn.Module(), "fp8_dynamic", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    check_device("model.quantization")


def test_fusing_is_refused() -> None:
    pipeline: MosaicFluxPipeline = tiny.build_pipeline(guidance_embeds=False)
    pipeline.unload_reference_lora()
    quantize_base(pipeline.transformer, "fp8_dynamic", torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot add to weights in fp8_dynamic"):
        pipeline.fuse_lora()
