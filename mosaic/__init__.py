"""MOSAIC for FLUX: several of your subjects in one picture, each faithful to its reference (arXiv:2509.01977)."""

from importlib import import_module

__version__ = "0.1.0"

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
