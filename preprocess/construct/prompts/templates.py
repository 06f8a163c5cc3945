"""The templates file: who can stand in a prompt, how they look, where, and in what sentences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mosaic.files import in_one_line, read_json
from preprocess.construct.prompts.validation import normalised
from preprocess.construct.rows import KINDS, Kind

SUBJECTS, SCENE = "{subjects}", "{scene}"
Word = Annotated[str, Field(pattern=r"^\S(.*\S)?$", max_length=500)]


class Named(BaseModel):
    """Somebody or something that a prompt can name.

    Attributes:
        name: A word or two, such as "cat".
        kind: What it is.
        article: Before the name; "": by the name's first letter.
        looks: Words that come after the name, such as "with white patches"; none: those of its kind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Word
    kind: Kind
    article: str = ""
    looks: tuple[Word, ...] = ()

    @property
    def phrase(self) -> str:
        """The name with its article."""
        return f"{self.article or ('an' if self.name[0].lower() in 'aeiou' else 'a')} {self.name}"


class Templates(BaseModel):
    """A templates file.

    Attributes:
        comment: For readers of the file.
        subjects: All names.
        looks: By kind, of subjects that have none of their own.
        scenes: Where it is, such as "on a beach".
        forms: Sentences with {subjects} and {scene}.
        forms_of_several: Further ones, of two or more subjects.
        between, last: What joins subjects, and the last two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    comment: str = Field(default="", alias="$comment")
    subjects: Annotated[tuple[Named, ...], Field(min_length=1)]
    looks: dict[Kind, tuple[Word, ...]] = {}
    scenes: Annotated[tuple[Word, ...], Field(min_length=1)]
    forms: Annotated[tuple[Word, ...], Field(min_length=1)]
    forms_of_several: tuple[Word, ...] = ()
    between: str = ", "
    last: str = " and "

    def of_kind(self, kind: str) -> list[Named]:
        """Subjects of a kind, in the file's order."""
        return [subject for subject in self.subjects if subject.kind == kind]

    def looks_of(self, subject: Named) -> tuple[str, ...]:
        """What a subject can look like."""
        return subject.looks or self.looks.get(subject.kind, ())

    def joined(self, phrases: Sequence[str]) -> str:
        """Phrases as one list in words."""
        return phrases[0] if len(phrases) == 1 else self.between.join(phrases[:-1]) + self.last + phrases[-1]


def read_templates(path: str) -> Templates:
    """Read a templates file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not of the form, or names a subject twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompts.templates: file not found: {path}. Paths are relative to the current directory.")
    content: Any = read_json(path)
    try:
        found = Templates.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"prompts.templates: {path}: {place}: {in_one_line(first['msg'], 200)}.") from error
    for form in (*found.forms, *found.forms_of_several):
        if form.count(SUBJECTS) != 1 or form.count(SCENE) != 1 or set("{}") & set(form.replace(SUBJECTS, "").replace(SCENE, "")):
            raise ValueError(
                f"prompts.templates: {path}: a form must hold {SUBJECTS} and {SCENE} once each and no other braces, got {form!r}."
            )
    names = [normalised(subject.name) for subject in found.subjects]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"prompts.templates: {path}: names {twice!r} twice.")
    assert set(found.looks) <= set(KINDS)
    return found
