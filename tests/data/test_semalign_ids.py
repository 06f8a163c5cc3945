"""Ids of SemAlign samples: the recipe, the canary, and the index file that keeps them."""

import hashlib
import io
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mosaic.data import SemAlignDataset
from mosaic.data.semalign import ids as semalign_ids
from mosaic.data.semalign.ids import canary_picture, deflate_library, pixel_digest, sample_id
from mosaic.data.semalign.rows import SemAlignRows
from tests import semalign_set
from tests.semalign_set import SemAlignSet, needs_classic_zlib

pytestmark = needs_classic_zlib


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SemAlignSet:
    made = semalign_set.write_set(tmp_path_factory.mktemp("semalign") / "set", num_kept=3)
    SemAlignDataset(made.root)
    return made


@pytest.fixture
def copy(made: SemAlignSet, tmp_path: Path) -> SemAlignSet:
    """A set of its own, with its index."""
    root = tmp_path / "set"
    shutil.copytree(made.root, root)
    return SemAlignSet(root, made.kept, made.ids, made.num_rows)


@pytest.fixture
def other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose deflate library packs other bytes."""

    def packed(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    monkeypatch.setattr(semalign_ids, "_png", packed)
    deflate_library.cache_clear()
    yield
    deflate_library.cache_clear()


def index_of(root: Path) -> Path:
    return root / "semalign_ids.parquet"


def test_canary() -> None:
    picture = canary_picture()
    assert picture.size == (256, 256)
    for x, y in ((0, 0), (255, 3), (17, 200)):
        assert picture.getpixel((x, y)) == tuple((7 * x + 13 * y + 29 * c + (x * y) % 17) % 256 for c in range(3))
    assert hashlib.sha256(picture.tobytes()).hexdigest().startswith("b009e3b5")
    assert len(semalign_ids._png(picture)) == 7883
    assert deflate_library() == "classic zlib"


def test_recipe() -> None:
    panel = canary_picture()
    identifier = sample_id(panel, "Cup", "A cup.")
    assert identifier == hashlib.sha256(b"Cup_A cup._69e86a5e").hexdigest()
    changed = panel.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert len({identifier, sample_id(changed, "Cup", "A cup."), sample_id(panel, "Cop", "A cup."), sample_id(panel, "Cup", "A cup")}) == 4
    assert pixel_digest(panel) == hashlib.sha256(panel.tobytes()).hexdigest() != pixel_digest(changed)


def test_a_colour_profile_enters_the_id_but_not_the_pixels(made: SemAlignSet) -> None:
    stored = made.kept[2]["image"]["bytes"]
    picture = Image.open(io.BytesIO(stored))
    assert "icc_profile" in picture.info
    panel = SemAlignDataset(made.root).stored(2)[1]
    plain = panel.copy()
    del plain.info["icc_profile"]
    assert sample_id(panel, "a", "b") != sample_id(plain, "a", "b")
    assert pixel_digest(panel) == pixel_digest(plain)


def test_index_file(made: SemAlignSet) -> None:
    rows = SemAlignRows(sorted((made.root / "data").iterdir()))
    table = pq.read_table(index_of(made.root))
    assert table.schema.equals(pa.schema([("row", pa.int64()), ("pixels", pa.string()), ("id", pa.string())]))
    assert table["row"].to_pylist() == rows.good.tolist() == [0, 2, 4]
    assert table["id"].to_pylist() == made.ids
    panels = [rows.read(row).panels()[0] for row in rows.good]
    assert table["pixels"].to_pylist() == [pixel_digest(panel) for panel in panels]
    names = {path.name for path in made.root.iterdir()}
    assert names - {"semalign_ids.parquet.lock"} == {"coord", "data", "mask", "semalign_ids.parquet"}


def test_the_index_saves_the_encoding(copy: SemAlignSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semalign_ids, "sample_id", lambda *_: pytest.fail("an id was computed anew"))
    dataset = SemAlignDataset(copy.root)
    assert [dataset[index].id for index in range(3)] == copy.ids


@pytest.mark.usefixtures("other_library")
def test_another_deflate_library_is_refused_without_an_index(copy: SemAlignSet) -> None:
    assert deflate_library() == "unknown"
    dataset = SemAlignDataset(copy.root)
    assert [dataset.sample_id(index) for index in range(3)] == copy.ids
    assert (dataset[0].missing, dataset.report()["canary"]) == ((), "unknown")
    path = index_of(copy.root)
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: the index of sample ids lacks 1 of 3 rows, and they cannot be computed here")):
        SemAlignDataset(copy.root)
    path.unlink()
    with pytest.raises(ValueError, match=r"lacks 3 of 3 rows.*deflate library in this process \(unknown, zlib .*classic zlib"):
        SemAlignDataset(copy.root)
    assert not path.exists()


def test_what_an_index_lacks_is_added(copy: SemAlignSet, monkeypatch: pytest.MonkeyPatch) -> None:
    path = index_of(copy.root)
    whole = pq.read_table(path)
    pq.write_table(whole.take([2, 0]), path)
    calls, compute = [], semalign_ids.sample_id
    monkeypatch.setattr(semalign_ids, "sample_id", lambda *arguments: calls.append(1) or compute(*arguments))
    assert SemAlignDataset(copy.root).sample_id(1) == copy.ids[1]
    assert len(calls) == 1
    assert pq.read_table(path).equals(whole)


@pytest.mark.parametrize(("rows_there", "is_readable"), [(0, True), (1, True), (1, False)])
def test_an_interrupted_index_goes_on(copy: SemAlignSet, monkeypatch: pytest.MonkeyPatch, rows_there: int, is_readable: bool) -> None:
    """A new one, one that knows a row and is completed, and one that has a row that could not be read."""
    path = index_of(copy.root)
    whole = pq.read_table(path)
    path.unlink()
    if rows_there:
        known = whole.slice(0, rows_there)
        if not is_readable:
            known = pa.Table.from_pylist([{"row": known["row"][0].as_py()}], known.schema)
        pq.write_table(known, path)
    missing = len(whole) - rows_there * is_readable
    monkeypatch.setattr(semalign_ids, "SAVE_EVERY", 1)
    calls, compute = [], semalign_ids.sample_id

    def stop_at_the_last(*arguments: object) -> str:
        calls.append(1)
        if len(calls) == missing:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(semalign_ids, "sample_id", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        SemAlignDataset(copy.root)
    assert path.exists() == bool(rows_there)
    assert path.with_name(path.name + ".partial").exists()
    SemAlignDataset(copy.root)
    assert len(calls) == missing + 1
    assert pq.read_table(path).equals(whole)
    assert not path.with_name(path.name + ".partial").exists()


def test_an_index_by_several_processes(copy: SemAlignSet, monkeypatch: pytest.MonkeyPatch) -> None:
    path = index_of(copy.root)
    whole = pq.read_table(path)
    path.unlink()
    monkeypatch.setattr(semalign_ids, "ROWS_PER_WORKER", 1)
    rows = SemAlignRows(sorted((copy.root / "data").iterdir()))
    semalign_ids.open_ids(path, rows, num_workers=2)
    assert pq.read_table(path).equals(whole)
    assert semalign_ids.has_all_ids(path, rows)
    pq.write_table(whole.slice(1), path)
    assert not semalign_ids.has_all_ids(path, rows)


def test_an_index_of_other_rows_is_refused(copy: SemAlignSet) -> None:
    path = index_of(copy.root)
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "row", pa.array([2, 0, 4])), path)
    dataset = SemAlignDataset(copy.root)
    where = re.escape(f"{copy.root / 'data/train-00000-of-00002.parquet'}[0]: the pixels are not those from which the index")
    with pytest.raises(ValueError, match=where):
        dataset[0]
    assert dataset[2].id == copy.ids[2]
    assert SemAlignDataset(copy.root, check_pixels=False)[0].id == copy.ids[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.drop_columns(["pixels"]), "must be a Parquet file of row, pixels and id"),
        (lambda table: table.set_column(0, "row", pa.array([0, 0, 2])), "must name every row once. Remove it"),
        (lambda table: table.set_column(2, "id", pa.array(["x", "../a", "b"])), "id must be 64 hexadecimal digits. Remove it"),
        (lambda table: table.set_column(2, "id", pa.array([{"a": 1}] * 3)), "must be a Parquet file of row, pixels and id"),
    ],
)
def test_damaged_indices_are_refused(copy: SemAlignSet, damage: object, message: str) -> None:
    path = index_of(copy.root)
    pq.write_table(damage(pq.read_table(path)), path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        SemAlignDataset(copy.root)


def test_an_index_that_cannot_be_written(copy: SemAlignSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"ids.parquet: the index of sample ids cannot be written .*data\.id_index"):
        SemAlignDataset(copy.root, id_index=tmp_path / "file/ids.parquet")


def test_unreadable_rows_are_entered_without_id_and_tried_again(copy: SemAlignSet, caplog: pytest.LogCaptureFixture) -> None:
    index_of(copy.root).unlink()
    path = copy.root / "data/train-00000-of-00002.parquet"
    whole = path.read_bytes()
    rows = pq.read_table(path).to_pylist()
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:2000]
    pq.write_table(pa.Table.from_pylist(rows, semalign_set.SCHEMA), path)
    dataset = SemAlignDataset(copy.root)
    assert "1 of 3 rows cannot be read; the first: row 2: " in caplog.text
    assert (len(dataset), dataset.report()["unreadable"]) == (3, 1)
    with pytest.raises(ValueError, match=re.escape(f"{path}[2].image: the file cannot be decoded as a picture: its 2000 bytes")):
        dataset[1]
    assert dataset[0].id == copy.ids[0]
    path.write_bytes(whole)
    assert SemAlignDataset(copy.root)[1].id == copy.ids[1]
