"""Hostile cases, pictures and cases files: each a message that names case and cure, or correct handling; the good cases finish."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inference
from mosaic.images import load_image, prepare_reference
from mosaic.rendering.cases.reading import MAX_FILE, read_cases
from mosaic.rendering.recipe import read_recipe
from tests import runs

RED = Image.new("RGB", (8, 8), (200, 0, 0))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a picture of that size and whose data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned() -> bytes:
    """4 x 2 px, stored lying, to be shown standing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (4, 2), (200, 0, 0)), "JPEG", exif=exif)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
STEP = Image.fromarray(np.array([[0, 65535]] * 2, np.uint16))

BAD_PICTURES: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "the picture file is empty (0 bytes)"),
    "text.png": (b"no picture", "cannot be decoded as a picture"),
    "zeros.png": (bytes(4096), "cannot be decoded as a picture"),
    "html.jpg": (b"<!DOCTYPE html><html>404</html>", "cannot be decoded as a picture"),
    "svg.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be decoded as a picture"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known picture format"),
    "truncated.png": (encoded(NOISE, "PNG")[:3000], "cannot be decoded as a picture"),
    "truncated.jpg": (encoded(NOISE, "JPEG")[:800], "cannot be decoded as a picture"),
    "truncated.webp": (encoded(NOISE, "WEBP")[:900], "cannot be decoded as a picture"),
    "header.png": (encoded(NOISE, "PNG")[:20], "cannot be decoded as a picture"),
    "flipped.png": (encoded(NOISE, "PNG")[:60] + b"\x00\xff" * 20 + encoded(NOISE, "PNG")[100:], "cannot be decoded as a picture"),
    "bomb.png": (png_of_size(60_000, 60_000), "it has more than 179 million pixels; make it smaller"),
    "line.png": (encoded(Image.new("RGB", (5000, 1)), "PNG"), "the subject is too narrow: its 5000 x 1 pixels"),
    "column.png": (encoded(Image.new("RGB", (1, 5000)), "PNG"), "the subject is too narrow: its 1 x 5000 pixels"),
    "floats.tiff": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "has no known range of values; save it with 8 bits"),
}

GOOD_PICTURES: dict[str, tuple[bytes, Callable[[Image.Image], bool]]] = {
    "turned.jpg": (turned(), lambda x: x.size == (2, 4)),
    "cmyk.jpg": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), lambda x: x.convert("RGB").getpixel((4, 4))[0] > 200),
    "grey16.png": (encoded(STEP, "PNG"), lambda x: np.asarray(prepare_reference(x, 8, 1.0)).min() < 40),
    "animated.gif": (
        encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 200))]),
        lambda x: x.convert("RGB").getpixel((0, 0)) == (200, 0, 0),
    ),
    "animated.webp": (
        encoded(RED, "WEBP", save_all=True, lossless=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 200))]),
        lambda x: x.convert("RGB").getpixel((0, 0)) == (200, 0, 0),
    ),
    "animated.png": (
        encoded(RED, "PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 200))]),
        lambda x: x.convert("RGB").getpixel((0, 0)) == (200, 0, 0),
    ),
    "alpha.png": (
        encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"),
        lambda x: np.asarray(prepare_reference(x, 8)).min() == 255,
    ),
    "palette.png": (encoded(RED.convert("P"), "PNG"), lambda x: x.convert("RGB").getpixel((0, 0))[0] > 180),
    "bilevel.png": (encoded(Image.new("1", (8, 8)), "PNG"), lambda x: np.asarray(prepare_reference(x, 8, 1.0)).max() == 0),
    "white.png": (encoded(Image.new("RGB", (8, 8), "white"), "PNG"), lambda x: np.asarray(prepare_reference(x, 8)).min() == 255),
    "one.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), lambda x: np.asarray(prepare_reference(x, 8, 1.0)).max() == 0),
    "Käse 🧀 ‮gnp.png": (encoded(RED, "PNG"), lambda x: x.size == (8, 8)),
    "-rf $(x) ;'\".png": (encoded(RED, "PNG"), lambda x: x.size == (8, 8)),
    "a\nb.png": (encoded(RED, "PNG"), lambda x: x.size == (8, 8)),
    "wrong suffix.gif": (encoded(RED, "PNG"), lambda x: x.size == (8, 8)),
    "no suffix": (encoded(RED, "JPEG"), lambda x: x.size == (8, 8)),
}

BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "null": (None, ": must be an object with the keys index, prompt, image_paths, got null."),
    "number": (3, ": must be an object"),
    "list": ([[]], ": must be an object"),
    "empty object": ({}, ': the key "prompt" is missing.'),
    "prompt list": ({"prompt": ["x"], "image_paths": ["ok.png"]}, ".prompt: must be a string"),
    "prompt null": ({"prompt": None, "image_paths": ["ok.png"]}, ".prompt: must be a string, got null."),
    "prompt huge": ({"prompt": "x" * 10_001, "image_paths": ["ok.png"]}, ".prompt: must have at most 10000 letters, got 10001."),
    "prompt NUL": ({"prompt": "a\x00b", "image_paths": ["ok.png"]}, ".prompt: must be plain text"),
    "prompt surrogate": ({"prompt": "\ud83d", "image_paths": ["ok.png"]}, ".prompt: must be plain text"),
    "paths a string": ({"prompt": "x", "image_paths": "ok.png"}, ".image_paths: must be a list of paths"),
    "paths nested": ({"prompt": "x", "image_paths": [["ok.png"]]}, ".image_paths[0]: must be a string"),
    "too many references": (
        {"prompt": "x", "image_paths": ["ok.png"] * 65},
        ".image_paths: must name at most 64 reference pictures, got 65.",
    ),
    "path to nowhere": ({"prompt": "x", "image_paths": ["../" * 40 + "none"]}, ".image_paths[0]: file not found: "),
    "path to a device": (
        {"prompt": "x", "image_paths": ["/dev/zero"]},
        ".image_paths[0]: must be a regular picture file, but it is a pipe or device",
    ),
    "path to text": ({"prompt": "x", "image_paths": ["/etc/hostname"]}, ".image_paths[0]: the file cannot be decoded as a picture"),
    "path to a pipe": (
        {"prompt": "x", "image_paths": ["pipe.png"]},
        ".image_paths[0]: must be a regular picture file, but it is a pipe or device",
    ),
    "path to a folder": ({"prompt": "x", "image_paths": ["."]}, ".image_paths[0]: must be a picture file, but it is a folder"),
    "path in a circle": ({"prompt": "x", "image_paths": ["circle.png"]}, ".image_paths[0]: the file cannot be read: "),
    "path too long": ({"prompt": "x", "image_paths": ["x" * 5000]}, ".image_paths[0]: must have at most 4096 letters, got 5000."),
    "part of a path too long": (
        {"prompt": "x", "image_paths": ["x" * 300]},
        ".image_paths[0]: the file cannot be read: ",
    ),
    "index escapes": ({"index": "../../x", "prompt": "x", "image_paths": ["ok.png"]}, ".index: must be an integer from 0"),
    "index negative": ({"index": -1, "prompt": "x", "image_paths": ["ok.png"]}, ".index: must be an integer from 0"),
    "index huge": ({"index": 10**30, "prompt": "x", "image_paths": ["ok.png"]}, ".index: must be an integer from 0"),
    "index twice": ({"index": 1000, "prompt": "x", "image_paths": ["ok.png"]}, ".index: must be unique, since it names the output files"),
    "seed negative": ({"prompt": "x", "image_paths": ["ok.png"], "seed": -1}, ".seed: must be an integer of at least 0"),
    "seed huge": ({"prompt": "x", "image_paths": ["ok.png"], "seed": 2**63}, ".seed: must be an integer of at least 0"),
    "seed a float": ({"prompt": "x", "image_paths": ["ok.png"], "seed": 1.5}, ".seed: must be an integer"),
    "height huge": (
        {"prompt": "x", "image_paths": ["ok.png"], "height": 10**9},
        ".height: must be an integer of at least 1 and at most 8192",
    ),
    "width true": ({"prompt": "x", "image_paths": ["ok.png"], "width": True}, ".width: must be an integer"),
    "guidance infinite": ({"prompt": "x", "image_paths": ["ok.png"], "guidance_scale": float("inf")}, ".guidance_scale: must be a number"),
    "pictures without end": ({"prompt": "x", "image_paths": ["ok.png"], "num_images_per_prompt": 10**9}, ".num_images_per_prompt: must be"),
    "key": ({"prompt": "x", "image_paths": ["ok.png"], "hieght": 16}, ".hieght: is not a known key. Did you mean height?"),
    "escape of a pattern": ({"prompt": "x", "image_paths": ["/**/*.png"]}, '.image_paths[0]: a pattern must not hold "**"'),
    "grid too large": ({"grid": {"prompts": ["x"] * 400, "references": ["ok.png"] * 400}}, ".grid: must give at most 100000 pictures"),
    "markup as a name": ({"prompt": "<b>", "references": {"<b>": "ok.png"}}, ".references.<b>.name: must be made of letters"),
}

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON: line 1, column 1"),
    "cut": (b'[{"prompt": "x"', "not valid JSON: line 1, column 16"),
    "UTF-16": ('[{"prompt": "x"}]'.encode("utf-16"), "must be a UTF-8 text file, but byte 0 is not UTF-8."),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "duplicate keys": (b'[{"prompt": "x", "prompt": "y"}]', "the key 'prompt' is given twice"),
    "long number": (b"[" + b"9" * 5000 + b"]", "not valid JSON"),
    "number": (b"7", "must be a list of cases, got a number"),
    "object": (b"{}", "must be a list of cases, got an object"),
    "no case": (b"[]", "must hold at least one case"),
    "pickle": (b"\x80\x04\x95", "must be a UTF-8 text file"),
}


