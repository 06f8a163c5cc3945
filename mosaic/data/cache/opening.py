"""The caches of a run: how their tensors must have been made, and the pipeline without the models that they stand for."""

import logging
from typing import Any, NamedTuple

from mosaic.config.loading import Config
from mosaic.data.cache.latents import LatentCache
from mosaic.data.cache.texts import TextCache
from mosaic.weights.components import TEXT_COMPONENTS, component_config, component_folder, component_revision

logger = logging.getLogger(__name__)


class Caches(NamedTuple):
    """The caches that a config names; None: training encodes."""

    latents: LatentCache | None
    text: TextCache | None


def open_caches(config: Config) -> Caches:
    """Open the caches that a config names.

    Raises:
        FileNotFoundError: One is missing or not finished.
        ValueError: One is stale: made with another VAE or other encoders, another dtype, size or text length.
    """
    data = config.data
    return Caches(
        LatentCache(data.latent_cache, latent_encoding(config)) if data.latent_cache is not None else None,
        TextCache(data.text_cache, text_encoding(config)) if data.text_cache is not None else None,
    )


def latent_encoding(config: Config) -> dict[str, Any]:
    """Everything that decides the latents of a picture file, as JSON values: the VAE, its dtype, and the sizes.

    Raises:
        FileNotFoundError, OSError: There is no such VAE.
        ValueError: Its config is not that of a FLUX VAE.
    """
    folder = component_folder(config.model.pretrained, "vae")
    vae = component_config(folder)
    for name in ("shift_factor", "scaling_factor", "block_out_channels"):
        if vae.get(name) is None:
            raise ValueError(f"{folder / 'config.json'}: {name} must be given, as in every FLUX VAE.")
    return {
        "vae": {
            "revision": component_revision(folder),
            "shift_factor": vae["shift_factor"],
            "scaling_factor": vae["scaling_factor"],
            "scale_factor": 2 ** (len(vae["block_out_channels"]) - 1),
        },
        **latent_settings(config),
    }


def latent_settings(config: Config) -> dict[str, Any]:
    """What of `latent_encoding` the config alone decides."""
    data = config.data
    sizes = [list(size) for size in data.buckets or (data.image_size,)]
    return {"dtype": config.model.dtype, "target_sizes": sizes, "reference_size": data.reference_size}


def text_encoding(config: Config) -> dict[str, Any]:
    """Everything that decides the embeddings of a prompt, as JSON values: encoders, tokenizers, dtype and text length.

    Raises:
        FileNotFoundError, OSError: There are no such encoders.
    """
    folders = {name: component_folder(config.model.pretrained, name) for name in TEXT_COMPONENTS}
    revisions = {name: component_revision(folder) for name, folder in folders.items()}
    return {**revisions, **text_settings(config)}


def text_settings(config: Config) -> dict[str, Any]:
    """What of `text_encoding` the config alone decides."""
    return {"dtype": config.model.dtype, "text_length": config.model.text_length}


def unneeded_components(config: Config, caches: Caches) -> list[str]:
    """Names of the pipeline's components that a run never uses. Validation encodes and decodes other pictures, so it needs all."""
    cached = [*(["vae"] if caches.latents is not None else []), *(TEXT_COMPONENTS if caches.text is not None else [])]
    if cached and config.validation.every is not None:
        logger.info("validation needs %s in memory, cached or not; validation.every=null leaves them out", ", ".join(cached))
        return []
    if cached:
        logger.info("not loaded, for their outputs are cached: %s", ", ".join(cached))
    return cached
