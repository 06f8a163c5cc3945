"""Fixtures: a seeded generator, tiny models with non-trivial weights, a synthetic batch, a small world to train on. The builders are in
tests/tiny.py and tests/runs.py."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Nothing asks the network, which would try five times where there is none. Read when `huggingface_hub` is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import FluxTransformer2DModel

from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training import Trainer
from tests import runs, tiny


def pytest_configure() -> None:
    """What `datasets` copies stays in a folder of this run, which children inherit."""
    folder = tempfile.mkdtemp(prefix="mosaic_tests_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["HF_DATASETS_CACHE"] = folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device. Trainings go first: a long file at the end keeps one core waiting."""
    items.sort(key=lambda item: item.path.parent.name != "training")
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Everything imported by now stays: each of a test's garbage collections, such as a trainer's at its end, need not go over it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[True, False], ids=["guidance", "no_guidance"])
def guidance_embeds(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def transformer() -> MosaicFluxTransformer2DModel:
    """Ours, without any LoRA."""
    return tiny.build_transformer()


@pytest.fixture
def stock_transformer() -> FluxTransformer2DModel:
    """The stock one with the same weights."""
    return tiny.build_transformer(stock=True)


@pytest.fixture
def batch() -> tiny.Batch:
    """K = 2, batch 2."""
    return tiny.build_batch()


@pytest.fixture
def pipeline() -> MosaicFluxPipeline:
    """Ours, with a random reference LoRA of rank 3."""
    return tiny.build_pipeline()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set and model folder for training runs; not to be changed."""
    return runs.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state per process, whose precision cannot change: neither an earlier test's is found nor one left behind."""
    _forget_accelerator()
    yield
    _forget_accelerator()


def _forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def trainer(world: Path, tmp_path: Path) -> Trainer:
    """A run that has not begun."""
    return Trainer(runs.make_config(world, tmp_path / "run"))
