"""The reference pictures of a run: each is decoded and prepared once, alone, by the check of the cases, and kept until it is rendered."""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mosaic.images import PreparedReference, decode_image, read_picture, reading_notes
from mosaic.reports.figures import TILE_SIDES, tile

MOST_BYTES = 512 * 2**20


class ReferencePicture(NamedTuple):
    """What is kept of a reference picture; its file's pixels are not, of which there may be a hundred million.

    Attributes:
        prepared: As the model sees it.
        tiles: The whole picture as panels show it, by the side of the tile in px.
        notes: What was done to read it, where its user may not expect that.
    """

    prepared: PreparedReference
    tiles: dict[int, Image.Image]
    notes: tuple[str, ...]


class ReferencePictures:
    """Prepared pictures by the SHA-256 of their files.

    A cases file may name more pictures than fit into memory. When `MOST_BYTES` of pixels are kept, one that was rendered from makes room
    for the next, and while there is none, what comes is not kept: it is decoded again when it is rendered. Cases are checked and rendered
    in one order, so that the first ones, which are kept, are the first to be used.

    Attributes:
        digests: SHA-256 of the files that were loaded, in hex.
        notes: What was done to read them, of those where it needs to be said.
    """

    def __init__(self, size: int, scale: float, most_bytes: int = MOST_BYTES) -> None:
        """Begin with none.

        Args:
            size: Side in pixels for which pictures are prepared.
            scale: Share of that side that the subject's long side fills.
            most_bytes: Of pixels that are kept.
        """
        self._size, self._scale, self._most_bytes = size, scale, most_bytes
        self.digests: dict[Path, str] = {}
        self.notes: dict[Path, tuple[str, ...]] = {}
        self._waiting: dict[str, ReferencePicture] = {}
        self._used: OrderedDict[str, ReferencePicture] = OrderedDict()  # the one whose last use is longest ago comes first
        self._num_bytes = 0

    def load(self, path: Path) -> ReferencePicture:
        """Read a picture, to be rendered from later.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no picture, or none that can be a reference.
        """
        data = read_picture(path)
        digest = self.digests[path] = hashlib.sha256(data).hexdigest()
        picture = self._find(digest) or self._decode(data, digest, path)
        if picture.notes:
            self.notes[path] = picture.notes
        return picture

    def use(self, path: Path, digest: str) -> ReferencePicture:
        """The picture of a file, to render from it.

        Args:
            path: The file.
            digest: SHA-256 that it must still have.

        Raises:
            FileNotFoundError, ValueError: As `load`, or the file is not the one that was checked.
        """
        data = read_picture(path)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{path}: has changed since the cases were checked. Start again.")
        picture = self._find(digest) or self._decode(data, digest, path)
        if self._find(digest):
            self._waiting.pop(digest, None)
            self._used[digest] = picture
            self._used.move_to_end(digest)
        return picture

    def _find(self, digest: str) -> ReferencePicture | None:
        return self._waiting.get(digest) or self._used.get(digest)

    def _decode(self, data: bytes, digest: str, path: Path) -> ReferencePicture:
        """Decode and prepare a picture, and keep it if there is room."""
        image = decode_image(data, str(path))
        try:
            prepared = PreparedReference.make(image, self._size, self._scale)
            picture = ReferencePicture(prepared, {side: tile(image, side) for side in TILE_SIDES}, reading_notes(image))
        except (ValueError, MemoryError) as error:
            raise ValueError(f"{path}: {error}") from error
        needed = _num_bytes(picture)
        while self._used and self._num_bytes + needed > self._most_bytes:
            self._num_bytes -= _num_bytes(self._used.popitem(last=False)[1])
        if self._num_bytes + needed <= self._most_bytes:
            self._waiting[digest] = picture
            self._num_bytes += needed
        return picture


def _num_bytes(picture: ReferencePicture) -> int:
    """Bytes of pixels."""
    return 3 * (picture.prepared.size**2 + sum(side**2 for side in picture.tiles))
