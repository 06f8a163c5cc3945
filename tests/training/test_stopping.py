"""Signals, losses that are not finite, and failures of tracker and validation."""

import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mosaic.data.batches import batches_from
from mosaic.method.losses import MosaicLoss
from mosaic.training import Trainer, train, validation
from mosaic.training import trainer as training
from mosaic.training.objective import train_step
from mosaic.training.signals import StopSignals, TrainingStopped, ignore_in_worker
from mosaic.training.watch import non_finite
from mosaic.training.watch.non_finite import NonFiniteLoss
from mosaic.training.watch.tracking import TensorBoardTracker
from scripts.train import main
from tests import runs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
OPTIONS: dict[str, Any] = {"optimizer__ema_decay": 0.9, "training__max_steps": 5}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps without a break; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(runs.make_config(world, folder, **OPTIONS))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def validated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a validation before the first step and after the last; not to be changed."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    train(runs.make_config(world, folder, **OPTIONS, validation__every=5))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("lora", "optimizer", "ema"):
        file = f"checkpoints/step_00000005/{name}.safetensors"
        runs.assert_same_tensors(load_file(found / file), load_file(expected / file))
    assert (found / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()


def at_step(number: int, action: Callable[[MosaicLoss], MosaicLoss], monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Let `action` change the loss of one optimizer step; returns the ids and global steps as they come."""
    seen: list[tuple] = []

    runs.watch_steps(
        lambda step, batch, _: seen.append((step, batch.ids)),
        lambda step, loss: action(loss) if step == number else loss,
        monkeypatch.setattr,
    )
    return seen


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """In the middle of the third step, which is finished; then exit code 75, and the resumed run is the uninterrupted one."""
    at_step(2, lambda loss: os.kill(os.getpid(), number) or loss, monkeypatch)
    values = runs.settings(world, tmp_path / "run")
    values["optimizer"]["ema_decay"], values["training"]["max_steps"] = 0.9, 5
    (tmp_path / "config.json").write_text(json.dumps(values))
    before = signal.getsignal(number)
    assert main([str(tmp_path / "config.json")]) == 75
    assert signal.getsignal(number) is before
    assert (
        f"stopped by {number.name} at step 3, checkpoint {tmp_path / 'run/checkpoints/step_00000003'}. Continue with --resume auto."
        in capsys.readouterr().err
    )
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000003"]
    assert not (tmp_path / "run/lora.safetensors").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    assert main([str(tmp_path / "config.json"), "--resume", "auto"]) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_in_the_last_step_changes_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(4, lambda loss: os.kill(os.getpid(), signal.SIGTERM) or loss, monkeypatch)
    assert train(runs.make_config(world, tmp_path / "run", **OPTIONS)).is_file()


def test_a_signal_at_a_step_with_a_checkpoint_writes_no_second_one(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(2, lambda loss: os.kill(os.getpid(), signal.SIGTERM) or loss, monkeypatch)
    written, write = [], training.CheckpointWriter.submit
    monkeypatch.setattr(training.CheckpointWriter, "submit", lambda self, snapshot: written.append(snapshot.step) or write(self, snapshot))
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM at step 3"):
        train(runs.make_config(world, tmp_path / "run", **OPTIONS, training__checkpoint_every=3))
    assert written == [3]


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_to_a_whole_group_leave_the_loading_processes_alive(trainer: Trainer, number: signal.Signals) -> None:
    """And what they load does not depend on their number."""
    alone = batches_from(1, trainer.dataset, trainer.sampler, 0)
    expected = [next(alone)[0][0].ids for _ in range(6)]
    stream = batches_from(1, trainer.dataset, trainer.sampler, 2, ignore_in_worker)
    before = set(multiprocessing.active_children())
    found = [next(stream)[0][0].ids for _ in range(2)]  # each of them has begun
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    found += [next(stream)[0][0].ids for _ in range(4)]
    assert found == expected


# ---- errors, with processes that load the data


def break_data(world: Path) -> None:
    for path in (world / "data/images").glob("train-*"):
        path.write_bytes(b"")


def kill_a_worker(_: Path) -> None:
    worker = max(multiprocessing.active_children(), key=lambda process: process.pid)
    os.kill(worker.pid, signal.SIGKILL)
    wait([worker.sentinel])


def fail(_: Path) -> None:
    raise RuntimeError("a kernel failed")


def fill_memory(_: Path) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


ERRORS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "data": (break_data, 2, r"error: .*the picture file is empty \(0 bytes\)"),
    "killed": (
        kill_a_worker,
        2,
        r"error: data loading process 2 of 2 \(pid \d+\) was killed by SIGKILL, most likely .* memory was full; fewer",
    ),
    "step": (fail, 70, "error: RuntimeError: a kernel failed"),
    "memory": (fill_memory, 2, "error: the device's memory is full: CUDA out of memory. Less memory, in this order:"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_ends_a_run_at_once_with_its_steps_in_a_checkpoint(
    world: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """In the middle of step 3; no loading process is left, for which Python would wait for ever, and the resumed run is the other one."""
    action, code, message = ERRORS[kind]
    own = world if kind != "data" else Path(shutil.copytree(world, tmp_path / "world"))
    values = runs.settings(own, tmp_path / "run")
    values["optimizer"]["ema_decay"], values["training"]["max_steps"], values["data"]["num_workers"] = 0.9, 5, 2
    if kind == "data":  # the two processes read four batches ahead, and one epoch has four
        values["training"]["max_steps"] = 20
    (tmp_path / "config.json").write_text(json.dumps(values))
    at_step(2, lambda loss: action(own) or loss, monkeypatch)
    before, begin = set(multiprocessing.active_children()), time.monotonic()
    assert main([str(tmp_path / "config.json")]) == code
    assert time.monotonic() - begin < 20
    assert set(multiprocessing.active_children()) == before
    handler = signal.getsignal(signal.SIGCHLD)
    assert not getattr(handler, "__module__", "").startswith("torch.")  # it would raise wherever the training is
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if re.match(message, line)]) == 1
    (folder,) = (tmp_path / "run/checkpoints").iterdir()
    done = int(folder.name[5:])
    assert done >= 2 if kind == "data" else done == {"killed": 3}.get(kind, 2)
    assert f"the first {done} of {done} steps are in {folder}; --resume auto goes on from there" in caplog.messages
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    if kind != "data":
        assert main([str(tmp_path / "config.json"), "--resume", "auto"]) == 0
        assert_same_run(tmp_path / "run", whole)


def test_an_error_half_way_through_an_update_writes_no_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What there is then is of no step."""
    trainer = Trainer(runs.make_config(world, tmp_path / "run", **OPTIONS, training__checkpoint_every=2))
    step, calls = trainer.optimizer.step, []

    def fail() -> None:
        calls.append(step())
        if len(calls) == 4:
            raise RuntimeError("a kernel failed")

    monkeypatch.setattr(trainer.optimizer, "step", fail)
    with trainer.writer, pytest.raises(RuntimeError, match="a kernel failed"):
        trainer.fit()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]
    assert "the first 2 of 3 steps are in" in caplog.text


def test_an_error_before_the_first_step_leaves_no_checkpoint(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same command, once mended, starts anew."""
    at_step(0, lambda _: fail(world), monkeypatch)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(runs.make_config(world, tmp_path / "run", **OPTIONS))
    assert not (tmp_path / "run/checkpoints").exists()


# ---- not finite


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_not_finite_stops_and_names_the_batch(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def spoil(loss: MosaicLoss) -> MosaicLoss:
        return MosaicLoss(*(term * math.nan for term in loss)) if kind == "loss" else loss._replace(total=loss.total * 1e38 * 1e10)

    seen = at_step(3, spoil, monkeypatch)
    config = runs.make_config(world, tmp_path / "run", **OPTIONS, training__gradient_accumulation_steps=2)
    with pytest.raises(NonFiniteLoss, match=r"step 4: not finite: total .*saved in .*non_finite\.json.*training\.non_finite=skip"):
        train(config)
    record = json.loads((tmp_path / "run/non_finite.json").read_text())
    ids = [name for step, names in seen if step == 3 for name in names]
    assert (record["step"], record["first_sample_index"], record["ids"]) == (4, 12, ids)
    assert len(ids) == 4
    assert record["gradient_norm"] in ("nan", "inf")
    folder = tmp_path / "run/checkpoints/step_00000003"  # the steps before are not lost
    assert all(
        bool(value.isfinite().all())
        for name in ("lora", "optimizer", "ema")
        for value in load_file(folder / f"{name}.safetensors").values()
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    train(
        runs.make_config(world, tmp_path / "run", **OPTIONS, training__gradient_accumulation_steps=2, training__non_finite="skip"),
        resume="auto",
    )
    assert (tmp_path / "run/lora.safetensors").is_file()


def test_not_finite_is_skipped_where_asked_for(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = at_step(2, lambda loss: MosaicLoss(*(term * math.nan for term in loss)), monkeypatch)
    trainer = Trainer(runs.make_config(world, tmp_path / "run", **OPTIONS, training__non_finite="skip"))
    weights, step = [], trainer.optimizer_step
    monkeypatch.setattr(trainer, "optimizer_step", lambda *batches: (step(*batches), weights.append(runs.values(trainer)))[0])
    trainer.fit()
    runs.assert_same_tensors(weights[2], weights[1])
    assert not torch.equal(weights[3]["transformer.x_embedder.lora_A.weight"], weights[2]["transformer.x_embedder.lora_A.weight"])
    assert trainer.ema.optimization_step == 4
    entries = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert entries == [1, 2, 4, 5]
    (message,) = [text for text in caplog.messages if "not finite" in text]
    assert message.startswith("step 3: not finite: total nan")
    assert message.endswith(f"ids {', '.join(seen[2][1])}; this batch is left out")
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run/lora.safetensors").values())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_late_as_on_a_device(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Between log entries a bad step is found while the next one is computed: nothing of either is in the checkpoint, and the run that goes
    on from there is the undisturbed one, bit for bit.
    """
    spoiled = {
        "loss": lambda loss: MosaicLoss(*(term * math.nan for term in loss)),
        "gradient": lambda loss: loss._replace(total=loss.total * 1e38 * 1e10),
    }
    seen = at_step(2, spoiled[kind], monkeypatch)
    late = {**OPTIONS, "training__log_every": 100}
    with pytest.raises(NonFiniteLoss, match="step 3: not finite: .*as it was after step 2"):
        train(runs.make_config(world, tmp_path / "run", **late))
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    record = json.loads((tmp_path / "run/non_finite.json").read_text())
    assert (record["step"], record["first_sample_index"], record["ids"]) == (3, 4, seen[2][1])
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]
    assert "the first 2 of 2 steps are in" in caplog.text
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    train(runs.make_config(world, tmp_path / "run", **late), resume="auto")
    for name in ("lora", "optimizer", "ema"):
        file = f"checkpoints/step_00000005/{name}.safetensors"
        runs.assert_same_tensors(load_file(tmp_path / "run" / file), load_file(whole / file))


def test_a_fused_optimizer_leaves_a_step_out_on_the_device(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU: weights, moments and their count stay as they are, bit for bit, and nobody asks whether they should."""
    monkeypatch.setattr(training, "build_optimizer", lambda _, weights: torch.optim.AdamW(weights, fused=True))
    seen = at_step(2, lambda loss: MosaicLoss(*(term * math.nan for term in loss)), monkeypatch)
    trainer = Trainer(runs.make_config(world, tmp_path / "run", **OPTIONS, training__non_finite="skip", training__log_every=100))
    states, step = [], trainer.optimizer_step

    def spy(*batches: Any) -> MosaicLoss:
        loss = step(*batches)
        moments = {f"{i} {key}": value.clone() for i, state in enumerate(trainer.optimizer.state.values()) for key, value in state.items()}
        states.append(runs.values(trainer) | moments)
        return loss

    monkeypatch.setattr(trainer, "optimizer_step", spy)
    trainer.fit()
    runs.assert_same_tensors(states[2], states[1])
    assert [float(state["0 step"]) for state in states] == [1, 2, 2, 3, 4]
    assert trainer.ema.optimization_step == 4
    (message,) = [text for text in caplog.messages if "not finite" in text]
    assert message.startswith("step 3: not finite: total nan")
    assert message.endswith(f"ids {', '.join(seen[2][1])}; this batch is left out")


def test_an_error_after_a_step_that_was_not_finite_keeps_the_steps_before_both(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before anybody has looked at that step."""

    def change(step: int, loss: MosaicLoss) -> MosaicLoss:
        if step == 3:
            raise RuntimeError("a kernel failed")
        return MosaicLoss(*(term * math.nan for term in loss)) if step == 2 else loss

    runs.watch_steps(lambda *_: None, change, monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(runs.make_config(world, tmp_path / "run", **OPTIONS, training__log_every=100))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]


def test_skipping_everything_stops(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(non_finite, "MOST_IN_A_ROW", 2)
    monkeypatch.setattr(training, "train_step", lambda *arguments: MosaicLoss(*(term * math.inf for term in train_step(*arguments))))
    with pytest.raises(NonFiniteLoss, match="step 2: not finite"):
        train(runs.make_config(world, tmp_path / "run", **OPTIONS, training__non_finite="skip"))


# ---- tracker and validation


@pytest.mark.parametrize("failing", ["__init__", "log", "close"])
def test_a_lost_tracker_costs_no_run(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    monkeypatch.setattr(TensorBoardTracker, failing, lambda *_: 1 / 0)
    train(runs.make_config(world, tmp_path / "run", **OPTIONS))
    (message,) = [text for text in caplog.messages if "tracker" in text]  # once
    assert message.endswith("ZeroDivisionError: division by zero")
    assert_same_run(tmp_path / "run", whole)


def test_a_log_that_cannot_be_written_costs_no_run(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    assert train(runs.make_config(world, tmp_path / "run", **OPTIONS)).is_file()
    (message,) = [text for text in caplog.messages if "metrics.jsonl" in text]  # once
    assert "cannot be written, training goes on without it" in message


def test_a_failing_validation_costs_no_run(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training, "validate", fail)
    with caplog.at_level(logging.ERROR):
        train(runs.make_config(world, tmp_path / "run", **OPTIONS, validation__every=2))
    assert len(calls) == 4  # at the start, after steps 2 and 4, at the end
    assert "validation at step 2 failed; training goes on" in caplog.messages
    assert_same_run(tmp_path / "run", whole)


def test_a_validation_cut_short_is_made_up_for(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while validating step 2, whose checkpoint is there."""
    options = {**OPTIONS, "training__checkpoint_every": 2, "validation__every": 2}
    whole = runs.make_config(world, tmp_path / "whole", **options)
    train(whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    calls, validate = [], training.validate

    def kill(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(training, "validate", kill)
    with pytest.raises(KeyboardInterrupt):
        train(runs.make_config(world, tmp_path / "run", **options))
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(runs.make_config(world, tmp_path / "run", **options), resume="auto")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("place", ["before", "first picture", "first batch"])
def test_a_signal_acts_before_the_first_step(
    world: Path, validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Before the first validation, or in it; its rest is left out and made up for when the run goes on."""
    config, steps, panels = runs.make_config(world, tmp_path / "run", **OPTIONS, validation__every=5), [], []

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    if place == "before":
        start = Trainer._start_log
        monkeypatch.setattr(Trainer, "_start_log", lambda self: (start(self), kill()))
    elif place == "first picture":
        write = validation.save_picture
        monkeypatch.setattr(validation, "save_picture", lambda *given: (panels.append(1), write(*given), kill()))
    else:
        measure = validation.batch_attention_accuracy
        monkeypatch.setattr(validation, "batch_attention_accuracy", lambda *given: (kill(), measure(*given))[1])
    step = Trainer.optimizer_step
    monkeypatch.setattr(Trainer, "optimizer_step", lambda self, batches: (steps.append(1), step(self, batches))[1])
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM at step 0"):
        train(config)
    assert steps == []
    assert len(panels) == (place == "first picture")
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config, resume="auto")
    assert_same_run(tmp_path / "run", validated)


def test_a_signal_in_the_last_validation_asks_for_another_start(
    world: Path, validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = runs.make_config(world, tmp_path / "run", **OPTIONS, validation__every=5), validation.save_picture

    def kill(panel: Any, path: Path) -> None:
        write(panel, path)
        if path.parent.name == "step_00000005":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(validation, "save_picture", kill)
    with pytest.raises(TrainingStopped, match="at step 5"):
        train(config)
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config, resume="auto")
    assert_same_run(tmp_path / "run", validated)
