"""The multi-reference format for real data: one row, its JSON Schema, writer and reader round trips, places that are no disk."""

import copy
import io
import json
import multiprocessing
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from mosaic.data import (
    BucketBatchSampler,
    DatasetWriter,
    Manifest,
    MultiReferenceDataset,
    ReferenceRecord,
    SampleRecord,
    collate,
    sample_id,
)
from mosaic.data.multi_reference.records import reference_grid_of, target_grid_of
from mosaic.data.multi_reference.rows import parse_row
from mosaic.data.multi_reference.storage import PerProcess
from mosaic.data.multi_reference.writer import SCHEMA
from preprocess.matching.rows import read_pictures
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {"image_size": (32, 32), "reference_size": 32, "target_token_grid": (4, 4), "reference_token_grid": (4, 4)}
GOOD: dict[str, Any] = {
    "id": "a-1_B",
    "split": "train",
    "prompt": "a cat",
    "target": "images/a.png",
    "references": [{"image": "images/r.png", "phrase": "cat", "mask": None}],
    "points": "points/a.safetensors",
    "reference_grid": [4, 4],
    "target_grid": [4, 8],
    "metadata": "{}",
}
BAD_PATHS = ["", "/a", "../a", "a/../b", "a/..", "a\\b", "C:/a", "s3://a", "a\0b", None, 3]
BAD_SIDES = [[4], [4, 4, 4], [0, 4], [4, -1], [4, None], ["4", 4], [True, 4], [4, 65536], "44", 4, {}]


def rows_to_judge() -> list[dict[str, Any]]:
    """Good rows and every kind of bad one."""
    rows = [GOOD, *({key: value for key, value in GOOD.items() if key != left} for left in GOOD)]

    def with_field(name: str, *values: Any) -> None:
        rows.extend(GOOD | {name: value} for value in values)

    def with_reference(**values: Any) -> None:
        rows.append(GOOD | {"references": [GOOD["references"][0] | values]})

    with_field("id", "", "a b", "a/b", "é", "a\n", "..", 5, None, "x" * 300, "x" * 65537)
    with_field("split", "", None, 1, "x" * 65537)
    with_field("prompt", "", "  ", "\n", " a", None, 1, "é" * 65536, "é" * 65537)
    with_field("target", *BAD_PATHS, "a.png", "a/b:c.png", "a..b/c", "..a")
    with_field("points", *BAD_PATHS, "a" * 65536, "a" * 65537)
    with_field(
        "references",
        [],
        None,
        {},
        [None],
        [{}],
        ["a"],
        [{"image": "a.png"}],
        GOOD["references"] * 7,
        GOOD["references"] * 64,
        GOOD["references"] * 65,
    )
    with_field("reference_grid", *BAD_SIDES, None, [4096, 1], [4097, 1])
    with_field("target_grid", *BAD_SIDES, None, [65535, 65535])
    with_field("target_size", *BAD_SIDES, None, [512, 300], [65535, 1])
    with_field("scores", None, '{"clip": 0.3}', {"clip": 0.3}, 3)
    with_field("metadata", None, "no JSON, and not looked at", {}, "x" * 2**20, "x" * (2**20 + 1))
    with_field("unknown", 1)
    for path in BAD_PATHS:
        with_reference(image=path)
        with_reference(mask=path)
    for sides in [*BAD_SIDES, None, [3, 9], [1, 4097]]:
        with_reference(grid=sides)
    for name in ("phrase", "scores", "kind"):
        with_reference(**{name: 1})
        with_reference(**{name: None})
        with_reference(**{name: "x"})
        with_reference(**{name: "x" * 65537})
    return rows


