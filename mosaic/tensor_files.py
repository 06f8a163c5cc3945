"""Tensors into a safetensors file that the people one shares a folder with can read, too."""

import os
from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in place, with the permissions that any new file gets there; safetensors by itself leaves them to the owner alone.

    Raises:
        OSError, SafetensorError: It cannot be written.
    """
    path.touch()
    mode = S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    if S_IMODE(path.stat().st_mode) != mode:  # where a file system knows no permissions they do not differ
        os.chmod(path, mode)
