"""Settings of stage 3."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Probability, Text


class SegmentationLimits(Section):
    """What every subject of a picture must be; a picture with one that misses a limit is dropped. A subject that is not found always is."""

    path: ClassVar[str] = "segmentation.limits"

    min_score: Probability | None = 0.3
    """How sure the model must be of a subject; null: not asked for."""
    min_area: Probability | None = 0.02
    """Least share of the picture that a subject covers; null: any."""
    max_area: Probability | None = 0.7
    """Largest share; null: any."""
    max_truncated: Probability | None = 0.2
    """Largest share of a subject's outline that lies on the picture's frame; null: any."""
    max_overlap: Probability | None = 0.3
    """Largest intersection over union of the boxes of two subjects; null: any."""
    max_rival: Probability | None = 0.3
    """How sure the model may be of one more thing that answers to a subject's phrase; null: there may be any."""


class SegmentationSettings(Section):
    """How subjects are found in the picture and cut out of it."""

    path: ClassVar[str] = "segmentation"

    kind: Literal["sam2", "sam3", "clipseg"] = "sam2"
    """What finds them: SAM 2 in the boxes of a detector, SAM 3 by phrases, or CLIPSeg, whose heat maps fall into pieces."""
    model: Text = "facebook/sam2.1-hiera-large"
    """The model of that kind: a folder or a hub id."""
    detector: Text | None = "IDEA-Research/grounding-dino-base"
    """For "sam2": GroundingDINO, MM-GroundingDINO or OWLv2, a folder or a hub id; null for the others."""
    text: Literal["phrase", "name"] = "phrase"
    """What is asked for: the phrase that the prompt has for a subject, or the name of its class, where the phrase says more than the model
    knows. Subjects of one text are told apart by where they stand alone."""
    mask_threshold: Probability = 0.5
    """How sure the model must be of a pixel that belongs to a subject."""
    limits: SegmentationLimits = Field(default_factory=SegmentationLimits)
    """What decides."""

    @model_validator(mode="after")
    def _check(self) -> "SegmentationSettings":
        if (self.kind == "sam2") != (self.detector is not None):
            needed = 'a detector for "sam2"' if self.kind == "sam2" else f'null, for "{self.kind}" finds things by itself'
            raise FieldError("segmentation.detector", f"must be {needed}, got {self.detector or 'null'}")
        return self
