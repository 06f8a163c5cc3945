"""Mask pictures: which pixels show the subject. The only place that says so, for every reader of masks.

Our own masks are 255 where the subject is seen and 0 elsewhere. Other tools write 0 and 1, palettes, transparency, 16 bits or coloured
labels. What has one meaning is read so; what has several is refused, since a wrong mask starves or misleads the supervision in silence.
"""

import numpy as np
from PIL import Image

from mosaic.images import decode_image

CURE = "Save it with 255 where this subject is seen and 0 elsewhere (8 bits, one channel)."
GREY = 8  # channels that differ by no more are grey: what JPEG makes of it
FEW = 32  # a mask of at most so many values may be one of labels; soft edges and JPEG have more
SHOWN = 6  # values listed in a message


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Read the content of a mask file.

    Args:
        data: Content of a picture file.
        name: Its name, for messages.

    Returns:
        bool [H, W], True where the subject is seen, upright.

    Raises:
        ValueError: It is damaged or no picture, or its meaning is not known.
    """
    picture = decode_image(data, name)
    try:
        return read_mask(picture)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_mask(picture: Image.Image) -> np.ndarray:
    """Which pixels of a mask picture show the subject.

    * Grey values, a palette or channels of grey: those above the middle.
    * Two values of which one is 0, such as 0 and 1, in 8, 16 or 32 bits: the other one.
    * Two colours of which one is black: the other one.
    * Transparency: what is opaque, if there is one colour or a picture there.

    A mask of one value may be empty or full; `mask_problem` names those.

    Args:
        picture: As `load_image` returns it, not converted.

    Returns:
        bool [H, W].

    Raises:
        ValueError: It may mean different things: labels of several subjects, values that stay below the middle, several colours.
    """
    if not picture.has_transparency_data or picture.mode.startswith("I"):
        return _opaque_mask(picture)
    rgba = np.asarray((picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA"))
    alpha, colours = rgba[..., 3], rgba[..., :3]
    if not alpha.size or (alpha.min() == alpha.max() and alpha.max() > 0):  # it says nothing
        return _opaque_mask(Image.fromarray(colours))
    seen = _grey_mask(alpha, 255, "transparency")
    inside = colours[seen]
    if not len(inside):
        if (colours != colours[0, 0]).any():
            raise ValueError(f"the mask is transparent everywhere, but has colours: it is not known which of both is the mask. {CURE}")
        return seen
    high, low = inside.max(axis=1), inside.min(axis=1)
    distinct = _distinct_colours(inside)
    unclear = high.min() < 64 and high.max() > 191 if (high - low).max() <= GREY else 1 < len(distinct) <= FEW
    if unclear:
        raise ValueError(
            f"the mask has transparency, and {len(distinct)} colours where it is opaque ({_listed(distinct)}): it is not known which of "
            f"them show the subject. {CURE}"
        )
    return seen


def mask_problem(mask: np.ndarray) -> str:
    """Say "empty" where a mask shows nothing, "full" where it shows everything, else "".

    An empty mask leaves matching nothing to find; a full one is right only where the subject fills the target.
    """
    return "empty" if not mask.any() else "full" if mask.all() else ""


def mask_picture(mask: np.ndarray) -> Image.Image:
    """A mask [H, W] as our files hold it: 255 where it is not 0."""
    return Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255)


def _opaque_mask(picture: Image.Image) -> np.ndarray:
    """As `read_mask`, transparency aside."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.size and not np.isfinite(values).all():
            raise ValueError(f"the mask must have finite values, got {values.min()} to {values.max()}. {CURE}")
        return _grey_mask(values, 65535 if picture.mode != "F" else np.inf, f"mode {picture.mode}")
    if picture.mode in ("1", "L"):
        return _grey_mask(np.asarray(picture.convert("L")), 255, f"mode {picture.mode}")
    colours = np.asarray(picture.convert("RGB"))
    low, high = colours.min(axis=2), colours.max(axis=2)
    if picture.mode == "P" and colours.size and low.min() == high.max():  # a palette of one colour: the numbers are the mask
        return _grey_mask(np.asarray(picture), 255, "mode P")
    if (low == high).all() or ((high - low).max() <= GREY and high.max() > 127):
        return _grey_mask(np.asarray(picture.convert("L")), 255, f"mode {picture.mode}")
    distinct = _distinct_colours(colours)
    if len(distinct) == 1 or (len(distinct) == 2 and distinct[0] == (0, 0, 0)):
        return high > 0
    raise ValueError(
        f"the mask must show one subject, but has {len(distinct)} colours (mode {picture.mode}): {_listed(distinct)}; they look like "
        f"labels of several subjects. {CURE}"
    )


def _distinct_colours(colours: np.ndarray) -> list[tuple[int, ...]]:
    """The different colours of [..., 3], sorted."""
    numbers = np.unique(colours.astype(np.int32) @ np.array([2**16, 2**8, 1], np.int32))
    return [(number >> 16, number >> 8 & 255, number & 255) for number in numbers.tolist()]


def _listed(values: list) -> str:
    return ", ".join(f"{value}" for value in values[:SHOWN]) + (", ..." if len(values) > SHOWN else "")


def _grey_mask(values: np.ndarray, top: float, place: str) -> np.ndarray:
    """The pixels of a grey picture that are seen.

    Args:
        values: [H, W].
        top: What is white.
        place: Where the values are from, for messages.

    Raises:
        ValueError: They have no one meaning.
    """
    if not values.size or not values.any():
        return np.zeros(values.shape, bool)
    distinct = np.flatnonzero(np.bincount(values.ravel())) if values.dtype == np.uint8 else np.unique(values)
    if len(distinct) == 2 and distinct[0] == 0:  # 0 and 1, 0 and 255, 0 and anything
        return values != 0
    if len(distinct) == 1 and distinct[0] == 1:  # 1 everywhere
        return np.ones(values.shape, bool)
    if top > 255 and distinct[0] >= 0 and 127 < distinct[-1] <= 255:  # 8 bits in more
        top = 255
    seen, faint = values > top / 2, (values != distinct[0]) & (values <= top / 2)
    flat = faint[1:, 1:] & (values[1:, 1:] == values[:-1, 1:]) & (values[1:, 1:] == values[1:, :-1])
    labels = len(distinct) <= FEW and faint.sum() > seen.sum() and 2 * flat.sum() > faint.sum()
    if distinct[0] < 0 or not seen.any() or labels:
        raise ValueError(
            f"the mask must be black and white or hold two values of which one is 0, but has {len(distinct)} from {distinct[0]:g} to "
            f"{distinct[-1]:g} ({place}): {_listed(distinct.tolist())}; they look like labels of several subjects, or are too dark. {CURE}"
        )
    return seen
