"""Damaged and hostile SemAlign files: a clear error that names the file, never a hang, a crash, code run from a file, or a wrong sample."""

import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mosaic.data import SemAlignDataset
from mosaic.data.semalign import store as semalign_store
from tests import semalign_set
from tests.semalign_set import SemAlignSet, needs_classic_zlib

pytestmark = needs_classic_zlib


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SemAlignSet:
    made = semalign_set.write_set(tmp_path_factory.mktemp("semalign") / "set", num_kept=2)
    SemAlignDataset(made.root)  # makes the index
    return made


@pytest.fixture
def copy(made: SemAlignSet, tmp_path: Path) -> SemAlignSet:
    root = tmp_path / "set"
    shutil.copytree(made.root, root)
    return SemAlignSet(root, made.kept, made.ids, made.num_rows)


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return Path.touch, (self.path,)


FIELD = torch.zeros(4096, 2, dtype=torch.int64)
RULE = "must hold one int64 tensor of shape [4096, 2]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (FIELD.int(), f"{RULE}, got torch.int32 [4096, 2]."),
        (FIELD[:1024], f"{RULE}, got torch.int64 [1024, 2]."),
        (FIELD.float(), f"{RULE}, got torch.float32"),
        (FIELD.to_sparse(), f"{RULE}, got Tensor."),
        ({"field": FIELD}, f"{RULE}, got dict."),
        (FIELD + 64, "(y, x) must lie in [0, 64), got [64, 64] for target cell 0."),
        (torch.cat([FIELD[1:], FIELD[:1] - 1]), "(y, x) must lie in [0, 64), got [-1, -1] for target cell 4095."),
    ],
)
def test_fields_of_another_form(copy: SemAlignSet, value: Any, message: str) -> None:
    path = copy.field_path(1, "geoaware")
    torch.save(value, path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        SemAlignDataset(copy.root)[1]


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_in_a_field_is_refused_unread(copy: SemAlignSet, tmp_path: Path, save: Callable) -> None:
    path = copy.field_path(0, "dift")
    save({"field": FIELD, "bomb": Bomb(tmp_path / "exploded")}, path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {RULE}; cannot be loaded as tensors alone')}"):
        SemAlignDataset(copy.root)[0]
    assert not (tmp_path / "exploded").exists()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, with bytes changed, zeroed or pushed in."""
    kind, at = rng.integers(4), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for position in rng.integers(len(data), size=int(rng.integers(1, 40))):
            flipped[position] ^= int(rng.integers(1, 256))
        return bytes(flipped)
    if kind == 2:
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    return data[:at] + rng.bytes(int(rng.integers(1, 100))) + data[at:]


def read_or_refuse(root: Path, names: tuple[str, ...], whole: SemAlignDataset) -> str:
    """Read both samples of a damaged set; an error must name one of the files, a sample must be well formed with the right id."""
    failure = ""
    try:
        found = SemAlignDataset(root)
        for index in range(2):
            sample = found[index]
            assert sample.id == whole.sample_id(index)
            assert sample.target.shape == (3, 512, 512)
            assert (sample.points[0].dtype, sample.points[0].shape[1:]) == (torch.int64, (2,))
            assert not len(sample.points[0]) or 0 <= int(sample.points[0].min()) <= int(sample.points[0].max()) < 1024
    except (ValueError, FileNotFoundError) as error:
        failure = str(error)
    assert not failure or any(name in failure for name in names), failure
    return "refused" if failure else "read"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on odd pictures
@pytest.mark.parametrize("what", ["parquet", "mask", "field", "index"])
def test_fuzzed_files(copy: SemAlignSet, what: str) -> None:
    paths = {
        "parquet": copy.root / "data/train-00000-of-00002.parquet",
        "mask": copy.mask_path(0),
        "field": copy.field_path(0, "dift"),
        "index": copy.root / "semalign_ids.parquet",
    }
    path, whole, rng = paths[what], SemAlignDataset(copy.root), np.random.default_rng(7)
    data, outcomes = path.read_bytes(), []
    index = (copy.root / "semalign_ids.parquet").read_bytes()
    for _ in range(25):
        (copy.root / "semalign_ids.parquet").write_bytes(index)
        path.write_bytes(damaged(data, rng))
        outcomes.append(read_or_refuse(copy.root, (path.name, "train-0000", "no sample", "none of"), whole))
    assert "refused" in outcomes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["mask", "coord"])
def test_fuzzed_archives(made: SemAlignSet, tmp_path: Path, name: str) -> None:
    root, rng = semalign_set.zip_set(made, tmp_path / "zipped"), np.random.default_rng(8)
    path, whole, outcomes = root / f"{name}.zip", SemAlignDataset(made.root), []
    data = path.read_bytes()
    for _ in range(25):
        path.write_bytes(damaged(data, rng))
        outcomes.append(read_or_refuse(root, (path.name,), whole))
    assert "refused" in outcomes


@pytest.mark.parametrize("member", ["/etc/passwd", "../mask/x.png", "mask/../../x.png", "mask\\x.png", "C:/x.png"])
def test_unsafe_member_names(made: SemAlignSet, tmp_path: Path, member: str) -> None:
    root = semalign_set.zip_set(made, tmp_path / "zipped")
    with zipfile.ZipFile(root / "mask.zip", "a") as archive:
        archive.writestr(zipfile.ZipInfo(member), b"")
    message = f'{root / "mask.zip"}: a member\'s name: must be relative to the archive, with "/" and without "..", got "'
    with pytest.raises(ValueError, match=re.escape(message)):
        SemAlignDataset(root)


def test_a_member_given_twice(made: SemAlignSet, tmp_path: Path) -> None:
    root = semalign_set.zip_set(made, tmp_path / "zipped")
    with zipfile.ZipFile(root / "mask.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(f"mask/{made.ids[0]}.png", b"")
    with pytest.raises(ValueError, match="twice; every name must be there once"):
        SemAlignDataset(root)


def test_members_and_files_that_are_too_large(copy: SemAlignSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = semalign_set.zip_set(copy, tmp_path / "zipped")
    with zipfile.ZipFile(root / "mask.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"mask/{copy.ids[0]}.png", bytes(20 * 2**20))
    with pytest.raises(ValueError, match=re.escape(f"{root / 'mask.zip'}[mask/{copy.ids[0]}.png]: must have at most 16777216 bytes")):
        SemAlignDataset(root)[0]
    monkeypatch.setattr(semalign_store, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match=re.escape(f"{copy.field_path(0, 'dift')}: must have at most 10 bytes")):
        SemAlignDataset(copy.root)[0]


def test_a_member_that_unpacks_to_more_than_it_says(copy: SemAlignSet, tmp_path: Path) -> None:
    root = semalign_set.zip_set(copy, tmp_path / "zipped")
    with zipfile.ZipFile(root / "mask.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"mask/{copy.ids[0]}.png", bytes(8 * 2**20))
    data = (root / "mask.zip").read_bytes()
    (root / "mask.zip").write_bytes(data.replace((8 * 2**20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=re.escape(f"{root / 'mask.zip'}[mask/{copy.ids[0]}.png]: cannot be read: Bad CRC-32")):
        SemAlignDataset(root)[0]


def test_a_field_that_unpacks_to_more_than_its_file(copy: SemAlignSet) -> None:
    """PyTorch's own format is a zip archive, which it would unpack whole."""
    path = copy.field_path(0, "dift")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/data/1", bytes(17 * 2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(
        ValueError, match=r"dift/.*: must hold one int64 tensor .*\(its parts have 178\d+ bytes unpacked, 16777216 are allowed\)"
    ):
        SemAlignDataset(copy.root)[0]


def test_odd_files(copy: SemAlignSet) -> None:
    path = copy.mask_path(0)
    Image.new("L", (512, 256)).save(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: a mask must be square, as its target is, got 512 x 256")):
        SemAlignDataset(copy.root)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{path}: must be a plain file.")):
        SemAlignDataset(copy.root)[0]
    path.rmdir()
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(ValueError, match=re.escape(f"{path}: must be a plain file.")):
        SemAlignDataset(copy.root)[0]
    path.unlink()
    path.symlink_to(copy.root / "gone.png")
    with pytest.raises(ValueError, match="is a link to a file that does not exist"):
        SemAlignDataset(copy.root)[0]


def with_image(data: bytes) -> dict[str, Any]:
    return semalign_set.row(1, image={"bytes": data, "path": "/etc/passwd"})


SMALL = semalign_set.encode(Image.new("RGB", (1040, 519)), "PNG")
LARGE = semalign_set.encode(Image.new("RGB", (2112, 1056)), "PNG")
CMYK = semalign_set.encode(Image.new("CMYK", (1048, 528)), "JPEG")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (with_image(b""), "[1].image: must hold the encoded picture itself, got none; pictures named by a path are not read."),
        (with_image(b"no picture"), "[1].image: the file cannot be decoded as a picture: its 10 bytes (no known picture format)."),
        (with_image(SMALL), "[1].image: must be at least 1040 x 520 px (width x height)"),
        (with_image(LARGE), "[1].image: must hold two panels of 512 px, got 2112 x 1056 px (width x height), of which panels of that size"),
        (
            with_image(CMYK),
            "[1]: has no id. Ids are hashes of PNG files, which hold no picture of mode CMYK, YCbCr or LAB, and this one has CMYK;",
        ),
        (semalign_set.row(1, image=None), "[1].image: must hold the encoded picture itself"),
        (semalign_set.row(1, description=None), "[1].description.item: must not be null."),
        (semalign_set.row(1, description={"item": "x", "description_0": None}), "[1].description.description_0: must not be null."),
    ],
)
def test_bad_rows_are_refused_when_they_are_read(tmp_path: Path, stored: dict[str, Any], message: str) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/x.parquet"
    pq.write_table(pa.Table.from_pylist([semalign_set.row(0), stored], semalign_set.SCHEMA), path)
    dataset = SemAlignDataset(tmp_path)
    assert dataset[0].missing == ("mask", "points")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}{message}')}"):
        dataset[1]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("image", pa.array([1, 2]), "the column image must hold encoded pictures, as bytes or in a struct with a field bytes, got int64"),
        ("image", pa.array([{"path": "x"}] * 2), "the column image must hold encoded pictures"),
        ("collection", pa.array([2, 2]), "the column collection must be a string, got int64"),
        ("quality_assessment", pa.array(["5", "5"]), "the column quality_assessment must be a struct, got string"),
        ("quality_assessment", pa.array([{"imageQuality": "5"}] * 2), "quality_assessment.imageQuality must be a number, got string"),
        ("description", pa.array([{"item": "x"}] * 2), "the column description must be a struct with a string description_0"),
    ],
)
def test_columns_of_another_type(tmp_path: Path, name: str, values: pa.Array, message: str) -> None:
    (tmp_path / "data").mkdir()
    table = pa.Table.from_pylist([semalign_set.row(0), semalign_set.row(1)], semalign_set.SCHEMA)
    path = tmp_path / "data/x.parquet"
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, values), path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        SemAlignDataset(tmp_path)
    pq.write_table(table.drop_columns([name]), path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: must have one column {name}. Found: ")):
        SemAlignDataset(tmp_path)


def test_a_stored_picture_may_not_start_other_programs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (1048, 528)).save(buffer, format="EPS")
    pq.write_table(pa.Table.from_pylist([with_image(buffer.getvalue())], semalign_set.SCHEMA), tmp_path / "data/x.parquet")
    with pytest.raises(ValueError, match="no known picture format"):
        SemAlignDataset(tmp_path)[0]
