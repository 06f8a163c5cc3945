"""Reference pictures that come from a browser: limited in number, bytes and pixels, and off the disk as soon as they are read."""

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mosaic.files import in_one_line
from mosaic.images import PreparedReference, decode_image, reading_notes
from mosaic.reports.figures import tile

MAX_REFERENCES = 6
MAX_BYTES = 20 * 2**20  # per file
MAX_PIXELS = 50_000_000
MAX_NAME = 60  # letters of a file name that are kept
THUMBNAIL = 192  # px


class Upload(NamedTuple):
    """A checked reference picture.

    Attributes:
        name: Name of the file, without a folder.
        sha256: Of the file's content, in hex.
        prepared: As the model sees it.
        thumbnail: A small white square with the picture, as a data URI.
        notes: What was done to read it, where its user may not expect that.
    """

    name: str
    sha256: str
    prepared: PreparedReference
    thumbnail: str
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[str, str]:
        """What a page remembers of a reference that it shows: name and content."""
        return self.name, self.sha256


class Taken(NamedTuple):
    """What `take_uploads` made of some files: the good pictures, and a message for every other file."""

    uploads: list[Upload]
    problems: list[str]


def take_uploads(paths: Sequence[str | os.PathLike], room: int, size: int, scale: float) -> Taken:
    """Read uploaded files and remove all of them, whatever they hold.

    Args:
        paths: The files.
        room: How many more references there may be.
        size: Side in pixels for which references will be prepared.
        scale: Share of that side that the subject's long side will fill.
    """
    taken = Taken([], [])
    try:
        for path in map(Path, paths):
            try:
                if len(taken.uploads) == room:
                    raise ValueError(f"{file_name(path)}: there are at most {MAX_REFERENCES} references. Remove one first.")
                taken.uploads.append(read_upload(path, size, scale))
            except (ValueError, OSError, MemoryError) as error:
                taken.problems.append(in_one_line(error))
    finally:  # not earlier: equal files of one upload are one file
        for path in map(Path, paths):
            path.unlink(missing_ok=True)
    return taken


def read_upload(path: Path, size: int, scale: float) -> Upload:
    """Read a picture file and do with it what will be needed.

    Raises:
        ValueError: It is gone, too large, or no picture that can be a reference; the message begins with the file's name.
    """
    name = file_name(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name}: the upload was lost ({error.strerror}). Drop the picture again.") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: must have at most {MAX_BYTES >> 20} MiB. Make it smaller.")
    image = decode_image(data, name, MAX_PIXELS)
    try:
        prepared = PreparedReference.make(image, size, scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Upload(name, hashlib.sha256(data).hexdigest(), prepared, thumbnail(image), reading_notes(image))


def thumbnail(image: Image.Image) -> str:
    """A picture in a small white square, as a data URI."""
    buffer = io.BytesIO()
    tile(image, THUMBNAIL).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def file_name(path: Path) -> str:
    """The name of a file as it may be shown and kept: its end, without what cannot be printed."""
    return "".join(letter if letter.isprintable() else "?" for letter in path.name)[-MAX_NAME:] or "picture"
