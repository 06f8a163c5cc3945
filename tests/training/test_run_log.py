"""A run's numbers by step: every line is JSON that any parser takes, and a resumed run continues them."""

import json
import math
from pathlib import Path

import pytest

from mosaic.training.watch.run_log import RunLog


def test_lines_are_json_and_the_best_step_is_one_with_a_number(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    for step, value in ((1, 0.5), (2, math.nan), (3, 0.75), (4, 0.75), (5, math.inf), (6, 0.1)):
        log.write(step, {"attention/exact": value})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in log.file.read_text().splitlines()]
    assert [line["attention/exact"] for line in lines] == [0.5, None, 0.75, 0.75, None, 0.1]
    assert log.best_step("attention/exact", [1, 2, 3, 4, 5]) == 4  # the later one of equals
    assert log.best_step("attention/exact", [1, 6]) == 1
    assert log.best_step("attention/exact", [2, 5]) is None
    assert log.best_step(None, [1]) is None


def test_a_resumed_run_drops_later_entries_and_half_lines(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.write(step, {"loss": math.nan if step == 1 else step})
    with open(log.file, "a") as file:
        file.write('{"step": 2, "lo')
    log.start(2)
    assert log.entries() == [{"step": 1, "loss": None}, {"step": 2, "loss": 2}]
    log.start(0)
    assert log.file.read_text() == ""
