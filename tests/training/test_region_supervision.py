"""Supervision of whole references by masks: the masks of a batch on its tokens, the loss, and a run with and without masks."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mosaic.config.sections import LossConfig
from mosaic.data import DatasetWriter, MultiReferenceDataset, ReferenceRecord, SampleRecord
from mosaic.method.flow import add_noise
from mosaic.method.grids import Grid
from mosaic.method.losses import MosaicLoss, region_loss
from mosaic.training import Trainer
from mosaic.training.encoding import EncodedBatch, Grids
from mosaic.training.objective import CallSettings, Draws, train_step
from tests import naive, runs, tiny


def write_masked(root: Path, height: int, width: int, masks: list[np.ndarray | None], count: int = 1) -> Path:
    """Samples with a reference per mask, without points but for the first cells."""
    with DatasetWriter(root) as writer:
        for index in range(count):
            target = Image.fromarray(np.full((height, width, 3), index, np.uint8))
            picture = Image.fromarray(np.zeros((12, 12, 3), np.uint8))
            references = [
                ReferenceRecord(picture, "cat", np.array([[k, width // 8 + k]]), mask=None if mask is None else mask.astype(np.uint8))
                for k, mask in enumerate(masks)
            ]
            writer.add(SampleRecord(f"train-{index}", "train", "a cat and a mug", target, references, (6, 6), (height // 2, width // 2)))
    return root


def read(root: Path, image_size: tuple[int, int], with_masks: bool = True) -> Tensor | None:
    grid = Grid(image_size[0] // 4, image_size[1] // 4)
    sizes = {"reference_size": 12, "target_token_grid": grid, "reference_token_grid": Grid(3, 3)}
    return MultiReferenceDataset(root, image_size=image_size, **sizes, with_masks=with_masks)[0].masks


def test_masks_lie_over_the_targets_tokens_row_by_row(tmp_path: Path) -> None:
    left, corner = np.zeros((16, 24), bool), np.zeros((16, 24), bool)
    left[:, :6], corner[15, 23] = True, True
    root = write_masked(tmp_path / "data", 16, 24, [left, None, corner])
    found = read(root, (16, 24))
    assert found is not None
    assert found.dtype == torch.float32
    shares = found.unflatten(1, (4, 6))
    assert shares[0].tolist() == [[1, 0.5, 0, 0, 0, 0]] * 4
    assert not shares[1].any()  # not known
    assert shares[2, 3, 5] == 1 / 16
    assert shares[2].sum() == 1 / 16
    assert read(root, (16, 24), with_masks=False) is None


def test_masks_are_cut_with_the_target(tmp_path: Path) -> None:
    """Of 32 columns the middle 16 stay; those of a mask go along, and a mask of what is cut off shows nothing."""
    middle, outside = np.zeros((16, 32), bool), np.zeros((16, 32), bool)
    middle[:, 12:16], outside[:, :8] = True, True
    found = read(write_masked(tmp_path / "data", 16, 32, [middle, outside]), (16, 16))
    assert found is not None
    assert found[0].unflatten(0, (4, 4)).tolist() == [[0, 1, 0, 0]] * 4
    assert not found[1].any()


def test_loss_by_hand() -> None:
    rows = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], [[0.1, 0.1, 0.8], [0.0, 0.0, 1.0]]])
    masks = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    both = torch.tensor([True, True])
    first = (0.25 + 0 + 0) / 3  # the other reference has no mask
    second = ((0.01 + 0.01 + 0.04) / 3 + (0 + 1 + 1) / 3) / 2
    assert region_loss(rows, masks, both).tolist() == pytest.approx([first, second])
    assert region_loss(rows, masks, torch.tensor([False, True])).tolist() == pytest.approx([0, second])  # lost to dropout


@pytest.mark.parametrize("settings", [{}, {"capture_blocks": "double", "supervised_timesteps": (0.4, 1.0), "heads": "each"}])
def test_equals_the_twin(settings: dict) -> None:
    transformer, batch = tiny.build_transformer(), tiny.build_batch(3)
    parameters = tiny.attach_random_lora(transformer)
    tensors = {key: parameter.detach().double().requires_grad_() for key, parameter in parameters.items()}
    masks = (torch.rand(2, 3, 24, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    masks[0, 1] = 0
    batch.inputs["timestep"] = torch.tensor([0.3, 0.6])
    batch.inputs["guidance"] = torch.ones(2)
    batch.inputs["hidden_states"] = add_noise(batch.latents, batch.noise, batch.inputs["timestep"])
    given = (batch.inputs[name] for name in ("reference_hidden_states", "encoder_hidden_states", "pooled_projections"))
    encoded = EncodedBatch(batch.latents, *given, Grids(tiny.TARGET_GRID, tiny.REFERENCE_GRID), masks)
    draws = Draws(torch.ones(2, dtype=torch.bool), batch.inputs["timestep"], batch.noise)

    def loss(weight: float) -> MosaicLoss:
        chosen = LossConfig(correspondence_weight=0, disentanglement_weight=0, region_weight=weight, **settings)
        return train_step(transformer, encoded, batch.points, draws, chosen, 0, CallSettings("target", True))

    inputs = {name: value.double() for name, value in batch.inputs.items()}
    output = naive.NaiveFlux(tiny.build_transformer(stock=True).double(), naive.lora_matrices(tensors))(**inputs)
    maps = naive.mean_maps(output.maps, [0, 1] if settings else None).unflatten(1, (3, -1)).mean(dim=2)
    terms = []
    for sample in range(2):
        means = [((maps[sample, k] - masks[sample, k]) ** 2).mean() for k in range(3) if masks[sample, k].any()]
        terms.append(sum(means) / len(means) * (sample == 1 or not settings))
    found, want = loss(0.7), (terms[0] + terms[1]) / 2
    torch.testing.assert_close(found.region.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.total, found.flow_matching + 0.7 * found.region)
    gradients = torch.autograd.grad(found.region, list(parameters.values()), allow_unused=True)
    wanted = torch.autograd.grad(want, list(tensors.values()), allow_unused=True)
    for key, gradient, expected in zip(parameters, gradients, wanted, strict=True):
        zero = torch.zeros_like(tensors[key])
        ours, theirs = (zero if g is None else g.double() for g in (gradient, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")
    assert loss(0.0).region == 0


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_reads_masks_and_says_where_they_are_missing(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = np.zeros((16, 24), bool)
    mask[:8] = True
    root = write_masked(tmp_path / "data", 16, 24, [mask, None], count=2)
    changes = {"data__root": str(root), "loss__region_weight": 0.5}
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(runs.make_config(world, tmp_path / "run", **changes))
    message = "loss.region_weight: 2 of 4 references have no mask in which they are seen; of these the region loss is 0"
    assert [record.getMessage() for record in caplog.records].count(message) == 1
    batch = runs.samples_of(trainer, num_references=2, count=2)
    loss = runs.step_loss(trainer, batch)
    assert loss.region > 0
    torch.testing.assert_close(loss.total, loss.flow_matching + 0.4 * loss.correspondence + 0.6 * loss.disentanglement + 0.5 * loss.region)