def test_the_schema_agrees_with_the_reader() -> None:
    schema = json.loads((ROOT / "preprocess/manifest.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    accepted = []
    for values in rows_to_judge():
        try:
            parse_row(copy.deepcopy(values), "row")
            read = True
        except ValueError:
            read = False
        assert validator.is_valid(values) == read, values
        accepted.append(read)
    assert 15 < sum(accepted) < len(accepted) - 70


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def record(index: int = 0, num_references: int = 2, matched: bool = True, target: Any = None, **values: Any) -> SampleRecord:
    """Reference 0 is square, the others are wide; reference k owns row k of the 8 x 8 grid of a square target."""
    references = [
        ReferenceRecord(
            noise(40, 40 if k == 0 else 80, 10 * index + k),
            phrase=f"thing {k}",
            points=np.array([[k, 8 * k], [k + 8, 8 * k + 7]]) if matched else None,
            grid=None if k == 0 else (4, 8),
            scores={"clip": 0.25},
            kind="object",
        )
        for k in range(num_references)
    ]
    picture = noise(48, 48, 99 + index) if target is None else target
    return SampleRecord(
        f"s{index}", "train", f"prompt {index}", picture, references, (8, 8), (8, 8), {"source": "test"}, {"q": 1.0}, **values
    )


def write(root: Path, *records: SampleRecord, **options: Any) -> Path:
    with DatasetWriter(root, **options) as writer:
        for sample in records:
            writer.add(sample)
    return root


def test_round_trip_of_every_field(tmp_path: Path) -> None:
    root = write(tmp_path / "d", record(num_references=6))
    row = Manifest(root, "train").row(0)
    assert (row.id, row.split, row.prompt, row.target_size) == ("s0", "train", "prompt 0", (48, 48))
    assert [reference.phrase for reference in row.references] == [f"thing {k}" for k in range(6)]
    assert [tuple(reference.grid) for reference in row.references] == [(8, 8), *[(4, 8)] * 5]
    assert json.loads(row.metadata) == {"source": "test"}
    stored = pq.read_table(root / "manifest.parquet").to_pylist()[0]
    assert (stored["scores"], stored["references"][1]["scores"], stored["references"][1]["kind"]) == (
        '{"q": 1.0}',
        '{"clip": 0.25}',
        "object",
    )
    schema = json.loads((ROOT / "preprocess/manifest.schema.json").read_text())
    assert Draft202012Validator(schema).is_valid(stored)


def test_references_of_another_aspect(tmp_path: Path) -> None:
    sample = MultiReferenceDataset(write(tmp_path / "d", record()), **OPTIONS)[0]
    assert sample.references.shape == (2, 3, 32, 32)
    assert (sample.references[1][:, :8] == 1).all()
    assert (sample.references[1][:, 24:] == 1).all()
    assert (sample.references[1][:, 8:24] < 1).any(dim=0).all()
    # Reference 0: u 0 and 8 of 8 x 8 lie in token 0 of 4 x 4. Reference 1: cells (0, 1) and (1, 1) of its 4 x 8 grid over rows 8..24
    # of 32: cell centres at y = 10 and 14, x = 6, so token (1, 0). Targets: v 0, 7 -> tokens 0, 3; v 8, 15 -> tokens 0, 3, which
    # reference 0 keeps.
    assert sample.points[0].tolist() == [[0, 0]]
    assert sample.points[1].tolist() == []
    alone = record(num_references=2)
    alone = SampleRecord("t", "train", "p", alone.target, alone.references[1:], (8, 8), (8, 8))
    sample = MultiReferenceDataset(write(tmp_path / "e", alone), **OPTIONS)[0]
    assert sample.points[0].tolist() == [[4, 0]]


def test_samples_without_points_are_named_and_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "d", record(0), record(1, matched=False), record(2))
    (root / "points/s2.safetensors").unlink()
    dataset = MultiReferenceDataset(root, **OPTIONS)
    assert [dataset[i].missing for i in range(3)] == [(), ("points",), ("points",)]
    assert [list(points.shape) for points in dataset[1].points] == [[0, 2], [0, 2]]
    assert dataset.report() == {"samples": 3, "found_points": 1, "missing_points": 2, "references_2": 3}
    (root / "points/s0.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        dataset[0]


def test_what_follows_a_dot_is_left_alone(tmp_path: Path) -> None:
    root = write(tmp_path / "d", record())
    points = {"0": torch.tensor([[0, 0]], dtype=torch.int32), "1": torch.zeros(0, 2, dtype=torch.int32)}
    save_file(points | {"0.similarity": torch.ones(1, dtype=torch.float16)}, root / "points/s0.safetensors")
    assert MultiReferenceDataset(root, **OPTIONS)[0].points[0].tolist() == [[0, 0]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_picture_files_are_copied_or_made_png(tmp_path: Path, kind: str) -> None:
    data = encoded(noise(48, 64), kind)
    (tmp_path / "in").write_bytes(data)
    for pictures, given in (("given", data), ("given", tmp_path / "in"), ("png", data)):
        root = tmp_path / f"{pictures}{type(given).__name__}"
        write(root, record(target=given), pictures=pictures)
        row = Manifest(root, "train").row(0)
        assert row.target_size == (48, 64)
        assert ((root / row.target).read_bytes() == data) == (pictures == "given")
        assert np.array_equal(np.asarray(Image.open(root / row.target)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_sizes_mean_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    root = write(tmp_path / "d", record(target=encoded(noise(40, 60), "JPEG", exif=exif)))
    assert Manifest(root, "train").row(0).target_size == (60, 40)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (record(target=b"no picture"), "cannot be decoded as a picture"),
        (record(target=encoded(noise(48, 48), "PNG")[:-300]), "cannot be decoded as a picture"),
        (record(target=Path("nowhere.png")), "file not found: nowhere.png"),
        (SampleRecord("a", "train", " ", noise(8, 8), [ReferenceRecord(noise(8, 8))], (4, 4), (4, 4)), "prompt must not be empty"),
        (SampleRecord("a", "train", "p", noise(8, 8), [], (4, 4), (4, 4)), "at least one reference"),
        (SampleRecord("a", "train", "p", noise(8, 8), [ReferenceRecord(noise(8, 8))], (4, 0), (4, 4)), "reference_grid must be two integers"),
        (
            SampleRecord("a", "train", "p", noise(8, 8), [ReferenceRecord(noise(8, 8), mask=np.ones((4, 4)))], (4, 4), (4, 4)),
            "mask must have the target's size 8 x 8",
        ),
        (
            SampleRecord(
                "a", "train", "p", noise(8, 8),
                [ReferenceRecord(noise(8, 8), points=np.zeros((0, 2), int)), ReferenceRecord(noise(8, 8))], (4, 4), (4, 4),
            ),
            r"references\[1\]: must have points, for other references have",
        ),
    ],
)  # fmt: skip
def test_the_writer_refuses_and_leaves_nothing(tmp_path: Path, broken: SampleRecord, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message), DatasetWriter(tmp_path / "d") as writer:
        writer.add(broken)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic.data.multi_reference.writer.ROWS_PER_GROUP", 3)
    root = write(tmp_path / "d", *(record(i, 1 + i % 3) for i in range(8)))
    assert [pq.ParquetFile(root / "manifest.parquet").metadata.row_group(g).num_rows for g in range(3)] == [3, 3, 2]
    dataset = MultiReferenceDataset(root, **OPTIONS)
    assert [dataset[i].id for i in (7, 0, 3, 4, 2, 6)] == ["s7", "s0", "s3", "s4", "s2", "s6"]
    assert dataset.num_references.tolist() == [1 + i % 3 for i in range(8)]
    assert list(dataset.manifest.column("prompt")) == [f"prompt {i}" for i in range(8)]
    with pytest.raises(ValueError, match="must be unique"):
        write(tmp_path / "e", *(record(i) for i in (0, 1, 2, 3, 0)))


def test_splits_across_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic.data.multi_reference.writer.ROWS_PER_GROUP", 2)
    samples = [record(i) for i in range(7)]
    held_out = {1, 2, 3, 6}
    samples = [SampleRecord(**vars(s) | {"split": "heldout" if i in held_out else "train"}) for i, s in enumerate(samples)]
    root = write(tmp_path / "d", *samples)
    manifest = Manifest(root, "heldout")
    assert [manifest.row(i).id for i in range(4)] == ["s1", "s2", "s3", "s6"]
    assert list(manifest.column("id")) == ["s1", "s2", "s3", "s6"]
    assert "manifest.parquet[6]" in manifest.place(3)
    assert len(Manifest(root, None)) == 7


def test_sample_id_is_over_pixels(tmp_path: Path) -> None:
    picture, reference = noise(5, 7), noise(6, 6, 1)
    name = sample_id([picture, reference], "a cat")
    assert re.fullmatch("[0-9a-f]{32}", name)
    reread = Image.open(io.BytesIO(encoded(picture, "PNG", compress_level=0)))
    assert sample_id([reread, reference], "a cat") == name
    turned = Image.frombytes("RGB", (5, 7), picture.tobytes())
    others = [([turned, reference], "a cat"), ([reference, picture], "a cat"), ([picture, reference], "a dog"), ([picture], "a cat")]
    assert len({name, *(sample_id(*other) for other in others)}) == 5


def test_default_grids() -> None:
    assert target_grid_of((512, 512), 64) == (64, 64)
    assert target_grid_of((256, 1024), 64) == (32, 128)
    assert target_grid_of((896, 1152), 64) == (57, 73)
    assert reference_grid_of((300, 300), 64) == (64, 64)
    assert reference_grid_of((300, 600), 64) == (32, 64)
    assert reference_grid_of((601, 300), 64) == (64, 32)


def copy_to_memory(root: Path, name: str) -> str:
    filesystem = fsspec.filesystem("memory")
    for path in root.rglob("*"):
        if path.is_file():
            filesystem.pipe(f"/{name}/{path.relative_to(root).as_posix()}", path.read_bytes())
    return f"memory://{name}"


def test_any_address_of_fsspec(tmp_path: Path) -> None:
    root = write(tmp_path / "d", record(0), record(1, matched=False))
    local, remote = (MultiReferenceDataset(place, **OPTIONS) for place in (root, copy_to_memory(root, "set")))
    for index in range(2):
        assert torch.equal(local[index].target, remote[index].target)
        assert torch.equal(local[index].references, remote[index].references)
        assert remote[index].missing == local[index].missing
        assert [p.tolist() for p in remote[index].points] == [p.tolist() for p in local[index].points]
    assert remote.report() == local.report()
    assert remote.manifest.place(0).startswith("memory://set/manifest.parquet[0]")
    with pytest.raises(ValueError, match="must be in a local folder, got memory://set/images/x"):
        remote.manifest.file("images/x", "here")
    with pytest.raises(FileNotFoundError, match="memory://none: there is no such folder"):
        MultiReferenceDataset("memory://none", **OPTIONS)
    with pytest.raises(ValueError, match="fsspec cannot serve this address"):
        MultiReferenceDataset("nosuch://set", **OPTIONS)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_read_what_the_parent_reads(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic.data.multi_reference.writer.ROWS_PER_GROUP", 3)
    dataset = MultiReferenceDataset(write(tmp_path / "d", *(record(i) for i in range(10))), **OPTIONS)
    expected = [dataset[i] for i in range(10)]  # the parent's file is open before the workers start
    sampler = BucketBatchSampler(dataset.batch_keys, 2, seed=0)
    context = multiprocessing.get_context(method)
    if method == "forkserver":  # the data set travels pickled, as it does to spawned workers
        forks.start_server()
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=2, multiprocessing_context=context)
    count = 0
    for batch in loader:
        for name, target in zip(batch.ids, batch.targets, strict=True):
            assert torch.equal(target, expected[int(name[1:])].target)
            count += 1
    assert count == 10


def test_open_files_are_not_shared_with_forks() -> None:
    value = PerProcess(os.getpid)
    assert value.get() == os.getpid()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put((os.getpid(), value.get())))
    child.start()
    own, held = queue.get()
    child.join()
    assert own == held != os.getpid()
    assert pickle.loads(pickle.dumps(value))._process is None


def test_buckets(tmp_path: Path) -> None:
    sizes = [(48, 48), (48, 96), (96, 48), (50, 90), (48, 50)]
    samples = []
    for index, size in enumerate(sizes):
        grid = target_grid_of(size, 16)
        points = [[0, cell] for cell in range(grid[0] * grid[1])]
        samples.append(
            SampleRecord(f"s{index}", "train", "p", noise(*size), [ReferenceRecord(noise(32, 32), points=np.array(points))], (8, 8), grid)
        )
    buckets = [(32, 32), (24, 48), (48, 24)]
    dataset = MultiReferenceDataset(write(tmp_path / "d", *samples), **OPTIONS, buckets=buckets)
    assert dataset.bucket.tolist() == [0, 1, 2, 1, 0]
    assert dataset.batch_keys.tolist() == [[1, 0], [1, 1], [1, 2], [1, 1], [1, 0]]
    for index in range(5):
        height, width = buckets[dataset.bucket[index]]
        assert dataset[index].target.shape == (3, height, width)
    batches = list(BucketBatchSampler(dataset.batch_keys, 2, seed=0))
    assert sorted(sorted(batch) for batch in batches) == [[0, 4], [1, 3], [2, 2]]
    with pytest.raises(
        ValueError, match=re.escape("data.buckets: height and width must be positive multiples of the token size 8 px, got 20 x 32.")
    ):
        MultiReferenceDataset(tmp_path / "d", **OPTIONS, buckets=[(20, 32)])


def test_what_is_cut_off_has_no_points(tmp_path: Path) -> None:
    """A 3 x 1 target under a square bucket: only the middle third's cells keep their points, at their own places."""
    picture = np.zeros((32, 96, 3), np.uint8)
    picture[:, 32:64] = noise(32, 32)
    points = np.stack(
        [np.arange(4 * 12) % 16, np.arange(4 * 12)], axis=1
    )  # u = (v mod 12 columns mod 4, row) differs between the cells kept
    middle = [cell for cell in range(48) if 4 <= cell % 12 < 8]
    points[middle, 0] = np.arange(16)
    sample = SampleRecord("s", "train", "p", Image.fromarray(picture), [ReferenceRecord(noise(32, 32), points=points)], (4, 4), (4, 12))
    read = MultiReferenceDataset(write(tmp_path / "d", sample), **OPTIONS)[0]
    assert read.points[0].tolist() == [[u, u] for u in range(16)]
    assert np.array_equal(np.rint((read.target.permute(1, 2, 0).numpy() + 1) * 127.5), picture[:, 32:64])


def rewritten(root: Path, change: Callable[[int, dict[str, Any]], Any], copies: int = 1) -> Path:
    """A data set whose manifest's rows were changed; `change` gets a row's number. A row may be there several times, under other ids."""
    rows = [row for _ in range(copies) for row in pq.read_table(root / "manifest.parquet").to_pylist()]
    for number, row in enumerate(rows):
        row["id"] = f"{row['id']}_{number}"
        change(number, row)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), root / "manifest.parquet")
    return root


