"""The sampling benchmark at its smallest: every mode runs, errors and predictions are what they must be, and bad flags are named."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mosaic.model.costs import Workload, sampling_flops
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.planning.model_shape import ModelShape
from scripts.benchmarks import command as benchmark
from scripts.benchmarks import infer as infer_benchmark
from scripts.benchmarks import models
from scripts.benchmarks.measuring import StepClock
from tests import naive, tiny

MODES = ["refresh:1", "refresh:2", "first-block:1e9", "batch:2", "attention:_native_math", "isolated", "isolated-cache"]
SMALLEST = ["infer", "--k", "1", "2", "--sizes", "16", "--reference-size", "12", "--text-tokens", "8", "--steps", "3", "--runs", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> MosaicFluxPipeline:
    """A tiny random model in the pocket model's place, and the caller's number of threads afterwards."""
    pipeline = tiny.build_pipeline(guidance_embeds=False)
    monkeypatch.setattr(infer_benchmark, "build_pipeline", lambda args, device: pipeline)
    monkeypatch.setattr(infer_benchmark, "encode_example", lambda _, cases, k, size, length: encoded(k, size, length))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return pipeline


def encoded(num_references: int, size: int, text_tokens: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(num_references)
    shapes = ((1, text_tokens, tiny.TEXT_WIDTH), (1, tiny.TEXT_WIDTH), (num_references, tiny.CHANNELS // 4, size // 2, size // 2))
    embeds, pooled, latents = (torch.randn(shape, generator=generator) for shape in shapes)
    return (embeds, pooled), latents


def test_a_table_of_every_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str], small: MosaicFluxPipeline) -> None:
    result = benchmark.measure([*SMALLEST, "--modes", *MODES, "--peak-tflops", "0.01", "--output", str(tmp_path / "deep" / "out.json")])
    assert json.loads((tmp_path / "deep" / "out.json").read_text()) == result
    rows = {(row["K"], row["mode"]): row for row in result["rows"]}
    assert list(rows) == [(k, mode) for k in (1, 2) for mode in ["target", *MODES]]
    for (k, mode), row in rows.items():
        assert set(row) == set(infer_benchmark.COLUMNS)
        assert row["s"] > row["first s"] > 0
        assert row["s"] > row["s/step"] > 0
        assert row["peak GiB"] > row["above the model GiB"] > 0
        assert (row["x twin"] or 0) > 0 or mode != "target"
        assert row["MFU %"] == pytest.approx(100 * row["TFLOP"] / (row["s"] * 0.01))
        assert row["speed-up"] == pytest.approx(rows[k, "target"]["s"] / row["s"])
        assert row["predicted"] == pytest.approx(rows[k, "target"]["TFLOP"] / row["TFLOP"])
        base = rows[k, "isolated" if mode.startswith("isolated") else "target"]
        assert row["over plain"] == pytest.approx(base["s"] / row["s"])
        assert row["predicted over plain"] == pytest.approx(base["TFLOP"] / row["TFLOP"])
        assert row["skipped"] == (2 if mode == "first-block:1e9" else 0)
        if mode in ("target", "isolated", "refresh:1"):
            assert (row["latents"], row["levels"]) == (0, 0)
        elif mode in ("isolated-cache", "batch:2", "attention:_native_math"):
            assert row["latents"] < 1e-4
            assert row["levels"] <= 1
        else:
            assert row["latents"] > 1e-4  # approximations
        attention = "isolated" if mode.startswith("isolated") else "target"
        steps = (3, {"isolated-cache": 1, "refresh:2": 2}.get(mode, 3), row["skipped"])
        load = Workload(1, k, 16, 9, 8, 3, attention)
        flops = sampling_flops(small.transformer.config, load, *steps)
        later = sampling_flops(small.transformer.config, load, 2, {"isolated-cache": 0, "refresh:2": 1}.get(mode, 2)) / 2
        assert row["of product %"] == pytest.approx(100 * later / 1e12 / (row["s/step"] * result["product_tflops"]))
        assert row["TFLOP"] == pytest.approx(flops / 1e12)
        if mode == "isolated-cache":
            plain, cached = (sampling_flops(small.transformer.config, load, 3, n, 0) for n in (3, 1))
            assert row["predicted over plain"] == pytest.approx(plain / cached)
    printed = capsys.readouterr().out
    assert "MFU against 0.01 TFLOP/s" in printed
    assert "Over plain: both over the plain path of the same attention mode, that of `isolated-cache` over `isolated`." in printed
    assert sum(line.startswith("| 16 |") for line in printed.splitlines()) == len(rows)


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sample = infer_benchmark.Cell.sample

    def fail(cell: infer_benchmark.Cell, mode: infer_benchmark.Mode, *rest: object, **more: object) -> torch.Tensor:
        if mode.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(cell, mode, *rest, **more)

    monkeypatch.setattr(infer_benchmark.Cell, "sample", fail)
    result = benchmark.measure([*SMALLEST, "--k", "1", "--modes", "batch:2", "isolated"])
    assert [row["s"] is None for row in result["rows"]] == [False, True, False]
    printed = capsys.readouterr().out
    assert "does not fit" in printed


def test_kept_references_are_measured_against_none_kept() -> None:
    result = benchmark.measure([*SMALLEST, "--k", "1", "--modes", "isolated-cache", "refresh:2"])
    rows = {row["mode"]: row for row in result["rows"]}
    assert list(rows) == ["target", "isolated", "isolated-cache", "refresh:2"]
    assert rows["isolated-cache"]["over plain"] == pytest.approx(rows["isolated"]["s"] / rows["isolated-cache"]["s"])
    assert rows["refresh:2"]["over plain"] == rows["refresh:2"]["speed-up"]
    assert [mode.name for mode in infer_benchmark.with_plain_paths([infer_benchmark.parse_mode("batch:2")])] == ["target", "batch:2"]


@pytest.mark.parametrize("mode", ["fast", "refresh", "refresh:0", "batch:x", "first-block:-1"])
def test_unknown_modes_are_named(mode: str) -> None:
    with pytest.raises(ValueError, match=f"--modes must be of target, isolated, .*, got {mode}$"):
        benchmark.measure([*SMALLEST, "--modes", "target", mode])


def test_modes_that_cannot_run_here_are_refused_first() -> None:
    with pytest.raises(ValueError, match='step_cache "mag" goes by FLUX.1-dev'):
        benchmark.measure([*SMALLEST, "--modes", "mag:0.1"])
    with pytest.raises(ValueError, match="inference.attention_backend=xformers does not run here"):
        benchmark.measure([*SMALLEST, "--modes", "attention:xformers"])


def test_flux_dev_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(ValueError, match="--model flux_dev needs a CUDA GPU with 30 GiB, but there is none here. Use --model pocket."):
        benchmark.measure(["infer", "--model", "flux_dev"])


def test_the_random_model_and_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the large model, at a tiny size: bfloat16, no VAE, so no pictures; what it samples depends on the references."""
    monkeypatch.undo()
    small = ModelShape(tiny.transformer_config(num_layers=1, num_single_layers=1), 8, {}, is_local=False)
    monkeypatch.setitem(models.MODELS, "flux_dev", replace(models.MODELS["flux_dev"], shape=small))
    monkeypatch.setattr(infer_benchmark, "FLUX_DEV_BYTES", 0)
    args = benchmark.parse(["infer", "--model", "flux_dev", "--text-tokens", "4", "--reference-size", "32", "--rank", "2", "--steps", "2"])
    pipeline = infer_benchmark.build_pipeline(args, torch.device("cpu"))
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.bfloat16}
    cell = infer_benchmark.Cell(args, pipeline, 32, 2, 1)
    plain = cell.sample(infer_benchmark.parse_mode("target"), slice(1))
    assert plain.shape == (1, 4, tiny.CHANNELS)
    assert cell.levels(plain) is None
    cell.references = -cell.references
    assert not torch.equal(cell.sample(infer_benchmark.parse_mode("target"), slice(1)), plain)


def test_a_step_is_timed_apart_from_the_first() -> None:
    clock = StepClock("cpu", "wall")
    for seconds in (0.02, 0.0, 0.0):
        time.sleep(seconds)
        clock.mark()
    first, *others = clock.seconds()
    assert first >= 0.02 > sum(others)
    assert len(others) == 2


def test_another_velocity_of_the_twin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive, "attention_mask", lambda token_reference, mode: (token_reference[:, None] >= -1) & (token_reference >= -1))
    with pytest.raises(RuntimeError, match="ours and the twin disagree"):
        benchmark.measure([*SMALLEST, "--k", "2", "--modes", "target"])
