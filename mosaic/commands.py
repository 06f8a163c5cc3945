"""The frame of every command: errors of users and of the machine in one line, our own with all that a report needs, Ctrl-C in a line."""

import functools
import gc
import os
import platform
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from importlib import metadata
from opcode import opmap
from pathlib import Path
from types import TracebackType

from mosaic.files import in_one_line

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(ROOT / name for name in ("mosaic", "scripts", "preprocess", "inference.py"))
USERS_ERROR, OUR_ERROR, INTERRUPTED = 2, os.EX_SOFTWARE, 130  # 128 + SIGINT, as shells have it
GOES_ON, NOTHING = "the same command goes on from here", "nothing was written"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
FULL = ("can't allocate memory", "not enough memory")  # what PyTorch says of a CPU's, in a RuntimeError

Main = Callable[[list[str] | None], int | None]


def command(kept: str) -> Callable[[Main], Callable[..., int]]:
    """Decorate the main function of a command: it then ends with an exit code, and with words for people.

    Exit code 2 and one line where users or the machine are at fault (`is_meant`), 70 and the traceback where it is we, 130 after Ctrl-C.

    Args:
        kept: What becomes of the work where it is interrupted, such as `GOES_ON`.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def framed(argv: list[str] | None = None) -> int:
            try:
                return main(argv) or 0
            except KeyboardInterrupt:
                if _rank() == 0:
                    print(f"interrupted: {kept}", file=sys.stderr)
                return INTERRUPTED
            except Exception as error:
                return tell(error)

        return framed

    return decorate


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries: the garbage collector, which would look through all that is loaded over and over, waits.

    That is an eighth of the time that diffusers takes.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def tell(error: Exception) -> int:
    """Print an error; returns the exit code that it ends a command with."""
    start = f"error: process {_rank()}: " if _rank() else "error: "
    if is_meant(error):
        print(f"{start}{printable(_words(error))}", file=sys.stderr)
        return USERS_ERROR
    traceback.print_exception(error)
    print(f"{start}{printable(in_one_line(error, with_kind=True))}", file=sys.stderr)
    print(
        'This is a fault of the program. Please report it, with all the lines above, as CONTRIBUTING.md says under "Report a fault". '
        f"Versions: {versions()}",
        file=sys.stderr,
    )
    return OUR_ERROR


def _rank() -> int:
    """The number of this process among those that were started together."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def is_meant(error: BaseException) -> bool:
    """Whether an error was made for users to read: one of the machine, or a ValueError or ImportError by a `raise` of this project.

    A ValueError out of a library or out of one of our own expressions is not: what it says makes no sense without its place.
    """
    if isinstance(error, OSError | MemoryError | BrokenExecutor) or _is_of_full_memory(error):  # a full disk, a hub that is not there
        return True
    return isinstance(error, ValueError | ImportError) and error.__traceback__ is not None and _ends_in_raise(error.__traceback__)


def _is_of_full_memory(error: BaseException) -> bool:
    """Also PyTorch's errors, without importing it."""
    return isinstance(error, RuntimeError) and (type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in FULL))


def _words(error: Exception) -> str:
    """The text of an error that is meant."""
    if isinstance(error, MemoryError):
        return f"the machine's memory is full ({in_one_line(error)})."
    if isinstance(error, BrokenExecutor):
        return f"a process of this command was ended, most likely by the system because the memory was full ({in_one_line(error)})"
    if _is_of_full_memory(error):
        return f"the device's memory is full: {in_one_line(error).partition('. ')[0].rstrip('.')}."
    return in_one_line(error)


def _ends_in_raise(trace: TracebackType) -> bool:
    """Whether the innermost statement of a traceback is a `raise` in one of our files; a call that fails within a library is none."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    file = Path(code.co_filename).resolve()
    return code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"] and any(file.is_relative_to(place) for place in OURS)


def printable(text: str) -> str:
    """Text without control letters, which names of files and keys may hold."""
    return "".join("?" if unicodedata.category(letter).startswith("C") else letter for letter in text)


def versions() -> str:
    """Python and the packages that matter, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _end_on_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C outside of a frame: a command is importing, or is about to end."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


sys.excepthook = _end_on_ctrl_c
