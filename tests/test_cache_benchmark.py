"""scripts/cache_benchmark.py on a tiny model: its tables, and mistakes."""

import json
from pathlib import Path

import pytest
import torch

from scripts import cache_benchmark
from tests import runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_world(tmp_path_factory.mktemp("world"))


def config_file(world: Path, folder: Path, **model: str) -> str:
    settings = runs.settings(world, folder)
    settings["model"] |= model
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    return str(path)


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of every Markdown table."""
    found = []
    for part in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines() if line.startswith("|")]
        if lines:
            found.append([dict(zip(lines[0], row, strict=True)) for row in lines[2:]])
    return found


def test_tables(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--k", "1", "3", "--refresh", "2", "--cases", "1", "--steps", "4", "--repeats", "1", "--clock", "cpu"]
    assert cache_benchmark.main(["--config", config_file(world, tmp_path), *arguments]) == 0
    cache, refresh = tables(capsys.readouterr().out)
    assert [row["K"] for row in cache] == ["1", "3"]
    assert all(0 <= float(row["largest error"]) < 1e-4 for row in cache)
    assert 1 < float(cache[0]["by FLOPs"]) < float(cache[1]["by FLOPs"]) < 4
    assert [(row["N"], float(row["largest"]) > 0) for row in refresh] == [("1", False), ("2", True)]
    assert float(refresh[0]["by FLOPs"]) == 1 < float(refresh[1]["by FLOPs"]) < 2


def test_turns_rotate_and_the_first_round_does_not_count() -> None:
    calls, ticks = [], iter(range(100))

    def arm(name: str) -> cache_benchmark.Arm:
        return lambda: calls.append(name) or torch.zeros(1)

    seconds, results = cache_benchmark.take_turns({"a": arm("a"), "b": arm("b")}, 2, lambda: float(next(ticks)))
    assert "".join(calls) == "abbaab"
    assert seconds == {"a": 1.0, "b": 1.0}
    assert results.keys() == {"a", "b"}


def test_mistakes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    isolated = config_file(world, tmp_path, reference_attention="isolated")
    assert cache_benchmark.main(["--config", isolated, "--k", "1", "--steps", "1", "--repeats", "1"]) == 1
    assert capsys.readouterr().err.endswith(
        '--refresh is for the modes "target" and "joint", but model.reference_attention is "isolated".\n'
    )
    assert cache_benchmark.main(["--config", str(tmp_path / "none.json")]) == 1
    assert "cache_benchmark: error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cache_benchmark.main(["--repeats", "0"])
