"""The frame of the commands: who is told what, and the exit code."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from mosaic.commands import GOES_ON, command, importing
from mosaic.files import parse_json, require_file
from mosaic.method.grids import token_grid

ROOT = Path(__file__).resolve().parents[1]


def run(main: Callable[[list[str] | None], int | None]) -> int:
    return command(GOES_ON)(main)(None)


def raises(error: BaseException) -> Callable[[list[str] | None], None]:
    def main(_: list[str] | None) -> None:
        raise error

    return main


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_a_code_goes_through(given: int | None, code: int) -> None:
    assert run(lambda _: given) == code


MEANT: dict[str, tuple[Callable[[], object], str]] = {
    "our raise": (lambda: token_grid(16, 18, 4, where="data.image_size"), "data.image_size: height and width must be positive multiples"),
    "our raise from another": (lambda: parse_json("{", "here"), "here: not valid JSON: line 1, column 2"),
    "our raise below": (lambda: require_file(Path("/"), "--json"), "--json: must be a file, but / is a folder."),
    "the machine": (lambda: open("/nowhere/x"), "[Errno 2] No such file or directory: '/nowhere/x'"),  # noqa: SIM115
    "memory": (lambda: bytes(2**62), "the machine's memory is full (MemoryError)."),
    "a process": (lambda: raises(BrokenProcessPool("gone"))(None), "a process of this command was ended, most likely by the system"),
    "PyTorch's memory": (lambda: torch.empty(2**60), "the device's memory is full: "),
}


@pytest.mark.parametrize("kind", MEANT)
def test_what_users_can_mend_is_one_whole_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    action, text = MEANT[kind]
    assert run(lambda _: action() and None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {text}")


def test_lines_are_folded_and_control_letters_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raises(OSError("a first line\n  and a second\x1b[2J\u202e one.\n.\n"))) == 2
    assert capsys.readouterr().err == "error: a first line and a second?[2J? one. .\n"


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "a library's": (lambda: torch.zeros(2).view(3), "RuntimeError: "),
    "an expression of ours": (lambda: sum([1, 2] for _ in "x"), "TypeError: "),
    "a ValueError without raise": (lambda: int("many"), "ValueError: invalid literal for int() with base 10: 'many'"),
    "a ValueError in a library": (lambda: torch.utils.data.DataLoader([], batch_size=-1), "ValueError: batch_size should be"),
    "a ValueError of somebody else": (lambda: raises(ValueError("raised in a test"))(None), "ValueError: raised in a test"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_ours_has_its_traceback_and_the_place_to_report_it(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    action, text = FAULTS[kind]
    assert run(lambda _: action() and None) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2].startswith(f"error: {text}")
    assert lines[-1].startswith(
        'This is a fault of the program. Please report it, with all the lines above, as CONTRIBUTING.md says under "'
    )
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[-1]
    assert "## Report a fault" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_process_is_named_where_there_are_several(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run(raises(OSError(errno.ENOSPC, "No space left on device"))) == 2
    assert capsys.readouterr().err == "error: process 3: [Errno 28] No space left on device\n"


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from here\n"


@pytest.mark.parametrize("moment", ["importing", "working"])
def test_ctrl_c_in_a_process(tmp_path: Path, moment: str) -> None:
    """While a command imports what comes after the frame, and at work."""
    waits = 'print("ready", flush=True); time.sleep(30)'
    program = (
        f"import time\nfrom mosaic.commands import *\n{waits}"
        if moment == "importing"
        else (f"import sys, time\nfrom mosaic.commands import *\n@command(NOTHING)\ndef main(argv=None):\n    {waits}\nsys.exit(main())")
    )
    with subprocess.Popen(
        # a process started in the background ignores Ctrl-C, and so would its children
        [sys.executable, "-c", f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{program}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert process.stderr.read() == ("interrupted\n" if moment == "importing" else "interrupted: nothing was written\n")


def test_the_garbage_collector_waits_for_imports() -> None:
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
    gc.enable()
