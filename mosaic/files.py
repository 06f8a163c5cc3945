"""Files that are written: their places are checked before long work, and a kill or a power cut leaves the old file or the new one."""

import os
from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def flush(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file aside, flush it, then rename it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in place, with the permissions that any new file gets there; safetensors by itself leaves them to the owner alone.

    Raises:
        OSError, SafetensorError: It cannot be written.
    """
    from safetensors.torch import save_file  # and torch, which most users of this file do without

    path.touch()
    mode = S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    if S_IMODE(path.stat().st_mode) != mode:  # where a file system knows no permissions they do not differ
        os.chmod(path, mode)
