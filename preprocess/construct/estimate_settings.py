"""Settings of the estimate: what a dry run assumes."""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Count, Text
from mosaic.planning.cards import find_card

Share = Annotated[float, Field(gt=0, le=1)]


class Yields(Section):
    """Share of the candidates that a stage lets through, as long as nothing has been measured."""

    path: ClassVar[str] = "estimate.yields"

    prompts: Share = 0.98
    """Valid prompts that no earlier one equals."""
    synthesis: Share = 0.5
    """Pictures that are sharp and show what the prompt asks for; the filter of UNO-1M keeps 40 % of its pairs."""
    segmentation: Share = 0.6
    """Pictures in which every subject is found once, large enough, whole, and apart from the others."""
    references: Share = 0.6
    """Pictures of which every subject has a try that shows the same individual."""
    points: Share = 0.9
    """Pictures of which enough references have enough points."""


class EstimateSettings(Section):
    """What a dry run assumes."""

    path: ClassVar[str] = "estimate"

    gpu: Text = "H100"
    """Card by whose data sheet hours are counted, of those that `preflight.py` knows."""
    utilisation: Share = 0.33
    """Share of the card's bf16 rate that pipelines reach; others published 0.31 to 0.4 for FLUX.1-dev on H100s and H200s with blocks that
    are not compiled, as here."""
    small_utilisation: Share = 0.15
    """Share that encoders, detectors and language models reach, which work on one picture at a time."""
    answer_tokens: Count = 150
    """Tokens of a judge's answer, or of a prompt."""
    yields: Yields = Field(default_factory=Yields)
    """What stages let through."""

    @model_validator(mode="after")
    def _check(self) -> "EstimateSettings":
        try:
            find_card(self.gpu)
        except ValueError as error:
            raise FieldError("estimate.gpu", f"must be a card that is known ({error})".rstrip(".")) from error
        return self
