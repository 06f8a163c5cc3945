"""The start that a run of cases and the page share: what is checked before the model is loaded, what all pictures share, the pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mosaic.config.loading import Config
from mosaic.lora.files import LoraFile
from mosaic.model.acceleration import accelerate
from mosaic.model.reference_cache import refresh_interval
from mosaic.pipeline.lora_loading import trained_config
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.rendering.checks import check_sizes
from mosaic.rendering.loading import load_pipeline
from mosaic.rendering.recipe import RunRecipe
from mosaic.rendering.recipes import shared_recipe
from mosaic.weights.digests import model_digest, vae_scale_factor, weights_digest
from mosaic.weights.hub import resolve_lora_file


def check_position(lora_file: Path, reference_position: str) -> None:
    """Check that references get the position ids that a reference LoRA was trained with: with others pictures are plausible but wrong.

    Raises:
        ValueError: They get others, or the file is damaged. One that does not tell is taken as it is.
    """
    model = trained_config(LoraFile(lora_file, "reference LoRA")).get("model")
    if model is not None and (trained := model.get("reference_position") or "width") != reference_position:
        raise ValueError(
            f'model.reference_position must be "{trained}", with which {lora_file} was trained, got "{reference_position}". '
            f"Set model.reference_position={trained}."
        )


@dataclass(frozen=True)
class Start:
    """A checked config, before its model is loaded.

    Attributes:
        config: The settings; `inference.memory` is not "auto" any more.
        device: Where pictures are rendered.
        lora_file: The reference LoRA; None: there is none.
        vae_scale_factor: Pixels per latent of the model.
        shared: The part of the recipe that all pictures share.
    """

    config: Config
    device: torch.device
    lora_file: Path | None
    vae_scale_factor: int
    shared: RunRecipe

    @classmethod
    def check(cls, config: Config, device: torch.device) -> "Start":
        """Check the model's name, the LoRAs' files and the settings; nothing is loaded.

        Raises:
            FileNotFoundError, OSError, ValueError: They do not fit.
        """
        name, settings = config.model.pretrained, config.inference
        factor, options = vae_scale_factor(name), ResolvedOptions.from_config(config)
        check_sizes(options, factor)
        # Only once the settings and the model stand: the file may be a download of a gigabyte.
        lora_file = resolve_lora_file(settings.lora, settings.lora_weight_name) if settings.lora else None
        if lora_file is not None:
            check_position(lora_file, options.reference_position)
        refresh_interval(options.reference_cache, options.refresh_references, config.model.reference_attention)
        lora_digest = weights_digest(lora_file) if lora_file is not None else None
        shared = shared_recipe(config, model_digest(name), lora_digest, device.type)
        return cls(config, device, lora_file, factor, shared)

    def load(self, prompts: Sequence[str] = ()) -> MosaicFluxPipeline:
        """The pipeline, ready to render.

        Args:
            prompts: All that will be rendered; where the text encoders leave, others cannot be.

        Raises:
            FileNotFoundError, OSError, ValueError: A part cannot be loaded, or does not fit.
        """
        pipeline = load_pipeline(self.config, self.lora_file, self.device, prompts)
        accelerate(pipeline.transformer, self.config.inference, self.device)
        return pipeline
