"""Open files that belong to one process."""

import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A handle opened on first use in each process: processes made by fork never share a file position, and nothing open is pickled."""

    def __init__(self, opener: Callable[[], T]) -> None:
        """Remember how to open.

        Args:
            opener: Opens and returns the handle; to be pickled with this object.
        """
        self._opener = opener
        self._handle: T | None = None
        self._process: int | None = None

    def get(self) -> T:
        """Return this process's handle."""
        if self._handle is None or self._process != os.getpid():
            self._handle, self._process = self._opener(), os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return {"_opener": self._opener, "_handle": None, "_process": None}
