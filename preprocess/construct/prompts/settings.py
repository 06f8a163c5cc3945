"""Settings of stage 1."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Count, NotNegative, Probability, Text
from preprocess.construct.chats import ChatSettings

MAX_SUBJECTS = 6
TEMPLATES = "preprocess/construct/prompts/templates.json"
LETTERS = {"H": "human", "A": "animal", "O": "object"}


class PromptChat(ChatSettings):
    """The model that writes prompts."""

    path: ClassVar[str] = "prompts.chat"


class PromptLimits(Section):
    """What decides, beside whether a prompt is valid."""

    path: ClassVar[str] = "prompts.limits"

    max_uses: Count | None = 1
    """How many candidates may have one prompt, by its words alone; null: any number, where only few prompts are known to the model."""


class PromptsSettings(Section):
    """Who stands in the pictures, and who puts it into words."""

    path: ClassVar[str] = "prompts"

    source: Literal["templates", "chat"] = "templates"
    """Who writes: sentence forms of the templates file, or the model of `chat`, which is told subjects, looks, scene and form."""
    templates: Text = TEMPLATES
    """JSON file of subjects, looks, scenes and sentence forms."""
    chat: PromptChat | None = None
    """The model that writes, for the source "chat"."""
    num_subjects: Annotated[tuple[NotNegative, ...], Field(min_length=1, max_length=MAX_SUBJECTS)] = (0.25, 0.35, 0.2, 0.1, 0.05, 0.05)
    """Shares of prompts with one, two, ... subjects, up to six; they are scaled to the sum 1."""
    kinds: dict[str, NotNegative] | None = None
    """Shares of combinations of kinds, such as {"HH": 1, "HAO": 2} (human, animal, object), among those of as many subjects; for numbers of
    subjects that it does not name, and with null for all: every combination equally."""
    twins: Probability = 0.0
    """Share of the prompts with two subjects of one kind in which these have one name, too ("a cat and another cat")."""
    looks: Probability = 1.0
    """Share of subjects whose looks the prompt tells, where the file has any."""
    hide_looks: bool = False
    """Captions, which training reads, do not tell looks: these must come from the references."""
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """How often a model is asked for one prompt; then it is dropped."""
    parallel: Annotated[int, Field(ge=1, le=256)] = 1
    """How many prompts an endpoint is asked for at a time."""
    limits: PromptLimits = Field(default_factory=PromptLimits)
    """What decides."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not sum(self.num_subjects) > 0:
            raise FieldError("prompts.num_subjects", "must hold a share above 0")
        if (self.source == "chat") != (self.chat is not None):
            raise FieldError("prompts.chat", 'must name a model where prompts.source is "chat", and be null elsewhere')
        for word in self.kinds or {}:
            if not word or len(word) > MAX_SUBJECTS or set(word) - set(LETTERS):
                raise FieldError("prompts.kinds", f"must name combinations of one to {MAX_SUBJECTS} letters of H, A and O, got {word!r}")
        return self
