"""The models that are measured, and the sizes that each is measured at: no other file of this room names a shape."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mosaic.config.loading import Config, from_dict
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.model.costs import FLUX_DEV
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.planning.dry_run import build_transformer
from mosaic.planning.model_shape import FLUX_DEV_SHAPE, ModelShape, read_model_shape
from scripts.benchmarks import ROOT

POCKET = ROOT / "assets" / "pocket"
#: The shipped pocket transformer's geometry, for a checkout without its weights.
POCKET_GEOMETRY = {
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 2,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": [8, 12, 12],
}
LORA_STD = 0.02  # of a random adapter's B: not zero, so that references differ from the bare model and A has a gradient


@dataclass(frozen=True)
class MeasuredModel:
    """A model with random weights, and what passes through it.

    Attributes:
        shape: Of the model.
        size: Side of the target in px.
        reference_size: Side of a reference in px.
        text_tokens: T.
        batch_size: Samples of a training step.
        rank: Of the adapter.
        points_per_reference: Correspondence points of each reference.
        half: Whether it is measured in bfloat16 and on a GPU alone; else in float32.
    """

    shape: ModelShape
    size: int
    reference_size: int
    text_tokens: int
    batch_size: int
    rank: int
    points_per_reference: int
    half: bool = False

    def config(
        self, num_references: int, checkpointing: str = "none", quantization: str = "none", loss: Mapping[str, Any] | None = None
    ) -> Config:
        """Settings of a run with K references: the paper's losses, unless `loss` says else."""
        return from_dict(
            {
                "model": {
                    "dtype": "bfloat16" if self.half else "float32",
                    "text_length": self.text_tokens,
                    "gradient_checkpointing": checkpointing,
                    "quantization": quantization,
                },
                "lora": {"rank": self.rank},
                "data": {"image_size": [self.size, self.size], "reference_size": self.reference_size},
                "loss": {"max_points": self.points_per_reference * num_references, **(loss or {})},
                "training": {"batch_size": self.batch_size, "mixed_precision": "bf16" if self.half else "no"},
            }
        )

    def build(self, config: Config, device: str) -> MosaicFluxTransformer2DModel:
        """The transformer with an adapter that changes something, as training has them."""
        torch.manual_seed(0)
        transformer = build_transformer(config, self.shape, device)
        for key, parameter in reference_lora_parameters(transformer).items():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter.data, std=LORA_STD)
        return transformer


def _shape(geometry: Mapping[str, Any]) -> ModelShape:
    return ModelShape({**FLUX_DEV, **geometry}, 8, {}, is_local=False)


def _pocket() -> MeasuredModel:
    folder = POCKET / "flux"
    shape = read_model_shape(str(folder)) if folder.is_dir() else ModelShape(POCKET_GEOMETRY, 4, {}, is_local=False)
    return MeasuredModel(shape, 64, 32, 24, 16, 32, 9)  # 9 points are the pocket world's mean at K = 4


_WIDTH_512 = {
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "joint_attention_dim": 512,
    "pooled_projection_dim": 512,
    "axes_dims_rope": [8, 28, 28],
}
_WIDTH_32 = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
#: By name: mid is FLUX between pocket and FLUX.1-dev, for a CPU: 64 text tokens, 256 of the target and of each reference. thin has all of
#: FLUX.1-dev's blocks and next to nothing to multiply: the time of its steps is that of the operations as such. wide is mid with fewer
#: blocks, for all cost alike.
MODELS: Mapping[str, MeasuredModel] = {
    "pocket": _pocket(),
    "thin": MeasuredModel(_shape({**_WIDTH_32, "axes_dims_rope": [4, 6, 6]}), 64, 64, 8, 1, 4, 4),
    "mid": MeasuredModel(_shape({**_WIDTH_512, "num_layers": 4, "num_single_layers": 8}), 256, 256, 64, 1, 128, 32),
    "wide": MeasuredModel(_shape({**_WIDTH_512, "num_layers": 1, "num_single_layers": 2}), 256, 256, 64, 1, 32, 32),
    "flux_dev": MeasuredModel(FLUX_DEV_SHAPE, 512, 512, 512, 1, 128, 256, half=True),
}


def measured_model(name: str, **sizes: Any) -> MeasuredModel:
    """A model by its name, with other sizes where they are not None."""
    return replace(MODELS[name], **{key: value for key, value in sizes.items() if value is not None})
