"""A quantised frozen base: text and target are the bare quantised model's, the adapter learns, and every optional package is asked for."""

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mosaic.config.loading import load_config
from mosaic.lora.adapter import save_reference_lora
from mosaic.lora.loading import load_reference_lora
from mosaic.model.branch import branch_linear
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.training import Trainer, train
from mosaic.weights import quantization
from mosaic.weights.quantization import FULL_PRECISION, PACKAGES, check_quantization, quantize_base
from tests import runs, tiny
from tests.model.test_transformer import our_step

CPU = torch.device("cpu")
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements-quantization.txt"


def test_the_packages_have_a_requirements_file() -> None:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert sorted(re.split("[><=]", line)[0] for line in lines) == sorted({*PACKAGES.values()} - {"torch"})


class RoundedLinear(nn.Linear):
    """A linear layer that stores 8-bit integers and a scale per row; its weight is of no use to who reads it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.bias = layer.bias
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("codes", (layer.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())
        self.weight = nn.Parameter(torch.full_like(layer.weight, torch.nan), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return Product.apply(hidden_states, self.codes * self.scale, self.bias)


class Product(torch.autograd.Function):
    """As the libraries do it: a function of its own, whose result is a view."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(hidden_states.flatten(0, -2), weight, bias).view(*hidden_states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.saved_tensors[0], None, None


def round_base(transformer: nn.Module) -> None:
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, nn.Linear) and name.split(".")[0] not in FULL_PRECISION:
            transformer.set_submodule(name, RoundedLinear(layer))


def library(name: str) -> pytest.param:
    missing = importlib.util.find_spec(PACKAGES[name]) is None
    return pytest.param(
        lambda transformer: quantize_base(transformer, name, CPU),
        id=name,
        marks=[
            pytest.mark.skipif(missing, reason=f"needs {PACKAGES[name]}"),
            pytest.mark.filterwarnings("ignore"),  # those of an optional package are not ours
        ],
    )


@pytest.mark.parametrize("quantize", [pytest.param(round_base, id="rounded"), *map(library, PACKAGES)])
def test_the_adapter_on_a_quantised_base(quantize: Callable[[nn.Module], None], tmp_path: Path) -> None:
    transformer, batch = tiny.build_transformer(), tiny.build_batch()
    exact = transformer(**batch.inputs).sample
    quantize(transformer)
    bare = transformer(**batch.inputs).sample
    assert 1e-4 < (bare - exact).abs().mean() / exact.abs().mean() < 0.5
    alone = transformer(**tiny.without_references(batch.inputs)).sample

    parameters = tiny.attach_random_lora(transformer)
    assert torch.equal(transformer(**tiny.without_references(batch.inputs)).sample, alone)  # text and target: the base alone
    assert not torch.equal(transformer(**batch.inputs).sample, bare)
    gradients = our_step(transformer, parameters, batch)[3]
    assert sum(bool(gradient.any()) for gradient in gradients.values()) == len(gradients) - 4  # all but the last block's MLP and exit
    assert {id(p) for p in transformer.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}
    adapted = transformer(**batch.inputs).sample
    path = save_reference_lora(transformer, tmp_path / "lora.safetensors")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    torch.testing.assert_close(transformer(**batch.inputs).sample, bare, atol=1e-5, rtol=1e-5)
    load_reference_lora(transformer, path)
    torch.testing.assert_close(transformer(**batch.inputs).sample, adapted, atol=1e-5, rtol=1e-5)


def test_target_tokens_of_one_layer_are_the_bare_layers(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    round_base(transformer)
    layer = transformer.transformer_blocks[0].attn.to_q
    tokens = torch.randn(2, 9, 32)
    want = layer(tokens)
    tiny.attach_random_lora(transformer)
    found = branch_linear(transformer.transformer_blocks[0].attn.to_q, tokens, 5)
    assert torch.equal(found[:, :5], want[:, :5])
    assert not torch.equal(found[:, 5:], want[:, 5:])


@pytest.mark.parametrize(("name", "package"), [(name, package) for name, package in PACKAGES.items() if package != "torch"])
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: None)
    message = f'model.quantization "{name}" needs the package {package}, which is not installed: pip install {package}'
    with pytest.raises(ValueError, match=message):
        train(runs.make_config(world, tmp_path / "run", model__quantization=name))
    assert not (tmp_path / "run").exists()
    check_quantization("none")


@pytest.mark.parametrize("name", [pytest.param(name, marks=library(name).marks) for name in PACKAGES])
def test_a_run_on_a_quantised_base(name: str, world: Path, tmp_path: Path) -> None:
    path = train(
        runs.make_config(world, tmp_path / "run", model__quantization=name, model__gradient_checkpointing="block", validation__every=3)
    )
    assert path.is_file()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
def test_the_24_gb_preset_end_to_end(world: Path, tmp_path: Path, fresh_accelerator: None) -> None:
    preset = load_config("configs/mosaic_24gb.json")
    assert (preset.model.quantization, preset.model.gradient_checkpointing, preset.optimizer.name) == ("nf4", "block", "adamw_8bit")
    options = {f"model__{name}": getattr(preset.model, name) for name in ("quantization", "gradient_checkpointing", "dtype", "compile")}
    config = runs.make_config(
        world, tmp_path / "run", **options, optimizer__name="adamw_8bit", training__mixed_precision="bf16", training__max_steps=4
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(config)
    before = runs.values(trainer)
    layer = trainer.pipeline.transformer.transformer_blocks[0].attn.to_q.base_layer
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == 32 * 32 // 2  # half a byte each
    codes = layer.weight.clone()
    path = trainer.fit()
    assert torch.equal(layer.weight, codes)
    moved = [key for key, value in load_file(path).items() if not torch.equal(value, before[key])]
    assert len(moved) == len(before)
    losses = [json.loads(line)["loss/total"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
