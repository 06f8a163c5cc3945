"""The FLOP model: against the published totals of FLUX.1-dev and against the operations that the real code runs."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mosaic.lora.adapter import attach_reference_lora, reference_lora_parameters
from mosaic.model import costs
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from tests import tiny

REFERENCE_TOKENS, TEXT = 1024, 512


def step(size: int, num_references: int, mode: str = "target", checkpointing: str = "none", rank: int = 128) -> float:
    """TFLOP of a training step of FLUX.1-dev, batch 1."""
    target = (size // 16) ** 2
    load = costs.Workload(1, num_references, target, REFERENCE_TOKENS, TEXT, rank, mode)
    return costs.training_step_flops(costs.FLUX_DEV, load, checkpointing) / 1e12


# px, K, mode, rank, checkpointing, TFLOP; the totals of an independent model of FLUX.1-dev (which gives the small terms a backward too)
PUBLISHED = [
    (512, 1, "target", 128, "none", 84.4),
    (512, 2, "target", 128, "none", 123.3),
    (512, 2, "target", 128, "keep_attention", 171.0),
    (512, 2, "target", 128, "block", 178.5),
    (512, 6, "joint", 128, "none", 355.9),
    (512, 6, "target", 512, "none", 317.6),
    (1024, 4, "target", 128, "none", 388.3),
    (1024, 6, "target", 128, "block", 699.0),
    (1024, 6, "target", 128, "keep_attention", 640.1),
    (1024, 6, "isolated", 128, "none", 427.5),
]


@pytest.mark.parametrize(("size", "num_references", "mode", "rank", "checkpointing", "expected"), PUBLISHED)
def test_flux_dev(size: int, num_references: int, mode: str, rank: int, checkpointing: str, expected: float) -> None:
    assert step(size, num_references, mode, checkpointing, rank) == pytest.approx(expected, rel=1e-3)


# px, K, mode, rank, steps in which the references run, TFLOP of 28 steps; of the same independent model
SAMPLED = [
    (512, 0, "target", 0, None, 602.07),
    (512, 4, "target", 0, None, 2411.89),
    (512, 4, "isolated", 0, 1, 781.28),
    (512, 6, "target", 128, None, 3437.56),
    (512, 6, "isolated", 128, 1, 875.2),
    (512, 6, "target", 0, 7, 1419.55),
    (1024, 4, "joint", 0, None, 4632.91),
    (1024, 4, "target", 128, None, 4466.68),
    (1024, 4, "isolated", 0, 1, 2508.75),
    (1024, 6, "isolated", 128, 1, 2726.05),
]


def sampled(size: int, num_references: int, mode: str, rank: int = 0, reference_steps: int | None = None, skipped: int = 0) -> float:
    """TFLOP of 28 steps of FLUX.1-dev, one picture."""
    load = costs.Workload(1, num_references, (size // 16) ** 2, REFERENCE_TOKENS, TEXT, rank, mode)
    return costs.sampling_flops(costs.FLUX_DEV, load, 28, reference_steps, skipped) / 1e12


@pytest.mark.parametrize(("size", "num_references", "mode", "rank", "reference_steps", "expected"), SAMPLED)
def test_sampling_of_flux_dev(size: int, num_references: int, mode: str, rank: int, reference_steps: int | None, expected: float) -> None:
    assert sampled(size, num_references, mode, rank, reference_steps) == pytest.approx(expected, rel=2e-4)


def test_skipped_steps_cost_one_block() -> None:
    """Of 57 blocks, all alike in their linear layers, one runs; beside it entry, exit and conditioning, here under 1 % of a step."""
    whole, reference_steps = sampled(512, 4, "target") / 28, 7
    assert sampled(512, 4, "target", skipped=10) == pytest.approx((18 + 10 / 57) * whole, rel=1e-3)
    cached = (sampled(512, 4, "target", 0, reference_steps) - 7 * whole) / 21
    skipped = sampled(512, 4, "target", 0, reference_steps, skipped=22)  # all steps without references and one with
    assert skipped == pytest.approx(21 * cached / 57 + (6 + 1 / 57) * whole, rel=2e-3)


@pytest.mark.parametrize(("given", "message"), [((29, 0), "reference_steps must be in 0..num_inference_steps"), ((1, -1), "skipped_steps")])
def test_steps_beyond_the_run_are_refused(given: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampled(512, 1, "isolated", 0, *given)


def test_captured_rows_of_flux_dev() -> None:
    """A forward pass of 512 px, K = 2 measures 55.45 TFLOP and a step 123.9 with 512 points, 179.4 with recomputed blocks."""
    load = costs.Workload(1, 2, 1024, REFERENCE_TOKENS, TEXT, 128, "target")
    rows = costs.captured_row_flops(costs.FLUX_DEV, load, 512, 57, all_tokens=False) / 1e12
    forward = costs.forward_flops(costs.FLUX_DEV, load).total / 1e12
    assert forward + rows / 4 == pytest.approx(55.45, rel=1e-3)
    assert step(512, 2) + rows == pytest.approx(123.9, rel=2e-3)
    assert step(512, 2, checkpointing="block") + rows * 5 / 4 == pytest.approx(179.4, rel=1e-3)


def test_parameter_counts() -> None:
    assert costs.base_parameter_count(costs.FLUX_DEV) == 11_901_408_320
    assert costs.lora_parameter_count(costs.FLUX_DEV, 128) == 463_609_856
    config = tiny.transformer_config(guidance_embeds=False)
    transformer = MosaicFluxTransformer2DModel(**config)
    assert costs.base_parameter_count(config) == sum(p.numel() for p in transformer.parameters())
    attach_reference_lora(transformer, 3)
    assert costs.lora_parameter_count(config, 3) == sum(p.numel() for p in reference_lora_parameters(transformer).values())


GEOMETRY = {"batch_size": 3, "num_references": 2, "reference_tokens": 36, "target_tokens": 48, "text_tokens": 20}


def load_of(mode: str) -> costs.Workload:
    return costs.Workload(**GEOMETRY, lora_rank=5, reference_attention=mode)


def meta_inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward pass of `GEOMETRY` on the meta device."""
    g = GEOMETRY

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    return {
        "hidden_states": empty(g["batch_size"], g["target_tokens"], config["in_channels"]),
        "encoder_hidden_states": empty(g["batch_size"], g["text_tokens"], config["joint_attention_dim"]),
        "pooled_projections": empty(g["batch_size"], config["pooled_projection_dim"]),
        "timestep": empty(g["batch_size"]),
        "guidance": empty(g["batch_size"]) if config["guidance_embeds"] else None,
        "img_ids": empty(g["target_tokens"], 3),
        "txt_ids": empty(g["text_tokens"], 3),
        "reference_hidden_states": empty(g["batch_size"], g["num_references"], g["reference_tokens"], config["in_channels"]),
        "reference_ids": empty(g["num_references"] * g["reference_tokens"], 3),
    }


