"""Colour profiles, depths and sizes of pictures: values become those of sRGB with 8 bits, or the picture is refused by name."""

import io
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from mosaic import images
from mosaic.images import decode_image, load_image, prepare_reference, reading_notes, to_rgb
from tests import icc

P3 = icc.rgb_profile("Wide")
NOTE = ("its colours are converted to sRGB from Wide",)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, shape, np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(name: bytes, content: bytes, image: Image.Image) -> bytes:
    data = saved(image, "PNG")
    return data[:33] + chunk(name, content) + data[33:]  # behind the header


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def jp2_with(profile: bytes, image: Image.Image) -> bytes:
    data = saved(image, "JPEG2000", irreversible=False)
    plain = data[data.index(b"colr") - 4 :][:15]
    start = data.index(b"jp2h") - 4
    size = struct.unpack(">I", data[start : start + 4])[0]
    header = data[start + 8 : start + size].replace(plain, box(b"colr", b"\x02\0\0" + profile))
    return data[:start] + box(b"jp2h", header) + data[start + size :]


def bmp_with(profile: bytes, image: Image.Image) -> bytes:
    data = saved(image, "BMP")
    pixels = data[54:]
    head = struct.pack("<I", 124) + data[18:54] + struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0) + b"DEBM" + bytes(48)
    head += struct.pack("<4I", 4, 124 + len(pixels), len(profile), 0)
    content = head + pixels + profile
    return b"BM" + struct.pack("<IHHI", 14 + len(content), 0, 0, 138) + content


def tiff(values: np.ndarray, bits: int, kind: int = 1, photometric: int = 1, raw: bytes | None = None) -> bytes:
    """An uncompressed grey TIFF [H, W]."""
    pixels = values.astype(f"<{'iu'[kind == 1]}{bits // 8}").tobytes() if raw is None else raw
    tags = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, values.shape[0]), (279, 4, len(pixels)), (339, 3, kind)]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + table


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF", "JPEG2000", "BMP"])
def test_a_wide_gamut_becomes_srgb_in_every_format(kind: str) -> None:
    colours = np.array([[[200, 60, 40], [40, 180, 90]], [[30, 60, 220], [128, 128, 128]]], np.uint8).repeat(16, 0).repeat(16, 1)
    picture = Image.fromarray(colours)
    if kind in ("JPEG2000", "BMP"):
        data = (jp2_with if kind == "JPEG2000" else bmp_with)(P3, picture)
    else:
        data = saved(
            picture,
            kind,
            icc_profile=P3,
            **({"quality": 100} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}),
        )
    found = decode_image(data, "a")
    assert found.format == kind
    assert reading_notes(found) == NOTE
    wanted = icc.in_srgb(colours.astype(float))
    tolerance = 6 if kind in ("JPEG", "AVIF") else 1
    assert np.abs(np.asarray(to_rgb(found)) - wanted)[4:12, 4:12].max() <= tolerance
    assert np.abs(np.asarray(to_rgb(found)) - wanted)[20:28, 20:28].max() <= tolerance
    assert np.abs(colours - wanted).max() > 20  # the profile matters


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16", "transparent P", "tRNS"])
def test_every_mode_follows_a_profile(mode: str) -> None:
    given = Image.fromarray(noise(9, 11, 4))
    if mode == "I;16":
        image = Image.fromarray(noise(9, 11).astype(np.uint16) * 257)
        plain = np.asarray(image)[..., None].repeat(3, -1) / 257
    elif mode in ("L", "LA"):
        image = given.convert(mode)
        plain = np.asarray(image.convert("RGB")).astype(float)
    elif mode in ("P", "transparent P"):
        image = given.convert("RGB").quantize(16)
        plain = np.asarray(image.convert("RGB")).astype(float)
        if mode != "P":
            image.info["transparency"] = 3
    else:
        image = given.convert(mode if mode != "tRNS" else "RGB")
        plain = np.asarray(image.convert("RGB")).astype(float)
        if mode == "tRNS":
            image.info["transparency"] = tuple(plain[4, 5].astype(int).tolist())
    alpha = np.asarray(image.convert("RGBA"))[..., 3:] / 255 if image.has_transparency_data else 1
    image.info["icc_profile"] = P3
    for profile, colours in ((P3, icc.in_srgb(plain)), (icc.grey_profile("Grey", 1.8), icc.encoded((plain / 255) ** 1.8))):
        if profile is P3 or mode in ("L", "LA", "I;16"):
            image.info["icc_profile"] = profile
            assert np.abs(np.asarray(to_rgb(image)) - (colours * alpha + 255 * (1 - np.asarray(alpha)))).max() < 1.6


