"""SemAlign samples as records of the multi-reference format, written and read back."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mosaic.data import MultiReferenceDataset, SampleRecord, SemAlignDataset
from preprocess import convert
from preprocess.sources.invalid import InvalidSamples
from preprocess.sources.semalign import samples
from tests import semalign_set
from tests.semalign_set import NEITHER, NO_MASK, NO_POINTS, SemAlignSet, needs_classic_zlib

pytestmark = needs_classic_zlib


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SemAlignSet:
    return semalign_set.write_set(tmp_path_factory.mktemp("semalign") / "set")


@pytest.fixture(scope="module")
def records(made: SemAlignSet) -> list[SampleRecord]:
    return list(samples(made.root, "train", InvalidSamples()))


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


def test_converted_and_read_they_are_the_samples_by_vote(made: SemAlignSet, tmp_path: Path) -> None:
    assert convert.main(["semalign", str(made.root), str(tmp_path / "out")]) == 0
    for image_size in (512, 1024):
        side = image_size // 16
        grids = {"target_token_grid": (side, side), "reference_token_grid": (32, 32)}
        read = MultiReferenceDataset(tmp_path / "out", image_size=(image_size, image_size), reference_size=512, **grids)
        direct = SemAlignDataset(made.root, image_size, reference_size=512)
        assert [sample.id for sample in read] == made.ids
        for sample in read:
            expected = direct[made.ids.index(sample.id)]
            assert sample.prompt == expected.prompt
            assert sample.missing == (("points",) if expected.missing else ())  # a sample without mask is not matched either
            assert torch.equal(sample.points[0], expected.points[0])
            assert torch.equal(sample.references, expected.references)
            assert image_size != 512 or torch.equal(sample.target, expected.target)


def test_a_damaged_row_ends_the_conversion_or_is_listed(made: SemAlignSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(made.root, tmp_path / "set"))
    (root / f"mask/{made.ids[0]}.png").write_bytes(b"no picture")
    assert convert.main(["semalign", str(root), str(tmp_path / "out")]) == 2
    assert f"{made.ids[0]}.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert.main(["semalign", str(root), str(tmp_path / "out"), "--skip-invalid"]) == 0
    assert f"{made.ids[0]}.png" in (tmp_path / "out.invalid.txt").read_text()


def test_rows_of_one_id_make_one_record(made: SemAlignSet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        shutil.copy(made.root / "data/train-00000-of-00002.parquet", tmp_path / f"data/{name}.parquet")
    dataset = SemAlignDataset(tmp_path)
    records = list(samples(tmp_path, "train", InvalidSamples()))
    assert len(dataset) == 2 * len(records) == 2 * len({record.id for record in records})
    assert dataset.report()["duplicate_ids"] == len(records)
    assert f"left out {len(records)} of {len(dataset)} rows" in caplog.text
