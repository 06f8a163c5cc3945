"""Settings of stage 4."""

from string import Formatter
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Count, Guidance, Probability, Side, Steps, Text
from preprocess.construct.chats import ChatSettings
from preprocess.construct.pipeline_settings import PipelineSettings
from preprocess.construct.rows import KINDS

WORDS = ("phrase", "name", "view")
Views = Annotated[tuple[Text, ...], Field(min_length=1)]
Similarity = Annotated[float, Field(ge=-1, le=1)]


class Instructions(Section):
    """What an editor is told, by the kind of the subject. {phrase}: as the prompt has it, without its article; {name}: its class; {view}:
    drawn from `references.views`.
    """

    path: ClassVar[str] = "references.instructions"

    human: Text = (
        "Show the same {phrase} from a {view} viewpoint, full figure, alone on a plain white background. Keep the person's face, hair, "
        "body, clothes and colours unchanged"
    )
    """Of people."""
    animal: Text = (
        "Show the same {phrase} from a {view} viewpoint, the whole animal, alone on a plain white background. Keep its identity, markings, "
        "fur and colours unchanged"
    )
    """Of animals."""
    object: Text = (
        "Show the same {phrase} from a {view} viewpoint, all of it, alone on a plain white background. Keep its identity, shape, colours, "
        "texture and text unchanged"
    )
    """Of things."""

    @model_validator(mode="after")
    def _known_words(self) -> Self:
        for kind, text in self:
            try:
                words = [word for _, word, _, _ in Formatter().parse(text) if word is not None]
            except ValueError as error:
                raise FieldError(f"{self.path}.{kind}", f"must be a text with words in braces; {error}") from error
            for word in words:
                if word not in WORDS:
                    raise FieldError(f"{self.path}.{kind}", f"may hold {{phrase}}, {{name}} and {{view}} in braces, got {{{word}}}")
        return self


class ViewChoices(Section):
    """The views from which a reference is asked for; each try draws one."""

    path: ClassVar[str] = "references.views"

    human: Views = ("front", "three-quarter", "side")
    """Of people."""
    animal: Views = ("front", "three-quarter", "side")
    """Of animals."""
    object: Views = ("front", "three-quarter", "side", "slightly elevated")
    """Of things."""


class ReferencesJudge(ChatSettings):
    """A model of pictures and texts that is shown each cut-out and its edit."""

    path: ClassVar[str] = "references.judge"


class ReferencesLimits(Section):
    """What a try must be to be a reference. A subject without such a try has no reference."""

    path: ClassVar[str] = "references.limits"

    min_similarity: Similarity | None = 0.6
    """Least cosine of edit and cut-out, below which it is another subject; null: any. It does not hold for the editor "none"."""
    max_similarity: Similarity | None = 0.95
    """Largest, above which it is a copy; null: any. It does not hold for the editor "none"."""
    min_border: Probability | None = 0.9
    """Least share of the picture's rim that is nearly white: the subject stands alone and is whole; null: any."""
    min_contrast: Probability | None = 0.03
    """Least contrast, the largest standard deviation of a channel: pictures that are blanked black or empty have none; null: any."""
    min_detector: Probability | None = None
    """How sure the detector must be of the subject's name; null: not asked for."""
    min_judge: Probability | None = None
    """Least share of the judge's answers that are yes, 0 where it is another one; null: not asked for."""
    min_references: Count = 1
    """Subjects of a sample that must have a reference; the others stand in its prompt and picture without one."""


class ReferencesSettings(PipelineSettings):
    """How cut-outs become references."""

    path: ClassVar[str] = "references"

    model: Text = "black-forest-labs/FLUX.1-Kontext-dev"
    """Image-to-image pipeline in diffusers layout: a folder or a hub id; of no use to the editor "none"."""
    editor: Literal["kontext", "flux2-klein", "qwen-image-edit", "none"] | None = None
    """Its class: `FluxKontextPipeline`, `Flux2KleinPipeline` or `QwenImageEditPlusPipeline`; "none": the cut-out itself is the reference;
    null: as the model's model_index.json says."""
    size: tuple[Side, Side] = (1024, 1024)
    """Height and width of a reference in px."""
    num_inference_steps: Steps = 28
    """Denoising steps."""
    guidance_scale: Guidance | None = 2.5
    """The pipeline's argument of that name; null: its default."""
    true_cfg_scale: Guidance | None = None
    """The argument of that name, by which FLUX.1-Kontext and Qwen-Image-Edit weigh the negative prompt; null: not passed."""
    negative_prompt: str | None = None
    """What references shall not show; null: not passed. Qwen-Image-Edit is used with " "."""
    max_sequence_length: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Tokens of the instruction; null: the pipeline's default."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Edits within a chunk that are made at once by FLUX.1-Kontext; the others take one at a time. In another batch an edit differs by
    rounding."""
    tries: Annotated[int, Field(ge=1, le=64)] = 2
    """Edits of each cut-out, with other noise and views. All are kept with their scores, the most similar one within the limits is used."""
    instructions: Instructions = Field(default_factory=Instructions)
    """What the editor is told."""
    views: ViewChoices = Field(default_factory=ViewChoices)
    """Which views are asked for."""
    encoder: Text | None = "facebook/dinov2-base"
    """DINO, DINOv2 or CLIP that compares edit and cut-out: a folder or a hub id; null: not measured."""
    detector: Text | None = None
    """GroundingDINO, MM-GroundingDINO or OWLv2 that looks for the subject's name in the edit; null: not measured."""
    judge: ReferencesJudge | None = None
    """Model that says whether edit and cut-out show the same individual, whole and once; null: not asked."""
    limits: ReferencesLimits = Field(default_factory=ReferencesLimits)
    """What decides."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        models = {
            "min_similarity": ("encoder", self.encoder),
            "max_similarity": ("encoder", self.encoder),
            "min_detector": ("detector", self.detector),
            "min_judge": ("judge", self.judge),
        }
        for limit, (name, model) in models.items():
            if getattr(self.limits, limit) is not None and model is None and not (name == "encoder" and self.editor == "none"):
                raise FieldError(
                    f"references.limits.{limit}", f"needs references.{name}, which is null; name a model, or set the limit to null"
                )
        low, high = self.limits.min_similarity, self.limits.max_similarity
        if low is not None and high is not None and low >= high:
            raise FieldError("references.limits.min_similarity", f"must be less than max_similarity {high:g}, got {low:g}")
        return self


assert set(Instructions.model_fields) == set(ViewChoices.model_fields) == set(KINDS), "each kind has its own"
