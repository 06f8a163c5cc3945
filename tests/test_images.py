"""Loading pictures and preparing references, against a plain per-pixel version of the same paragraph."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosaic.images import PreparedReference, load_image, prepare_reference, to_rgb


def plain_prepare(image: Image.Image, size: int, scale: float) -> Image.Image:
    """The paragraph of `prepare_reference`, step by step on arrays."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.int64)
    alpha = rgba[..., 3:]
    rgb = (rgba[..., :3] * alpha + 255 * (255 - alpha)) / 255
    array = np.floor(rgb + 0.5).astype(np.uint8)
    rows, columns = np.nonzero((array != 255).any(axis=-1))
    if len(rows):
        array = array[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = array.shape[:2]
    factor = size * scale / max(width, height)
    small = Image.fromarray(array).resize((int(width * factor), int(height * factor)), Image.LANCZOS)
    result = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - small.height) // 2, (size - small.width) // 2
    result[top : top + small.height, left : left + small.width] = np.asarray(small)
    return Image.fromarray(result)


def random_picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Noise on a white (or transparent) frame that is not symmetric."""
    rng = np.random.default_rng(seed)
    array = np.full((height, width, 4), 255, np.uint8)
    array[..., 3] = 0
    inside = array[3 : height - 1, 2 : width - 5]
    inside[...] = rng.integers(0, 256, inside.shape)
    image = Image.fromarray(array)
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    flat = Image.new("RGB", image.size, (255, 255, 255))
    flat.paste(image, mask=image.getchannel("A"))
    return flat.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize(
    ("width", "height", "size", "scale"), [(40, 23, 64, 0.9), (17, 60, 32, 0.8), (200, 190, 48, 1.0), (31, 31, 33, 0.9)]
)
def test_equals_the_plain_version(mode: str, width: int, height: int, size: int, scale: float) -> None:
    image = random_picture(mode, width, height, seed=width)
    result = prepare_reference(image, size, scale)
    assert (result.mode, result.size) == ("RGB", (size, size))
    # CMYK and bilevel noise are turned into RGB by Pillow in both versions.
    assert np.array_equal(np.asarray(result), np.asarray(plain_prepare(image, size, scale)))


def test_alpha_is_composited_exactly_for_every_value() -> None:
    value, alpha = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    image = Image.fromarray(np.stack([value, value, value, alpha], axis=-1).astype(np.uint8))
    expected = np.floor((value * alpha + 255 * (255 - alpha)) / 255 + 0.5)
    assert np.array_equal(np.asarray(to_rgb(image))[..., 1], expected)


def test_palette_with_transparency_becomes_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (2, 2, 5, 5))
    image.info["transparency"] = 0
    rgb = to_rgb(image)
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((3, 3)) == (200, 0, 0)


def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(to_rgb(load_image(tmp_path / "deep.png")))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_white_picture_is_kept_whole() -> None:
    result = prepare_reference(Image.new("RGB", (10, 20), (255, 255, 255)), 32)
    assert np.asarray(result).min() == 255


def test_the_background_must_be_exactly_white() -> None:
    image = Image.new("RGB", (20, 20), (254, 255, 255))
    image.paste((0, 0, 0), (5, 5, 10, 10))
    dark = np.asarray(prepare_reference(image, 40))[..., 1] < 128
    assert dark.sum() == 81  # 5 of 20 px at factor 1.8 (not the whole square): 254 counts as subject


@pytest.mark.parametrize(
    ("image", "size", "scale", "message"),
    [
        (
            Image.new("RGB", (1000, 1)),
            64,
            0.9,
            "the subject is too narrow: its 1000 x 1 pixels (width x height) would become 57 x 0 in a square of 64.",
        ),
        (Image.new("RGB", (0, 4)), 64, 0.9, "the picture must have pixels, got 0 x 4 (width x height)."),
        (Image.new("RGB", (4, 4)), 0, 0.9, "size must be at least 1 pixel, got 0."),
        (Image.new("RGB", (4, 4)), 64, 0.0, "scale must be more than 0 and at most 1, got 0.0."),
        (Image.new("RGB", (4, 4)), 64, 1.5, "scale must be more than 0 and at most 1, got 1.5."),
        (Image.new("F", (4, 4)), 64, 0.9, 'a picture of mode "F" (32-bit floats) has no known range of values'),
    ],
)
def test_prepare_messages(image: Image.Image, size: int, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_reference(image, size, scale)


def test_a_pixel_is_found_where_it_was_put() -> None:
    picture = np.full((30, 50, 3), 255, np.uint8)
    picture[4:24, 10:40] = 200  # the subject: 30 x 20 px
    for x, y in ((10, 4), (39, 4), (10, 23), (39, 23), (25, 9), (17, 20)):
        marked = picture.copy()
        marked[y, x] = 0
        prepared = np.asarray(prepare_reference(Image.fromarray(marked), 320, 0.9))[..., 0].astype(float)
        dark = np.clip(190 - prepared, 0, None)
        centre = [float((dark.sum(axis=axis) * (np.arange(320) + 0.5)).sum() / dark.sum()) for axis in (0, 1)]
        assert PreparedReference.make(Image.fromarray(picture), 320, 0.9).position((x, y)) == pytest.approx(centre, abs=1.0)
    assert PreparedReference.make(Image.new("RGB", (8, 8), "white"), 80, 1.0).position((7, 0)) == (75, 5)


@pytest.mark.parametrize("point", [(9, 10), (40, 10), (20, 3), (20, 24), (-1, 5)])
def test_points_beside_the_subject(point: tuple[int, int]) -> None:
    image = Image.new("RGB", (50, 30), "white")
    image.paste("navy", (10, 4, 40, 24))
    with pytest.raises(ValueError, match=re.escape("must lie on the subject, x in [10, 40) and y in [4, 24) of the 50 x 30 pixels, got [")):
        PreparedReference.make(image, 32).position(point)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to see it upright"
    image.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (2, 4)


def test_load_messages(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"file not found: {tmp_path / 'no.png'}.")):
        load_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match=re.escape(f"must be a picture file, but it is a folder: {tmp_path}.")):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=re.escape(f"the picture file is empty (0 bytes): {tmp_path / 'empty.png'}.")):
        load_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=re.escape(f"cannot be decoded as a picture: {tmp_path / 'text.png'} (no known picture format).")):
        load_image(tmp_path / "text.png")
    random_picture("RGB", 64, 64, seed=0).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=re.escape(f"cannot be decoded as a picture: {tmp_path / 'half.png'} (")):
        load_image(tmp_path / "half.png")
    with pytest.raises(ValueError, match="the file cannot be read"):
        load_image("a\x00b.png")


def test_postscript_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\n")
    with pytest.raises(ValueError, match="no known picture format"):
        load_image(tmp_path / "a.eps")
