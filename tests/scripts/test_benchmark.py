"""The benchmark command at its smallest: the arms do the same work, tables and JSON hold what they promise."""

import io
import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mosaic.lora.adapter import reference_lora_parameters
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.costs import Workload, training_step_flops
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.planning.model_shape import ModelShape
from mosaic.weights.float8 import Float8Linear
from scripts.benchmarks import ROOT, against, gpu, measuring, models, page, supervision
from scripts.benchmarks import command as benchmark
from scripts.benchmarks import train as train_benchmark
from tests import naive, tiny

SMALLEST = ["train", "--k", "2", "--steps", "1"]
#: One block of each kind; 4 x 4 tokens of the target, 2 x 2 of a reference.
TINY = models.MeasuredModel(
    ModelShape(tiny.transformer_config(num_layers=1, num_single_layers=1), 4, {}, is_local=False), 32, 16, 4, 1, 2, 3
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in the place of each, and the caller's number of threads and tiny numbers afterwards."""
    for name in ("pocket", "thin", "mid", "wide"):
        monkeypatch.setitem(models.MODELS, name, TINY)
    monkeypatch.setitem(measuring.PRODUCT_SIDE, "cpu", 64)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda flush: True)


def test_the_table_of_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--sizes", "32", "--checkpointing", "none", "block", "--output", str(tmp_path / "deep" / "result.json")]
    result = benchmark.measure([*SMALLEST, *flags])
    assert json.loads((tmp_path / "deep" / "result.json").read_text()) == result
    assert [(row["px"], row["K"], row["checkpointing"]) for row in result["rows"]] == [(32, 2, "none"), (32, 2, "block")]
    plain, recomputed = result["rows"]
    assert plain["x twin"] > 0
    assert plain["x twin's memory"] > 1  # LoRA on all tokens, full maps
    assert (recomputed["x twin"], recomputed["x twin's memory"]) == (None, None)
    assert plain["MFU %"] == pytest.approx(plain["of product %"])  # on a CPU both are against a large product
    printed = capsys.readouterr().out
    assert "3 points a reference" in printed
    assert "| n/a |" in printed


def test_a_difference_between_ours_and_the_twin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mean_maps = naive.mean_maps
    monkeypatch.setattr(naive, "mean_maps", lambda maps, blocks: mean_maps(maps, blocks).roll(1, dims=1))
    with pytest.raises(RuntimeError, match="ours and the twin disagree"):
        benchmark.measure([*SMALLEST, "--checkpointing", "none"])


def test_the_twin_trains_an_adapter_of_its_own() -> None:
    transformer = TINY.build(TINY.config(2), "cpu")
    ours = list(reference_lora_parameters(transformer).values())
    assert all(bool(parameter.any()) for parameter in ours)
    twin = train_benchmark.Twin(transformer)
    before = [parameter.clone() for parameter in ours]
    step = train_benchmark.StandInStep(TINY.config(2), TINY.shape, 2, transformer, forward=twin)
    measuring.optimizer_step(step, twin.parameters, torch.optim.AdamW(twin.parameters, lr=1e-2))
    assert all(map(torch.equal, before, ours))
    assert not any(map(torch.equal, before, twin.parameters))


def test_memory_is_read_above_the_built_objects() -> None:
    before = measuring.resident_mib("VmRSS")
    measuring.forget_resident_peak()
    with mmap.mmap(-1, 2**25) as fresh:  # 32 MiB that the allocator does not hold already
        for _ in range(32):
            fresh.write(bytes(2**20))
    assert 30 < measuring.resident_mib("VmHWM") - before < 100
    kept = torch.ones(1000)
    assert measuring.peak_bytes(lambda: torch.ones(500).sum(), [kept], "cpu") == 4000 + 2000 + 4


def test_shares_are_of_paired_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ours": [100.0, 200.0, 100.0], "bare": [90.0, 190.0, 95.0], "twin": [300.0, 200.0, 250.0]}
    monkeypatch.setattr(train_benchmark, "_measured", lambda *_: (seconds, {"ours": 3 * 2**30, "twin": 5 * 2**30}, 2**30))
    row = train_benchmark.measure(benchmark.parse(SMALLEST), TINY, 2, "none", "cpu", peak=1.0, rate=1.0)
    assert row["capture and losses %"] == pytest.approx(5)
    assert row["x twin"] == 2.5
    assert row["x twin's memory"] == 2
    assert (row["peak GiB"], row["above the model GiB"]) == (3, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "0"], "--k must be positive, got 0"),
        (["--k", "2", "-1"], "--k must be positive, got -1"),
        (["--points-per-reference", "0"], "--points-per-reference must be positive, got 0"),
        (["--checkpointing", "all"], "--checkpointing must be of none, block, keep_attention, got all"),
        (["--peak-tflops", "0"], "--peak-tflops must be positive, got 0.0"),
    ],
)
def test_bad_flags_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["train", *flags])
    assert message in capsys.readouterr().err


