"""Runs of one and of two processes are one run; a signal to one process stops all; a killed run is the uninterrupted one."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mosaic.training import objective
from mosaic.training.checkpoints.checkpoint import find_damage
from scripts.train import main as train_main
from tests import forks, runs

STEPS = 16


def write_config(world: Path, file: Path, output: str, **training: Any) -> str:
    values = runs.settings(world, file.parent / output)
    values["training"].update(training)
    values["optimizer"].update(learning_rate=1e-3, ema_decay=0.9, warmup_steps=5)
    values["data"].update(image_dropout=0.2, text_dropout=0.2)
    file.write_text(json.dumps(values))
    return str(file)


def train_and_record(config: str, record: Path, stop: tuple[int, int, str] | None) -> int:
    """One rank; keeps [id, timestep, mean of x_t] of its samples of each step, and gets the signal `stop`: rank, step, name."""
    rank = int(os.environ.get("RANK", "0"))
    seen: dict[int, list] = {}
    predict = objective.predict

    def seen_step(step: int, batch: Any, _: Any) -> None:
        if stop and stop[:2] == (rank, step):
            os.kill(os.getpid(), signal.Signals[stop[2]])

        def spy_predict(transformer: Any, encoded: Any, noisy_latents: torch.Tensor, timesteps: Any, *others: Any) -> Any:
            means = noisy_latents.double().mean(dim=(1, 2)).tolist()
            seen.setdefault(step, []).extend(map(list, zip(batch.ids, timesteps.tolist(), means, strict=True)))
            return predict(transformer, encoded, noisy_latents, timesteps, *others)

        objective.predict = spy_predict

    runs.watch_steps(seen_step)
    code = train_main([config, "--resume", "auto"])
    record.with_name(f"{record.name}_rank_{rank}.json").write_text(json.dumps(seen))
    return code


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A global batch of 4 in several ways."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs: list[tuple[str, int, int, int, int, tuple[int, int, str] | None, int]] = [
        # output, processes, batch, micro-batches, steps, signal, exit code
        ("one", 1, 4, 1, STEPS, None, 0),
        ("two", 2, 2, 1, STEPS, None, 0),
        ("mixed", 2, 2, 1, 7, None, 0),
        ("mixed", 1, 2, 2, STEPS, None, 0),
        ("stopped", 2, 2, 1, STEPS, (1, 4, "SIGUSR1"), 75),
        ("stopped", 2, 2, 1, STEPS, (0, 9, "SIGTERM"), 75),
        ("stopped", 2, 2, 1, STEPS, None, 0),
    ]
    for number, (output, processes, batch_size, micro_batches, steps, stop, code) in enumerate(jobs):
        values = {"batch_size": batch_size, "gradient_accumulation_steps": micro_batches, "max_steps": steps, "checkpoint_every": 1000}
        config = write_config(world, folder / f"config_{number}.json", output, **values)
        printed = folder / f"job_{number}.log"
        ranks = forks.start_ranks(train_and_record, config, folder / f"job_{number}", stop, output=printed, processes=processes)
        assert forks.wait(ranks) == [code] * processes, printed.read_text()[-3000:]
    return folder


def samples(folder: Path, *jobs: int) -> dict[int, list[list]]:
    """[id, timestep, mean of x_t] of all samples of each step, over all processes."""
    found: dict[int, list[list]] = {}
    for job in jobs:
        for file in folder.glob(f"job_{job}_rank_*.json"):
            for step, records in json.loads(file.read_text()).items():
                found.setdefault(int(step), []).extend(records)
    return {step: sorted(records) for step, records in found.items()}


def losses(folder: Path, output: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([[value for name, value in line.items() if name.startswith("loss/")] for line in lines])


@pytest.mark.parametrize(("output", "jobs"), [("two", (1,)), ("mixed", (2, 3)), ("stopped", (4, 5, 6))])
def test_any_number_of_processes_sees_the_same(folder: Path, output: str, jobs: tuple[int, ...]) -> None:
    """Samples, timesteps and noise of each step, and so the losses; also where the number changes at a resume."""
    expected, found = samples(folder, 0), samples(folder, *jobs)
    assert found.keys() == expected.keys() == set(range(STEPS))
    for step in range(STEPS):
        assert [record[0] for record in found[step]] == [record[0] for record in expected[step]]
        assert len(expected[step]) == 4
        for place in (1, 2):
            assert [record[place] for record in found[step]] == pytest.approx([record[place] for record in expected[step]], abs=1e-5)
    assert len({record[1] for records in expected.values() for record in records}) == 4 * STEPS
    torch.testing.assert_close(losses(folder, output), losses(folder, "one"), rtol=1e-3, atol=1e-4)
    for name in ("lora", "ema"):
        file = f"checkpoints/step_{STEPS:08d}/{name}.safetensors"
        torch.testing.assert_close(load_file(folder / output / file), load_file(folder / "one" / file), rtol=1e-2, atol=1e-3)


def test_a_signal_to_one_process_stops_all_at_one_step(folder: Path) -> None:
    """SIGUSR1 in step 4 of the second process, then SIGTERM in step 9 of the first."""
    for job, first, stop in ((4, 0, 5), (5, 5, 10), (6, 10, STEPS)):
        assert find_damage(folder / f"stopped/checkpoints/step_{stop:08d}") is None
        assert samples(folder, job).keys() == set(range(first, stop))
    for name in ("lora", "optimizer", "ema"):  # two processes throughout: bit for bit
        file = f"checkpoints/step_{STEPS:08d}/{name}.safetensors"
        runs.assert_same_tensors(load_file(folder / "stopped" / file), load_file(folder / "two" / file))
    assert (folder / "stopped/metrics.jsonl").read_text() == (folder / "two/metrics.jsonl").read_text()


@pytest.mark.cluster
def test_kills_change_nothing(world: Path, tmp_path: Path) -> None:
    """A short form of the script's 50 kills."""
    config = write_config(world, tmp_path / "config.json", "unused", max_steps=12, checkpoint_every=2, keep_checkpoints=2)
    arguments = (config, "--output", str(tmp_path / "kills"), "--kills", "2", "--seed", "1")
    codes = forks.wait(forks.start("scripts/kill_test.py", *arguments, output=tmp_path / "log"))
    printed = (tmp_path / "log").read_text()
    assert codes == [0], printed[-3000:]
    assert "2 of 2 kills (" in printed
    assert "equal bit for bit: weights, optimizer, average, log" in printed


def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    from scripts.launching.kill_test import compare

    for name, value in (("whole", 1.0), ("killed", 1.0)):
        step = tmp_path / name / "checkpoints/step_00000002"
        step.mkdir(parents=True)
        for file in (step / "lora.safetensors", step / "optimizer.safetensors", tmp_path / name / "lora.safetensors"):
            runs.write_lora(file, seed=5)
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "loss/total": {value}}}\n')
    assert compare(tmp_path / "whole", tmp_path / "killed") == []
    (tmp_path / "killed/metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0000001}\n')
    runs.write_lora(tmp_path / "killed/checkpoints/step_00000002/optimizer.safetensors", seed=6)
    (tmp_path / "killed/checkpoints/step_00000002/lora.safetensors").unlink()
    (tmp_path / "killed/checkpoints/.step_00000003.partial").mkdir()
    found = compare(tmp_path / "whole", tmp_path / "killed")
    assert [difference.split(":")[0] for difference in found] == [
        "checkpoint lora.safetensors is missing",
        "checkpoint optimizer.safetensors",
        "metrics.jsonl",
        "left over",
    ]
