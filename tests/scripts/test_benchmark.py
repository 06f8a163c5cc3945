"""The benchmark command at its smallest: the arms do the same work, the table and the JSON hold what they promise."""

import json
from pathlib import Path

import pytest
import torch

from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.costs import Workload, training_step_flops
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.planning.model_shape import ModelShape
from scripts.benchmarks import command as benchmark
from scripts.benchmarks import supervision
from scripts.benchmarks import train as train_benchmark
from scripts.benchmarks import twin as twin_benchmark
from tests import tiny

SMALLEST = [
    "train",
    "--k",
    "2",
    "--points-per-reference",
    "3",
    "--batch-size",
    "1",
    "--rank",
    "2",
    "--text-tokens",
    "4",
    "--threads",
    "1",
    "--steps",
    "1",
]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of each kind, and the caller's number of threads afterwards."""
    small = twin_benchmark.POCKET_GEOMETRY | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(twin_benchmark, "transformer_config", lambda: small)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def test_points_are_ragged_and_have_the_stated_mean() -> None:
    args = benchmark.parse(["train", "--k", "4", "--batch-size", "200"])
    samples = twin_benchmark.draw_points(args)
    counts = torch.tensor([[len(pairs) for pairs in sample] for sample in samples]).float()
    assert counts.shape == (200, 4)
    assert counts.mean().item() == pytest.approx(9, abs=0.3)
    assert counts.min() < 7
    assert counts.max() > 11
    from mosaic.method.correspondence import validate_points

    for sample in samples:
        validate_points(sample, 16, 64)


def test_arms_take_turns_and_agree(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin_benchmark, "memory_in_fresh_process", lambda name, args: {"ours": 2.0, "flow_only": 1.0, "twin": 6.0}[name])
    result = benchmark.measure([*SMALLEST, "--output", str(tmp_path / "deep" / "result.json")])
    assert json.loads((tmp_path / "deep" / "result.json").read_text()) == result
    assert set(result["arms"]) == {"ours", "flow_only", "twin"}
    assert result["arms"]["twin"]["memory_ratio"] == 3
    assert result["arms"]["ours"]["time_ratio"] == 1
    assert all(arm["ms_per_step"] > 0 for arm in result["arms"].values())
    printed = capsys.readouterr().out
    assert "| twin |" in printed
    assert "K = 2, 3 points per reference" in printed
    assert "Capture and losses cost" in printed
    assert [(row["px"], row["K"], row["checkpointing"]) for row in result["rows"]] == [(64, 2, "none"), (64, 2, "block")]


def test_a_difference_between_the_arms_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.naive.disentanglement", lambda maps, samples, size: [maps.new_zeros(()) for _ in samples])
    with pytest.raises(RuntimeError, match="disagree on the loss"):
        twin_benchmark.time_in_turns(benchmark.parse(SMALLEST))


def test_memory_is_read_above_the_built_objects(capsys: pytest.CaptureFixture[str]) -> None:
    twin_benchmark.measure_memory(benchmark.parse([*SMALLEST, "--memory-of", "ours"]))
    assert json.loads(capsys.readouterr().out)["peak_mib"] >= 0
    assert 50 < twin_benchmark.peak_memory_mib() < 100_000


def test_cost_is_the_median_of_paired_steps() -> None:
    args = benchmark.parse(SMALLEST)
    times = {"ours": [100.0, 200.0, 100.0], "flow_only": [90.0, 190.0, 95.0], "twin": [300.0, 200.0, 250.0]}
    result = twin_benchmark.report(args, times, {"ours": 10.0, "flow_only": 8.0, "twin": 20.0})
    assert result["capture_and_losses_percent"] == pytest.approx(5)
    assert result["arms"]["twin"]["time_ratio"] == 2.5
    assert result["arms"]["twin"]["memory_ratio"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "0"], "--k must be positive, got 0"),
        (["--k", "2", "-1"], "--k must be positive, got -1"),
        (["--points-per-reference", "17"], "must be at most 16"),
        (["--checkpointing", "all"], "--checkpointing must be of none, block, keep_attention, got all"),
        (["--peak-tflops", "0"], "--peak-tflops must be positive, got 0.0"),
    ],
)
def test_bad_flags_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["train", *flags])
    assert message in capsys.readouterr().err


