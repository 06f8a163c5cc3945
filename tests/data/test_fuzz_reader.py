"""Damaged files: a clear error or the right sample, never a hang, a crash or another sample."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mosaic.data import DatasetWriter, MultiReferenceDataset, ReferenceRecord, Sample, SampleRecord
from mosaic.method.correspondence import validate_points

OPTIONS: dict[str, Any] = {"image_size": (16, 16), "reference_size": 16, "target_token_grid": (4, 4), "reference_token_grid": (4, 4)}
TRIALS = 40


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "set"
    with DatasetWriter(root) as writer:
        for index in range(5):
            references = [ReferenceRecord(noise(10 * index + k), f"thing {k}", np.array([[k, k], [k + 4, k + 8]])) for k in range(2)]
            writer.add(SampleRecord(f"s{index}", "train", f"prompt {index}", noise(index + 100), references, (4, 4), (4, 4)))
    return root


def read_all(root: Path) -> list[Sample]:
    dataset = MultiReferenceDataset(root, **OPTIONS)
    dataset.report()
    return [dataset[index] for index in range(len(dataset))]


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 4)):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def overwrite(data: bytes, rng: np.random.Generator) -> bytes:
    start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 64))
    return data[:start] + rng.bytes(length) + data[start + length :]


def insert(data: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(0, len(data)))
    return data[:start] + rng.bytes(int(rng.integers(1, 64))) + data[start:]


DAMAGES: list[Callable[[bytes, np.random.Generator], bytes]] = [flip, cut, overwrite, insert]


def same_but_points(first: Sample, second: Sample) -> bool:
    pictures = torch.equal(first.target, second.target) and torch.equal(first.references, second.references)
    return pictures and (first.id, first.prompt) == (second.id, second.prompt)


@pytest.mark.parametrize(
    "name", ["dataset.json", "manifest.parquet", "images/s2_target.png", "images/s2_ref1.png", "points/s2.safetensors"]
)
def test_damage(source: Path, tmp_path: Path, name: str) -> None:
    """Pictures and manifest carry checksums, so what is read is right; points carry none, so what is read is at least valid."""
    root = tmp_path / "set"
    shutil.copytree(source, root)
    good = read_all(root)
    data = (root / name).read_bytes()
    refusals: list[str] = []
    for trial in range(TRIALS):
        rng = np.random.default_rng([trial, len(data)])
        (root / name).write_bytes(DAMAGES[trial % len(DAMAGES)](data, rng))
        try:
            samples = read_all(root)
        except (ValueError, FileNotFoundError) as error:
            refusals.append(str(error))
            continue
        assert len(samples) == len(good)
        for read, expected in zip(samples, good, strict=True):
            assert same_but_points(read, expected)
            validate_points(read.points, 16, 16)
            assert read.missing == ()
    assert len(refusals) > TRIALS // 2
    assert all(str(root) in message and "Traceback" not in message for message in refusals), refusals


def test_folders_and_links_in_place_of_files(source: Path, tmp_path: Path) -> None:
    for number, (name, message) in enumerate(
        [("dataset.json", "must be a file"), ("manifest.parquet", "must be a file"), ("images/s0_target.png", "must be a file")]
    ):
        root = tmp_path / str(number)
        shutil.copytree(source, root)
        (root / name).unlink()
        (root / name).mkdir()
        with pytest.raises(ValueError, match=message):
            read_all(root)
    root = tmp_path / "link"
    shutil.copytree(source, root)
    (root / "points/s0.safetensors").unlink()
    (root / "points/s0.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="must stay in the data set's folder"):
        read_all(root)
