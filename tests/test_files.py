"""Files that are written: places that cannot hold them are refused by name, and what was there stays until the new file is whole."""

import os
import re
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mosaic import files
from mosaic.files import move, recover, remove_folder, replacing, require_file, require_folder, save_tensors, write_text
from mosaic.lora.files import write_tensors


def test_places_that_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "a/b", Path("c/d"), Path()):
        require_folder(folder, "--x")
    require_file(None, "--x")
    require_file(tmp_path / "a/b.json", "--x")
    require_file(Path("b.json"), "--x")
    assert not list(tmp_path.iterdir())


def test_places_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, message in (
        (tmp_path / "file", "file is a file. Name another"),
        (tmp_path / "file/a/b", r"b would lie below the file .*file\."),
    ):
        with pytest.raises(ValueError, match=f"--x: must be a folder, but .*{message}"):
            require_folder(folder, "--x")
    with pytest.raises(ValueError, match="link is a file"):
        require_folder(tmp_path / "link", "--x")
    with pytest.raises(ValueError, match="--x: must be a file, but .* is a folder. Name a file in it"):
        require_file(tmp_path, "--x")
    with pytest.raises(ValueError, match=r"--x: the place of .*page\.html: must be a folder, but .*file is a file"):
        require_file(tmp_path / "file/page.html", "--x")
    with pytest.raises(ValueError, match="--x: must be an ordinary file, but /dev/null is none"):
        require_file(Path("/dev/null"), "--x")


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(ValueError, match=f"must be a folder that can be written to, but {tmp_path} cannot"):
        require_file(tmp_path / "a/b.json", "--x")


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep/a.txt"
    write_text(path, "ä")
    assert path.read_text(encoding="utf-8") == "ä"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "ä"
    assert [path.name for path in path.parent.iterdir()] == ["a.txt"]


def test_what_fails_halfway_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/old").write_text("old")

    def write(text: str, error: type[Exception] | None) -> None:
        with replacing(tmp_path / "set") as aside:
            assert not aside.exists()
            aside.mkdir()
            (aside / "new").write_text(text)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt)
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "old"]
    write("whole", None)
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "new"]
    assert (tmp_path / "set/new").read_text() == "whole"


@pytest.mark.parametrize("limit", [files.FLUSHED_ONE_BY_ONE, 1])
def test_all_is_flushed_before_the_name_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    done: list[str] = []
    names: dict[int, str] = {}
    real_open, real_replace = os.open, os.replace

    def opened(path: Path, flags: int) -> int:
        descriptor = real_open(path, flags)
        names[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(files, "FLUSHED_ONE_BY_ONE", limit)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(names[descriptor]))
    monkeypatch.setattr(os, "sync", lambda: done.append("all"))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), real_replace(a, b)))
    with replacing(tmp_path / "set") as aside:
        (aside / "deep").mkdir(parents=True)
        (aside / "deep/file").write_text("x")
    before = ["all"] if limit == 1 else ["file", "deep", ".set.partial"]
    assert done == [*before, "renamed", tmp_path.name]


def test_what_a_kill_leaves_is_put_back_or_removed(tmp_path: Path) -> None:
    for name in (".a.replaced", ".b.replaced", "b", ".c.partial", ".c.removed", ".other.partial"):
        (tmp_path / name).mkdir()
    recover(tmp_path, "[abc]")
    recover(tmp_path / "none", "*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial", "a", "b"]
    remove_folder(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial", "b"]


def test_a_move_is_flushed_in_both_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[Path, bool]] = []
    source, target = tmp_path / "a/file", tmp_path / "b/file"
    for folder in (source.parent, target.parent):
        folder.mkdir()
    source.write_text("x")
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path, target.exists() and not source.exists())))
    move(source, target)
    assert target.read_text() == "x"
    assert sorted(flushed) == [(source.parent, True), (target.parent, True)]
    flushed.clear()
    source, target = target, tmp_path / "b/other"
    move(source, target)
    assert flushed == [(tmp_path / "b", True)]


@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_a_link_at_a_hidden_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    (mine / "folder").mkdir()
    for name in ("a.txt", "set"):
        (tmp_path / f".{name}.partial").symlink_to(mine / target)
        (tmp_path / f".{name}.replaced").symlink_to(mine / target)
    (tmp_path / "set").mkdir()
    write_text(tmp_path / "a.txt", "new")
    with replacing(tmp_path / "set") as aside:
        aside.mkdir(exist_ok=True)
        (aside / "file").write_text("new")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "set/file").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()
    assert not (tmp_path / "set").is_symlink()
    assert sorted(path.name for path in mine.rglob("*")) == ["file", "folder"]
    assert (mine / "file").read_text() == "mine"
    # One that cannot be removed, or that comes between the look and the writing, is refused.
    link = tmp_path / ".b.txt.partial"
    link.symlink_to(mine / target)
    with monkeypatch.context() as patched:
        patched.setattr(files, "_delete", lambda _: None)
        with pytest.raises(FileExistsError, match=r"\.b\.txt\.partial: is in the way of .*b\.txt, .* Move it away"):
            write_text(tmp_path / "b.txt", "new")
        patched.setattr(os.path, "lexists", lambda _: False)
        with pytest.raises(FileExistsError):
            write_text(tmp_path / "b.txt", "new")
    assert not (mine / "nowhere").exists()
    assert (mine / "file").read_text() == "mine"


def test_two_processes_at_once_leave_one_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    with replacing(path, shared=True) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with replacing(path, shared=True) as other:
            other.write_text("other")
    assert path.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_only_one_place_renames() -> None:
    root = Path(files.__file__).parents[1]
    calls = re.compile(r"\bos\.(replace|renames?)\(|\.rename\(|\bshutil\.move\(|from (os|shutil) import .*\b(replace|renames?|move)\b")
    paths = [path for room in ("mosaic", "scripts", "preprocess") for path in (root / room).rglob("*.py")]
    assert [str(path.relative_to(root)) for path in paths if calls.search(path.read_text())] == ["mosaic/files.py"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, mask: int) -> None:
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2)}
    before = os.umask(mask)
    try:
        save_tensors(tensors, tmp_path / "plain.safetensors")
        write_tensors(tensors, tmp_path / "lora.safetensors", {"key": "text"})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name
        assert all(torch.equal(found, tensors[name]) for name, found in load_file(path).items())
        assert load_file(path).keys() == tensors.keys()
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "key": "text"}
    with safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        assert file.metadata() is None


def test_an_error_in_one_line() -> None:
    error = ValueError("the first line,\n  and another")
    assert files.in_one_line(error) == "the first line, and another"
    assert files.in_one_line(error, 9) == "the first"
    assert files.in_one_line('got "  "') == 'got "  "'
    assert files.in_one_line(error, 20, with_kind=True) == "ValueError: the firs"
    assert files.in_one_line(ValueError()) == "ValueError"
