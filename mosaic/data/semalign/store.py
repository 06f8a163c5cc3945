"""The masks and coordinate fields of SemAlign-MS-Subjects200K: one file per sample, in a folder or in a zip archive.

Names are made from sample ids only, so nothing that is read decides which file is opened. Links are followed, for a hub cache is made of
them.
"""

import io
import stat
import zipfile
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from mosaic.data.masks import decode_mask, mask_picture
from mosaic.data.semalign.points import FIELD_GRID
from mosaic.data.semalign.zip_members import ZipMembers

MAX_BYTES = 16 * 2**20  # of one mask or coordinate file, unpacked; the released ones have less than 100 KiB


class Store(Protocol):
    """Small files by name."""

    def place(self, name: str) -> str:
        """Return where a file is, for messages."""

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is no such file.

        Raises:
            ValueError: It is there but cannot be read, is no plain file or is larger than `MAX_BYTES`.
        """


class FolderStore:
    """Files in a folder."""

    def __init__(self, folder: Path) -> None:
        """Remember the folder."""
        self.folder = folder

    def place(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.folder / name)

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None; raises as `Store.read`."""
        path = self.folder / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path}: must be a plain file.")
            if status.st_size > MAX_BYTES:
                raise ValueError(f"{path}: must have at most {MAX_BYTES} bytes, got {status.st_size}.")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            if path.is_symlink():
                raise ValueError(f"{path}: is a link to a file that does not exist.") from error
            return None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error


class ZipStore:
    """Members of a zip archive below one folder, as `mask` in `mask.zip`."""

    def __init__(self, path: Path, folder: str) -> None:
        """Open the archive.

        Args:
            path: The archive.
            folder: Folder inside it that stands before every name.

        Raises:
            ValueError: The archive cannot be read.
        """
        self.folder = folder
        self._members = ZipMembers(path)

    def place(self, name: str) -> str:
        """Return archive and member."""
        return f"{self._members.path}[{self.folder}/{name}]"

    def has(self, name: str) -> bool:
        """Return whether there is such a member."""
        return f"{self.folder}/{name}" in self._members

    def read(self, name: str) -> bytes | None:
        """Return the content of a member, or None; raises as `Store.read`."""
        return self._members.read(f"{self.folder}/{name}", MAX_BYTES) if self.has(name) else None


def open_store(root: Path, name: str, location: str | Path | None) -> Store | None:
    """Find masks or coordinates.

    Args:
        root: Folder of the data set.
        name: "mask" or "coord": the folder `root/name` is taken, else the archive `root/name.zip`.
        location: A folder or archive to take instead; None: what the data set has under `name`.

    Returns:
        The store, or None where `location` is None and the data set has neither.

    Raises:
        FileNotFoundError: There is nothing at `location`.
        ValueError: An archive cannot be read.
    """
    candidates = [root / name, root / f"{name}.zip"] if location is None else [Path(location)]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        if location is not None:
            raise FileNotFoundError(f"{location}: there is no such folder or zip archive of {name} files.")
        return None
    return FolderStore(path) if path.is_dir() else ZipStore(path, name)


def _require_small(data: bytes) -> None:
    """Raise ValueError for a file of PyTorch's whose parts would take more than `MAX_BYTES` unpacked; PyTorch itself unpacks them all."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"its parts have {size} bytes unpacked, {MAX_BYTES} are allowed")


def read_mask(store: Store | None, sample_id: str) -> Image.Image | None:
    """Read the mask of a target as a picture of 0 and 255, None if there is none.

    Raises:
        ValueError: The file is damaged or of unknown meaning (`mosaic.data.masks`), or the mask is not square.
    """
    name = f"{sample_id}.png"
    if store is None or (data := store.read(name)) is None:
        return None
    try:
        mask = mask_picture(decode_mask(data, name))
    except ValueError as error:
        raise ValueError(f"{store.place(name)}: {error}") from error
    if mask.width != mask.height:
        raise ValueError(
            f"{store.place(name)}: a mask must be square, as its target is, got {mask.width} x {mask.height} (width x height)."
        )
    return mask


def read_field(store: Store | None, matcher: str, sample_id: str) -> Tensor | None:
    """Read the coordinate field of a matcher ("dift" or "geoaware"), None if there is none.

    Returns:
        int64 [4096, 2] of (y, x) on the 64 x 64 grid.

    Raises:
        ValueError: The file is damaged, holds anything but such a tensor (pickled objects are refused unread), or leaves the grid.
    """
    name = f"{matcher}/{sample_id}_ref0.pt"
    if store is None or (data := store.read(name)) is None:
        return None
    rule = f"{store.place(name)}: must hold one int64 tensor of shape [{FIELD_GRID.num_tokens}, 2]"
    try:
        _require_small(data)
        field = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make PyTorch raise all kinds of errors; its message on pickles is a page of advice
        reason = f"{error}".strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{rule}; cannot be loaded as tensors alone, and nothing else is unpickled ({reason[:200]}).") from error
    if not isinstance(field, Tensor) or field.layout is not torch.strided or field.device.type != "cpu":
        raise ValueError(f"{rule}, got {type(field).__name__}.")
    if field.dtype != torch.int64 or tuple(field.shape) != (FIELD_GRID.num_tokens, 2):
        raise ValueError(f"{rule}, got {field.dtype} {list(field.shape)}.")
    outside = (field < 0) | (field >= FIELD_GRID.rows)
    if outside.any():
        cell = int(outside.any(dim=1).int().argmax())
        raise ValueError(
            f"{store.place(name)}: (y, x) must lie in [0, {FIELD_GRID.rows}), got {field[cell].tolist()} for target cell {cell}."
        )
    return field
