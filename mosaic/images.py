"""Loading pictures from files, and preparing reference pictures. Needs Pillow and numpy only."""

import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from PIL import Image, ImageChops, ImageOps

WHITE = (255, 255, 255)

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")
"""Formats read, by Pillow's names. Others are left out on purpose: some of their readers start outside programs (EPS)."""

MAX_FILE = 2 * 2**30
"""Bytes of a picture file that is read; what Pillow decodes at most has fewer."""

AGAIN = "Save or download it again."


class _TooManyPixels(ValueError):
    """A picture has more pixels than the caller takes."""


def load_image(path: str | Path) -> Image.Image:
    """Read a picture and turn it upright by its EXIF orientation.

    Args:
        path: A file in one of `FORMATS`. Of an animation the first frame is read.

    Returns:
        The decoded picture in the mode of the file (transparency is kept), detached from the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, empty, damaged, not a picture, or cannot be read. The messages begin with the problem, so that a caller
            can put the place before them.
    """
    return decode_image(read_picture(path), str(path))


def read_picture(path: str | Path) -> bytes:
    """The content of a picture file, not empty, for `decode_image`; errors are those of `load_image`."""
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"file not found: {path}.") from error
    except (OSError, ValueError) as error:  # a ValueError: the path holds a NUL or a letter that no file name can hold
        raise ValueError(f"the file cannot be read: {path} ({getattr(error, 'strerror', None) or error}).") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"must be a picture file, but it is a folder: {path}. Name a picture in it.")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise ValueError(f"must be a regular picture file, but it is a pipe or device: {path}. Save the picture to a file first.")
    if status.st_size > MAX_FILE:
        raise ValueError(f"the picture file must have at most {MAX_FILE >> 20} MiB, got {status.st_size >> 20}: {path}. Make it smaller.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the file cannot be read: {path} ({error.strerror}).") from error
    if not data:
        raise ValueError(f"the picture file is empty (0 bytes): {path}. {AGAIN}")
    return data


