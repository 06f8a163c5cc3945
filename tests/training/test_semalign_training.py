"""Training on data in the layout of SemAlign-MS-Subjects200K, with a tiny model."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from mosaic.config.loading import from_dict
from mosaic.data import SemAlignDataset, open_dataset
from mosaic.data.semalign.points import release_points, vote_points
from mosaic.data.semalign.rows import SemAlignRows
from mosaic.method.grids import Grid
from mosaic.planning.data_checks import look_at_data
from mosaic.planning.model_shape import read_model_shape
from mosaic.training import Trainer, train
from mosaic.training import trainer as training
from tests import runs, semalign_set
from tests.semalign_set import needs_classic_zlib

pytestmark = needs_classic_zlib


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    runs.write_model(folder / "model")
    runs.write_lora(folder / "lora.safetensors")
    semalign_set.write_set(folder / "data", num_kept=3)  # none of which lacks anything
    return folder


@pytest.fixture(scope="module")
def one_held_out(world: Path) -> float:
    """The share of which one sample of three is held out."""
    dataset = SemAlignDataset(world / "data")
    return (min(int(dataset.sample_id(index)[:8], 16) for index in range(3)) + 1) / 16**8


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


SIZES: dict[str, Any] = {"data__format": "semalign", "data__image_size": [64, 64], "data__reference_size": 32}  # tokens of 4 px


@pytest.mark.parametrize("downsample", ["vote", "release"])
def test_two_steps_and_a_validation(world: Path, tmp_path: Path, one_held_out: float, downsample: str) -> None:
    changes = {"data__downsample": downsample, "data__heldout_share": one_held_out, "training__max_steps": 2, "validation__every": 2}
    train(runs.make_config(world, tmp_path / "run", **SIZES, **changes, data__num_workers=1))
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry for entry in entries if "loss/total" in entry]
    assert [entry["step"] for entry in losses] == [1, 2]
    assert all(math.isfinite(entry["loss/total"]) for entry in losses)
    assert all(entry["loss/correspondence"] > 1 for entry in losses)
    assert all(entry["loss/disentanglement"] == 0 for entry in losses)  # one reference has none to be told from
    accuracy = [entry["attention/exact"] for entry in entries if "attention/exact" in entry]
    assert len(accuracy) == 2
    assert (tmp_path / "run/validation/step_00000002/case_0.png").is_file()


def test_the_data_is_opened_once(world: Path, tmp_path: Path, one_held_out: float, monkeypatch: pytest.MonkeyPatch) -> None:
    SemAlignDataset(world / "data")  # makes the index of ids
    opened = runs.count_made(SemAlignRows, monkeypatch)
    config = runs.make_config(world, tmp_path / "run", **SIZES, data__heldout_share=one_held_out, validation__every=2)
    trainer = Trainer(config)
    assert (len(trainer.dataset), len(trainer.held_out or ()), len(opened)) == (2, 1, 1)
    opened.clear()
    _, findings = look_at_data(config, read_model_shape(config.model.pretrained), 1, None)
    assert [finding.message.split(":")[-1].strip() for finding in findings[:3]] == [
        "the released layout.",
        '2 samples in the split "train", up to 1 references.',
        '1 samples in the split "heldout", up to 1 references.',
    ]
    assert len(opened) == 1


def test_the_settings_reach_the_data_set(world: Path, tmp_path: Path, one_held_out: float) -> None:
    config = runs.make_config(world, tmp_path / "run", **SIZES, data__heldout_share=one_held_out)
    trainer = Trainer(config)
    dataset = trainer.dataset
    assert isinstance(dataset, SemAlignDataset)
    assert (dataset.target_side, dataset.reference_side, dataset.token_size, dataset.downsample) == (16, 8, 4, "vote")
    held_out = open_dataset(config.data, "heldout", Grid(16, 16), Grid(8, 8))
    assert (len(dataset), len(held_out)) == (2, 1)
    found = dataset.supervision(0)
    assert torch.equal(dataset[0].points[0], vote_points(found.dift, found.geoaware, found.mask, 8, 16))
    release = open_dataset(runs.make_config(world, tmp_path, **SIZES, data__downsample="release").data, "all", Grid(16, 16), Grid(8, 8))
    found = release.supervision(1)
    assert torch.equal(release[1].points[0], release_points(found.dift, found.geoaware, found.mask, 8, 16, token_size=4))
    for name in ("parquet", "masks", "coordinates", "id_index"):
        nowhere = str(world / "lora.safetensors/x")  # below a file
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{re.escape(nowhere)}: "):
            open_dataset(runs.make_config(world, tmp_path, **SIZES, **{f"data__{name}": nowhere}).data, "train", Grid(16, 16), Grid(8, 8))


def test_what_does_not_fit_is_refused_before_the_model_is_loaded(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "load_base", pytest.fail)
    with pytest.raises(ValueError, match=r"data.image_size must be square where data.format is \"semalign\", got \[64, 32\]"):
        from_dict({"data": {"format": "semalign", "image_size": [64, 32]}})
    with pytest.raises(ValueError, match=r'data.reference_order must be "stored" where data.format is "semalign", got "left_to_right"'):
        runs.make_config(world, tmp_path, **SIZES, data__reference_order="left_to_right")
    shutil.copytree(world / "data/data", tmp_path / "data")
    config = runs.make_config(world, tmp_path / "run", **SIZES, data__root=str(tmp_path), data__heldout_share=0, validation__every=1)
    with pytest.raises(ValueError, match='has no sample of the split "heldout" with a heldout_share of 0'):
        train(config)
    assert (tmp_path / "semalign_ids.parquet").is_file()
    config = runs.make_config(world, tmp_path / "run", **SIZES, data__root=str(tmp_path / "no"))
    with pytest.raises(FileNotFoundError, match="root must be a SemAlign-MS-Subjects200K data set"):
        train(config)
