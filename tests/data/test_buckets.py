"""Training and validation on targets of several sizes, and on composed samples."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from mosaic.config.loading import from_dict
from mosaic.data import BucketBatchSampler, DatasetWriter, ReferenceRecord, SampleRecord, collate
from mosaic.training import Trainer, train
from mosaic.training.encoding import batch_grids
from preprocess import compose
from tests import runs

SIZES = runs.ASPECT_SIZES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single-subject samples of three aspects."""
    folder = runs.write_world(tmp_path_factory.mktemp("world"))
    runs.write_aspects(folder / "aspects")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_run_with_buckets(world: Path, tmp_path: Path) -> None:
    config = runs.make_config(
        world, tmp_path / "run", data__root=str(world / "aspects"), data__buckets=[list(size) for size in SIZES], data__image_size=[16, 16],
        training__max_steps=3, validation__every=3,
    )  # fmt: skip
    trainer = Trainer(config)
    dataset = trainer.dataset
    assert dataset.bucket.tolist() == [0, 1, 2] * 3
    shapes = set()
    for indices in BucketBatchSampler(dataset.batch_keys, 2, seed=0):
        batch = collate([dataset[index] for index in indices])
        grids = batch_grids(batch, trainer.pipeline.encoders.vae_scale_factor)
        assert (grids.target.rows * 4, grids.target.columns * 4) == batch.targets.shape[-2:]
        assert tuple(grids.reference) == (3, 3)
        shapes.add(tuple(batch.targets.shape[-2:]))
        trainer.pipeline.transformer.zero_grad()
        seen = runs.captured_inputs(trainer)
        loss = runs.step_loss(trainer, batch)
        assert torch.isfinite(loss.total)
        assert loss.correspondence > 0
        assert seen[-1]["img_ids"].shape == (grids.target.num_tokens, 3)
        assert seen[-1]["img_ids"][-1].tolist() == [0, grids.target.rows - 1, grids.target.columns - 1]
        assert seen[-1]["hidden_states"].shape[1] == grids.target.num_tokens
    assert shapes == set(SIZES)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/total" in line] == [1, 2, 3]
    assert all(np.isfinite(line["attention/exact"]) for line in lines if "attention/exact" in line)


def test_a_run_on_composed_samples_has_both_losses_alive(world: Path, tmp_path: Path) -> None:
    """Batch 4, K = 2..4."""
    source = tmp_path / "source"
    with DatasetWriter(source) as writer:
        for index in range(8):
            rng = np.random.default_rng(index)
            points = np.stack([rng.integers(0, 36, 64), rng.permutation(64)], axis=1)
            picture, target = (Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in (12, 16))
            writer.add(SampleRecord(f"s{index}", "train", "a cat", target, [ReferenceRecord(picture, "cat", points)], (6, 6), (8, 8)))
    assert compose.main([str(source), str(tmp_path / "composed"), "--num-samples", "24", "--references", "2,3,4"]) == 0
    config = runs.make_config(
        world,
        tmp_path / "run",
        data__root=str(tmp_path / "composed"),
        data__image_size=[16, 16],
        training__batch_size=4,
        training__max_steps=4,
    )
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(line["loss/correspondence"] > 0 for line in lines)
    assert all(abs(line["loss/disentanglement"]) > 0 for line in lines)


def test_buckets_in_a_config() -> None:
    assert from_dict({}).data.buckets == ()
    assert from_dict({"data": {"buckets": []}}).data.buckets == ()
    assert from_dict({"data": {"buckets": [[512, 512], [384, 640]]}}).data.buckets == ((512, 512), (384, 640))
    for wrong in ([512, 512], [[512]], [[512, 0]], "512", {}):
        with pytest.raises(ValueError, match=r"data\.buckets must be a list of 0 to 256 values, each a list of 2 values, each an integer"):
            from_dict({"data": {"buckets": wrong}})