def test_the_white_around_a_subject_stays_white() -> None:
    image = Image.new("RGB", (20, 20), "white")
    image.paste((200, 60, 40), (5, 5, 10, 10))
    plain = np.asarray(prepare_reference(image, 40))
    image.info["icc_profile"] = P3
    assert np.array_equal((np.asarray(prepare_reference(image, 40)) == 255).all(axis=-1), (plain == 255).all(axis=-1))


def test_cmyk_follows_its_profile() -> None:
    image = Image.merge("CMYK", [Image.new("L", (2, 1)) for _ in range(4)])
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert reading_notes(image) == ("its CMYK values have no colour profile, so that its colours are approximate",)
    assert to_rgb(image).getpixel((1, 0)) == (127, 127, 127)
    image.info["icc_profile"] = icc.cmyk_profile("Inks")
    lightness = 100 * 127 / 255
    wanted = icc.encoded(np.array(((lightness + 16) / 116) ** 3))
    assert to_rgb(image).getpixel((1, 0)) == pytest.approx((wanted,) * 3, abs=1)
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_srgb_stays_bit_for_bit() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    every = Image.fromarray(np.arange(2**16, dtype=np.uint32).view(np.uint8).reshape(256, 256, 4)[..., :3].copy())
    for mode in ("RGB", "RGBA", "L", "P", "CMYK"):
        image = every.convert(mode)
        before = to_rgb(image).tobytes()
        image.info["icc_profile"] = srgb
        assert to_rgb(image).tobytes() == before
        assert len(reading_notes(image)) == (mode == "CMYK")


@pytest.mark.parametrize(
    ("mode", "profile", "problem"),
    [
        ("RGB", b"no profile", "it is damaged"),
        ("RGB", P3[:200], "it is damaged"),
        ("RGB", icc.grey_profile("Grey", 1.8), "it is for grey pictures"),
        ("RGB", icc.cmyk_profile("Inks"), "it is for CMYK pictures"),
        ("CMYK", P3, "it is for RGB pictures"),
    ],
)
def test_a_profile_that_cannot_be_used_is_named(mode: str, profile: bytes, problem: str) -> None:
    image = Image.fromarray(noise(4, 5, 3)).convert(mode)
    plain = to_rgb(image).tobytes()
    found = decode_image(saved(image, "TIFF", icc_profile=profile), "a.tif")
    assert reading_notes(found) == (f"its colour profile is not followed, for {problem}: its values are taken as they are",)
    assert to_rgb(found).tobytes() == plain


def test_a_converted_picture_is_not_converted_again(tmp_path: Path) -> None:
    image = to_rgb(decode_image(saved(Image.fromarray(noise(5, 5, 3)), "PNG", icc_profile=P3), "a.png"))
    image.save(tmp_path / "b.png")
    assert to_rgb(load_image(tmp_path / "b.png")).tobytes() == to_rgb(image).tobytes() == image.tobytes()


