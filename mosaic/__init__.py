"""MOSAIC for FLUX: several of your subjects in one picture, each faithful to its reference (arXiv:2509.01977)."""

import os
from importlib import import_module

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for one another, by default for milliseconds. Where another process has the core of one of them, a
# step that takes a second alone can take a minute so. Fewer spins cost a machine of one's own about 13 % (docs/speed.md).
# libgomp reads this when torch is loaded; every command imports this package before.
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPIN_COUNT = "1000"
if not any(name in os.environ for name in SPIN_VARIABLES):
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT

_EXPORTS = {
    "MosaicFluxPipeline": "mosaic.pipeline.pipeline",
    "MosaicPipelineOutput": "mosaic.pipeline.pipeline",
    "MosaicFluxTransformer2DModel": "mosaic.model.transformer",
    "MosaicTransformerOutput": "mosaic.model.transformer",
    "load_image": "mosaic.images",
    "prepare_reference": "mosaic.images",
    "load_config": "mosaic.config.loading",
    "load_cases": "mosaic.rendering.cases.reading",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> object:
    # Imported on first use, so that reading a config does not wait for torch and diffusers.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'mosaic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
