"""Loading pictures from files, and preparing reference pictures. Needs Pillow and numpy only."""

import functools
import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image, ImageChops, ImageOps

from mosaic.colours import Profile, embedded_profile, usable_profile

WHITE = (255, 255, 255)

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")
"""Formats read, by Pillow's names. Others are left out on purpose: some of their readers start outside programs (EPS)."""

MAX_FILE = 2 * 2**30
"""Bytes of a picture file that is read; what Pillow decodes at most has fewer."""

MAX_PIXELS = 178_956_970
"""Pixels of a picture that is decoded; more are refused before memory is taken. Pillow's own limit, which a program may have changed."""

STRIP_PIXELS = 2**22
"""Pixels that are converted at a time, so that a large picture needs memory for itself and its RGB values only."""

DARKEST = 4095
"""A picture of 16 bits whose values reach no further is refused: as 16 bits it is nearly black, and 12 bits or fewer are likely."""

AGAIN = "Save or download it again."

# What `decode_image` keeps in a picture's `info`, for `to_rgb` and `reading_notes`; a PNG can put texts there, by any name without a NUL.
_NUMBERS = ("transparency", "icc_profile", "gamma", "srgb")
_DEEP, _WHITE, _SEVERAL = "\0deep", "\0white", "\0several"


class _Unfit(ValueError):
    """A picture is whole, but not to be read as it is; the message holds the cure."""


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


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the content of a picture file, as `load_image` does.

    Args:
        data: Content of a file in one of `FORMATS`.
        name: Name of the file, for messages.
        max_pixels: Pictures with more are refused before their pixels are decoded.

    Returns:
        The decoded picture, upright; its `format` is the file's, and its `info` holds the file's colour profile.

    Raises:
        ValueError: The content is empty, damaged or no picture, has too many pixels, or colours or values that cannot be read rightly.
    """
    if not data:
        raise ValueError(f"the picture file is empty (0 bytes): {name}. {AGAIN}")
    try:
        with Image.open(io.BytesIO(data), formats=_readable_formats()) as picture:
            if picture.width * picture.height > max_pixels:
                given = f"{picture.width} x {picture.height} pixels"
                raise _Unfit(f"it has {given}, more than {max_pixels / 1e6:.4g} million; make it smaller")
            facts = _facts(picture, data)
            image = ImageOps.exif_transpose(picture)
            image.load()
            image.format = picture.format
            # A PNG's texts stand in `info` too, by names that they choose.
            image.info = {key: value for key, value in image.info.items() if not (key in _NUMBERS and isinstance(value, str))} | facts
    except Exception as error:  # decoders of damaged files raise all kinds of errors, and each of them means the same here
        raise ValueError(f"the file cannot be decoded as a picture: {name} ({_reason(error, data)}).{_cure(error)}") from error
    return image


def reading_notes(image: Image.Image) -> tuple[str, ...]:
    """What `load_image` and `to_rgb` do with a picture that its user may not expect, such as "its colours are converted to sRGB ...".

    Args:
        image: A picture as `load_image` returns it.
    """
    notes = []
    if image.info.get(_SEVERAL):
        notes.append("of its several frames or pages the first is read")
    profile, problem = usable_profile(image)
    if profile is not None and profile.transform is not None:
        notes.append(f"its colours are converted to sRGB from {profile.name}")
    elif problem:
        notes.append(f"its colour profile is not followed, for {problem}: its values are taken as they are")
    elif profile is None and image.mode == "CMYK":
        notes.append("its CMYK values have no colour profile, so that its colours are approximate")
    gamma = image.info.get("gamma")
    if profile is None and isinstance(gamma, float) and "srgb" not in image.info and abs(gamma - 1 / 2.2) > 0.02:
        notes.append(f"its gamma of {gamma:g} is not followed: its values are taken as sRGB")
    if image.mode.startswith("I"):
        white, high = image.info.get(_WHITE, 65535), _extrema(image)[1]
        if white != 65535:
            notes.append(f"its values from 0 to {white} are scaled to 8 bits")
        elif DARKEST < high < 2**14:
            notes.append(f"its 16-bit values reach no further than {high} of 65535, so that it is dark; 14-bit values are to be scaled")
    return tuple(notes)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB picture in sRGB, transparency composited on white.

    Palette, greyscale, CMYK and bilevel pictures are converted as Pillow does; colours with an embedded profile that is not that of sRGB
    are converted by it (a profile that cannot be used is not: `reading_notes` says so). Pictures of 16 bits per pixel are scaled to 8
    bits, where Pillow would clip nearly all of them to white.

    Args:
        image: A picture of any mode except "F", whose range is not known.

    Returns:
        The picture itself where nothing is to be done.

    Raises:
        ValueError: The mode cannot be converted, or it is not known which of its values is white.
    """
    _check_values(image)
    profile = usable_profile(image)[0]
    if image.mode == "RGB" and not image.has_transparency_data and (profile is None or profile.transform is None):
        return image
    return _rgb_part(image, (0, 0, *image.size), profile)