def test_a_stated_size_is_compared_with_the_picture(tmp_path: Path) -> None:
    """By all that read the picture: training, the doctor, matching; a size that is believed decides the bucket, and what is cut off."""
    root = write(tmp_path / "d", record(0, 1, target=noise(32, 64)), record(1, 1))
    rewritten(root, lambda number, row: row.update(target_size=[[64, 32], [48, 480]][number]))
    dataset = MultiReferenceDataset(root, **OPTIONS, buckets=[(32, 32), (16, 64)])
    turned = (
        r'manifest\.parquet\[0\] \(id "s0_0"\)\.target: target_size says 64 x 32 px .*images/s0_target\.png has 32 x 64\. Height and width'
    )
    for read in (dataset.__getitem__, dataset.inspect, lambda index: read_pictures(dataset.manifest, dataset.manifest.row(index))):
        with pytest.raises(ValueError, match=turned):
            read(0)
        with pytest.raises(ValueError, match="says 48 x 480 px .* has 48 x 48. Put the right size"):
            read(1)
    rewritten(root, lambda number, row: row.update(target_size=[[32, 64], [48, 48]][number]))
    assert [MultiReferenceDataset(root, **OPTIONS)[index].missing for index in range(2)] == [(), ()]


def test_a_grid_that_stands_for_the_size_is_compared_with_the_picture(tmp_path: Path) -> None:
    root = write(tmp_path / "d", record(0, 1, target=noise(32, 64)), record(1, 1, target=noise(45, 44)))
    rewritten(root, lambda _, row: row.update(target_size=None))
    dataset = MultiReferenceDataset(root, **OPTIONS, buckets=[(32, 32), (16, 64), (32, 40)])
    for read in (dataset.__getitem__, dataset.inspect):
        with pytest.raises(
            ValueError, match="target_grid: 8 x 8 cells stand for the target's aspect, .*images/s0_target.png has 32 x 64 px"
        ):
            read(0)
    assert dataset[1].target.shape == (3, 32, 32)
    assert MultiReferenceDataset(root, **OPTIONS, buckets=[(32, 32)])[0].missing == ()  # one bucket takes all


