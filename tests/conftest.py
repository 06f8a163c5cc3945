"""Fixtures: a seeded generator, tiny models with non-trivial weights, a synthetic batch. The builders are in tests/tiny.py."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from mosaic.pipeline import MosaicFluxPipeline
from mosaic.transformer import MosaicFluxTransformer2DModel
from tests import tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
