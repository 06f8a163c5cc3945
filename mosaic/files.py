"""JSON and text read with errors that say where. What is written is checked before long work, and a kill leaves the old file or the new."""

import difflib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_TEXT = 2**30  # bytes of a text file that is read as a whole; the longest are lists of the pictures of a data set
FLUSHED_ONE_BY_ONE = 100  # files of a folder; a data set of a million is flushed with all else that the system has to write
_LEADS_OUT = re.compile(r"^/|(^|/)\.\.(/|$)|\\|^[^/]*:")  # absolute, "..", a Windows separator or drive, a URL


def require_folder(folder: Path, name: str) -> None:
    """Check that files can be written into a folder, which may not be there yet.

    Args:
        folder: The folder.
        name: Of the setting or the flag that names it, for the message.

    Raises:
        ValueError: It or a part of the path to it is a file, or nothing can be written there.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        where = f"{place} is a file" if place == folder else f"{folder} would lie below the file {place}"
        raise ValueError(f"{name}: must be a folder, but {where}. Name another, or move the file away.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: must be a folder that can be written to, but {place} cannot. Name another.")


def require_file(path: Path | None, name: str) -> None:
    """Check that a file can be written, if one is asked for; its folder may not be there yet.

    Raises:
        ValueError: There is a folder or a device in its place, or the folder it lies in will not do (`require_folder`).
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name}: must be a file, but {path} is a folder. Name a file in it.")
    if path.exists() and not path.is_file():  # it would be replaced
        raise ValueError(f"{name}: must be an ordinary file, but {path} is none. Name another.")
    require_folder(path.parent, f"{name}: the place of {path}")


def relative_path(path: object, place: str, folder: str = "the data set's folder") -> str:
    """Check a path that a file states: it must name something below a folder, by its letters alone.

    Args:
        path: The path, of any type.
        place: Where it stands, for the message.
        folder: What it must be relative to, for the message.

    Returns:
        The path.

    Raises:
        ValueError: It is no text, empty, absolute, or holds "..", a backslash, a NUL or a ":" in its first part.
    """
    if not isinstance(path, str) or not path or "\x00" in path:
        raise ValueError(f"{place}: must be a path, got {shown(path)}.")
    if _LEADS_OUT.search(path):
        raise ValueError(f'{place}: must be relative to {folder}, with "/" and without "..", got {shown(path)}.')
    return path


def path_below(root: Path, relative: str, place: str, folder: str = "the data set's folder") -> Path:
    """Resolve a path that a file states; it may not be there yet.

    Args:
        root: The folder that it may not leave.
        relative: The path, as `relative_path` takes it.
        place: Where it stands, for the message.
        folder: What `root` is, for the message.

    Raises:
        ValueError: As `relative_path`, or a symbolic link leads out of the folder.
    """
    path = (root / relative_path(relative, place, folder)).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{place}: must stay in {folder}, but {relative} leads to {path}.")
    return path


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Write a file or a folder aside; when the context ends without an error it is flushed, then takes the place of what is at `path`.

    So a kill, a full disk or a power cut leaves the old one or the new one. The folder that it lies in is made.

    Args:
        path: The file or folder in the end.
        shared: Several processes may write it at once, each its own; the last one stays.

    Yields:
        Where to write it: a hidden name beside `path` at which there is nothing yet.

    Raises:
        FileExistsError: What is at the hidden name cannot be removed; a link there would be written through.
    """
    aside = _beside(path, f"{os.getpid()}.partial" if shared else "partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete(aside)  # what a killed process has left
    if os.path.lexists(aside):
        raise FileExistsError(f"{aside}: is in the way of {path}, which is written there first, and cannot be removed. Move it away.")
    try:
        yield aside
        _flush_all(aside)
        replaced = _beside(path, "replaced")
        if aside.is_dir() and path.is_dir():  # a folder with files in it cannot be renamed over; `recover` puts the old one back
            _delete(replaced)  # what a killed process has left when the new one was already in place
            os.replace(path, replaced)
        os.replace(aside, path)
        flush(path.parent)
        _delete(replaced)
    finally:
        _delete(aside)


def move(source: Path, target: Path) -> None:
    """Give a whole file or folder another name on the same disk; the change of names is flushed."""
    os.replace(source, target)
    for folder in {source.parent, target.parent}:
        flush(folder)


def recover(folder: Path, pattern: str) -> None:
    """Remove what killed processes have left of `replacing` and `remove_folder`, and put back what a kill left without a successor.

    Args:
        folder: The folder, which may not be there.
        pattern: Of the names that were to be written, such as "step_*".
    """
    for replaced in folder.glob(f".{pattern}.replaced"):
        path = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not path.exists():
            os.replace(replaced, path)
    for left in ("partial", "replaced", "removed"):
        for path in folder.glob(f".{pattern}.{left}"):
            _delete(path)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it; its name is gone at once, so that a kill leaves no half of it there."""
    removed = _beside(path, "removed")
    os.replace(path, removed)
    _delete(removed)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _delete(path: Path) -> None:
    """Delete a file or a folder if it is there and can be deleted; an error that led here is the one to be told."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _flush_all(path: Path) -> None:
    """Have the system write a file, or a folder with all that is in it, to the disk."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    if len(paths) > FLUSHED_ONE_BY_ONE:
        os.sync()
        return
    for one in reversed(paths):
        flush(one)


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as aside, open(aside, "xb") as file:  # which follows no link that somebody puts there meanwhile
        file.write(content)


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in place, with the permissions that any new file gets there; safetensors by itself leaves them to the owner alone.

    Raises:
        OSError: It cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # and torch, which most users of this file do without

    path.touch()
    mode = S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # a full disk
        raise OSError(f"{path}: cannot be written ({error}).") from error
    if S_IMODE(path.stat().st_mode) != mode:  # where a file system knows no permissions they do not differ
        os.chmod(path, mode)


