"""One writer per folder: what a second run is told, that it touches nothing, and what becomes of the lock."""

import os
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

import inference
from mosaic.data import DatasetWriter, Manifest
from mosaic.locks import FolderLock, new_folder
from mosaic.training.checkpoints.checkpoint import folder_of
from mosaic.training.starting import choose_checkpoint
from preprocess import cache, compose, convert, match, push
from scripts import make_pocket_world
from scripts.pocket.dataset import write_dataset, write_folders
from tests import forks
from tests.runs import files_below

POCKET = str(forks.ROOT / "configs/pocket.json")


def hold(root: Path) -> None:
    FolderLock(root / "new", "folder", beside=True).acquire()
    FolderLock(root / "run", "training.output_dir").acquire()
    print("held", flush=True)
    time.sleep(600)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample folders `folders`, and a data set `data` of one sample."""
    root = tmp_path_factory.mktemp("pictures")
    write_folders(root / "folders", 4, 1, 0, 64, 32)
    write_dataset(root / "data", 2, 0, 1, 0)
    return root


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ForkServerProcess]]:
    """A folder in which another process writes `new` and `run`, and that process."""
    root, log = tmp_path_factory.mktemp("held"), tmp_path_factory.mktemp("log") / "log"
    (other,) = forks.start_ranks(hold, root, output=log, processes=1)
    while not log.exists() or log.read_text() != "held\n":
        assert other.exitcode is None, log.read_text()
        time.sleep(0.01)
    yield root, other
    other.kill()
    other.join()


def commands(pictures: Path, root: Path) -> dict[str, tuple[object, list[str], str]]:
    """Of every command that writes a folder: its main function, its arguments, and what names the folder."""
    new, run, data = str(root / "new"), str(root / "run"), str(pictures / "data")
    return {
        "convert": (convert.main, ["folder", str(pictures / "folders"), new], "folder"),
        "compose": (compose.main, [data, new, "--num-samples", "1", "--references", "2"], "folder"),
        "push": (push.main, [data, "--to", new, "--license", "mit"], "folder"),
        "match": (match.main, ["--data", data, "--output", run, "--extractors", "pixels", "--device", "cpu"], "--output"),
        "cache": (cache.main, [POCKET, "--set", f"data.latent_cache={run}"], "data.latent_cache"),
        "inference": (inference.main, ["--cases", str(forks.ROOT / "example_cases.json"), "--output-dir", run], "inference.output_dir"),
    }


@pytest.mark.parametrize("name", ["convert", "compose", "push", "match", "cache", "inference"])
def test_a_second_run_is_refused_in_one_line(
    name: str, pictures: Path, held: tuple[Path, ForkServerProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    root, other = held
    before = files_below(root)
    command, arguments, setting = commands(pictures, root)[name]
    assert command(arguments) == 2
    folder = root / ("new" if setting == "folder" else "run")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{setting}: {folder} is in use by another run (host " in line
    assert f", process {other.pid}). Wait for its end or stop it, or choose another {setting}." in line
    assert files_below(root) == before


def test_a_new_pocket_world_is_refused(held: tuple[Path, ForkServerProcess], capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--folders"]):
        assert make_pocket_world.main(["--output", str(held[0] / "new"), "--num-samples", "1", *more]) == 2
        assert f"{held[0] / 'new'} is in use by another run" in capsys.readouterr().err


def test_training_looks_once_it_has_locked(held: tuple[Path, ForkServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FolderLock(held[0] / "run", "training.output_dir") as lock, pytest.raises(ValueError, match="is in use by another run"):
        choose_checkpoint(None, held[0] / "run", lock)
    acquire = FolderLock.acquire

    def late(lock: FolderLock) -> None:  # another run has begun and ended after this one found no folder
        folder_of(tmp_path / "run/checkpoints", 7).mkdir(parents=True)
        acquire(lock)

    monkeypatch.setattr(FolderLock, "acquire", late)
    earlier = "holds checkpoints of an earlier run, up to step_00000007"
    with FolderLock(tmp_path / "run", "training.output_dir") as lock, pytest.raises(ValueError, match=earlier):
        choose_checkpoint(None, tmp_path / "run", lock)


def test_two_conversions_at_once(pictures: Path, tmp_path: Path) -> None:
    """One of them is whole; the other one is refused, be it while the first one writes or after that."""
    started = [
        forks.start("preprocess/convert.py", "folder", str(pictures / "folders"), str(tmp_path / "out"), output=tmp_path / f"log_{number}")
        for number in range(2)
    ]
    assert sorted(forks.wait([process for (process,) in started])) == [0, 2]
    refusal = "".join(path.read_text() for path in sorted(tmp_path.glob("log_*")) if "error:" in path.read_text())
    assert "out is in use by another run" in refusal or "out: exists already" in refusal
    assert len(Manifest(tmp_path / "out", "train")) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out", "log_0", "log_1"}


def test_a_folder_made_while_the_lock_was_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = FolderLock.acquire

    def late(lock: FolderLock) -> None:  # another process has begun and ended after this one found no folder
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("x")
        acquire(lock)

    monkeypatch.setattr(FolderLock, "acquire", late)
    with pytest.raises(FileExistsError, match="exists already"), DatasetWriter(tmp_path / "out"):
        pytest.fail("the folder is another one's")
    assert files_below(tmp_path) == {"out/theirs": b"x"}


def test_what_becomes_of_the_lock(tmp_path: Path) -> None:
    """Its file goes with it, and the folders that were made for it; one that a kill left locks nobody out, a link is not followed."""
    lock = FolderLock(tmp_path / "a/b", "x")
    with lock:
        lock.acquire()
        lock.acquire()
        assert f"process {os.getpid()}" in (tmp_path / "a/b/.lock").read_text()
    assert not (tmp_path / "a").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/.lock").write_text("host gone, process 1\n")
    with FolderLock(tmp_path / "kept", "x") as lock:
        lock.acquire()
    assert list((tmp_path / "kept").iterdir()) == []
    (tmp_path / "kept/.lock").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_text("mine")
    with FolderLock(tmp_path / "kept", "x") as lock, pytest.raises(OSError, match=r"\.lock"):
        lock.acquire()
    assert (tmp_path / "victim").read_text() == "mine"
    with pytest.raises(ValueError, match="x: must be a folder, but .*victim is a file"), new_folder(tmp_path / "victim/new", "x"):
        pytest.fail("nothing can be made there")


def test_a_lock_that_is_given_back_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was locked then is a file without a name, which would lock nobody out."""
    lock, take = FolderLock(tmp_path, "x"), FolderLock._lock
    removed = []

    def slow(lock: FolderLock, file: int) -> bool:
        if not removed:
            removed.append(lock.path.unlink())
        return take(lock, file)

    monkeypatch.setattr(FolderLock, "_lock", slow)
    with lock:
        lock.acquire()
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with FolderLock(tmp_path, "x") as lock:
        lock.acquire()
    assert "this file system has no locks" in caplog.text
    assert list(tmp_path.iterdir()) == []
