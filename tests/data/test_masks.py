"""Masks of other tools: what has one meaning is read so, what has several is refused by name."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mosaic.data import DatasetWriter, Manifest, MultiReferenceDataset, ReferenceRecord, SampleRecord
from mosaic.data.masks import decode_mask, mask_picture, mask_problem, read_mask
from mosaic.data.semalign.points import corner_cells
from mosaic.images import read_picture
from preprocess import convert
from preprocess.composing import read_panel
from preprocess.matching.rows import read_pictures
from scripts.doctor import command as doctor

SEEN = np.zeros((24, 32), bool)
SEEN[5:17, 8:20] = True
LABELS = SEEN.astype(np.uint8)  # 0 and 1
PHOTO = np.random.default_rng(3).integers(0, 256, (24, 32, 3), np.uint8)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0]  # the first colours of Pascal VOC's palette


def palette(numbers: np.ndarray, colours: list[int] = VOC) -> Image.Image:
    image = Image.fromarray(numbers)
    image = Image.frombytes("P", image.size, numbers.tobytes())
    image.putpalette(colours)
    return image


def with_alpha(colours: np.ndarray | tuple[int, ...], alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([np.broadcast_to(colours, (*SEEN.shape, 3)).astype(np.uint8), alpha.astype(np.uint8)]))


def transparent_palette() -> Image.Image:
    image = palette(LABELS)
    image.info["transparency"] = 0
    return image


def coloured(*colours: tuple[int, int, int]) -> Image.Image:
    """Background, subject, and a second subject where there are three."""
    numbers = LABELS.copy()
    if len(colours) > 2:
        numbers[18:22, 22:30] = 2
    return Image.fromarray(np.array(colours, np.uint8)[numbers])


def as_jpeg(image: Image.Image, quality: int = 60) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


GOOD: dict[str, Callable[[], Image.Image]] = {
    "0 and 255": lambda: Image.fromarray(LABELS * 255),
    "0 and 1": lambda: Image.fromarray(LABELS),
    "0 and 38": lambda: Image.fromarray(LABELS * 38),
    "bilevel": lambda: Image.fromarray(SEEN),
    "16 bits": lambda: Image.fromarray(LABELS.astype(np.uint16) * 65535),
    "16 bits, 0 and 1": lambda: Image.fromarray(LABELS.astype(np.uint16)),
    "16 bits, 0 and 255": lambda: Image.fromarray(LABELS.astype(np.uint16) * 255),
    "16 bits, soft": lambda: Image.fromarray(np.where(SEEN, 50_000, 3).astype(np.uint16)),
    "32 bits, 0 and 1": lambda: Image.fromarray(LABELS.astype(np.int32)),
    "floats, 0 and 1": lambda: Image.fromarray(LABELS.astype(np.float32)),
    "palette of Pascal VOC": lambda: palette(LABELS),
    "palette of greys": lambda: palette(LABELS, [0, 0, 0, 255, 255, 255]),
    "palette, white first": lambda: palette(1 - LABELS, [255, 255, 255, 0, 0, 0]),
    "palette of one colour": lambda: palette(LABELS, [0] * 9),
    "palette of numbers": lambda: palette(LABELS, [0, 0, 0, 1, 1, 1]),
    "palette, transparent background": transparent_palette,
    "black, alpha": lambda: with_alpha((0, 0, 0), LABELS * 255),
    "white, alpha": lambda: with_alpha((255, 255, 255), LABELS * 255),
    "white on black, alpha": lambda: with_alpha(LABELS[..., None] * 255, LABELS * 255),
    "black on white, alpha": lambda: with_alpha(255 - LABELS[..., None] * 255, LABELS * 255),
    "alpha of 0 and 1": lambda: with_alpha((0, 0, 0), LABELS),
    "cut-out": lambda: with_alpha(PHOTO, LABELS * 255),
    "alpha that says nothing": lambda: with_alpha(LABELS[..., None] * 255, LABELS * 0 + 255),
    "grey and alpha": lambda: with_alpha((0, 0, 0), LABELS * 255).convert("LA"),
    "premultiplied grey": lambda: with_alpha((255, 255, 255), LABELS * 255).convert("LA").convert("La"),
    "one label, red": lambda: coloured((0, 0, 0), (255, 0, 0)),
    "one label, nearly black": lambda: coloured((0, 0, 0), (1, 0, 0)),
    "grey channels": lambda: coloured((0, 0, 0), (255, 255, 255)),
    "JPEG": lambda: as_jpeg(Image.fromarray(LABELS * 255)),
    "JPEG of colours": lambda: as_jpeg(coloured((0, 0, 0), (255, 255, 255))),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("as_file", [False, True])
def test_one_meaning_is_read(name: str, as_file: bool, tmp_path: Path) -> None:
    image = GOOD[name]()
    if as_file:
        path = tmp_path / ("a.tif" if image.mode in ("F", "I") else "a.png")
        if image.mode in ("La",):
            pytest.skip("no file has it")
        image.save(path)
        found = decode_mask(read_picture(path), "a")
    else:
        found = read_mask(image)
    assert found.dtype == bool
    assert np.array_equal(found, SEEN)


def test_soft_edges_are_cut_in_the_middle() -> None:
    """As they always were: 128 is seen, 127 is not."""
    values = np.arange(256, dtype=np.uint8).reshape(8, 32)
    for image in (Image.fromarray(values), Image.fromarray(values).convert("RGB")):
        assert np.array_equal(read_mask(image), values > 127)
    blurred = np.clip(np.hypot(*np.mgrid[-60:60, -60:60]) * -9 + 300, 0, 255).astype(np.uint8)
    assert np.array_equal(read_mask(Image.fromarray(blurred)), blurred > 127)
    few = np.kron(np.array([[0, 0, 64], [0, 64, 191], [64, 191, 255]], np.uint8), np.ones((1, 1), np.uint8))
    assert np.array_equal(read_mask(Image.fromarray(few)), few > 127)


TWO = LABELS.copy()
TWO[18:22, 22:30] = 2


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(TWO), "has 3 from 0 to 2 (mode L): 0, 1, 2; they look like labels of several subjects, or are too dark"),
        (Image.fromarray(TWO.astype(np.uint16)), "has 3 from 0 to 2 (mode I;16): 0, 1, 2"),
        (Image.fromarray(np.where(TWO == 2, 255, LABELS).astype(np.uint8)), "has 3 from 0 to 255 (mode L): 0, 1, 255"),
        (Image.fromarray(LABELS + 1), "has 2 from 1 to 2 (mode L): 1, 2"),
        (Image.fromarray(LABELS.astype(np.int32) - 1), "has 2 from -1 to 0 (mode I)"),
        (Image.fromarray(np.linspace(0, 0.7, 768, dtype=np.float32).reshape(24, 32)), "(mode F)"),
        (Image.fromarray(np.where(SEEN, np.nan, 0).astype(np.float32)), "must have finite values"),
        (as_jpeg(Image.fromarray(LABELS * 40)), "too dark"),
        (palette(TWO), "has 3 colours (mode P): (0, 0, 0), (0, 128, 0), (128, 0, 0); they look like labels"),
        (coloured((0, 0, 0), (255, 0, 0), (0, 255, 0)), "has 3 colours (mode RGB)"),
        (coloured((255, 0, 0), (0, 255, 0)), "has 2 colours (mode RGB): (0, 255, 0), (255, 0, 0)"),
        (coloured((255, 255, 255), (255, 0, 0)), "has 2 colours (mode RGB)"),
        (as_jpeg(coloured((0, 0, 0), (255, 0, 0))), "colours (mode RGB): "),
        (Image.fromarray(PHOTO), "has 768 colours (mode RGB): "),
        (with_alpha(coloured((0, 0, 0), (255, 0, 0), (0, 255, 0)), (TWO > 0) * 255), "2 colours where it is opaque"),
        (with_alpha(LABELS[..., None] * 255, (np.arange(32) < 30) * np.full(SEEN.shape, 255)), "2 colours where it is opaque"),
        (with_alpha(LABELS[..., None] * 255, LABELS * 0), "transparent everywhere, but has colours"),
    ],
)
def test_several_meanings_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_mask(image)
    assert str(caught.value).endswith("Save it with 255 where this subject is seen and 0 elsewhere (8 bits, one channel).")


def test_empty_and_full() -> None:
    blank = np.zeros_like(LABELS)
    for image in (Image.fromarray(blank), palette(blank), Image.fromarray(blank > 0), with_alpha((0, 0, 0), blank)):
        assert mask_problem(read_mask(image)) == "empty"
    for image in (Image.fromarray(blank + 255), Image.fromarray(blank + 1), palette(blank + 1), coloured((9, 0, 200), (9, 0, 200))):
        assert mask_problem(read_mask(image)) == "full"
    assert mask_problem(SEEN) == ""


def test_the_masks_of_semalign_keep_their_cells() -> None:
    soft = Image.fromarray(np.random.default_rng(5).integers(0, 256, (96, 96), np.uint8))
    assert torch.equal(corner_cells(mask_picture(read_mask(soft)), 16, 16), corner_cells(soft, 16, 16))


def stored(tmp_path: Path, mask: Image.Image) -> Path:
    """A data set of one sample, whose mask file is replaced."""
    target, reference = Image.fromarray(PHOTO), Image.fromarray(PHOTO[:, :24])
    points = np.array([[0, 5]])
    record = ReferenceRecord(reference, "a thing", points=points, mask=SEEN)
    with DatasetWriter(tmp_path / "set") as writer:
        writer.add(SampleRecord("one", "train", "a thing", target, [record], (4, 4), (3, 4)))
    mask.save(tmp_path / "set/images/one_mask0.png")
    return tmp_path / "set"


def open_set(root: Path) -> MultiReferenceDataset:
    return MultiReferenceDataset(root, image_size=(24, 32), reference_size=16, target_token_grid=(3, 4), reference_token_grid=(2, 2))


@pytest.mark.parametrize("name", ["0 and 1", "palette of Pascal VOC", "black, alpha", "16 bits, 0 and 1", "bilevel"])
def test_everybody_reads_the_same(name: str, tmp_path: Path) -> None:
    root = stored(tmp_path, GOOD[name]())
    manifest = Manifest(root, None)
    row = manifest.row(0)
    assert np.array_equal(read_pictures(manifest, row).references[0].target_mask, SEEN)  # matching
    assert np.array_equal(read_panel(manifest, row)[0].mask, SEEN)  # composing
    found = open_set(root).inspect(0)  # the doctor, and its pages
    cells = [row * 4 + column for row in range(3) for column in range(4) if SEEN[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].any()]
    assert found.masks[0].nonzero().flatten().tolist() == cells
    assert found.mask_problems == ("",)
    assert convert.main(["repository", str(root), str(tmp_path / "copy")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "copy/images/one_mask0.png")), LABELS * 255)  # converting


def test_a_mask_of_another_frame(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=re.escape("must have its target's size, 24 x 32 px (height x width), but images/one_mask0.png has 32")
    ):
        open_set(stored(tmp_path / "turned", Image.fromarray(LABELS.T * 255))).inspect(0)


def sample_folder(folder: Path, mask: Image.Image) -> None:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(len(folder.name) + ord(folder.name[0])).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(noise).save(folder / "target.png")
    Image.fromarray(noise[:, :20]).save(folder / "ref_0.png")
    (folder / "prompt.txt").write_text(f"a {folder.name}")
    mask.save(folder / "mask_0.png")


def test_empty_and_full_masks_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blank = np.zeros_like(LABELS)
    for name, mask in (("empty", blank), ("full", blank + 1), ("good", LABELS)):
        sample_folder(tmp_path / "src" / name, Image.fromarray(mask))
    assert convert.main(["folder", str(tmp_path / "src"), str(tmp_path / "set"), "--grid", "4"]) == 0
    said = capsys.readouterr().err
    ids = {row["metadata"].split('"')[3]: row["id"] for row in (Manifest(tmp_path / "set", None).values(index) for index in range(3))}
    assert (
        f"note: 1 masks are empty (their references are seen nowhere, so that matching finds no points), of the samples {ids['empty']}\n"
        in said
    )
    assert f"note: 1 masks are full (right where a subject fills it), of the samples {ids['full']}\n" in said

    sizes = ["--image-size", "16", "--reference-size", "16", "--token-size", "8", "--workers", "0"]
    assert doctor.main([str(tmp_path / "set"), *sizes]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"empty masks +1; first: {ids['empty']}\n", said)
    assert re.search(rf"full masks +1; first: {ids['full']}\n", said)
    assert f"1 of those without have an empty mask (samples {ids['empty']}), where matching can find none: mend these masks" in said


def test_the_converter_refuses_labels_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample_folder(tmp_path / "src/one", palette(TWO))
    assert convert.main(["folder", str(tmp_path / "src"), str(tmp_path / "set")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'src/one/mask_0.png'}: the mask must show one subject, but has 3 colours" in said
    assert not (tmp_path / "set").exists()