def test_there_are_sixty() -> None:
    assert len(BAD_PICTURES) + len(GOOD_PICTURES) + len(BAD_ENTRIES) + len(BAD_FILES) >= 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RED.save(tmp_path / "ok.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    for name, (data, _) in {**BAD_PICTURES, **GOOD_PICTURES}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_each_has_its_message_and_the_good_cases_finish(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = runs.write_world(folder / "world")
    (folder / "config.json").write_text(json.dumps(runs.settings(world, folder / "out")))
    entries: list[Any] = [{"index": 1000, "prompt": "a cat", "image_paths": ["ok.png"]}]
    entries += [entry for entry, _ in BAD_ENTRIES.values()]
    entries += [{"index": 2000 + n, "prompt": "a cat", "references": [{"path": name}]} for n, name in enumerate(BAD_PICTURES)]
    entries += [{"index": 3000 + n, "prompt": "a mug", "image_paths": [name]} for n, name in enumerate(GOOD_PICTURES)]
    messages = [message for _, message in BAD_ENTRIES.values()] + [f".references[0]: {what}" for what in ("",) * len(BAD_PICTURES)]
    path = folder / "cases.json"
    path.write_text(json.dumps(entries))

    file = read_cases(path, runs.REFERENCE_SIZE)
    assert len(file.problems) == len(messages)
    for number, (problem, message) in enumerate(zip(file.problems, messages, strict=True), 1):
        assert str(problem).startswith(f"{path}[{number}]{message}")
        assert len(str(problem)) < 600
    for problem, (name, (_, what)) in zip(file.problems[len(BAD_ENTRIES) :], BAD_PICTURES.items(), strict=True):
        assert what in str(problem)
        assert str(folder / name) in str(problem)
    assert len(file.cases) == 1 + len(GOOD_PICTURES)

    assert inference.main(["--config", str(folder / "config.json"), "--cases", str(path), "--steps", "1"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert len([line for line in captured.err.splitlines() if line.startswith("error: ")]) == len(messages)
    rows = [json.loads(line) for line in (folder / "out/manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["references"][0]["file"] for row in rows] == ["ok.png", *GOOD_PICTURES]
    assert all(read_recipe(folder / "out" / row["file"])["digest"] == row["digest"] for row in rows)


@pytest.mark.parametrize("name", GOOD_PICTURES)
def test_odd_pictures_are_read_as_they_look(folder: Path, name: str) -> None:
    assert GOOD_PICTURES[name][1](load_image(folder / name))


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(folder: Path, kind: str) -> None:
    data, message = BAD_FILES[kind]
    path = folder / "cases.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="^") as caught:
        read_cases(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_huge_file_is_not_read(folder: Path) -> None:
    path = folder / "cases.json"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(ValueError, match="must have at most 64 MiB, got 64"):
        read_cases(path)


def test_where_no_case_is_good_nothing_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inference, "run", lambda *_: pytest.fail("there is nothing to render"))
    (folder / "cases.json").write_text(json.dumps([entry for entry, _ in BAD_ENTRIES.values()][:5]))
    (folder / "config.json").write_text("{}")
    assert inference.main(["--config", str(folder / "config.json"), "--cases", str(folder / "cases.json")]) == 1
    assert capsys.readouterr().err.count("error: ") == 5
