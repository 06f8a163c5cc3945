"""The command that fills caches: kills, several processes, added samples, mistakes."""

import json
import random
import re
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState
from safetensors.torch import load_file

from mosaic.data import DatasetWriter
from preprocess import cache
from tests import forks, runs

NUM_SAMPLES, NUM_PROMPTS = len(runs.NUM_REFERENCES), 3


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    PartialState._reset_state()


def config_file(world: Path, folder: Path, **data: Any) -> Path:
    """A config that names two caches in a folder."""
    values = runs.settings(world, folder / "run")
    values["data"] |= {"latent_cache": str(folder / "latents"), "text_cache": str(folder / "text"), **data}
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def fill(config: Path, *flags: str) -> int:
    code = cache.main([str(config), "--device", "cpu", "--shard-size", "2", *flags])
    PartialState._reset_state()
    return code


def contents(folder: Path) -> dict[str, Any]:
    """All files of both caches; safetensors by their tensors, since their header's order is free, and the rest byte by byte."""
    found: dict[str, Any] = {}
    for name in ("latents", "text"):
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                key = path.relative_to(folder).as_posix()
                read = path.suffix == ".safetensors"
                found[key] = {k: v.float().tolist() for k, v in load_file(path).items()} if read else path.read_bytes()
    return found


@pytest.fixture(scope="module")
def filled(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    assert fill(config_file(world, folder)) == 0
    return folder


def test_what_is_written(filled: Path) -> None:
    names = list(contents(filled))
    assert [name for name in names if name.startswith("latents/")] == [
        "latents/cache.json",
        "latents/index.parquet",
        "latents/names.parquet",
        *(f"latents/shards/{number:06d}.safetensors" for number in range(5)),  # 9 samples
    ]
    description = json.loads((filled / "latents/cache.json").read_text())
    assert description["encoding"]["target_sizes"] == [list(runs.IMAGE_SIZE)]
    assert description["encoding"]["vae"]["scale_factor"] == 2
    assert description["made_of"]["shard_size"] == 2


def test_a_second_start_does_nothing(world: Path, filled: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()}
    assert fill(filled / "config.json") == 0
    output = capsys.readouterr().out
    assert f"0 samples encoded, {NUM_SAMPLES} were finished before" in output
    assert f"0 prompts encoded, {NUM_PROMPTS} were finished before" in output
    assert {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()} == before


def start(config: Path, processes: int = 1) -> list[ForkServerProcess]:
    arguments = (str(config), "--device", "cpu", "--shard-size", "2")
    return forks.start("preprocess/cache.py", *arguments, output=config.with_suffix(".log"), processes=processes)


def test_killed_twice_equals_uninterrupted(world: Path, filled: Path, tmp_path: Path) -> None:
    """SIGKILL once shards are there; each start goes on from whole shards, and none is written twice."""
    config, draw, kills = config_file(world, tmp_path), random.Random(0), 0
    for goal in (1, 3):
        (process,) = start(config)
        while process.exitcode is None and len(list(tmp_path.glob("latents/shards/*.safetensors"))) < goal:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.01)
        kills += process.exitcode is None
        process.kill()
        process.join()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("latents/shards/*.safetensors")}
    assert kills
    assert len(before) >= 3
    assert fill(config) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path) == contents(filled)


def test_two_processes_equal_one(world: Path, filled: Path, tmp_path: Path) -> None:
    codes = forks.wait(start(config_file(world, tmp_path), processes=2))
    output = (tmp_path / "config.log").read_text()
    assert codes == [0, 0], output[-3000:]
    assert sorted(re.findall(r"process \d of 2: (\d+) samples encoded", output)) == ["4", "5"]
    assert contents(tmp_path) == contents(filled)


def test_added_samples_cost_only_their_shards(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def write(root: Path, count: int) -> Path:
        with DatasetWriter(root) as writer:
            for index in range(count):
                writer.add(runs._sample(index, "train", 1))
        return root

    write(tmp_path / "data", 5)
    config = config_file(world, tmp_path, root=str(tmp_path / "data"))
    assert fill(config) == 0
    (tmp_path / "data").rename(tmp_path / "old")
    write(tmp_path / "data", 8)
    capsys.readouterr()
    assert fill(config) == 0
    assert "4 samples encoded, 4 were finished before" in capsys.readouterr().out  # the fifth was alone in its shard
    damaged = tmp_path / "latents/shards/000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert fill(config) == 0
    assert "2 samples encoded, 6 were finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "data.latent_cache=null", "--set", "data.text_cache=null"], "nothing to cache: name a folder with --set"),
        (["--shard-size", "0"], "--shard-size must be at least 1, got 0"),
        (["--shard-size", "3"], "made_of.shard_size was 2 and is now 3. Name another folder"),
        (["--set", "model.text_length=4"], "holds a cache that was made otherwise: encoding.text_length was 8 and is now 4"),
        (["--set", "data.reference_size=8"], "encoding.reference_size was 12 and is now 8"),
        (["--set", "data.split=no"], 'has no sample of the split "no"'),
        (["--set", "data.text_cache=mosaic"], "mosaic: must be a new or empty folder, or a cache"),
        (["--set", "data.latent_cache=README.md"], "data.latent_cache: must be a folder, but README.md is a file."),
        (["--set", "model.pretrained=no/such/place/x"], "no such folder, and not a hub id"),
        (["--device", "tpu3"], "--device tpu3: cannot be used here"),
    ],
)
def test_mistakes_are_one_line(filled: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str) -> None:
    before = contents(filled)
    assert fill(filled / "config.json", *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert contents(filled) == before


def test_one_cache_alone(world: Path, filled: Path, tmp_path: Path) -> None:
    """Its encoders only are loaded; the files are those of both."""
    config = config_file(world, tmp_path)
    assert fill(config, "--set", "data.latent_cache=null") == 0
    assert not (tmp_path / "latents").exists()
    assert fill(config, "--set", "data.text_cache=null") == 0
    assert contents(tmp_path) == contents(filled)
