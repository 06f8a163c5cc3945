"""SemAlignDataset on a synthetic set in the released layout, against a plain twin of the released loader."""

import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from mosaic.data import BucketBatchSampler, SemAlignDataset, collate
from mosaic.data.semalign.rows import SemAlignRows
from mosaic.method.correspondence import validate_points
from tests import semalign_set
from tests.semalign_set import NEITHER, NO_MASK, NO_POINTS, SemAlignSet, needs_classic_zlib

pytestmark = needs_classic_zlib


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SemAlignSet:
    return semalign_set.write_set(tmp_path_factory.mktemp("semalign") / "set")


@pytest.fixture(scope="module")
def dataset(made: SemAlignSet) -> SemAlignDataset:
    return SemAlignDataset(made.root)


def test_rows_ids_prompts_and_panels(made: SemAlignSet, dataset: SemAlignDataset) -> None:
    assert len(dataset) == len(made.kept) == 8
    for index, stored in enumerate(made.kept):
        sample = dataset[index]
        assert sample.id == dataset.sample_id(index) == semalign_set.naive_id(stored)
        assert sample.prompt == stored["description"]["description_0"]
        assert torch.equal(sample.target, semalign_set.naive_panel(stored, (8, 8, 520, 520), 512))
        assert torch.equal(sample.references[0], semalign_set.naive_panel(stored, (528, 8, 1040, 520), 512))
        assert (sample.references.shape, sample.target.dtype) == ((1, 3, 512, 512), torch.float32)
    assert len({sample.id for sample in dataset}) == 8
    with pytest.raises(IndexError):
        dataset[8]