def test_a_mask_has_the_size_of_its_target(tmp_path: Path) -> None:
    masked = ReferenceRecord(noise(40, 40), mask=np.ones((32, 64)))
    root = write(tmp_path / "d", SampleRecord("s", "train", "p", noise(32, 64), [masked], (8, 8), (8, 16)))
    dataset = MultiReferenceDataset(root, **OPTIONS)
    assert dataset.inspect(0).masks[0].all()
    Image.new("L", (32, 64), 255).save(root / "images/s_mask0.png")
    for read in (dataset.inspect, lambda index: read_pictures(dataset.manifest, dataset.manifest.row(index))):
        with pytest.raises(
            ValueError, match=r"references\[0\]\.mask: a mask must have its target's size, 32 x 64 .*s_mask0\.png has 64 x 32"
        ):
            read(0)


BEYOND: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda row: row.update(references=row["references"] * 65), r"references: must be at most 64, got 65"),
    (lambda row: row.update(target_grid=[65535, 65535]), r"target_grid: must be at most 4096 in both sides"),
    (lambda row: row["references"][0].update(grid=[4097, 1]), r"references\[0\]\.grid: must be at most 4096"),
    (lambda row: row.update(prompt="a" * 65537), "prompt: must have at most 65536 characters, got 65537"),
    (lambda row: row["references"][0].update(phrase="a" * 65537), r"references\[0\]\.phrase: must have at most 65536 characters"),
    (lambda row: row.update(metadata="a" * (2**20 + 1)), "metadata: must have at most 1048576 characters"),
]