def test_the_reader_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.benchmarks import data as data_benchmark

    monkeypatch.setattr(data_benchmark, "memory_in_fresh_process", data_benchmark.measure_opening)
    monkeypatch.setattr(data_benchmark, "NUM_STORED", 3)
    flags = ["--size", "32", "--batch-size", "2", "--workers", "0", "--seconds", "0.1", "--rows", "3", "1500"]
    result = benchmark.measure(["data", *flags, "--output", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert set(result["samples_per_second"]) == {"0"}
    assert min(result["samples_per_second"].values()) > 0
    assert set(result["manifest"]) == {"3", "1500"}
    printed = capsys.readouterr().out
    assert "| 1,500 |" in printed
    assert "ms per sample" in printed


def test_the_synthetic_manifest_is_a_good_one(tmp_path: Path) -> None:
    from mosaic.data import Manifest
    from scripts.benchmarks import data as data_benchmark

    manifest = Manifest(data_benchmark.write_manifest(tmp_path / "set", 2300, 3), "train")
    assert len(manifest) == 2300
    assert set(manifest.num_references.tolist()) == {3}
    row = manifest.row(2299)
    assert row.id == f"{2299:032x}"
    assert [entry.image for entry in row.references] == [f"images/{row.id}_ref{k}.jpg" for k in range(3)]


def test_a_cell_of_the_table() -> None:
    """The same code as on a GPU, at a tiny size: times and memory are there, and utilisation and floor follow from them."""
    values = tiny.transformer_config(False, num_layers=1, num_single_layers=1)
    shape = ModelShape(values, 4, {}, is_local=False)
    args = benchmark.parse([*SMALLEST, "--sizes", "64", "--reference-size", "32", "--max-points", "4"])
    cells = {mode: train_benchmark.measure(args, shape, 64, 2, mode, "cpu", peak=0.01, rate=0.005) for mode in ("none", "block")}
    flops = training_step_flops(values, Workload(1, 2, 64, 16, 4, 2, "target"), "none")
    for mode, row in cells.items():
        assert set(row) == set(train_benchmark.COLUMNS) - {"px", "K", "checkpointing"}
        assert row["s/step"] > 0
        assert row["MFU %"] == pytest.approx(100 * flops / 1e12 / (row["s/step"] * 0.01), rel=0.01), mode
        assert row["floor s"] == pytest.approx(row["TFLOP"] / 0.005)
        assert row["x floor"] == pytest.approx(row["s/step"] / row["floor s"])
    assert cells["none"]["peak GiB"] > cells["block"]["peak GiB"] > 0
    assert cells["block"]["TFLOP"] > cells["none"]["TFLOP"]


def test_a_cell_without_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_benchmark, "_measured", measured)
    args = benchmark.parse(SMALLEST)
    result = train_benchmark.run(args)
    assert {row["s/step"] for row in result["rows"]} == {None}
    assert "| does not fit |" in capsys.readouterr().out


def test_a_model_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("mosaic.planning.preflight.os.sysconf", lambda name: 2**14)
    with pytest.raises(ValueError, match="--model flux_dev needs 29.1 GiB .* Use --model pocket here, or a GPU of 80 GB"):
        benchmark.measure(["train", "--model", "flux_dev"])


def test_settings_of_supervision_take_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        supervision, "WIDE_SHAPE", ModelShape(tiny.transformer_config(True, num_layers=1, num_single_layers=1), 4, {}, False)
    )
    monkeypatch.setitem(supervision.SIZES, "wide", (32, 16, 4, 1, 2))
    asked: list[tuple] = []
    forward = MosaicFluxTransformer2DModel.forward

    def noted(self: MosaicFluxTransformer2DModel, *args: object, capture: CaptureRequest | None = None, **inputs: object) -> object:
        kind = ("none",) if capture is None else (capture.global_index is not None, capture.target_keys, capture.each_head)
        asked.append(kind)
        return forward(self, *args, capture=capture, **inputs)

    monkeypatch.setattr(MosaicFluxTransformer2DModel, "forward", noted)
    monkeypatch.setattr(supervision, "clocked", lambda step, *_: (step(), float(len(asked)))[1])
    monkeypatch.setattr(supervision, "WARM_UP_STEPS", 1)
    result = benchmark.measure(["supervision", "--rounds", "1", "--k", "2", "--max-points", "4", "--output", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    first = [(True, None, False), ("none",), (True, "all", False), (True, "all", False), (True, "references", False), (True, "all", True)]
    assert asked[:6] == first
    assert asked[6:] == [*first[1:], first[0]]  # who runs after whom changes
    rows = {row["supervised"]: row for row in result["rows"]}
    assert list(rows) == list(supervision.ARMS)
    assert rows["target"] == {"supervised": "target", "seconds": 8, "ratio": 8 / 12, "low": 8 / 12, "high": 8 / 12}  # of the second round
    assert "| target, every head | " in capsys.readouterr().out


def test_ratios_are_of_one_round() -> None:
    found = supervision.compared([2.0, 4.0, 9.0, 8.0], [1.0, 4.0, 3.0, 4.0])
    assert found == {"seconds": 6.0, "ratio": 2.0, "low": 1.25, "high": 2.75}