def count(config: Mapping[str, Any], mode: str, points: int = 0, backward: bool = True) -> int:
    """FLOPs of a forward pass, or of a forward and backward pass, that the counter sees."""
    with torch.device("meta"):
        transformer = MosaicFluxTransformer2DModel(**config)
        attach_reference_lora(transformer, 5)
    index = torch.zeros(GEOMETRY["batch_size"], points, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = transformer(
            **meta_inputs(config), reference_attention=mode, capture=CaptureRequest(index, all_tokens=True) if points else None
        )
        loss = output.sample.sum()
        if points:
            loss = loss + output.attention_rows.sum() + output.reference_rows.sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ["target", "joint", "isolated"])
@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_equals_the_operations_of_the_real_forward(mode: str, guidance_embeds: bool) -> None:
    config = tiny.transformer_config(guidance_embeds, num_layers=2, num_single_layers=3)
    forward = costs.forward_flops(config, load_of(mode))
    assert count(config, mode, backward=False) == pytest.approx(forward.total, rel=1e-6)


@pytest.mark.parametrize("mode", ["target", "isolated"])
def test_equals_the_operations_of_a_run_with_kept_references(mode: str) -> None:
    config = tiny.transformer_config(num_layers=2, num_single_layers=3)
    with torch.device("meta"):
        transformer = MosaicFluxTransformer2DModel(**config)
        attach_reference_lora(transformer, 5)
    inputs = meta_inputs(config)
    without = {name: value for name, value in inputs.items() if not name.startswith("reference_")}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        cache = transformer(**inputs, reference_attention=mode, keep_references=True).kept_references
        for _ in range(2):
            transformer(**without, reference_attention=mode, kept_references=cache)
    run = costs.sampling_flops(config, load_of(mode), 3, reference_steps=1)
    assert counter.get_total_flops() == pytest.approx(run, rel=1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_equals_the_operations_of_skipped_steps(cached: bool) -> None:
    config = tiny.transformer_config(num_layers=3, num_single_layers=4)
    transformer = tiny.build_transformer(num_layers=3, num_single_layers=4)
    attach_reference_lora(transformer, 5)
    generator = torch.Generator().manual_seed(0)
    inputs = {name: None if value is None else torch.rand(value.shape, generator=generator) for name, value in meta_inputs(config).items()}
    without = {name: value for name, value in inputs.items() if not name.startswith("reference_")}
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    kept = None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for step in range(3):
            with transformer.cache_context("pass"):
                given = {**without, "kept_references": kept} if cached and step else {**inputs, "keep_references": cached}
                output = transformer(**given, reference_attention="isolated")
            kept = output.kept_references or kept
    run = costs.sampling_flops(config, load_of("isolated"), 3, reference_steps=1 if cached else 3, skipped_steps=2)
    assert counter.get_total_flops() == pytest.approx(run, rel=1e-6)


def test_follows_the_operations_of_the_real_backward() -> None:
    """Plain attention keeps its softmax, so that its backward is four products and not five; deep enough for the edges not to count."""
    config = tiny.transformer_config(num_layers=6, num_single_layers=12)
    forward = costs.forward_flops(config, load_of("target"))
    expected = costs.training_step_flops(config, load_of("target"), "none")
    assert count(config, "target") == pytest.approx(expected - forward.attention / 2, rel=0.02)


def test_captured_rows_equal_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic.model.attention_rows.SAVED_BYTES", 0)  # FLUX.1-dev's are never kept
    config = tiny.transformer_config(num_layers=2, num_single_layers=3)
    without, with_rows = count(config, "target"), count(config, "target", points=7)
    assert with_rows - without == costs.captured_row_flops(config, load_of("target"), 7, 5, all_tokens=True)


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match='gradient_checkpointing must be one of none, block, keep_attention, got "blocks"'):
        step(512, 1, checkpointing="blocks")
    with pytest.raises(ValueError, match='reference_attention must be one of joint, target, isolated, got "self"'):
        step(512, 1, mode="self")