def decode_image(data: bytes, name: str, max_pixels: int | None = None) -> Image.Image:
    """Decode the content of a picture file, as `load_image` does.

    Args:
        data: Content of a file in one of `FORMATS`.
        name: Name of the file, for messages.
        max_pixels: Pictures with more are refused before their pixels are decoded. None: Pillow's own limit.

    Returns:
        The decoded picture, upright; its `format` is the file's.

    Raises:
        ValueError: The content is empty, damaged or no picture, or has too many pixels.
    """
    if not data:
        raise ValueError(f"the picture file is empty (0 bytes): {name}. {AGAIN}")
    try:
        with Image.open(io.BytesIO(data), formats=_readable_formats()) as picture:
            if max_pixels is not None and picture.width * picture.height > max_pixels:
                given = f"{picture.width} x {picture.height} pixels"
                raise _TooManyPixels(f"it has {given}, more than {max_pixels / 1e6:g} million; make it smaller")
            image = ImageOps.exif_transpose(picture)
            image.load()
            image.format = picture.format
    except Exception as error:  # decoders of damaged files raise all kinds of errors, and each of them means the same here
        raise ValueError(f"the file cannot be decoded as a picture: {name} ({_reason(error)}).{_cure(error)}") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB picture, transparency composited on white.

    Palette, greyscale, CMYK and bilevel pictures are converted as Pillow does. Pictures of 16 bits per pixel are scaled to 8 bits, where
    Pillow would clip nearly all of them to white.

    Args:
        image: A picture of any mode except "F", whose range is not known.

    Raises:
        ValueError: The mode cannot be converted.
    """
    if image.mode == "F":
        raise ValueError('a picture of mode "F" (32-bit floats) has no known range of values; save it with 8 bits per channel.')
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # premultiplied grey, which Pillow converts to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(background, image).convert("RGB")


def prepare_reference(image: Image.Image, size: int, scale: float = 0.9) -> Image.Image:
    """Put a subject, cut out by its white background, in the middle of a white square.

    Transparency is composited on white; the picture is cropped to the bounding box of its pixels that are not exactly (255, 255, 255), or
    kept whole if there is none; resized (Lanczos) by f = size * scale / long side to (int(width * f), int(height * f)); and pasted in the
    centre. EXIF rotation is not looked at: `load_image` does that.

    Args:
        image: The reference picture, any size; any mode that `to_rgb` takes.
        size: Side of the result in pixels.
        scale: Long side of the subject in the result as a share of `size`, in (0, 1].

    Returns:
        RGB picture of `size` x `size`.

    Raises:
        ValueError: `size` or `scale` is out of range, or the picture is so narrow that a side would become 0 pixels.
    """
    return PreparedReference.make(image, size, scale).picture


class _Placement(NamedTuple):
    """The part of a picture that is kept (left, top, right, bottom), and its size and place in the prepared square, px."""

    box: tuple[int, int, int, int]
    width: int
    height: int
    left: int
    top: int


def _placement(image: Image.Image, size: int, scale: float) -> tuple[Image.Image, _Placement]:
    """The picture as RGB, and where its subject goes; raises as `prepare_reference`."""
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}.")
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be more than 0 and at most 1, got {scale}.")
    if 0 in image.size:
        raise ValueError(f"the picture must have pixels, got {image.width} x {image.height} (width x height).")
    image = to_rgb(image)
    box = ImageChops.difference(image, Image.new("RGB", image.size, WHITE)).getbbox() or (0, 0, *image.size)
    subject = box[2] - box[0], box[3] - box[1]
    factor = size * scale / max(subject)
    width, height = (int(side * factor) for side in subject)
    if width == 0 or height == 0:
        raise ValueError(
            f"the subject is too narrow: its {subject[0]} x {subject[1]} pixels (width x height) would become {width} x {height} "
            f"in a square of {size}. Use a picture whose subject is less elongated, or a larger size."
        )
    return image, _Placement(box, width, height, (size - width) // 2, (size - height) // 2)


@dataclass(frozen=True)
class PreparedReference:
    """A reference picture as the model sees it, prepared once for every call and page that needs it.

    Attributes:
        picture: What `prepare_reference` makes of it.
        scale: As given there.
        given_size: (width, height) of the picture that was given, in px.
    """

    picture: Image.Image
    scale: float
    given_size: tuple[int, int]
    _placement: "_Placement"

    @classmethod
    def make(cls, image: Image.Image, size: int, scale: float = 0.9) -> Self:
        """Prepare a picture; arguments and errors are those of `prepare_reference`."""
        rgb, placement = _placement(image, size, scale)
        subject = rgb.crop(placement.box).resize((placement.width, placement.height), Image.Resampling.LANCZOS)
        picture = Image.new("RGB", (size, size), WHITE)
        picture.paste(subject, (placement.left, placement.top))
        return cls(picture, scale, image.size, placement)

    @property
    def size(self) -> int:
        """Side in pixels."""
        return self.picture.width

    def position(self, point: tuple[int, int]) -> tuple[float, float]:
        """Where a pixel of the given picture lies in the prepared one.

        Args:
            point: (x, y) of a pixel, counted from 0 at the upper left.

        Returns:
            (x, y) of the pixel's centre in px of the prepared picture, from its upper left corner.

        Raises:
            ValueError: The pixel lies outside the part of the picture that is kept.
        """
        box, width, height, left, top = self._placement
        x, y = point
        if not (box[0] <= x < box[2] and box[1] <= y < box[3]):
            raise ValueError(
                f"must lie on the subject, x in [{box[0]}, {box[2]}) and y in [{box[1]}, {box[3]}) of the {self.given_size[0]} x "
                f"{self.given_size[1]} pixels, got [{x}, {y}]."
            )
        return left + (x + 0.5 - box[0]) * width / (box[2] - box[0]), top + (y + 0.5 - box[1]) * height / (box[3] - box[1])


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Return an "I" or "I;16" picture (0 to 65535) as 8-bit greyscale, its transparent value, if it has one, as white."""
    values = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = np.where(values == transparent, 65535, values)
    return Image.fromarray((values.clip(0, 65535) / 257 + 0.5).astype(np.uint8))


def _readable_formats() -> list[str]:
    """Return those of `FORMATS` that this build of Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    """Return the reason of a decoding error in a few words; Pillow's "cannot identify" repeats the path."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels; make it smaller"
    return "no known picture format" if isinstance(error, Image.UnidentifiedImageError) else f"{error}" or type(error).__name__


def _cure(error: Exception) -> str:
    """Return what helps against a decoding error, as a sentence, where the reason does not say it."""
    if isinstance(error, (Image.DecompressionBombError, _TooManyPixels)):
        return ""
    if isinstance(error, Image.UnidentifiedImageError):
        readable = ", ".join(name for name in _readable_formats() if name != "MPO")  # JPEGs with several pictures
        return f" Save it in a format that can be read: {readable}."
    return f" It is damaged or cut short. {AGAIN}"
