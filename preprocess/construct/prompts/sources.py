"""Who puts an assignment into words: sentence forms, or a model that is asked."""

import hashlib
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from preprocess.construct.prompts.drawing import Assignment
from preprocess.construct.prompts.settings import MAX_SUBJECTS, PromptsSettings
from preprocess.construct.prompts.templates import SCENE, SUBJECTS, Templates
from preprocess.construct.prompts.validation import normalised, problem_of
from preprocess.construct.rows import PromptRow, Subject

INSTRUCTION = (
    "Write one prompt for a text-to-image model, in plain English, one sentence of at most 60 words. It shows exactly these subjects, one "
    "of each, in this order, all clearly visible and apart from each other, and nobody else:\n{subjects}\nScene: {scene}. Manner: {manner}."
    "\nprompt: the sentence. It tells how each subject looks. caption: the same sentence without any word on how the subjects look "
    "(colour, pattern, material, clothes): who, what they do, and where. phrases: for each subject in order the words that name it, "
    'article included, such as "a cat"; they hold the name given above, stand letter by letter in prompt and caption alike, and differ '
    "from each other."
)
AGAIN = "\nAn earlier answer to this was refused: {problem}."


class Written(BaseModel):
    """What a model answers."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    caption: str
    phrases: Annotated[list[str], Field(min_length=1, max_length=MAX_SUBJECTS)]


class PromptSource(Protocol):
    """Writes prompts.

    Attributes:
        provenance: Who writes, as JSON values.
    """

    provenance: dict[str, Any]

    def __call__(self, number: int, assignment: Assignment) -> PromptRow:
        """The prompt of a candidate.

        Raises:
            OSError: An endpoint cannot be reached.
        """


class TemplateSource:
    """Sentence forms of the templates file."""

    def __init__(self, settings: PromptsSettings, templates: Templates) -> None:
        self.settings, self.templates = settings, templates
        self.provenance: dict[str, Any] = {}

    def __call__(self, number: int, assignment: Assignment) -> PromptRow:
        """Prompt and caption by the same form."""
        texts = []
        for hide in (False, self.settings.hide_looks):
            subjects = self.templates.joined(assignment.phrases(hide))
            texts.append(assignment.form.replace(SCENE, assignment.scene).replace(SUBJECTS, subjects))
        phrases = assignment.phrases(self.settings.hide_looks)
        return row_of(number, assignment, texts[0], texts[1], phrases, 1, problem_of(texts[0], texts[1], phrases))


class ChatSource:
    """A model that is told what was drawn."""

    def __init__(self, settings: PromptsSettings, chat: Any) -> None:
        self.settings, self.chat = settings, chat
        made = chat.provenance
        instruction = hashlib.sha256((INSTRUCTION + AGAIN).encode()).hexdigest()[:8]
        self.provenance: dict[str, Any] = {"model": made.model, "revision": made.revision, "instruction": instruction}

    def __call__(self, number: int, assignment: Assignment) -> PromptRow:
        """What it answers, if that is a prompt of these subjects; it is asked a few times."""
        from mosaic.evaluation.chat import ask

        problem, attempt = "", 0
        for attempt in range(1, self.settings.max_attempts + 1):
            try:
                written = ask(self.chat, [request(assignment, problem)], Written)
            except ValueError as error:
                problem = str(error)
                continue
            prompt, caption = " ".join(written.prompt.split()), " ".join(written.caption.split())
            caption = caption if self.settings.hide_looks else prompt
            problem = problem_of(prompt, caption, written.phrases) or self._problem(assignment, caption, written.phrases)
            if not problem:
                return row_of(number, assignment, prompt, caption, written.phrases, attempt)
        return row_of(number, assignment, "", "", [subject.name for subject in assignment.subjects], attempt, problem)

    def _problem(self, assignment: Assignment, caption: str, phrases: list[str]) -> str:
        """Why it is a prompt of others; "": it is not."""
        if len(phrases) != len(assignment.subjects):
            return f"there must be {len(assignment.subjects)} phrases, got {len(phrases)}"
        for subject, phrase in zip(assignment.subjects, phrases, strict=True):
            if f" {normalised(subject.name)} " not in f" {normalised(phrase)} ":
                return f"the phrase {phrase!r} must hold {subject.name!r}"
        told = next((look for look in assignment.looks if look and normalised(look) in normalised(caption)), None)
        return f"the caption must not tell looks, such as {told!r}" if told and self.settings.hide_looks else ""


def request(assignment: Assignment, problem: str = "") -> str:
    """What a model is told: other words for each candidate and after each refusal, for it always answers the same to the same."""
    lines = [
        f"{k}. {subject.name} ({subject.kind}){f', {look}' if look else ''}"
        for k, (subject, look) in enumerate(zip(assignment.subjects, assignment.looks, strict=True), 1)
    ]
    manner = assignment.form.replace(SUBJECTS, "(subjects)").replace(SCENE, "(scene)")
    text = INSTRUCTION.format(subjects="\n".join(lines), scene=assignment.scene, manner=manner)
    return text + (AGAIN.format(problem=problem) if problem else "")


def row_of(
    number: int, assignment: Assignment, prompt: str, caption: str, phrases: list[str], attempts: int, problem: str = ""
) -> PromptRow:
    """The row of an assignment in words."""
    subjects = [
        Subject(phrase=phrase, name=subject.name, kind=subject.kind) for subject, phrase in zip(assignment.subjects, phrases, strict=True)
    ]
    return PromptRow(
        number=number, prompt=prompt, caption=caption, subjects=tuple(subjects), seed=assignment.seed, attempts=attempts, problem=problem
    )
