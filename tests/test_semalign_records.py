"""SemAlign samples as records of the multi-reference format, written and read back."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mosaic.data import DatasetWriter, MultiReferenceDataset, SampleRecord, SemAlignDataset
from preprocess.sources.semalign import semalign_records
from tests import semalign_set
from tests.semalign_set import NEITHER, NO_MASK, NO_POINTS, SemAlignSet, needs_classic_zlib

pytestmark = needs_classic_zlib


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SemAlignSet:
    return semalign_set.write_set(tmp_path_factory.mktemp("semalign") / "set")


@pytest.fixture(scope="module")
def records(made: SemAlignSet) -> list[SampleRecord]:
    return list(semalign_records(SemAlignDataset(made.root), "train"))


def test_records(made: SemAlignSet, records: list[SampleRecord]) -> None:
    assert [record.id for record in records] == made.ids
    for index, record in enumerate(records):
        stored, (reference,) = made.kept[index], record.references
        assert (record.split, record.prompt, reference.phrase) == ("train", stored["description"]["description_0"], f"Item {index}")
        assert (record.reference_grid, record.target_grid) == ((64, 64), (64, 64))
        pixels = torch.from_numpy(np.array(record.target)).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(pixels, semalign_set.naive_panel(stored, (8, 8, 520, 520), 512))
        pixels = torch.from_numpy(np.array(reference.image)).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(pixels, semalign_set.naive_panel(stored, (528, 8, 1040, 520), 512))
        assert (record.metadata["source"], record.metadata["item"]) == ("SemAlign-MS-Subjects200K", f"Item {index}")
        assert (record.metadata["row"], record.metadata["reference_caption"]) == (2 * index, "right")


def test_points_are_all_that_agree_inside_the_mask(made: SemAlignSet, records: list[SampleRecord]) -> None:
    first, second = semalign_set.fields(0)
    mask = np.asarray(semalign_set.mask(0).resize((1024, 1024), 0))
    expected = []
    for v, (cell, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if cell == other and mask[16 * (v // 64), 16 * (v % 64)] > 127:
            expected.append([64 * cell[0] + cell[1], v])
    assert records[0].references[0].points.tolist() == sorted(expected)
    assert SemAlignDataset(made.root).consensus(0).tolist() == sorted(expected)
    assert np.array_equal(records[0].references[0].mask, np.asarray(semalign_set.mask(0)) > 127)


def test_what_is_missing_is_not_matched_and_said(records: list[SampleRecord]) -> None:
    missing = {NO_MASK: ["mask"], NO_POINTS: ["points"], NEITHER: ["mask", "points"]}
    for index, record in enumerate(records):
        (reference,) = record.references
        assert record.metadata["missing"] == missing.get(index, [])
        assert (reference.points is None) == (index in missing)
        assert (reference.mask is None) == (index in (NO_MASK, NEITHER))


@pytest.mark.parametrize("image_size", [512, 1024])
def test_written_and_read_they_are_the_samples_by_vote(
    made: SemAlignSet, records: list[SampleRecord], tmp_path: Path, image_size: int
) -> None:
    matched = [record for record in records if not record.metadata["missing"]]
    with DatasetWriter(tmp_path / "out") as writer:
        for record in matched:
            writer.add(record)
    side = image_size // 16
    grids = {"target_token_grid": (side, side), "reference_token_grid": (32, 32)}
    read = MultiReferenceDataset(tmp_path / "out", image_size=(image_size, image_size), reference_size=512, **grids)
    direct = SemAlignDataset(made.root, image_size, reference_size=512)
    for sample in read:
        expected = direct[made.ids.index(sample.id)]
        assert sample.prompt == expected.prompt
        assert torch.equal(sample.points[0], expected.points[0])
        assert torch.equal(sample.references, expected.references)
        assert image_size != 512 or torch.equal(sample.target, expected.target)
    assert len(read) == 5


def test_rows_of_one_id_make_one_record(made: SemAlignSet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        shutil.copy(made.root / "data/train-00000-of-00002.parquet", tmp_path / f"data/{name}.parquet")
    dataset = SemAlignDataset(tmp_path)
    records = list(semalign_records(dataset, "train"))
    assert len(dataset) == 2 * len(records) == 2 * len({record.id for record in records})
    assert dataset.report()["duplicate_ids"] == len(records)
    assert f"left out {len(records)} of {len(dataset)} rows" in caplog.text
