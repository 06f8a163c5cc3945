"""The folder of a data set: local, or any place that fsspec knows ("s3://bucket/set", "memory://set")."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.core import split_protocol, url_to_fs

from mosaic.data.handles import PerProcess
from mosaic.files import path_below, shown
from mosaic.images import MAX_FILE

DESCRIPTION, MANIFEST = "dataset.json", "manifest.parquet"
T = TypeVar("T")


class Folder:
    """Files below one root, read through fsspec. Picklable, and safe to use after a fork."""

    def __init__(self, root: str | Path) -> None:
        """Name the root; nothing is read.

        Args:
            root: Path of a folder, or a URL whose protocol fsspec knows.

        Raises:
            ValueError: fsspec does not know the protocol, or the package that serves it is not installed.
        """
        protocol, path = split_protocol(str(root))
        self.is_local = protocol in (None, "file", "local")
        self.root: str | Path = Path(path) if self.is_local else str(root).rstrip("/")
        self._filesystem = PerProcess(self._open_filesystem)
        try:
            self._filesystem.get()
        except (ValueError, ImportError) as error:
            raise ValueError(f"{root}: fsspec cannot serve this address ({error}).") from error

    def path(self, relative: str) -> str:
        """Return the address of a file, for messages and for fsspec."""
        return os.path.join(self.root, relative) if self.is_local else f"{self.root}/{relative}"

    def exists(self) -> bool:
        """Return whether the root is a folder."""
        return bool(self._filesystem.get().isdir(str(self.root)))

    def read(self, relative: str, place: str | None = None, max_bytes: int = MAX_FILE) -> bytes:
        """Return the content of a file.

        Args:
            relative: Path below the root, with "/" and without "..".
            place: Where the path comes from, for messages; None: from the format itself.
            max_bytes: A file with more is refused, and no more of it is read.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no regular file, cannot be read, is too large, or a symbolic link leads out of the root.
        """
        path = self._checked(relative, place or self.path(relative))
        if self.is_local:
            size = self._translated(lambda filesystem: filesystem.size(path), relative, place)
            self._require_size(size, max_bytes, relative, place)
            return self._translated(lambda filesystem: filesystem.cat_file(path), relative, place)
        data = self._translated(lambda filesystem: filesystem.cat_file(path, start=0, end=max_bytes + 1), relative, place)
        self._require_size(len(data), max_bytes, relative, place)
        return data

    def open(self, relative: str, place: str | None = None) -> BinaryIO:
        """Return a file open for reading at any place in it. Raises as `read`."""
        path = self._checked(relative, place or self.path(relative))
        return self._translated(lambda filesystem: filesystem.open(path, "rb"), relative, place)

    def names(self, relative: str) -> set[str]:
        """Return the names of the files in a folder below the root; none where there is no such folder."""
        try:
            found = self._filesystem.get().ls(self.path(relative), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {str(name).rstrip("/").rsplit("/", 1)[-1] for name in found}

    def local_path(self, relative: str, place: str) -> Path:
        """Return the resolved path of a file of a local data set.

        Raises:
            ValueError: The data set is not local, or a symbolic link leads out of the root.
        """
        if not self.is_local:
            raise ValueError(f"{place}: must be in a local folder, got {self.path(relative)}. Copy the data set to a disk first.")
        return path_below(Path(self.root), relative, place)

    def _checked(self, relative: str, place: str) -> str:
        """Return the address of a file; a local one must be a regular file within the root, since a pipe would block for ever."""
        if not self.is_local:
            return self.path(relative)
        try:
            path = self.local_path(relative, place)
            is_other = path.exists() and not path.is_file()
        except (OSError, RuntimeError) as error:  # a name that no file can have, or links in a circle
            reason = getattr(error, "strerror", None) or "links lead in a circle"
            raise ValueError(f"{place}: the file cannot be read ({reason}): {shown(relative)}.") from error
        if is_other:
            raise ValueError(f"{place}: must be a file, but it is a folder or a device: {self.path(relative)}.")
        return str(path)

    def _require_size(self, size: int, max_bytes: int, relative: str, place: str | None) -> None:
        if size > max_bytes:
            start = f"{place}: " if place else ""
            raise ValueError(f"{start}the file must have at most {max_bytes} bytes, got {size}: {self.path(relative)}.")

    def _translated(self, action: Callable[[Any], T], relative: str, place: str | None) -> T:
        """Run an action on the file system; its errors name the place and the file."""
        start, end = (f"{place}: ", f": {self.path(relative)}") if place else (f"{self.path(relative)}: ", "")
        try:
            return action(self._filesystem.get())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{start}file not found{end}.") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{start}the file cannot be read{end} ({error}).") from error

    def _open_filesystem(self) -> fsspec.AbstractFileSystem:
        return url_to_fs(str(self.root))[0]
