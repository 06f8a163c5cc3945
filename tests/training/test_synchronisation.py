"""A training step leaves all numbers on the device: shown on the meta device, whose tensors have none that anybody could ask for."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic.data.samples import Posteriors, TextEmbeddings
from mosaic.devices import HostCopy, to_device
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.training import Trainer
from mosaic.training.watch import non_finite
from tests import runs, tiny

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
CACHED = {"data__image_dropout": 0.5, "loss__supervised_queries": "both", "loss__disentanglement_start_step": 0}


class Transfers(TorchDispatchMode):
    """Whether the host waits for each copy to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self.waiting.append(not kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


class LoggedCopy:
    """In the place of a copy to the host, which the meta device cannot make: when it was made, and when it was asked for."""

    events: list[str]

    def __init__(self, numbers: Tensor) -> None:
        self.count = len(numbers)
        self.events.append("sent")

    def values(self) -> list[float]:
        self.events.append("read")
        return [1.0] * self.count


@pytest.fixture
def swapped_weights() -> Iterator[None]:
    """Weights that move to another device stay the same objects, which the optimizer has."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapped_weights")
def test_no_step_waits_for_the_device(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With caches, dropout, clipping and two micro-batches; asking a meta tensor for its value is an error."""
    trainer = Trainer(runs.make_config(world, tmp_path, **CACHED))
    batch = runs.samples_of(trainer, num_references=2, count=2)
    latents = torch.randn(2, 3, 8, 8, 12)
    batch = replace(
        batch,
        posteriors=Posteriors(latents[:, 0], torch.randn(2, 2, 8, 6, 6), 0.1, 0.5),
        text=TextEmbeddings(*(torch.randn(*shape, tiny.TEXT_WIDTH) for shape in [(2, 8), (2,), (8,), ()])),
    )
    trainer.pipeline.transformer.to("meta")
    assert all(weight.is_meta for weight in trainer.parameters.values())
    trainer.optimizer.param_groups[0]["fused"] = True
    skips: list[Tensor] = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: skips.append(trainer.optimizer.found_inf))  # there is no fused one for it
    monkeypatch.setattr(non_finite, "HostCopy", LoggedCopy)
    monkeypatch.setattr(LoggedCopy, "events", [], raising=False)
    with Transfers() as transfers:
        for _ in range(3):
            loss = trainer.optimizer_step([batch, batch])
    assert loss.total.is_meta
    assert all(skip.is_meta for skip in skips)
    assert len(transfers.waiting) > 20
    assert not any(transfers.waiting)
    # Each step's numbers are read after those of the next were asked for, and before they leave.
    assert LoggedCopy.events == ["sent", "read", "sent", "read", "sent"]


def test_copies() -> None:
    numbers = torch.tensor([1.5, float("inf")])
    assert HostCopy(numbers).values() == [1.5, float("inf")]
    assert torch.equal(to_device(numbers, "cpu"), numbers)
    assert to_device(numbers, torch.device("meta")).is_meta


def test_the_kernel_of_training(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(MosaicFluxTransformer2DModel, "set_attention_backend", lambda _, name: chosen.append(name))
    Trainer(runs.make_config(world, tmp_path / "run", model__attention_backend="_native_math"))
    assert chosen == ["_native_math"]
    with pytest.raises(ValueError, match="model.attention_backend=xformers does not run here"):
        Trainer(runs.make_config(world, tmp_path / "other", model__attention_backend="xformers"))
