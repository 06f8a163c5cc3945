"""Predicted memory against what PyTorch's CPU allocator hands out in the same step, by part and at several sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mosaic.config.loading import Config, from_dict
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.planning import dry_run
from mosaic.planning.dry_run import ADAPTER, BASE, GRADIENTS, OPTIMIZER, SAVED, TRANSIENT
from mosaic.planning.meta_kernels import kernels_of
from mosaic.planning.model_shape import FLUX_DEV_SHAPE, ModelShape, read_model_shape
from mosaic.planning.storage_meter import StorageMeter, storage_bytes
from tests import runs, tiny

TOLERANCE = 0.05


def shape(**changes: Any) -> ModelShape:
    """A small FLUX, wide enough for its activations to outweigh everything that is counted in ones."""
    values = tiny.transformer_config(num_layers=1, num_single_layers=2) | {"num_attention_heads": 4, "attention_head_dim": 32}
    return ModelShape(values | {"axes_dims_rope": (8, 12, 12)} | changes, 2, {}, is_local=False)


def config(**changes: Any) -> Config:
    """Targets of 16 x 16 and references of 8 x 8 tokens."""
    values: dict[str, dict[str, Any]] = {
        "model": {"dtype": "float32", "text_length": 32, "gradient_checkpointing": "none"},
        "lora": {"rank": 8},
        "data": {"image_size": [64, 64], "reference_size": 32},
        "loss": {"max_points": 64},
        "training": {"mixed_precision": "no", "batch_size": 1},
    }
    for name, value in changes.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return from_dict(values)


class Measured:
    """Bytes that the allocator hands out in one step on the CPU, above what lives before it, from its own log."""

    def __init__(self, settings: Config, model: ModelShape, num_references: int) -> None:
        transformer = dry_run.build_transformer(settings, model, device="cpu")
        step = dry_run.StandInStep(settings, model, num_references, transformer)
        parameters = list(reference_lora_parameters(transformer).values())
        optimizer = torch.optim.AdamW(parameters)
        self.run(step, optimizer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            gradients = self.run(step, optimizer)
        log = [(event.name(), event.start_ns(), event) for event in profiler.profiler.kineto_results.events()]
        spans = {name: (start, start + event.duration_ns()) for name, start, event in log if name in ("forward", "backward")}
        changes = sorted((start, event.nbytes()) for name, start, event in log if name == "[memory]")
        start, self.saved, self.peak, alive = 0, 0, 0, 0
        for start, change in changes:
            alive += change
            self.peak = max(self.peak, alive)
            if start <= spans["forward"][1]:
                self.saved = alive
        self.base = storage_bytes(p for p in transformer.parameters() if not p.requires_grad)
        self.adapter, self.gradients = storage_bytes(parameters), storage_bytes(gradients)
        self.optimizer = storage_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))

    @staticmethod
    def run(step: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        with torch.profiler.record_function("forward"):
            loss = step()
        with torch.profiler.record_function("backward"):
            loss.backward()
        optimizer.step()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad(set_to_none=True)
        return gradients


CASES = {
    "no autocast": ({}, {}, 2),
    "one reference, wide adapter, larger target": (
        {"lora__rank": 64, "training__batch_size": 2, "data__image_size": [64, 96]},
        {"num_layers": 1, "num_single_layers": 2},
        1,
    ),
    "recomputed": ({"model__gradient_checkpointing": "block"}, {"num_layers": 1, "num_single_layers": 5}, 2),
    "joint attention, all rows": ({"model__reference_attention": "joint", "loss__preset": "release"}, {"num_single_layers": 1}, 2),
    "rows of both sides, regions": ({"loss__supervised_queries": "both", "loss__region_weight": 1.0}, {"num_single_layers": 1}, 2),
    "autocast": ({"model__dtype": "bfloat16", "training__mixed_precision": "bf16"}, {"num_layers": 1}, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_follows_the_allocator_by_part(name: str) -> None:
    changes, model_changes, num_references = CASES[name]
    settings, model = config(**changes), shape(**model_changes)
    predicted = dry_run.dry_run(settings, model, num_references, device_type="cpu")
    measured = Measured(settings, model, num_references)
    assert predicted.peak[BASE] == predicted.base == measured.base
    assert predicted.peak[ADAPTER] == measured.adapter
    assert predicted.peak[OPTIMIZER] == pytest.approx(measured.optimizer, rel=0.01)
    assert measured.gradients == measured.adapter
    assert predicted.saved == pytest.approx(measured.saved, rel=TOLERANCE)
    above = predicted.peak[SAVED] + predicted.peak[TRANSIENT] + predicted.peak[GRADIENTS]
    assert above == pytest.approx(measured.peak, rel=TOLERANCE)


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_captured_rows_are_what_they_add(heads: str) -> None:
    """Counted on shallow models, they are those of a deeper one."""
    changes = {} if heads == "mean" else {"loss__heads": "each", "loss__own_reference_weight": 0.1}
    settings, model = config(training__mixed_precision="bf16", **changes), shape(num_layers=1, num_single_layers=2)
    with_rows, without = (dry_run.saved_bytes(settings, model, 2, "cuda", supervised) for supervised in (True, False))
    assert dry_run.dry_run(settings, model, 2, "cuda").saved == with_rows > without
    assert dry_run.row_bytes(settings, model, 2, "cuda") == pytest.approx(with_rows - without, rel=0.1)


def test_gradients_stay_between_micro_batches() -> None:
    """With accumulation they are there from the start."""
    once, accumulated = (
        dry_run.dry_run(config(training__gradient_accumulation_steps=count), shape(num_layers=1, num_single_layers=1), 1, "cpu").peak
        for count in (1, 2)
    )
    assert once[GRADIENTS] == 0
    assert accumulated[GRADIENTS] == accumulated[ADAPTER]
    assert accumulated.total() == once.total() + once[ADAPTER]


def kept(function: Any, *inputs: Tensor, device_type: str, autocast: torch.dtype | None) -> int:
    """Bytes that a function leaves alive for its backward pass."""
    with StorageMeter() as meter, kernels_of(device_type, autocast):
        meter.mark("given", inputs)
        output = function(*inputs)
        return meter.live["temporary"] if output is not None else 0


def test_kernels_of_a_gpu() -> None:
    """Autocast on CUDA runs norms in float32 (its input's copy and its output live on) and attention in bfloat16."""
    tokens, width = 100, 64
    x = torch.empty(1, 1, tokens, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    norm, rms = torch.nn.LayerNorm(width, device="meta").requires_grad_(False), torch.nn.RMSNorm(width, device="meta").requires_grad_(False)
    numbers, statistic = tokens * width, tokens * 4
    assert kept(norm, x, device_type="cuda", autocast=torch.bfloat16) == pytest.approx(2 * 4 * numbers + 2 * statistic, abs=width * 8)
    assert kept(rms, x, device_type="cuda", autocast=torch.bfloat16) == pytest.approx(2 * 4 * numbers + statistic, abs=width * 8)
    linear = torch.nn.Linear(width, width, device="meta").requires_grad_(False)
    attend = torch.nn.functional.scaled_dot_product_attention
    with kernels_of("cuda", torch.bfloat16):
        assert torch.nn.functional.linear(x.float(), linear.weight, linear.bias).dtype == torch.bfloat16
    assert torch.nn.functional.scaled_dot_product_attention is attend

    def attention(y: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query=y, key=y, value=y)

    assert kept(attention, x, device_type="cuda", autocast=None) == pytest.approx(2 * numbers + statistic, rel=0.2)
    with pytest.raises(ValueError, match='must be "cuda" or "cpu", got \'tpu\''), kernels_of("tpu"):
        pass


def test_storages_are_counted_once_and_while_they_live() -> None:
    with StorageMeter() as meter:
        x = torch.zeros(100, device="meta")
        y = x.view(10, 10)[2:]
        assert (meter.live["temporary"], meter.peak.total()) == (400, 400)
        meter.label = "other"
        z = torch.zeros(50, device="meta")
        meter.mark("kept", [x])
        assert meter.live["kept"] == 400
        del x, z
        assert (meter.live["kept"], meter.live["other"]) == (400, 0)
        del y
        assert meter.live.total() == 0
        assert meter.peak.total() == 600
        meter.reset_peak()
        assert meter.peak.total() == 0


def test_shapes(tmp_path: Any) -> None:
    pocket = read_model_shape("assets/pocket/flux")
    assert pocket.is_local
    assert pocket.vae_scale_factor == 4
    assert pocket.encoders["vae"] == 655_203
    assert read_model_shape("black-forest-labs/FLUX.1-dev") == FLUX_DEV_SHAPE
    runs.write_model(tmp_path / "model")
    own = read_model_shape(str(tmp_path / "model"))
    assert own.base_parameters == sum(p.numel() for p in tiny.build_transformer(False, num_layers=1, num_single_layers=1).parameters())
    (tmp_path / "model/vae/diffusion_pytorch_model.safetensors").write_bytes(b"12345678{")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_model_shape(str(tmp_path / "model"))
    (tmp_path / "model/transformer/config.json").write_text("{}")
    with pytest.raises(ValueError, match="must be the config of a FLUX transformer, but lacks patch_size"):
        read_model_shape(str(tmp_path / "model"))