def test_without_a_command_both_tables_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.parse([]).command == "speed"
    assert benchmark.parse(["--k", "3"]).k == [3]
    output = tmp_path / "speed.json"
    result = benchmark.measure(["--models", "thin", "--k", "2", "--output", str(output)])
    assert json.loads(output.read_text()) == result
    (row,) = result["train"]["thin"]["rows"]
    modes = {row["mode"]: row for row in result["infer"]["thin"]["rows"]}
    assert list(modes) == ["target", "isolated", "isolated-cache"]
    assert min(row["x twin"], modes["target"]["x twin"]) > 0
    assert "## thin, infer" in capsys.readouterr().out
    text = page.speed_table(result)
    assert f"| thin | train | 2 | {row['s/step']:.3g} | {row['of product %']:.0f} | {row['TFLOP']:.3g} " in text
    assert "| thin | isolated-cache | 2 |" in text


def test_two_checkouts_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, str, int]] = []

    @contextmanager
    def worker(task: against.Task, view: Path) -> Iterator[object]:
        assert (view / "scripts").resolve() == ROOT / "scripts"

        def ask(turn: int) -> dict[str, object]:
            asked.append((str(task), view.name, turn))
            seconds = {"old": 2.0, "new": 1.0 + turn}[view.name]
            return {"seconds": seconds, "numbers": [4.0, turn / 10 * (view.name == "new")], "peak_mib": 10.0 - turn}

        yield ask

    monkeypatch.setattr(against, "worker", worker)
    monkeypatch.setattr(against, "state_of", lambda tree: "0000")
    output, other = tmp_path / "against.json", tmp_path / "other"
    flags = [str(other), "--rounds", "2", "--processes", "1", "--output", str(output)]
    with pytest.raises(FileNotFoundError, match="must be a checkout of this repository"):
        benchmark.measure(["against", *flags])
    (other / "mosaic").mkdir(parents=True)
    (other / "mosaic/__init__.py").touch()
    result = benchmark.measure(["against", *flags, "--tasks", "mid train 4"])
    sides = [side for _, side, _ in asked]
    assert sides == ["new", "old", "old", "new"] * 2
    row = result["rows"]["mid train 4"]
    assert row["ratios"] == [3 / 2, 4 / 2]  # of the rounds after the warm-up
    assert (row["ratio"], row["old_seconds"], row["new_seconds"], row["old_peak_mib"]) == (1.75, 2, 3.5, 10)
    assert row["difference"] == pytest.approx(0.3 / 4)
    assert json.loads(output.read_text()) == result
    assert "| mid, train, K = 4 | 2 | 3.5 | 1.750 " in capsys.readouterr().out
    benchmark.measure(["against", *flags, "--tasks", "mid train 4", "thin cached 2"])
    assert {task for task, _, _ in asked[8:]} == {"thin cached 2"}  # the other one is there
    monkeypatch.setattr(against, "state_of", lambda tree: "0000+")
    assert against.finished(output, {"trees": {"old": "0000+", "new": "0000+"}, "rounds": 2, "processes": 1}) == {}


@pytest.mark.parametrize("task", ["mid train", "mid learn 4", "mid train 0", "mid train x"])
def test_unknown_tasks_are_named(task: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f'--tasks must be like "mid train 4", .*, got "{task}"'):
        benchmark.measure(["against", str(ROOT), "--tasks", task])


def test_a_checkout_is_measured_with_its_own_code(tmp_path: Path) -> None:
    (tmp_path / "other/mosaic").mkdir(parents=True)
    (tmp_path / "other/mosaic/__init__.py").write_text("name = 'other'")
    view = against.view_of(tmp_path / "other", tmp_path / "view")
    code = "import mosaic, scripts.benchmarks; print(mosaic.name, scripts.benchmarks.ROOT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=view, env={"PYTHONPATH": str(view)}, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["other", str(ROOT)]


@pytest.mark.parametrize("kind", ["train", "target", "cached"])
def test_a_measuring_process_repeats_its_numbers(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def answers() -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["", "mid", kind, "2"])
        monkeypatch.setattr(sys, "stdin", io.StringIO("0\n1\n"))
        against.serve()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    first, second = answers(), answers()
    assert Path(first[0]["mosaic"]) == ROOT / "mosaic/__init__.py"
    assert [answer["numbers"] for answer in first[1:]] == [answer["numbers"] for answer in second[1:]]
    assert first[1]["numbers"] != first[2]["numbers"]
    assert all(answer["seconds"] > 0 for answer in first[1:])


