"""One run per folder: a lock that ends with its process, however that ends."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import Self

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"


class RunLock:
    """Context that holds the lock of a run's folder.

    It is a record lock of the operating system (also of NFS), not the existence of the file: it ends with the process that holds it,
    also where that is killed, and data loading processes that outlive it do not hold it.
    """

    def __init__(self, run_dir: Path) -> None:
        """Name the folder; nothing is done yet."""
        self.path = run_dir / LOCK_FILE
        self._file: int | None = None

    def __enter__(self) -> Self:
        return self

    def acquire(self) -> None:
        """Make the folder and take the lock; does nothing where it is held already.

        Raises:
            ValueError: Another run holds it.
            OSError: The folder cannot be written.
        """
        if self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "unknown"
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"training.output_dir: {self.path.parent} is in use by another run ({holder}). "
                    "Wait for its end or stop it, or choose another training.output_dir."
                ) from error
            logger.warning("%s: this file system has no locks (%s); see to it that one run only uses the folder", self.path, error)
            return
        os.ftruncate(file, 0)
        os.write(file, f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
        self._file = file

    def __exit__(self, *_: object) -> None:
        """Give the lock back; the file stays, since removing it could take another run's lock away."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