@pytest.mark.parametrize(("change", "message"), BEYOND)
def test_bounds_of_a_row(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    root = rewritten(write(tmp_path / "d", record(0, 1)), lambda number, row: change(row) if number == 2 else None, copies=3)
    with pytest.raises(ValueError, match=rf'manifest\.parquet\[2\] \(id "s0_2"\)\.{message}'):
        MultiReferenceDataset(root, **OPTIONS, max_references=10**6)


def test_bounds_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file says of itself is looked at before it is decoded: numbers of references that overflow, texts beyond all memory, points."""
    root = write(tmp_path / "d", record(0, 1))
    points = {"0": torch.zeros(0, 2, dtype=torch.int32), "0.more": torch.zeros(2**20 + 1024 * 64, dtype=torch.uint8)}
    save_file(points, root / "points/s0.safetensors")
    for data in (root, copy_to_memory(root, "bounds")):
        with pytest.raises(ValueError, match=r"points: the file must have at most 1114112 bytes"):
            MultiReferenceDataset(data, **OPTIONS)[0]
    rewritten(root, lambda _, row: row.update(references=row["references"] * 40_000))
    with pytest.raises(ValueError, match=r"references: must be at most 64, got 40000"):
        MultiReferenceDataset(root, **OPTIONS, max_references=10**6)
    monkeypatch.setattr("mosaic.data.multi_reference.parquet_table.MAX_GROUP_BYTES", 2**20)
    rewritten(root, lambda _, row: row.update(references=row["references"][:1], prompt="a" * 2**21))
    with pytest.raises(ValueError, match="row group 0: must have at most 1 MiB unpacked, got 2"):
        MultiReferenceDataset(root, **OPTIONS)


def test_a_schema_that_contradicts_its_columns(tmp_path: Path) -> None:
    """One bit: the column split would always be there. pyarrow ends the process if its part of the file's own description is asked for."""
    manifest = write(tmp_path / "d", record(0, 1)) / "manifest.parquet"
    data = manifest.read_bytes()
    assert data.count(b"\x25\x02\x18\x05split") == 1
    manifest.write_bytes(data.replace(b"\x25\x02\x18\x05split", b"\x25\x0a\x18\x05split"))
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        MultiReferenceDataset(manifest.parent, **OPTIONS)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    root = write(tmp_path / "d", record(0, 1), record(1, 1))
    (root / "images/loop.png").symlink_to(root / "images/loop.png")
    rewritten(root, lambda number, row: row.update(target=["x" * 300, "images/loop.png"][number]))
    dataset = MultiReferenceDataset(root, **OPTIONS)
    for index, reason in enumerate(("File name too long", "links lead in a circle|Too many levels of symbolic links|file not found")):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"manifest\.parquet\[{index}\] .*\.target: .*({reason})"):
            dataset[index]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    root = write(tmp_path / "d", record(0, 1))
    table = pq.read_table(root / "manifest.parquet")
    pq.write_table(table.append_column("prompt", table["prompt"]), root / "manifest.parquet")
    with pytest.raises(ValueError, match="the column prompt must be there once, but is there 2 times"):
        MultiReferenceDataset(root, **OPTIONS)
    references = table["references"].combine_chunks()
    fields = [references.values.field(number) for number in range(references.values.type.num_fields)]
    names = [field.name for field in references.values.type]
    twice = pa.StructArray.from_arrays([*fields, fields[names.index("image")]], [*names, "image"])
    place = table.schema.get_field_index("references")
    pq.write_table(table.set_column(place, "references", pa.ListArray.from_arrays(references.offsets, twice)), root / "manifest.parquet")
    with pytest.raises(ValueError, match=r"the column references\[\]\.image must be there once, but is there 2 times"):
        MultiReferenceDataset(root, **OPTIONS)


def test_an_old_manifest_reads(tmp_path: Path) -> None:
    """As the first writer wrote it: no optional columns, one row group without checksums."""
    root = write(tmp_path / "d", record(0, 1))
    fields = [(name, pa.string()) for name in ("id", "split", "prompt", "target", "points", "metadata")]
    reference = pa.struct([(name, pa.string()) for name in ("image", "phrase", "mask")])
    fields += [("references", pa.list_(reference)), ("reference_grid", pa.list_(pa.int32())), ("target_grid", pa.list_(pa.int32()))]
    rows = pq.read_table(root / "manifest.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), root / "manifest.parquet")
    dataset = MultiReferenceDataset(root, **OPTIONS, buckets=[(16, 64), (32, 32)])
    assert dataset.manifest.row(0).target_size is None
    assert dataset.bucket.tolist() == [1]
    assert dataset[0].points[0].tolist() == [[0, 0]]