def _rgb_part(image: Image.Image, box: tuple[int, int, int, int], profile: Profile | None) -> Image.Image:
    """A part of a picture (left, top, right, bottom) as RGB, converted strip by strip."""
    left, top, right, bottom = box
    result = Image.new("RGB", (right - left, bottom - top))
    for start, end in _strips(image.width, top, bottom):
        strip = _converted(image.crop((left, start, right, end)), profile)
        result.paste(strip, (0, start - top))
    return result


def _strips(width: int, top: int, bottom: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of strips of about `STRIP_PIXELS`."""
    rows = max(1, STRIP_PIXELS // max(1, width))
    return [(start, min(start + rows, bottom)) for start in range(top, bottom, rows)]


def _converted(image: Image.Image, profile: Profile | None) -> Image.Image:
    """RGB values of a picture whose values have been checked."""
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB") if profile is None else profile.apply(image.convert(profile.mode))
    if image.mode == "La":  # premultiplied grey, which Pillow converts to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    if profile is not None:
        alpha = image.getchannel("A")
        image = profile.apply(image.convert("RGB") if profile.mode == "RGB" else image.getchannel("R"))
        image.putalpha(alpha)
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
    """The subject as RGB, and where it goes; raises as `prepare_reference`."""
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}.")
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be more than 0 and at most 1, got {scale}.")
    if 0 in image.size:
        raise ValueError(f"the picture must have pixels, got {image.width} x {image.height} (width x height).")
    _check_values(image)
    profile = usable_profile(image)[0]
    box = _subject_box(image, profile) or (0, 0, *image.size)
    subject = box[2] - box[0], box[3] - box[1]
    factor = size * scale / max(subject)
    width, height = (int(side * factor) for side in subject)
    if width == 0 or height == 0:
        raise ValueError(
            f"the subject is too narrow: its {subject[0]} x {subject[1]} pixels (width x height) would become {width} x {height} "
            f"in a square of {size}. Use a picture whose subject is less elongated, or a larger size."
        )
    return _rgb_part(image, box, profile), _Placement(box, width, height, (size - width) // 2, (size - height) // 2)


def _subject_box(image: Image.Image, profile: Profile | None) -> tuple[int, int, int, int] | None:
    """Bounding box of what is not exactly white, found strip by strip; None: all is white."""
    boxes = []
    for start, end in _strips(image.width, 0, image.height):
        strip = _rgb_part(image, (0, start, image.width, end), profile)
        box = ImageChops.difference(strip, Image.new("RGB", strip.size, WHITE)).getbbox()
        if box:
            boxes.append((box[0], start + box[1], box[2], start + box[3]))
    if not boxes:
        return None
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


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
        subject, placement = _placement(image, size, scale)
        subject = subject.resize((placement.width, placement.height), Image.Resampling.LANCZOS)
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
    values, white = np.asarray(image).astype(np.int64), image.info.get(_WHITE, 65535)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = np.where(values == transparent, white, values)
    return Image.fromarray((values.clip(0, white) / (white / 255) + 0.5).astype(np.uint8))


def _check_values(image: Image.Image) -> None:
    """Raise ValueError where it is not known which value of a picture is white."""
    if image.mode == "F":
        raise ValueError('a picture of mode "F" (32-bit floats) has no known range of values; save it with 8 bits per channel.')
    if image.mode.startswith("I"):
        low, high = _extrema(image)
        if low < 0 or high > 65535:
            raise ValueError(
                f"the picture's integers must lie in 0 to 65535 (white), got {low} to {high}: which of them is white is not known. Scale "
                "them to 16 bits, or save it with 8 bits per channel."
            )
        darkest = 0 if _WHITE in image.info else DARKEST
    elif image.info.get(_DEEP) and image.mode != "CMYK":
        bands = [np.asarray(image.getchannel(band)) for band in image.getbands() if band != "A"]
        high, darkest = max(int(band.max(initial=0)) for band in bands) * 257, DARKEST  # of 16 bits per channel Pillow keeps the upper 8
    else:
        return
    if 0 < high <= darkest:
        raise ValueError(
            f"the picture's 16-bit values must reach white, 65535, or come near it, but none is above {high}: it would be nearly black. It "
            f"seems to hold values of 12 bits or fewer: scale them to 16 bits, or save it with 8 bits per channel."
        )


def _extrema(image: Image.Image) -> tuple[int, int]:
    """Least and largest value of an "I" or "I;16" picture."""
    strips = [np.asarray(image.crop((0, start, image.width, end))) for start, end in _strips(image.width, 0, image.height)]
    ends = [int(end) for strip in strips if strip.size for end in (strip.min(), strip.max())]
    return min(ends, default=0), max(ends, default=0)


def _facts(picture: Image.Image, data: bytes) -> dict[str | tuple[int, int], Any]:
    """What a picture's file says and Pillow does not keep: for its `info`.

    Raises:
        _Unfit: The file means other values than Pillow would give.
    """
    facts: dict[str | tuple[int, int], Any] = {}
    if picture.format != "MPO" and getattr(picture, "is_animated", False):  # an MPO's other pictures are previews and the like
        facts[_SEVERAL] = True
    raw = [tile[3] if isinstance(tile[3], str) else str(tile[3][0]) for tile in getattr(picture, "tile", []) if tile[3]]
    if any("16" in mode for mode in raw):
        facts[_DEEP] = True
    if picture.format == "TIFF" and picture.mode.startswith("I"):
        tags = picture.tag_v2  # type: ignore[attr-defined]
        if tags.get(262) == 0:
            raise _Unfit("its 16-bit values count from white to black; save it with 8 bits per channel")
        if any("16" in mode and mode.endswith("S") for mode in raw):
            raise _Unfit("it has 16-bit values with a sign, and which of them is white is not known; save it with 8 bits per channel")
        if tags.get(258) == (12,):
            facts[_WHITE] = 4095
    try:
        profile = embedded_profile(picture, data)
    except ValueError as error:
        raise _Unfit(str(error)) from error
    return facts | ({"icc_profile": profile} if profile else {})


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """The endings, such as ".png", of the formats that are read, in small letters; a name may have them in any."""
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def _readable_formats() -> list[str]:
    """Return those of `FORMATS` that this build of Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _reason(error: Exception, data: bytes) -> str:
    """Return the reason of a decoding error in a few words; Pillow's "cannot identify" repeats the path."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels; make it smaller"
    if isinstance(error, Image.UnidentifiedImageError):
        is_tiff = data[:4] in (b"II*\x00", b"MM\x00*")
        return "a TIFF of a kind that is not read, such as colours of 32-bit floats" if is_tiff else "no known picture format"
    return f"{error}" or type(error).__name__


def _cure(error: Exception) -> str:
    """Return what helps against a decoding error, as a sentence, where the reason does not say it."""
    if isinstance(error, (Image.DecompressionBombError, _Unfit)):
        return ""
    if isinstance(error, Image.UnidentifiedImageError):
        readable = ", ".join(name for name in _readable_formats() if name != "MPO")  # JPEGs with several pictures
        return f" Save it in a format that can be read: {readable}."
    return f" It is damaged or cut short. {AGAIN}"
