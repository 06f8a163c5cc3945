"""Reference LoRAs of another rank: the nearest one, the same function, and a run that starts from one."""

import logging
from pathlib import Path

import pytest
import torch

from mosaic.lora.resize import resize_reference_lora
from mosaic.training import Trainer
from tests import runs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SHAPES = {"wide": (7, 11), "tall": (12, 6), "narrow": (9, 2)}  # in, out; "narrow" has fewer outputs than the rank


def random_lora(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for name, (fan_in, fan_out) in SHAPES.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, fan_in, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(fan_out, rank, generator=generator)
    return tensors


def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()


def test_a_lower_rank_is_the_nearest() -> None:
    """Against the SVD of the whole product; the kept share by hand from its singular values."""
    tensors = random_lora(5)
    resized, kept = resize_reference_lora(tensors, 3)
    kept_sum = whole_sum = 0.0
    for name, (fan_in, fan_out) in SHAPES.items():
        u, values, v = torch.linalg.svd(product(tensors, name), full_matrices=False)
        nearest = u[:, :3] * values[:3] @ v[:3]
        torch.testing.assert_close(product(resized, name), nearest, rtol=1e-5, atol=1e-5)
        assert resized[f"{name}.lora_A.weight"].shape == (3, fan_in)
        assert resized[f"{name}.lora_B.weight"].shape == (fan_out, 3)
        kept_sum, whole_sum = kept_sum + float(values[:3].square().sum()), whole_sum + float(values.square().sum())
    assert kept == pytest.approx(kept_sum / whole_sum)
    assert 0.5 < kept < 1


def test_a_higher_rank_is_the_same_function_with_room() -> None:
    tensors = random_lora(3)
    resized, kept = resize_reference_lora(tensors, 5, seed=1)
    assert kept == 1
    for name in SHAPES:
        a, b = resized[f"{name}.lora_A.weight"], resized[f"{name}.lora_B.weight"]
        assert torch.equal(a[:3], tensors[f"{name}.lora_A.weight"])
        assert torch.equal(b[:, :3], tensors[f"{name}.lora_B.weight"])
        assert bool((a[3:] != 0).all())
        assert not b[:, 3:].any()  # no effect, but A lets a gradient through to B
    assert not torch.equal(resized["wide.lora_A.weight"], resize_reference_lora(tensors, 5, seed=2)[0]["wide.lora_A.weight"])


def test_there_and_back() -> None:
    tensors = random_lora(3)
    back, kept = resize_reference_lora(resize_reference_lora(tensors, 6)[0], 3)
    assert kept == pytest.approx(1)
    for name in SHAPES:
        torch.testing.assert_close(product(back, name), product(tensors, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "share"), [(2, None), (5, "100.00")])
def test_warm_start_with_another_rank(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int, share: str | None) -> None:
    with caplog.at_level(logging.INFO):
        trainer = Trainer(runs.make_config(world, tmp_path / "run", lora__rank=rank, lora__resize=True))
    (message,) = [text for text in caplog.messages if "resized" in text]
    assert f"lora.safetensors: rank 3 resized to {rank}, " in message
    assert share is None or f"{share} % of the squared norm kept" in message
    expected, _ = resize_reference_lora(runs.lora_tensors(), rank, trainer.config.training.seed)
    runs.assert_same_tensors(runs.values(trainer), expected)
    if rank > runs.RANK:
        batch = runs.samples_of(trainer, num_references=2, count=2)
        found = runs.step_loss(trainer, batch)
        same = runs.step_loss(Trainer(runs.make_config(world, tmp_path / "same")), batch)
        torch.testing.assert_close(found, same)
        trainer.optimizer_step([batch])  # and the room is used
        assert trainer.parameters["transformer.x_embedder.lora_B.weight"][:, 3:].any()