def read_text(path: str | Path) -> str:
    """Read a text file (UTF-8).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no ordinary file, has more than `MAX_TEXT` bytes, cannot be read, or is not UTF-8.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_TEXT:
            return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: file not found. Relative paths start at the current directory, {Path.cwd()}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be a UTF-8 text file, but byte {error.start} is not UTF-8.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path}: must be a JSON file, but it is a folder.")
    if not stat.S_ISREG(status.st_mode):  # it may have no end, and a pipe may wait for ever
        raise ValueError(f"{path}: must be an ordinary file, but it is a pipe, a socket or a device. Save the text to a file first.")
    raise ValueError(f"{path}: must be a text file of at most {MAX_TEXT >> 20} MiB, got {status.st_size >> 20} MiB.")


def read_json(path: str | Path) -> Any:
    """Read a JSON file (UTF-8), refusing duplicate keys.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, cannot be read, is not UTF-8 or not JSON; the message gives line and column.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, place: str) -> Any:
    """Parse JSON text, refusing duplicate keys.

    Args:
        text: The text.
        place: Where it comes from, for messages.

    Raises:
        ValueError: It is not JSON; the message gives line and column.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON: {error}.") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of key-value pairs; a key given twice is an error, since one of its values would be lost."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice in one object")
    return result


def json_line(values: Mapping[str, Any]) -> str:
    """Values as a line of JSON. Numbers that are not finite, which JSON does not know, become null."""
    return json.dumps(without_nan(values), ensure_ascii=False, allow_nan=False)


def without_nan(value: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: object) -> str:
    """Return a value as JSON on one line, shortened, for messages."""
    try:
        text = (
            json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
        )  # halves of surrogate pairs cannot be printed
    except RecursionError:
        return "a value nested too deeply to be shown"
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_one_line(error: BaseException | str, most: int | None = None, *, with_kind: bool = False) -> str:
    """Return an error's text on one line, for messages.

    Args:
        error: The error, or its text; an error without a text is named by its kind.
        most: Letters at most; None: all.
        with_kind: Begin with its kind, as "OSError: no space left".
    """
    text = f"{type(error).__name__}: {error}" if with_kind else f"{error}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:most] or type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" for the known name nearest to `word`, whatever its case, or "" when none is near."""
    folded = {name.casefold(): name for name in known}
    match = difflib.get_close_matches(word.casefold(), list(folded), n=1, cutoff=0.5)
    return f" Did you mean {folded[match[0]]}?" if match else ""


def first_difference(found: Any, wanted: Any, name: str = "") -> str:
    """Words for the first difference of two JSON values, "" if they are equal."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        texts = (first_difference(found.get(key), wanted.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return next((text for text in texts if text), "")
    return "" if found == wanted else f"{name or 'settings'} was {shown(found)} and is now {shown(wanted)}"
