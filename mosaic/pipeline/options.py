"""What a config, a case and a Python call say to the sampler, in one object. Needs no torch."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from mosaic.config.loading import Config
from mosaic.config.schema import Section
from mosaic.config.sections import MAX_STRENGTH

DEFAULT_SIZE = 512  # px; target and references, unless the loaded reference LoRA says otherwise


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The settings of a call of `MosaicFluxPipeline`, under the names of its arguments; what they mean is said there.

    Strengths are not among them: there is one for each reference, and they come with the references.
    """

    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    image_guidance_scale: float = 1.0
    reference_size: int | None = None
    reference_scale: float = 0.9
    reference_attention: str | None = None
    reference_position: str | None = None
    reference_cache: bool = False
    refresh_references: int | None = None
    max_sequence_length: int | None = None

    def trained(self, config: Mapping[str, Any]) -> "ResolvedOptions":
        """These options, with what the loaded reference LoRA was trained with where they are None.

        Args:
            config: The training config that the LoRA's file carries, as JSON; empty if it carries none.
        """
        data, model = config.get("data", {}), config.get("model", {})
        height, width = data.get("image_size") or (DEFAULT_SIZE, DEFAULT_SIZE)
        usual = {
            "height": height,
            "width": width,
            "reference_size": data.get("reference_size") or DEFAULT_SIZE,
            "reference_attention": model.get("reference_attention") or "target",
            "reference_position": model.get("reference_position") or "width",
        }
        missing = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return ResolvedOptions(**self.arguments | missing)

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as keyword arguments of `MosaicFluxPipeline.__call__`, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(SamplingOptions):
    """Options that leave nothing to the reference LoRA: sizes, attention mode and positions are said."""

    height: int
    width: int
    reference_size: int
    reference_attention: str
    reference_position: str

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """What the sections `inference`, `data` and `model` of a config say to the sampler."""
        settings = config.inference
        return cls(
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
            reference_size=config.data.reference_size,
            reference_scale=settings.reference_scale,
            reference_attention=config.model.reference_attention,
            reference_position=config.model.reference_position,
            reference_cache=settings.reference_cache,
            refresh_references=settings.refresh_references,
            max_sequence_length=config.model.text_length,
        )

    def given(self, case: Section) -> Self:
        """These options, with those in place of them that a case decides for itself.

        Args:
            case: Fields of the same names, of which those that are None leave a decision to these options; others do not count.
        """
        own = self.arguments
        return replace(self, **{name: value for name, value in case if name in own and value is not None})


def check_strength(value: object, where: str, show: Callable[[object], str] = repr) -> None:
    """Check the strength of a reference.

    Args:
        value: What was given.
        where: The subject of the message.
        show: How the message writes the value.

    Raises:
        ValueError: It is no number, or none that attention takes.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= MAX_STRENGTH:
        raise ValueError(f"{where} must be a number from 0 (absent) to {MAX_STRENGTH:g}, got {show(value)}.")
