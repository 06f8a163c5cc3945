"""Colours of pictures: ICC profiles that are embedded in them, and what they mean in sRGB. Needs Pillow only."""

import io
from functools import cache, lru_cache
from typing import NamedTuple

from PIL import Image, ImageCms

SAME = 2
"""Levels of 255 by which a profile may differ from sRGB and count as sRGB: the many profiles of that name differ by their rounding."""

_SRGB_PRIMARIES, _SRGB_TRANSFERS = (1, 2, 5, 6), (1, 2, 6, 13, 14, 15)
"""Codes of CICP (ITU-T H.273) that mean colours like sRGB's; 2: not said."""

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class Profile(NamedTuple):
    """What an ICC profile says.

    Attributes:
        name: Its description.
        mode: Mode of the pictures that it is for, "RGB", "L" or "CMYK".
        transform: From that mode to sRGB; None: it is sRGB.
    """

    name: str
    mode: str
    transform: ImageCms.ImageCmsTransform | None

    def apply(self, image: Image.Image) -> Image.Image:
        """An RGB picture of the same colours in sRGB, out of one of `mode`."""
        if self.transform is None:
            return image.convert("RGB")
        converted = self.transform.apply(image)
        converted.info.pop("icc_profile", None)
        return converted


@lru_cache(maxsize=8)
def read_profile(data: bytes) -> Profile:
    """Read an ICC profile.

    Colours are kept relative to white, the darkest ones are fitted (relative colorimetric, black point compensation), as photographers'
    programs do it.

    Args:
        data: Its bytes.

    Raises:
        ValueError: It is damaged, or for pictures that are neither RGB, nor grey, nor CMYK.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        mode = _MODES.get(space)
        if mode is None:
            raise ValueError(f"it is for {space} values")
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(profile, _srgb(), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags)
    except (OSError, ImageCms.PyCMSError, TypeError) as error:
        raise ValueError("it is damaged") from error
    name = " ".join(f"{profile.profile.profile_description or 'a profile without a name'}".split())[:60]
    return Profile(name, mode, None if mode != "CMYK" and _changes_nothing(transform, mode) else transform)


def usable_profile(image: Image.Image) -> tuple[Profile | None, str]:
    """The profile in a picture's `info`, None where there is none that can be used; and why it cannot, "" where nothing is wrong."""
    data = image.info.get("icc_profile", b"")
    if data == b"":
        return None, ""
    try:
        if not isinstance(data, bytes):  # None: Pillow could not unpack it
            raise ValueError("it is damaged")
        profile = read_profile(data)
        colours = image.mode.rstrip("Aa") if image.mode in ("LA", "La") else image.mode
        grey = colours in ("L", "1") or colours.startswith("I")
        fits = {"RGB": colours not in ("CMYK", "LAB", "HSV"), "L": grey, "CMYK": colours == "CMYK"}
        if not fits[profile.mode]:
            raise ValueError(f"it is for {'grey' if profile.mode == 'L' else profile.mode} pictures")
    except ValueError as error:
        return None, str(error)
    return profile, ""


def embedded_profile(picture: Image.Image, data: bytes) -> bytes | None:
    """The ICC profile of a picture file, None where there is none that Pillow can unpack.

    Args:
        picture: As Pillow opens the file.
        data: The file.

    Raises:
        ValueError: Instead of a profile the file has codes of colours that are not like those of sRGB.
    """
    profile = picture.info.get("icc_profile") or _unread_profile(picture, data)
    if profile and isinstance(profile, bytes):  # a PNG's text may have that name
        return profile
    at = data.find(b"cICP", 0, max(0, data.find(b"IDAT"))) + 4 if picture.format == "PNG" else data.find(b"colrnclx") + 8
    step = 1 if picture.format == "PNG" else 2
    if picture.format in ("PNG", "AVIF") and at >= 8:
        primaries, transfer = (int.from_bytes(data[at + i * step : at + (i + 1) * step], "big") for i in (0, 1))
        if primaries not in _SRGB_PRIMARIES or transfer not in _SRGB_TRANSFERS:
            raise ValueError(f"its colours are not those of sRGB (CICP {primaries}/{transfer}), and it has no ICC profile; save it as sRGB")
    return None


def _unread_profile(picture: Image.Image, data: bytes) -> bytes:
    """The ICC profile of a JPEG 2000 or BMP file, which Pillow leaves out; empty where there is none."""
    if picture.format == "JPEG2000":
        at = data.find(b"colr\x02", 0, 2**16)  # a box: its length, its name, its kind (2: a profile), two more bytes
        return data[at + 7 : at - 4 + int.from_bytes(data[at - 4 : at], "big")] if at >= 4 else b""
    if picture.format == "BMP" and data[14:18] == (124).to_bytes(4, "little") and data[70:74] == b"DEBM":
        start, size = (int.from_bytes(data[at : at + 4], "little") for at in (126, 130))
        return data[14 + start : 14 + start + size]
    return b""


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours spread over the whole space stay within `SAME` levels."""
    levels = range(256) if mode == "L" else range(0, 256, 15)
    colours = [(value,) * 3 for value in levels] if mode == "L" else [(r, g, b) for r in levels for g in levels for b in levels]
    probe = Image.new("RGB", (len(colours), 1))
    probe.putdata(colours)
    given, found = probe.tobytes(), transform.apply(probe.convert(mode)).tobytes()
    return max(abs(a - b) for a, b in zip(given, found, strict=True)) <= SAME
