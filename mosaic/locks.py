"""One writer per folder: a lock that ends with its process, however that ends."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mosaic.files import replacing, require_folder

if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"


class FolderLock:
    """Context that holds the lock of a folder.

    It is a record lock of the operating system (also of NFS), not the existence of the file: it ends with the process that holds it,
    also where that is killed, and data loading processes that outlive it do not hold it. The file that a kill leaves locks nobody out.
    """

    def __init__(self, folder: Path, setting: str, *, beside: bool = False) -> None:
        """Name the folder; nothing is done yet.

        Args:
            folder: What one process at a time may write.
            setting: What names it, a setting or a flag, for the message.
            beside: Keep the lock beside the folder, which is to be made as a whole, and not in it.
        """
        self.folder, self.setting = folder, setting
        self.path = folder.with_name(f".{folder.name}{LOCK_FILE}") if beside else folder / LOCK_FILE
        self._file: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def acquire(self) -> None:
        """Take the lock, and make the folder that it is kept in; does nothing where it is held already.

        Raises:
            ValueError: Another process holds it, or there is a file in its place or a folder that cannot be written; nothing has been
                touched.
            OSError: The lock cannot be written.
        """
        if self._file is not None:
            return
        home = self.path.parent
        require_folder(home, self.setting)
        self._made += [path for path in (home, *home.parents) if not path.exists()]
        while True:
            home.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:  # the one that held it has just removed the folder that it had made
                continue
            if not self._lock(file):
                return
            if os.fstat(file).st_nlink:
                break
            os.close(file)  # the one that held it has removed the file since it was opened
        self._file = file
        with suppress(OSError):  # a full disk: it is locked all the same
            os.ftruncate(file, 0)
            os.write(file, f"host {socket.gethostname()}, process {os.getpid()}\n".encode())

    def _lock(self, file: int) -> bool:
        """Lock an open file; false where the file system has no locks. Raises ValueError where another process holds it."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "unknown"
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{self.setting}: {self.folder} is in use by another run ({holder}). "
                    f"Wait for its end or stop it, or choose another {self.setting}."
                ) from error
            logger.warning("%s: this file system has no locks (%s); see to it that one run only uses the folder", self.path, error)
            self.path.unlink(missing_ok=True)
            return False
        return True

    def __exit__(self, *_: object) -> None:
        """Give the lock back; its file goes, and so do folders that were made for it and are empty."""
        if self._file is not None:
            with suppress(OSError):
                self.path.unlink()  # while it is locked: whoever waits looks whether its file is still the one that is there
            os.close(self._file)
            self._file = None
        with suppress(OSError):
            for path in self._made:
                path.rmdir()
        self._made = []


def acquire_for_all(lock: FolderLock, state: "PartialState") -> None:
    """Have the main process take a lock for all processes of a run.

    Raises:
        ValueError: In every process, where the main one did not get it.
    """
    from accelerate.utils import broadcast_object_list  # and torch, which most users of this file do without

    problem: list[str | None] = [None]
    if state.is_main_process:
        try:
            lock.acquire()
        except (ValueError, OSError) as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])


@contextmanager
def new_folder(folder: Path, setting: str) -> Iterator[Path]:
    """Write a folder that is not there yet, as `replacing` does, by one process at a time.

    Args:
        folder: To be made.
        setting: What names it, for the message.

    Yields:
        Where to write it.

    Raises:
        FileExistsError: It exists.
        ValueError: Another process is writing it.
    """
    refuse_existing(folder)
    with FolderLock(folder, setting, beside=True) as lock:
        lock.acquire()
        refuse_existing(folder)  # another process may have made it until now
        with replacing(folder) as aside:
            yield aside


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError for a folder that is there already, be it a link that leads nowhere."""
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder}: exists already; choose another folder or remove it")
