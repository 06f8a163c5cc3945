"""Folders as people keep them: every file is used, or refused by its name; what is missing is said, with the command that makes it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosaic.data import Manifest
from mosaic.images import FORMATS, load_image, picture_suffixes
from preprocess import convert
from tests.runs import files_below


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def draw(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """The folder of a good sample."""
    draw(tmp_path / "in/a/target.png", 1)
    draw(tmp_path / "in/a/ref_0.png", 2)
    (tmp_path / "in/a/prompt.txt").write_text("a cat")
    return tmp_path / "in/a"


def converted(sample: Path, *flags: str) -> Manifest:
    dest = sample.parents[1] / "out"
    assert convert.main(["folder", str(sample.parent), str(dest), *flags]) == 0
    manifest = Manifest(dest, "train")
    shutil.rmtree(dest)
    return manifest


def refused(sample: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the refusal; nothing is written, and --skip-invalid lists the same."""
    before = files_below(sample.parents[1])
    assert convert.main(["folder", str(sample.parent), str(sample.parents[1] / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: {sample}")
    assert files_below(sample.parents[1]) == before
    return line


def test_all_formats_are_read_whatever_the_case_of_their_endings(sample: Path) -> None:
    endings = [".bmp", ".tif", ".TIFF", ".avif", ".PNG", ".JPG", ".jpeg", ".webp", ".gif", ".ppm", ".jp2", ".tga", ".ico", ".pgm"]
    assert {ending.lower() for ending in endings} <= picture_suffixes()
    assert len(FORMATS) == 12
    (sample / "target.png").rename(sample / "Target.PNG")
    (sample / "prompt.txt").rename(sample / "Prompt.TXT")
    for number, ending in enumerate(endings, start=1):
        image = picture(10 + number).convert("L" if ending == ".pgm" else "RGB")
        image.save(sample / f"{'REF' if number % 2 else 'ref'}_{number}{ending}")
    manifest = converted(sample)
    assert manifest.num_references.tolist() == [1 + len(endings)]


def test_order_and_masks_by_number(sample: Path, tmp_path: Path) -> None:
    for name in ("ref_10.bmp", "REF_2.png", "ref_b.png"):
        draw(sample / name, len(name))
    mask = np.zeros((24, 24), np.uint8)
    mask[2:5, 3:9] = 255
    Image.fromarray(mask).save(sample / "mask_02.BMP")
    assert convert.main(["folder", str(sample.parent), str(tmp_path / "out")]) == 0
    row = Manifest(tmp_path / "out", "train").row(0)
    wanted = [sample / name for name in ("ref_0.png", "REF_2.png", "ref_10.bmp", "ref_b.png")]
    assert [(tmp_path / "out" / entry.image).read_bytes() for entry in row.references] == [path.read_bytes() for path in wanted]
    assert [entry.mask is None for entry in row.references] == [True, False, True, True]
    assert (np.asarray(load_image(tmp_path / "out" / row.references[1].mask)) > 0).sum() == 18


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ref-1.png", "ref-1.png would be left out: a sample's folder holds target.*, ref_0.*, "),
        ("ref1.png", "ref1.png would be left out"),
        ("ref_1 copy.png", "ref_1 copy.png would be left out"),
        ("ref_1 (1).png", "ref_1 (1).png would be left out"),
        ("ref_.png", "ref_.png would be left out"),
        ("ref_1.heic", "pictures end in .png, .jpg, .jpeg, .webp, .avif, .tif, "),
        ("ref_1", "ref_1 would be left out"),
        ("caption.txt", "caption.txt would be left out"),
        ("mask.png", "mask.png would be left out"),
        ("more/ref_1.png", "more would be left out"),
        ("ref_1.png/x.png", "ref_1.png would be left out"),
        ("mask_1.png", "mask_1.png is the mask of no reference; found ref_0.png"),
        ("ref_0.jpg", "ref_0.jpg and ref_0.png are both the ref_0; keep one of them"),
        ("ref_00.png", "ref_0.png and ref_00.png are both the ref_0"),
        ("REF_0.png", "REF_0.png and ref_0.png are both the ref_0"),
        ("target.jpg", "target.jpg and target.png are both the target"),
        ("PROMPT.txt", "PROMPT.txt and prompt.txt are both the prompt"),
    ],
)
def test_what_would_be_left_out_is_refused(sample: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    path = sample / name
    if path.suffix in (".png", ".jpg"):
        draw(path, 7)
    else:
        path.write_text("x")
    assert message in refused(sample, capsys)
    draw(sample.parent / "b/target.png", 3)
    draw(sample.parent / "b/ref_0.png", 4)
    (sample.parent / "b/prompt.txt").write_text("a dog")
    dest = sample.parents[1] / "out"
    assert convert.main(["folder", str(sample.parent), str(dest), "--skip-invalid"]) == 0
    (listed,) = (sample.parents[1] / "out.invalid.txt").read_text().splitlines()
    assert message in listed
    assert Manifest(dest, "train").row(0).prompt == "a dog"


@pytest.mark.parametrize("name", ["target.png", "ref_0.png", "prompt.txt"])
def test_what_is_missing_is_named(sample: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (sample / name).unlink()
    assert f"{sample / name}: file not found" in refused(sample, capsys)


def test_litter_is_ignored_and_counted(sample: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "._ref_0.png",
        "._target.png",
        "Desktop.ini",
        "__MACOSX/a/ref_1.png",
        "../.DS_Store",
        "../__MACOSX/x",
    ):
        (sample / name).parent.mkdir(parents=True, exist_ok=True)
        (sample / name).write_text("x")
    (sample.parent / "README.md").write_text("mine")
    with caplog.at_level("INFO"):
        assert converted(sample).num_references.tolist() == [1]
    assert (
        "8 hidden files and files of operating systems are ignored: .DS_Store (2), ._* (2), Desktop.ini (1), Thumbs.db (1), __MACOSX (2)"
        in (caplog.text)
    )
    assert "beside the samples' folders, and not read: README.md" in caplog.text


def test_folders_one_level_off(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of a sample in place of the one that holds it, and pictures beside the samples' folders."""
    assert convert.main(["folder", str(sample), str(sample.parents[1] / "out")]) == 2
    assert f"{sample}: is the folder of one sample; name the folder that holds it, {sample.parent}" in capsys.readouterr().err
    draw(sample.parent / "1.png")
    assert convert.main(["folder", str(sample.parent), str(sample.parents[1] / "out")]) == 2
    assert "holds folders and pictures; 1.png would be left out" in capsys.readouterr().err


# ---- a flat folder


def test_a_flat_folder_becomes_sample_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    root, dest = tmp_path / "flat", tmp_path / "samples"
    for number, name in enumerate(("1.png", "2.JPG", "3.bmp")):
        draw(root / name, number)
    for name in ("1.txt", "2.TXT", "3.bmp.txt"):
        (root / name).write_text(f"caption of {name[0]}\n")
    (root / "Thumbs.db").write_text("x")
    with caplog.at_level("INFO"):
        assert convert.main(["folder", str(root), str(dest)]) == 0
    assert "1 hidden files and files of operating systems are ignored: Thumbs.db (1)" in caplog.text
    output = capsys.readouterr().out
    assert output.startswith(f"wrote 3 sample folders to {dest}\n{dest} is no data set yet, for its samples lack their references")
    assert f'for sample in {dest}/*/; do rembg i "$sample"target.* "$sample"ref_0.png; done' in output
    assert f"python preprocess/convert.py folder {dest} DATA" in output
    assert {name: data for name, data in files_below(dest).items() if name.endswith("prompt.txt")} == {
        f"{number}/prompt.txt": f"caption of {number}\n".encode() for number in (1, 2, 3)
    }
    assert (dest / "2/target.jpg").read_bytes() == (root / "2.JPG").read_bytes()
    assert convert.main(["folder", str(dest), str(tmp_path / "out")]) == 2
    assert f"{dest / '1/ref_0.png'}: file not found; a sample needs at least one" in capsys.readouterr().err
    for number in (1, 2, 3):
        draw(dest / f"{number}/ref_0.png", 50 + number)
    assert convert.main(["folder", str(dest), str(tmp_path / "out")]) == 0
    assert sorted(Manifest(tmp_path / "out", "train").column("prompt")) == [f"caption of {number}" for number in (1, 2, 3)]


def test_a_flat_folder_with_metadata(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    draw(root / "a.png", 1)
    draw(root / "more/b.png", 2)
    lines = [{"file_name": "a.png", "text": "a cat", "score": 3}, {"file_name": "more/b.png", "text": "a dog"}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert convert.main(["folder", str(root), str(tmp_path / "samples")]) == 0
    assert (tmp_path / "samples/a/prompt.txt").read_text() == "a cat\n"
    assert (tmp_path / "samples/more_b/prompt.txt").read_text() == "a dog\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.png", "", "b.png: must have one caption, in b.txt or metadata.jsonl; found none."),
        ("b.txt", "a dog", "b.txt: is the caption of no picture that is there."),
        ("a.caption", "a dog", "a.png: must have one caption"),
        ("a.jpg", "", "has the same name; rename one of them."),
        ("a.heic", "x", "a.heic: must be a picture (.png, "),
        ("metadata.csv", "x", "its caption (.txt, .caption) or metadata.jsonl. Take it away"),
        ("a.txt", " \n", "a.txt: the caption must not be empty."),
        ("metadata.jsonl", '{"file_name": "../x.png", "text": "a"}', "metadata.jsonl[0].file_name: must be relative to "),
        ("metadata.jsonl", '{"file_name": "x.png", "text": "a"}', "metadata.jsonl[0].file_name: file not found: "),
        ("metadata.jsonl", '{"file_name": "a.png"}', "metadata.jsonl[0]: must have one caption, as prompt or text or caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}', "a.png: must have one caption, in a.txt or metadata.jsonl; found "),
        ("metadata.jsonl", "[" * 100_000, "metadata.jsonl[0]: not valid JSON: "),
    ],
)
def test_flat_folders_that_are_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, message: str) -> None:
    root = tmp_path / "flat"
    draw(root / "a.png", 1)
    (root / "a.txt").write_text("a cat")
    if content:
        (root / name).write_text(content)
    else:
        draw(root / name, 2)
    before = files_below(tmp_path)
    assert convert.main(["folder", str(root), str(tmp_path / "samples")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: {root}")
    assert message in line
    assert files_below(tmp_path) == before


# ---- lists and columns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [\n{"prompt": "a"}]}', "must be a list of objects, as JSON ([{...}, {...}]) or JSON Lines (an object in every line), got "),
        ('[{"prompt": "a", "image_tgt_path": "../t.png", "image_path": "r.png"}]', '"images/1.png", and name the folder that holds all pictures by --image-root'),
        ('[{"prompt": "a", "image_tgt_path": "/t.png", "image_path": "r.png"}]', "are relative to --image-root (now "),
        ('[{"prompt": "a", "image_tgt_path": "t.png", "image_path": "r.png", "image_paths": ["s.png"]}]', "must have image_paths or image_path, got both"),
    ],
)  # fmt: skip
def test_lists_of_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "list.json").write_text(text)
    assert convert.main(["uno", str(tmp_path / "list.json"), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
