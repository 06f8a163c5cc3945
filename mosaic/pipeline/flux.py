"""diffusers' FLUX pipeline and the parts of it that are used here.

It imports image processors for IP adapters by names of which transformers says, where torchvision is not installed, that it gives the
processors that need Pillow alone. They are asked for once, quietly, so that a start says nothing.
"""

# ruff: noqa: E402

from transformers.utils import logging

_verbosity = logging.get_verbosity()
logging.set_verbosity_error()
try:
    from transformers import CLIPImageProcessor, SiglipImageProcessor  # noqa: F401  (it remembers what it gave)
finally:
    logging.set_verbosity(_verbosity)

from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

__all__ = ["FluxPipeline", "calculate_shift", "retrieve_timesteps"]
