"""The meter against hand-counted seconds, and what a run logs of it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mosaic.model.costs import Workload, training_step_flops
from mosaic.training import Trainer, train
from mosaic.training.watch.throughput import ThroughputMeter, Work, batch_work, known_peak, resident_peak_bytes
from tests import runs, tiny

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def slow(clock: Clock, waits: list[float]) -> Iterator[int]:
    for index, seconds in enumerate(waits):
        clock.now += seconds
        yield index


def test_figures_of_two_intervals() -> None:
    clock = Clock()
    meter = ThroughputMeter(4, CPU, peak_tflops=10.0, clock=clock)
    found = []
    for index in meter.wait_for(slow(clock, [1.0, 0.0, 3.0])):
        clock.now += 2.0
        meter.end_step([Work(2, 100, 3e12), Work(1, 50, 6e12)])
        clock.now += 77.0  # a checkpoint
        if index != 0:
            found.append(meter.report())
    first, second = found
    # Two steps: 1 + 2 and 0 + 2 seconds; then one of 3 + 2.
    assert first["throughput/samples_per_second"] == pytest.approx(4 * 6 / 5)
    assert first["throughput/tokens_per_second"] == pytest.approx(4 * 300 / 5)
    assert first["throughput/tflops"] == pytest.approx(18 / 5)
    assert first["throughput/mfu"] == pytest.approx(18 / 5 / 10)
    assert first["throughput/step_seconds"] == pytest.approx(2.5)
    assert first["throughput/data_wait_share"] == pytest.approx(1 / 5)
    assert second["throughput/samples_per_second"] == pytest.approx(4 * 3 / 5)
    assert second["throughput/data_wait_share"] == pytest.approx(3 / 5)
    assert meter.report() == {}


def test_memory_and_no_utilisation_without_a_peak() -> None:
    clock = Clock()
    meter = ThroughputMeter(1, CPU, clock=clock)
    for _ in meter.wait_for(slow(clock, [0.0])):
        clock.now += 1
        meter.end_step([Work(1, 1, 1.0)])
    values = meter.report()
    assert "throughput/mfu" not in values
    assert values["memory/resident_peak_gib"] == pytest.approx(resident_peak_bytes() / 2**30, rel=0.05)
    status = (
        dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        if Path("/proc/self/status").exists()
        else {}
    )
    if status:
        assert resident_peak_bytes() == pytest.approx(int(status["VmHWM"].split()[0]) * 1024, rel=0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
    ],
)
def test_peaks(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert known_peak(torch.device("cuda")) == peak
    assert known_peak(CPU) is None


@pytest.mark.usefixtures("fresh_accelerator")
def test_work_of_a_batch(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path / "run"))
    batch = runs.samples_of(trainer, num_references=2, count=3)
    work = batch_work(batch, trainer.pipeline, trainer.config)
    tokens = 3 * (tiny.TEXT_LENGTH + 4 * 6 + 2 * 9)  # targets 16 x 24 px, references 12 x 12 px, tokens of 4 px
    flops = training_step_flops(trainer.pipeline.transformer.config, Workload(3, 2, 24, 9, tiny.TEXT_LENGTH, runs.RANK, "target"), "none")
    assert work == (3, tokens, flops)


@pytest.mark.usefixtures("fresh_accelerator")
def test_what_a_run_logs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"optimizer__max_grad_norm": 1e-3, "optimizer__warmup_steps": 2, "training__log_every": 2, "training__peak_tflops": 1e-3}
    run = tmp_path / "run"
    config = runs.make_config(world, run, **options)
    trainer, norms = Trainer(config), []
    clip = torch.nn.utils.clip_grads_with_norm_
    before = lambda parameters, *rest: (norms.append(runs.total_norm(runs.gradients(trainer))), clip(parameters, *rest))  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", before)
    trainer.fit()
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 3]
    assert [entry["optimizer/gradient_norm"] for entry in entries] == pytest.approx(norms[1:], rel=1e-5)
    assert min(norms) > 1e-2
    assert [entry["optimizer/learning_rate"] for entry in entries] == pytest.approx([1e-2, 1e-2])
    assert not [name for entry in entries for name in entry if name.startswith(("throughput", "memory"))]
    speeds = [json.loads(line) for line in (run / "throughput.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in speeds] == [2, 3]
    for entry in speeds:
        assert all(math.isfinite(value) and value >= 0 for value in entry.values())
        assert entry["throughput/mfu"] == pytest.approx(entry["throughput/tflops"] / 1e-3)
        assert entry["throughput/samples_per_second"] * entry["throughput/step_seconds"] == pytest.approx(2, rel=1e-6)


@pytest.mark.usefixtures("fresh_accelerator")
def test_no_tracker_and_failing_trackers_change_nothing(world: Path, tmp_path: Path) -> None:
    files = []
    for name, trackers in (("none", []), ("both", ["wandb", "tensorboard"])):
        train(runs.make_config(world, tmp_path / name, training__trackers=trackers, training__max_steps=1))
        files.append((tmp_path / name / "lora.safetensors").read_bytes()[-1000:])
    assert files[0] == files[1]
    assert not (tmp_path / "none/logs").exists()