def test_the_gpu_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The same code as on a GPU, at a tiny size; what there is no time for is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "TRAIN_FLAGS", ("--steps", "1", "--no-twin"))
    monkeypatch.setattr(gpu, "INFER_FLAGS", ("--steps", "2", "--runs", "1", "--no-twin"))
    built: list[type] = []
    build = models.MeasuredModel.build

    def noted(*arguments: object) -> MosaicFluxTransformer2DModel:
        transformer = build(*arguments)
        built.append(type(transformer.single_transformer_blocks[0].proj_mlp.base_layer))
        return transformer

    monkeypatch.setattr(models.MeasuredModel, "build", noted)
    output = tmp_path / "gpu.json"
    result = benchmark.measure(["gpu", "--model", "thin", "--minutes", "2", "--output", str(output)])
    assert json.loads(output.read_text()) == result
    assert result["left out"] == []
    assert built == ([torch.nn.Linear] * 3 + [Float8Linear] * 3) * 2
    formats = list(gpu.FORMATS)
    cells = [(row["format"], row["px"], row["K"]) for row in result["train"]]
    assert cells == [(format_, px, k) for px in (32, 64) for format_ in formats for k in (4, 2)]
    assert {row["checkpointing"] for row in result["train"]} == {"none"}
    assert {row["mode"] for row in result["infer"]} == {"target", "isolated", "isolated-cache"}
    assert len(result["infer"]) == 3 * 2 * len(formats)
    assert "| none | 32 | 4 | isolated-cache |" in capsys.readouterr().out
    result = benchmark.measure(["gpu", "--model", "thin", "--minutes", "0.01", "--output", str(output)])
    assert len(result["left out"]) == 2 * 3 * len(formats)
    assert "Left out for want of time: train none 32 px, K = 4;" in capsys.readouterr().out
    monkeypatch.setattr("mosaic.planning.preflight.os.sysconf", lambda name: 2**14)
    with pytest.raises(ValueError, match="flux_dev needs"):
        benchmark.measure(["gpu", "--output", str(output)])


def test_what_does_not_fit_a_gpu_is_measured_with_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(args: object, model: object, k: int, mode: str, *rest: object) -> dict[str, float | None]:
        return {"s/step": None if mode == "none" else 1.0}

    monkeypatch.setattr(train_benchmark, "measure", measure)
    rows = gpu.train_rows("thin", "none", 32, 2, "cpu")
    assert [(row["checkpointing"], row["s/step"]) for row in rows] == [("none", None), ("block", 1.0)]


def test_the_page_says_what_is_measured_and_what_is_not(tmp_path: Path) -> None:
    changes = {"note": "A note.", "changes": [{"change": "a", "of": "b", "predicted": "0.9", "found": ""}]}
    target = tmp_path / "page.md"
    target.write_text(f"before\n{page.MARKER}\nold\n{page.MARKER}\nafter\n")
    flags = ["page", "--page", str(target), "--results", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="changes.json"):
        benchmark.measure(flags)
    (tmp_path / "changes.json").write_text(json.dumps(changes))
    benchmark.measure(flags)
    text = target.read_text()
    assert text.startswith(f"before\n{page.MARKER}\nA note.\n")
    assert "| a | b | 0.9 | not measured yet |" in text
    assert text.count("\nNot measured yet.\n") == 3
    assert "old" not in text


def test_the_guide_has_what_is_in_the_results() -> None:
    assert page.block(ROOT / "assets/speed") in (ROOT / "docs/speed.md").read_text(encoding="utf-8")


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
    args = benchmark.parse([*SMALLEST, "--no-twin"])
    cells = {mode: train_benchmark.measure(args, TINY, 2, mode, "cpu", peak=0.01, rate=0.005) for mode in ("none", "block")}
    flops = training_step_flops(TINY.shape.transformer, Workload(1, 2, 16, 4, 4, 2, "target"), "none")
    for mode, row in cells.items():
        assert set(row) == set(train_benchmark.COLUMNS) - {"px", "K", "checkpointing"}
        assert row["s/step"] > 0
        assert row["MFU %"] == pytest.approx(100 * flops / 1e12 / (row["s/step"] * 0.01), rel=0.03), mode
        assert row["floor s"] == pytest.approx(row["TFLOP"] / 0.005)
        assert row["of product %"] == pytest.approx(100 * row["floor s"] / row["s/step"])
        assert row["x twin"] is None
    assert cells["none"]["peak GiB"] > cells["block"]["peak GiB"] > cells["block"]["above the model GiB"] > 0
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
    asked: list[tuple] = []
    forward = MosaicFluxTransformer2DModel.forward

    def noted(self: MosaicFluxTransformer2DModel, *args: object, capture: CaptureRequest | None = None, **inputs: object) -> object:
        kind = ("none",) if capture is None else (capture.global_index is not None, capture.target_keys, capture.each_head)
        asked.append(kind)
        return forward(self, *args, capture=capture, **inputs)

    monkeypatch.setattr(MosaicFluxTransformer2DModel, "forward", noted)
    monkeypatch.setattr(supervision, "timed", lambda step, *_: (step(), float(len(asked)))[1])
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
