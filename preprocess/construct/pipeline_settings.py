"""Which pipeline of diffusers a stage uses, and how it fits a device: the settings that the stages with a pipeline share."""

from typing import Annotated, Literal

from pydantic import Field

from mosaic.config.schema import Section
from mosaic.config.sections import Text


class PipelineSettings(Section):
    """Base of the sections of stages that make pictures."""

    model: Text
    """Pipeline in diffusers layout: a local folder or a hub id."""
    revision: Text | None = None
    """Branch, tag or commit of the hub id; null: its main branch."""
    lora: Text | None = None
    """LoRA that is merged into the pipeline's weights: a .safetensors file, a folder or a hub id with pytorch_lora_weights.safetensors."""
    lora_scale: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Factor of the LoRA."""
    memory: Literal["none", "80gb", "48gb", "24gb", "16gb", "12gb"] = "none"
    """What is done to fit a device, as `inference.memory` does it. "none" and "80gb": everything stays on it; "48gb": parts wait in CPU
    memory while others compute; "24gb": so, with the transformer in int8 (torchao); "16gb": so, in nf4 (bitsandbytes), and the VAE works
    in tiles; "12gb": int8, block by block from CPU memory, the text encoders layer by layer, the VAE in tiles."""
    quantization: Literal["none", "nf4", "int8", "fp8"] | None = None
    """Number format of the transformer's matrices; null: that of `memory`."""
    offload: Literal["none", "model", "group"] | None = None
    """What waits in CPU memory: nothing, all models but the one that computes, or all blocks but the one that does; null: as `memory`
    says. On a CPU everything does."""