@pytest.mark.parametrize("image_size", [512, 1024])
@pytest.mark.parametrize("reference_size", [512, 1024])
@pytest.mark.parametrize("downsample", ["release", "vote"])
def test_points_equal_the_twin(made: SemAlignSet, image_size: int, reference_size: int, downsample: str) -> None:
    dataset = SemAlignDataset(made.root, image_size, downsample, reference_size=reference_size)
    twin = getattr(semalign_set, f"naive_{downsample}")
    for index in (0, 1, 2, 5, 7):
        mask = semalign_set.mask(index, size=(512, 1024, 500)[index % 3])
        expected = twin(*semalign_set.fields(index), mask, image_size, reference_size)
        supervision = dataset.supervision(index)
        points = dataset._points(supervision, downsample)
        assert points.dtype == torch.int64
        assert points.tolist() == [[u, v] for u, v in sorted(expected.items())]
        assert len(points) > 50
        validate_points([points], (reference_size // 16) ** 2, (image_size // 16) ** 2)
    sample = dataset[2]
    assert (sample.target.shape[1:], sample.references.shape[2:]) == ((image_size,) * 2, (reference_size,) * 2)
    assert torch.equal(sample.target, semalign_set.naive_panel(made.kept[2], (8, 8, 520, 520), image_size))
    assert sample.points[0].tolist() == dataset._points(dataset.supervision(2), downsample).tolist()


def test_both_ways_are_equal_on_the_grid_of_the_fields(made: SemAlignSet) -> None:
    vote, release = (SemAlignDataset(made.root, image_size=1024, downsample=name)[0].points[0] for name in ("vote", "release"))
    assert torch.equal(vote, release)
    assert len(vote) > 500


def test_missing_parts_are_named_and_counted(made: SemAlignSet, dataset: SemAlignDataset) -> None:
    expected = {NO_MASK: ("mask",), NO_POINTS: ("points",), NEITHER: ("mask", "points")}
    for index in range(8):
        sample = dataset[index]
        assert sample.missing == expected.get(index, ())
        assert (len(sample.points[0]) == 0) == (index in expected)
        assert (sample.points[0].shape[1], sample.points[0].dtype) == (2, torch.int64)
    report = dataset.report()
    release = [semalign_set.naive_release(*semalign_set.fields(i), dataset.supervision(i).mask, 512, 512) for i in (0, 1, 2, 5, 7)]
    assert report == {
        "rows": made.num_rows,
        "kept": 8,
        "samples": 8,
        "unreadable": 0,
        "duplicate_ids": 0,
        "found_mask": 6,
        "found_points": 6,
        "missing_mask": 2,
        "missing_points": 2,
        "canary": "classic zlib",
        "compared_samples": 5,
        "vote_points": sum(len(dataset[i].points[0]) for i in range(8)),
        "release_points": sum(map(len, release)),
    }
    assert report["vote_points"] > report["release_points"]
    assert dataset.report(num_compared=2)["compared_samples"] == 2


def test_masks_and_coordinates_moved_away(made: SemAlignSet, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(made.root, root)
    shutil.rmtree(root / "mask")
    (root / "coord").rename(tmp_path / "elsewhere")
    dataset = SemAlignDataset(root)
    assert dataset[0].missing == ("mask", "points")
    report = dataset.report()
    assert (report["missing_mask"], report["missing_points"], report["compared_samples"], report["vote_points"]) == (8, 8, 0, 0)
    assert SemAlignDataset(root, coordinates=tmp_path / "elsewhere")[0].missing == ("mask",)
    with pytest.raises(FileNotFoundError, match="masks.zip: there is no such folder or zip archive of mask files"):
        SemAlignDataset(root, masks=tmp_path / "masks.zip")


def test_masks_lie_over_the_targets_tokens(made: SemAlignSet) -> None:
    dataset = SemAlignDataset(made.root, image_size=256, with_masks=True)
    known = 0
    for index in range(len(dataset)):
        mask, found = dataset.supervision(index).mask, dataset[index].masks
        assert found.shape == (1, 16 * 16)
        if mask is None:
            assert not found.any()
            continue
        known += 1
        array, side = np.asarray(mask) > 0, mask.width / 16
        for row, column in ((0, 3), (7, 9), (15, 15)):
            cell = array[int(row * side) : -int(-(row + 1) * side // 1), int(column * side) : -int(-(column + 1) * side // 1)]
            assert found[0, row * 16 + column] == pytest.approx(cell.mean(), abs=1e-6)
    assert 0 < known < len(dataset)
    assert SemAlignDataset(made.root)[0].masks is None


def test_archives_equal_folders(made: SemAlignSet, dataset: SemAlignDataset, tmp_path: Path) -> None:
    root = semalign_set.zip_set(made, tmp_path / "zipped")
    zipped = SemAlignDataset(root)
    for index in range(8):
        first, second = dataset[index], zipped[index]
        assert (first.id, first.prompt, first.missing) == (second.id, second.prompt, second.missing)
        assert torch.equal(first.points[0], second.points[0])
        assert torch.equal(first.target, second.target)
    assert zipped.report() == dataset.report()
    elsewhere = SemAlignDataset(
        tmp_path, masks=root / "mask.zip", coordinates=made.root / "coord", parquet=root / "data", id_index=tmp_path / "new/ids.parquet"
    )
    assert torch.equal(elsewhere[1].points[0], dataset[1].points[0])
    assert (tmp_path / "new/ids.parquet").is_file()


def test_plain_binary_images_and_one_file(made: SemAlignSet, dataset: SemAlignDataset, tmp_path: Path) -> None:
    table = pa.concat_tables([pq.read_table(path) for path in sorted((made.root / "data").iterdir())])
    table = table.set_column(0, "image", pa.array([image["bytes"] for image in table["image"].to_pylist()], pa.binary()))
    pq.write_table(table, tmp_path / "all.parquet")
    found = SemAlignDataset(made.root, parquet=tmp_path / "all.parquet")  # the rows count on over the files, so the index holds here too
    assert [found.sample_id(index) for index in range(8)] == made.ids
    assert torch.equal(found[7].target, dataset[7].target)


def test_a_missing_score_counts_zero(made: SemAlignSet, tmp_path: Path) -> None:
    shutil.copytree(made.root / "data", tmp_path / "data")
    path = tmp_path / "data/train-00001-of-00002.parquet"
    table = pq.read_table(path)
    quality = pa.array([{"imageQuality": 5, "objectConsistency": 5}] * len(table))
    pq.write_table(table.set_column(2, "quality_assessment", quality), path)
    first = [r for r in pq.read_table(tmp_path / "data/train-00000-of-00002.parquet").to_pylist() if semalign_set.naive_passes(r)]
    assert len(SemAlignDataset(tmp_path)) == len(first) < 8


def test_rows_come_from_a_copy_and_are_those_of_the_files(made: SemAlignSet, dataset: SemAlignDataset) -> None:
    rows, streamed = SemAlignRows(dataset.rows.files), SemAlignRows(dataset.rows.files)
    streamed.mapped = None
    assert rows.mapped is not None
    assert [rows.read(number) for number in range(rows.num_rows)] == [streamed.read(number) for number in range(rows.num_rows)]
    assert rows.read(int(rows.good[2])).image == made.kept[2]["image"]["bytes"]


def test_a_changed_file_is_copied_anew(made: SemAlignSet, tmp_path: Path) -> None:
    shutil.copytree(made.root / "data", tmp_path / "data [1]")
    (file, _) = files = sorted((tmp_path / "data [1]").iterdir())
    assert SemAlignRows(files).read(0).item == "Item 0"
    table = pq.read_table(file).to_pylist()
    table[0]["description"]["item"] = "another"
    pq.write_table(pa.Table.from_pylist(table, semalign_set.SCHEMA), file)
    assert SemAlignRows(files).read(0).item == "another"


def test_without_a_copy_rows_are_streamed_and_it_is_said_why(
    made: SemAlignSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(made.root / "data", tmp_path / "data")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    rows = SemAlignRows(sorted((tmp_path / "data").iterdir()))
    assert rows.read(0).item == "Item 0"
    assert rows.mapped is None
    assert re.search(r"data: no copy can be made \(OSError: .* has 0.0 GB free .*convert.py semalign", caplog.text)


def test_held_out_samples(made: SemAlignSet, dataset: SemAlignDataset) -> None:
    train, held_out = (SemAlignDataset(made.root, split=name, heldout_share=0.4) for name in ("train", "heldout"))
    expected = [identifier for identifier in made.ids if int(identifier[:8], 16) / 16**8 < 0.4]
    assert [held_out.sample_id(index) for index in range(len(held_out))] == expected
    assert [train.sample_id(index) for index in range(len(train))] == [i for i in made.ids if i not in expected]
    assert 0 < len(expected) < 8
    position = made.ids.index(expected[-1])
    assert torch.equal(held_out[-1].target, dataset[position].target)
    assert held_out.report()["samples"] == len(expected)
    with pytest.raises(ValueError, match='has no sample of the split "heldout" with a heldout_share of 0; 8 rows pass'):
        SemAlignDataset(made.root, split="heldout", heldout_share=0)


@pytest.mark.parametrize("zipped", [False, True])
def test_workers_fork_and_pickle(made: SemAlignSet, dataset: SemAlignDataset, tmp_path: Path, zipped: bool) -> None:
    found = SemAlignDataset(semalign_set.zip_set(made, tmp_path / "zipped") if zipped else made.root)
    expected = [dataset[index] for index in range(8)]
    assert torch.equal(found[1].points[0], expected[1].points[0])  # handles are open in this process before the fork
    copy = pickle.loads(pickle.dumps(found))
    assert torch.equal(copy[2].points[0], expected[2].points[0])
    sampler = BucketBatchSampler(found.num_references, batch_size=2, seed=0)
    batches = list(DataLoader(found, batch_sampler=sampler, collate_fn=collate, num_workers=2))
    assert [batch.ids for batch in batches] == [[made.ids[index] for index in indices] for indices in sampler]
    for batch, indices in zip(batches, sampler, strict=True):
        for row, index in enumerate(indices):
            assert torch.equal(batch.points[row][0], expected[index].points[0])
            assert torch.equal(batch.targets[row], expected[index].target)


def test_forks_read_at_once_without_disturbing_one_another(made: SemAlignSet, tmp_path: Path) -> None:
    found = SemAlignDataset(semalign_set.zip_set(made, tmp_path / "zipped"))
    expected = [len(found[index].points[0]) for index in range(8)]
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            same = all([len(found[index].points[0]) for index in range(8)] == expected for _ in range(3))
            os._exit(0 if same else 1)
        children.append(child)
    assert [len(found[index].points[0]) for index in range(8)] == expected
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"downsample": "mean"}, 'downsample must be one of vote, release, got "mean"'),
        ({"split": "test"}, 'split must be one of all, train, heldout, got "test"'),
        ({"image_size": 500}, "image_size must be a positive multiple of the token size 16 px, a single number, got 500"),
        ({"image_size": (512, 512)}, "image_size must be a positive multiple of the token size 16 px, a single number"),
        ({"image_size": 768}, 'downsample "vote" needs a token grid that divides it, but 768 px make 48 x 48 tokens'),
        ({"reference_size": 2048}, "reference_size: the points were found on a grid of 64 x 64 cells"),
        ({"heldout_share": 1.5}, "heldout_share must lie in"),
    ],
)
def test_arguments_that_do_not_fit(made: SemAlignSet, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemAlignDataset(made.root, **arguments)


def test_release_takes_other_sizes(made: SemAlignSet) -> None:
    points = SemAlignDataset(made.root, 768, "release")[0].points[0]
    validate_points([points], 48 * 48, 48 * 48)
    assert len(points) > 50


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder; root must be"):
        SemAlignDataset(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="data: there is no such folder; it must hold the Parquet files"):
        SemAlignDataset(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data: has no \*.parquet file"):
        SemAlignDataset(tmp_path)
    pq.write_table(pa.Table.from_pylist(semalign_set.bad_rows(), semalign_set.SCHEMA), tmp_path / "data/x.parquet")
    with pytest.raises(ValueError, match="none of 9 rows passes the quality filter"):
        SemAlignDataset(tmp_path)


def test_num_references(dataset: SemAlignDataset) -> None:
    assert np.array_equal(dataset.num_references, np.ones(8))
