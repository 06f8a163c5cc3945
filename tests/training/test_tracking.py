"""Trackers: what they get, and that none of them can end a run."""

import logging
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mosaic.training.watch import tracking
from mosaic.training.watch.tracking import Trackers


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_and_a_resumed_run(tmp_path: Path) -> None:
    for begin, end in ((0, 4), (2, 5)):  # killed after step 4, resumed from step 2
        trackers = Trackers(["tensorboard"], tmp_path)
        trackers.start(begin, {})
        for step in range(begin + 1, end + 1):
            trackers.log({"loss/total": begin + 0.5 * step}, step)
        trackers.close()
    assert scalars(tmp_path, "loss/total") == [(1, 0.5), (2, 1.0), (3, 3.5), (4, 4.0), (5, 4.5)]


class Failing:
    """Fails at the second entry."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        self.calls = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError("disk full")

    def close(self) -> None:
        raise RuntimeError("not reached")


class Working(Failing):
    def log(self, values: Mapping[str, float], step: int) -> None:
        self.calls += 1

    def close(self) -> None:
        pass


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "wandb", Failing)
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Working)
    trackers = Trackers(["wandb", "tensorboard"], tmp_path)
    trackers.start(0, {})
    working = trackers.running["tensorboard"]
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            trackers.log({"a": 1.0}, step)
        trackers.close()
    assert [record.getMessage() for record in caplog.records] == ["tracker wandb failed, the run goes on without it: OSError: disk full"]
    assert working.calls == 5


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = Trackers(["wandb"], tmp_path)
    trackers.start(0, {})
    trackers.log({"a": 1.0}, 1)
    trackers.close()
    assert len(caplog.records) == 1
    assert "tracker wandb does not start, the run goes on without it (pip install wandb)" in caplog.records[0].getMessage()


def test_wandb_gets_the_config_and_one_id_for_a_run_and_its_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    stub = types.SimpleNamespace(init=lambda **options: (calls.append(options), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for step in (0, 7):
        trackers = Trackers(["wandb"], tmp_path / "my_run/logs")
        trackers.start(step, {"lora": {"rank": 3}})
        trackers.log({"a": 1.0}, step + 1)
        trackers.close()
    first, second = calls[0], calls[3]
    assert (first["project"], first["name"], first["resume"], first["config"]) == ("mine", "my_run", "allow", {"lora": {"rank": 3}})
    assert first["id"] == second["id"]
    assert len(first["id"]) == 12
    assert calls[1:3] == [(1, {"a": 1.0}), "finish"]
