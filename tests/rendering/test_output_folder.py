"""The output folder of a run: why a file could not be written is told, and nothing of the user's is replaced, removed or written through."""

import errno
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import inference
from mosaic.rendering import outputs, rendering
from mosaic.rendering.cases.reading import Case
from mosaic.rendering.folder import check_own
from mosaic.rendering.recipes import PictureJob
from mosaic.rendering.start import Start
from tests import forks, runs
from tests.recipes import make_recipe

NAMES = [f"case_{index:03d}" for index in range(3)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_world(tmp_path_factory.mktemp("world"))
    (folder / "cases.json").write_text(json.dumps([{"prompt": name, "image_paths": ["reference_0.png"]} for name in NAMES]))
    (folder / "config.json").write_text(json.dumps(runs.settings(folder, folder / "unused")))
    return folder


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey pictures at once: what is written of them is the point."""

    def grey(jobs: Sequence[PictureJob], *_: Any) -> tuple[list[Image.Image], list[None]]:
        return [Image.new("RGB", (16, 16), "grey") for _ in jobs], [None] * len(jobs)

    monkeypatch.setattr(Start, "load", lambda *_: None)
    monkeypatch.setattr(rendering, "sample", grey)


def render(world: Path, output: Path, *more: str) -> int:
    return inference.main(["--config", str(world / "config.json"), "--output-dir", str(output), *more])


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


# ---- why a file could not be written


@pytest.mark.parametrize(
    ("error", "words", "goes_on"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device", False),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded", False),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system", False),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied", True),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "File too large", True),
        (MemoryError(), "MemoryError", True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory. Tried to allocate 2 GiB", True),
    ],
)
def test_the_true_reason_is_told(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    words: str,
    goes_on: bool,
) -> None:
    save, add = rendering.save_picture, outputs.Journal.add
    full = False

    def saving(image: Image.Image, path: Path, *text: Any) -> Path:
        nonlocal full
        full = full or NAMES[1] in path.name
        if NAMES[1] in path.name:
            raise error
        return save(image, path, *text)

    def adding(journal: outputs.Journal, job: PictureJob, **values: Any) -> None:
        if full and isinstance(error, OSError):
            raise error
        add(journal, job, **values)

    monkeypatch.setattr(rendering, "save_picture", saving)
    monkeypatch.setattr(outputs.Journal, "add", adding)
    assert render(world, tmp_path) == 1
    found = errors(capsys)
    assert found[0].startswith(f"{world / 'cases.json'}[1] (case_001): ")
    assert words in found[0]
    assert (f"cannot be written to {tmp_path} (" in found[0]) == isinstance(error, OSError)
    if not goes_on:
        assert found[1].endswith(f"[2] (case_002): not begun, since {tmp_path} takes no more files. Start again when this is mended.")
    monkeypatch.undo()


def test_a_manifest_that_cannot_be_written_loses_no_reason(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        for place, name in ((rendering, "save_picture"), (outputs, "write_text"), (outputs, "save_picture")):
            patched.setattr(place, name, full)
        assert render(world, tmp_path) == 1
    found = errors(capsys)
    assert [line.split(" (")[0] for line in found[:3]] == [f"{world / 'cases.json'}[{number}]" for number in range(3)]
    assert "No space left on device" in found[0]
    assert f"{tmp_path}: the manifest could not be written (OSError: [Errno 28] No space left on device). Start again" in found[3]
    assert not any("its process ended" in line for line in found)
    assert render(world, tmp_path) == 0
    assert [json.loads(line)["name"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()] == NAMES
    assert not list(tmp_path.glob(".*"))


def test_a_picture_of_which_nothing_is_known_says_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendering, "write_picture", lambda *_: None)
    assert render(world, tmp_path) == 1
    assert errors(capsys)[0].endswith("(case_000): its process ended before the picture was made.")


def killed_on_the_way(rank: str, *arguments: str) -> int:
    """A process of two, of which one kills itself as the system does when memory is full; runs in a fork."""

    def grey(jobs: Sequence[PictureJob], *_: Any) -> tuple[list[Image.Image], list[None]]:
        if os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return [Image.new("RGB", (16, 16), "grey") for _ in jobs], [None] * len(jobs)

    Start.load, rendering.sample = (lambda *_: None), grey  # type: ignore[assignment,method-assign]
    return inference.main(list(arguments))


def test_where_another_process_is_killed_the_rest_is_told_and_kept(world: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(world / "config.json"), "--output-dir", str(tmp_path / "out")]
    printed = tmp_path / "log"
    codes = forks.wait(forks.start_ranks(killed_on_the_way, "1", *arguments, output=printed, processes=2))
    assert codes == [1, -signal.SIGKILL], printed.read_text()[-3000:]
    text = printed.read_text()
    assert "error: another process has ended before its pictures were made (" in text
    assert "(case_001): its process ended before the picture was made." in text
    assert "Traceback" not in text
    rows = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["case_000", "case_002"]


# ---- what is the user's


def of_the_user(path: Path) -> None:
    path.write_bytes(b"mine")


def a_picture(path: Path) -> None:
    Image.new("RGB", (3, 3), "red").save(path)


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def a_link_to_a_file(path: Path) -> None:
    (path.parent / "target").write_text("mine")
    path.symlink_to("target")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "put", "with_report"),
    [
        ("case_000.png", of_the_user, False),
        ("case_001.png", a_picture, False),
        ("case_001.png", a_link_to_nothing, False),
        ("case_001.png", a_link_to_a_file, False),
        ("case_001.png", a_pipe, False),
        ("case_002_panel.png", a_picture, False),
        ("case_002_panel.png", a_folder, False),
        ("overview.png", a_picture, False),
        ("overview.png", of_the_user, False),
        ("manifest.jsonl", of_the_user, False),
        ("manifest.jsonl", a_folder, False),
        (".journal_0.jsonl", of_the_user, False),
        (".journal_0.jsonl", a_link_to_a_file, False),
        ("case_000_attention.png", a_picture, True),
        ("case_000_report.html", of_the_user, True),
        ("report.html", of_the_user, True),
    ],
)
def test_it_is_refused_before_the_model_loads(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    put: Callable[[Path], None],
    with_report: bool,
) -> None:
    monkeypatch.setattr(Start, "load", lambda *_: pytest.fail("the model is loaded"))
    put(tmp_path / name)
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    for more in ([], ["--check"]):
        assert render(world, tmp_path, *["--report"] * with_report, *more) == 2
        (error,) = errors(capsys)
        assert error.startswith(f"inference.output_dir: {tmp_path / name} would be replaced, but it is ")
        assert error.endswith("Move it away, or name another folder.")
    assert {path: path.lstat()[:2] for path in tmp_path.rglob("*")} == {path: status[:2] for path, status in before.items()}


def test_a_journal_is_not_written_through_a_link(tmp_path: Path) -> None:
    """One that comes after the look."""
    journal, job = outputs.Journal(tmp_path / "out", 0), PictureJob("a", Case(0, "a cat", ()), make_recipe("a"))
    of_the_user(tmp_path / "target")
    journal.path.symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        journal.add(job, seconds=1)
    journal.add_failure(job, "no picture")
    assert journal.failures == {("a", job.recipe.digest): "no picture"}
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_what_a_run_does_not_write_stays(world: Path, tmp_path: Path) -> None:
    mine = ["overview_1.png", "overview_17.png", "report.html", "case_000_report.html", ".journal_notes.jsonl", "overview_x.png"]
    for name in mine:
        of_the_user(tmp_path / name)
    a_picture(tmp_path / "case_001_attention.png")
    picture = (tmp_path / "case_001_attention.png").read_bytes()
    for seed in ("1", "2"):
        assert render(world, tmp_path, "--seed", seed) == 0
    assert {(tmp_path / name).read_bytes() for name in mine} == {b"mine"}
    assert (tmp_path / "case_001_attention.png").read_bytes() == picture


def test_what_an_earlier_run_has_written_is_replaced_damaged_or_old(world: Path, tmp_path: Path) -> None:
    assert render(world, tmp_path) == 0
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    Image.open(tmp_path / "overview.png").save(tmp_path / "overview.png")  # earlier versions put no text into it
    (tmp_path / "case_000.png").write_bytes(whole["case_000.png"][:300])
    (tmp_path / "case_001_panel.png").write_bytes(b"")
    (tmp_path / ".journal_0.jsonl").write_text('\n{"na')
    target = tmp_path.parent / "elsewhere.png"
    (tmp_path / "case_002.png").rename(target)
    (tmp_path / "case_002.png").symlink_to(target)
    os.link(tmp_path / "case_002_panel.png", tmp_path.parent / "hard.png")
    assert render(world, tmp_path, "--seed", "9") == 0
    assert {path.name for path in tmp_path.iterdir()} == whole.keys()
    assert target.read_bytes() == whole["case_002.png"]
    assert (tmp_path.parent / "hard.png").read_bytes() == whole["case_002_panel.png"]
    assert not (tmp_path / "case_002.png").is_symlink()
    check_own(tmp_path, NAMES, with_report=True)


def test_a_sheet_that_takes_a_users_name_at_the_end_is_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a picture fails, fewer sheets are written, of other names than those that were looked at."""
    from mosaic.rendering import folder

    monkeypatch.setattr(folder, "PANELS_PER_SHEET", 2)
    monkeypatch.setattr(outputs, "PANELS_PER_SHEET", 2)
    of_the_user(tmp_path / "overview.png")
    read = rendering.read_references

    def fail(job: PictureJob, pictures: Any) -> Any:
        if job.name == NAMES[1]:
            raise ValueError("bad")
        return read(job, pictures)

    monkeypatch.setattr(rendering, "read_references", fail)
    assert render(world, tmp_path) == 1
    assert any("overview.png would be replaced, but it is no contact sheet of ours: move it away" in error for error in errors(capsys))
    assert (tmp_path / "overview.png").read_bytes() == b"mine"