def test_codes_of_other_colours_are_refused() -> None:
    plain = Image.fromarray(noise(8, 8, 3))
    assert to_rgb(decode_image(png_with(b"cICP", bytes([1, 13, 0, 1]), plain), "a.png")).tobytes() == plain.tobytes()
    message = "its colours are not those of sRGB (CICP {}), and it has no ICC profile; save it as sRGB"
    with pytest.raises(ValueError, match=re.escape(f"b.png ({message.format('12/13')})")):
        decode_image(png_with(b"cICP", bytes([12, 13, 0, 1]), plain), "b.png")
    avif = saved(plain, "AVIF")
    decode_image(avif, "a.avif")
    with pytest.raises(ValueError, match=re.escape(message.format("9/16"))):
        decode_image(avif.replace(b"colrnclx" + bytes([0, 1, 0, 13]), b"colrnclx" + bytes([0, 9, 0, 16])), "b.avif")
    wide = decode_image(png_with(b"gAMA", struct.pack(">I", 100_000), plain), "c.png")
    assert reading_notes(wide) == ("its gamma of 1 is not followed: its values are taken as sRGB",)
    assert reading_notes(decode_image(png_with(b"gAMA", struct.pack(">I", 45_455), plain), "d.png")) == ()


@pytest.mark.parametrize("key", ["transparency", "icc_profile", "gamma", "srgb", "white", "\\0white", "several", "deep"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16"])
def test_texts_of_a_png_are_no_facts(key: str, mode: str) -> None:
    """Pillow keeps them beside what it knows of a file, by the names that the file gives them."""
    image = Image.fromarray(np.full((5, 6), 40_000, np.uint16)) if mode == "I;16" else Image.new("RGB", (6, 5), "teal").convert(mode)
    texts = PngInfo()
    texts.add_text(key, "1000")
    found = decode_image(saved(image, "PNG", pnginfo=texts), "a.png")
    assert reading_notes(found) == ()
    assert to_rgb(found).tobytes() == to_rgb(image).tobytes()


GREY = np.array([[0, 1000, 40_000, 65_535]])


def test_integers_of_32_bits() -> None:
    assert to_rgb(decode_image(tiff(GREY, 32), "a.tif")).tobytes()[::3] == bytes([0, 4, 156, 255])
    for values, given in ((GREY * 2, "0 to 131070"), (GREY - 1, "-1 to 65534"), (GREY * 65_537, "-16")):
        with pytest.raises(ValueError, match=re.escape(f"must lie in 0 to 65535 (white), got {given}")):
            to_rgb(decode_image(tiff(values, 32), "a.tif"))


def test_values_of_few_bits_in_16() -> None:
    for bits in (1, 8, 10, 12):
        image = Image.fromarray(np.linspace(0, 2**bits - 1, 8).astype(np.uint16)[None])
        for kind in ("PNG", "TIFF"):
            with pytest.raises(ValueError, match=f"none is above {2**bits - 1}: it would be nearly black"):
                to_rgb(decode_image(saved(image, kind), "a"))
    assert to_rgb(decode_image(saved(Image.new("I;16", (2, 2)), "PNG"), "black.png")).getextrema()[0] == (0, 0)
    bright = Image.fromarray(np.array([[0, 4096]], np.uint16))
    assert reading_notes(bright)[0].startswith("its 16-bit values reach no further than 4096 of 65535")
    assert to_rgb(bright).getpixel((1, 0)) == (16, 16, 16)
    big_endian = decode_image(saved(Image.fromarray(np.array([[0, 4095]], ">u2")), "TIFF"), "a.tif")
    with pytest.raises(ValueError, match="none is above 4095"):
        to_rgb(big_endian)


def test_12_bits_that_a_tiff_declares_are_scaled() -> None:
    values = np.array([[0, 2048, 4095, 15]])
    raw = bytes(int("".join(f"{value:012b}" for value in values[0])[i : i + 8], 2) for i in range(0, 48, 8))
    found = decode_image(tiff(values, 12, raw=raw), "a.tif")
    assert np.asarray(found).tolist() == values.tolist()
    assert to_rgb(found).tobytes()[::3] == bytes([0, 128, 255, 1])
    assert reading_notes(found) == ("its values from 0 to 4095 are scaled to 8 bits",)


def test_dark_colours_of_16_bits_are_refused() -> None:
    """Pillow keeps the upper byte of each channel, so that 12 bits become 0 to 15."""
    rows = (np.arange(36).reshape(3, 12) * 110).astype(">u2")
    for scale, good in ((1, False), (16, True)):
        content = b"".join(b"\0" + (row * scale).astype(">u2").tobytes() for row in rows)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
        image = decode_image(data, "a.png")
        assert image.mode == "RGB"
        if good:
            assert np.asarray(to_rgb(image)).ravel().tolist() == (rows.ravel() * 16 // 256).tolist()
        else:
            with pytest.raises(ValueError, match="none is above 3855: it would be nearly black"):
                to_rgb(image)


def test_tiffs_that_mean_something_else() -> None:
    with pytest.raises(ValueError, match=re.escape("a.tif (its 16-bit values count from white to black; save it")):
        decode_image(tiff(GREY, 16, photometric=0), "a.tif")
    with pytest.raises(ValueError, match=re.escape("a.tif (it has 16-bit values with a sign")):
        decode_image(tiff(GREY // 2, 16, kind=2), "a.tif")
    with pytest.raises(ValueError, match="32-bit floats"):
        to_rgb(decode_image(saved(Image.new("F", (3, 3)), "TIFF"), "a.tif"))
    broken = tiff(GREY, 16).replace(struct.pack("<HHII", 277, 3, 1, 1), struct.pack("<HHII", 277, 3, 1, 7))
    with pytest.raises(ValueError, match=re.escape("a.tif (a TIFF of a kind that is not read")):
        decode_image(broken, "a.tif")


def test_of_several_frames_the_first_is_read_and_said() -> None:
    first, second = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (6, 4), "blue")
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        found = decode_image(saved(first, kind, save_all=True, append_images=[second]), "a")
        assert reading_notes(found) == ("of its several frames or pages the first is read",), kind
        assert np.abs(np.subtract(to_rgb(found).getpixel((3, 2)), (255, 0, 0))).max() < 6, kind
        assert reading_notes(decode_image(saved(first, kind), "a")) == ()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_orientation_is_honoured_once_in_every_format(kind: str) -> None:
    image = Image.fromarray(np.repeat([[[250, 0, 0]], [[0, 0, 250]]], 16, axis=0).repeat(16, 1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = to_rgb(decode_image(saved(image, kind, exif=exif), "a"))
    assert found.size == (32, 16)
    assert found.getpixel((4, 8))[2] > 200 > 60 > found.getpixel((28, 8))[2]  # what was below is at the left


def test_premultiplied_and_grey_alpha() -> None:
    straight = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    wanted = to_rgb(straight).getpixel((0, 0))
    assert to_rgb(straight.convert("RGBa")).getpixel((0, 0)) == pytest.approx(wanted, abs=1)
    grey = Image.new("LA", (1, 1), (100, 128))
    assert to_rgb(grey.convert("La")).getpixel((0, 0)) == pytest.approx(to_rgb(grey).getpixel((0, 0)), abs=1)


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("RGB", "RGBA", "LA", "P", "CMYK"):
        image = Image.fromarray(noise(23, 17, 4)).convert(mode if mode != "P" else "RGB")
        image = image.quantize(9) if mode == "P" else image
        whole = to_rgb(image).tobytes(), prepare_reference(image, 16).tobytes()
        monkeypatch.setattr(images, "STRIP_PIXELS", 40)
        assert (to_rgb(image).tobytes(), prepare_reference(image, 16).tobytes()) == whole
        monkeypatch.undo()
    framed = Image.new("RGB", (40, 60), "white")
    framed.paste("navy", (7, 31, 20, 52))
    whole = prepare_reference(framed, 32).tobytes()
    monkeypatch.setattr(images, "STRIP_PIXELS", 40)
    assert prepare_reference(framed, 32).tobytes() == whole


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    data = saved(Image.new("1", (4000, 4000)), "PNG")
    tracemalloc.start()
    with pytest.raises(ValueError, match=re.escape("a.png (it has 4000 x 4000 pixels, more than 15 million; make it smaller).")):
        decode_image(data, "a.png", 15_000_000)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
