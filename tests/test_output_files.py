"""Files that are written: places that cannot hold them are refused by name, and what was there stays until the new file is whole."""

import os
from pathlib import Path

import pytest

from mosaic.files import require_file, require_folder, write_text


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
