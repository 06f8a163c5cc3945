"""diffusers' FLUX pipeline and the parts of it that are used here.

It imports image processors for IP adapters, by names for which transformers warns where torchvision is not installed, and then gives the
processors that need Pillow alone. They are put under those names before, so that a start says nothing.
"""

import transformers
from transformers.utils import is_torchvision_available

if not is_torchvision_available():
    for _name in ("CLIPImageProcessor", "SiglipImageProcessor"):
        setattr(transformers, _name, getattr(transformers, f"{_name}Pil"))

from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

__all__ = ["FluxPipeline", "calculate_shift", "retrieve_timesteps"]
