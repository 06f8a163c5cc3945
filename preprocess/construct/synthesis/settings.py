"""Settings of stage 2."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Guidance, NotNegative, Probability, Side, Steps, Text
from preprocess.construct.chats import ChatSettings
from preprocess.construct.pipeline_settings import PipelineSettings


class SynthesisJudge(ChatSettings):
    """A model of pictures and texts that is asked about each picture."""

    path: ClassVar[str] = "synthesis.judge"


class SynthesisLimits(Section):
    """What a picture must be. null: not asked for."""

    path: ClassVar[str] = "synthesis.limits"

    min_contrast: NotNegative | None = 0.02
    """Least standard deviation of a channel, of values in 0 to 1; black pictures, as safety checkers leave them, have 0."""
    max_uniformity: Probability | None = 0.95
    """Largest share of one colour, of 16 shades a channel."""
    min_sharpness: NotNegative | None = None
    """Least variance of the Laplacian of the grey picture at a short side of 256 px, of values in 0 to 255."""
    min_aesthetics: float | None = None
    """Least score of the aesthetic predictor, 1 to 10; its author calls 5.5 great."""
    min_prompt_fit: float | None = None
    """Least fit of picture and prompt: the cosine of a CLIP, the probability of a SigLIP."""
    max_text: Probability | None = None
    """How sure the detector may be of text in the picture."""
    min_judge: Probability | None = None
    """Least share of the judge's answers that are yes."""


class SynthesisSettings(PipelineSettings):
    """How pictures are made, and with what they are measured."""

    path: ClassVar[str] = "synthesis"

    model: Text = "black-forest-labs/FLUX.1-dev"
    """Text-to-image pipeline in diffusers layout, of any class that `AutoPipelineForText2Image` knows: a folder or a hub id."""
    sizes: Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1)] = ((1024, 1024),)
    """Heights and widths in px, of which each picture has one, evenly."""
    num_inference_steps: Steps = 28
    """Denoising steps."""
    guidance_scale: Guidance | None = None
    """The pipeline's argument of that name; null: its default."""
    true_cfg_scale: Guidance | None = None
    """The argument of that name, by which FLUX.1 and Qwen-Image weigh the negative prompt; null: not passed."""
    negative_prompt: str | None = None
    """What pictures shall not show; null: not passed."""
    max_sequence_length: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Tokens of the prompt; null: the pipeline's default."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pictures of one size within a chunk that are made at once. In another batch a picture differs by rounding."""
    siglip: Text | None = None
    """SigLIP under the aesthetic predictor, such as google/siglip-so400m-patch14-384; null: aesthetics is not measured."""
    aesthetic_head: Text | None = None
    """File of the aesthetic predictor's head."""
    prompt_fit: Text | None = None
    """CLIP or SigLIP that compares picture and prompt: a folder or a hub id; null: not measured."""
    text_detector: Text | None = None
    """GroundingDINO, MM-GroundingDINO or OWLv2 that is asked for text; null: not measured."""
    text_words: Annotated[tuple[Text, ...], Field(min_length=1)] = ("text", "watermark")
    """What it is asked for."""
    judge: SynthesisJudge | None = None
    """Model that says for each subject whether it is present, single, complete and distinct; null: not asked."""
    limits: SynthesisLimits = Field(default_factory=SynthesisLimits)
    """What decides."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if (self.siglip is None) != (self.aesthetic_head is None):
            raise FieldError("synthesis.aesthetic_head", "and synthesis.siglip must be given together, or neither")
        models = {
            "min_aesthetics": ("siglip", self.siglip),
            "min_prompt_fit": ("prompt_fit", self.prompt_fit),
            "max_text": ("text_detector", self.text_detector),
            "min_judge": ("judge", self.judge),
        }
        for limit, (name, model) in models.items():
            if getattr(self.limits, limit) is not None and model is None:
                raise FieldError(
                    f"synthesis.limits.{limit}", f"needs synthesis.{name}, which is null; name a model, or set the limit to null"
                )
        return self
