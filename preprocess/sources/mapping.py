"""Mapping files: which field of a list's rows is what. Those of `preprocess/mappings` are known by their names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Text
from mosaic.files import nearest, read_json, relative_path, shown
from preprocess.sources import fields
from preprocess.sources.placeholders import problem_of_template

FOLDER = Path(__file__).resolve().parents[1] / "mappings"
IGNORED_KEYS = ("$schema", "$comment")
Fields = Text | Annotated[tuple[Text, ...], Field(min_length=1)]


class Score(Section):
    """A number that decides whether a row is taken."""

    path: ClassVar[str] = "scores"

    field: Text
    """Where the rows have it."""
    least: float
    """Rows with less are left out."""
    most: float | None = None
    """Rows with more, which is no true value, are left out, as are those without a number; null: none is too large."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.most is not None and self.most < self.least:
            raise FieldError("scores.most", f"must be at least scores.least, {self.least:g}, got {self.most:g}")
        return self


class Interleaved(Section):
    """Prompt and references as parts of one list, text and pictures in the order in which they are read."""

    path: ClassVar[str] = "interleaved"

    field: Text
    """The list. A part is a text, or an object."""
    text: Text = "text"
    """Field of a part that has its text."""
    image: Text = "image|image_url.url"
    """Field of a part that has its picture."""


class Mapping(Section):
    """What the rows of a list hold.

    A field is a column's name, "a.b" or "a.0" a part of what it holds, "a.*.b" that part of every element, "a|b" whichever of the two a row
    has. Pictures are paths, encoded files, or objects of bytes and path.
    """

    name: Text
    """Of the source, for the samples' metadata."""
    target: Text
    """Field of the target picture."""
    prompt: Text | None = None
    """Field of the target's caption; null with interleaved."""
    references: Fields = ()
    """Field of the reference pictures: a list or one picture; "ref_{0}" means the columns ref_0, ref_1, ...; or a list of fields. Empty
    with interleaved."""
    interleaved: Interleaved | None = None
    """Where prompt and references stand in one list, as in conversations."""
    missing_references: Literal["refuse", "skip"] = "refuse"
    """What null in place of a reference means: "refuse": the row is invalid; "skip": the row has fewer references."""
    phrases: Fields | None = None
    """Field of what the references are called, one for each. Those that the prompt does not hold are left empty and counted."""
    masks: Fields | None = None
    """Field of the masks over the target, one for each reference, null where it is unknown."""
    kinds: Fields | None = None
    """Field of what the references are, such as "human", one for each."""
    id: Text | None = None
    """Field of the samples' ids: letters, digits, "-" and "_"; null: they are computed from the pictures and the prompt."""
    split: Text | None = None
    """Field of the samples' splits; null: --split."""
    scores: tuple[Score, ...] = ()
    """Numbers that decide which rows are taken; they are kept as the samples' scores."""
    metadata: dict[str, str] = Field(default_factory=dict)
    """Fields to keep in the samples' metadata, by the names that they get there."""
    folder: Text | None = None
    """Folder below --image-root that paths are relative to; null: --image-root itself."""
    placeholder_words: str | None = None
    """What takes the place of a picture's placeholder in the prompt, such as <image_1>: "{phrase}" is what the reference is called,
    "{number}" its number from 1; "": placeholders are taken away; null: prompts that hold one are invalid."""
    placeholder_form: Text | None = None
    """How placeholders are written, such as "[IMG{number}]"; null: <image_1>, <image1>, <image>, <|image_1|>, <img><|image_1|></img>."""
    placeholder_start: Literal[0, 1] = 1
    """The number of the first reference in placeholders."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.interleaved is None and (self.prompt is None or not self.references):
            missing = "prompt" if self.prompt is None else "references"
            raise FieldError(missing, "must name a field, unless interleaved does")
        if self.interleaved is not None and (self.prompt is not None or self.references):
            raise FieldError("interleaved", "must not be given with prompt or references, which it stands for")
        if self.interleaved is not None and self.placeholder_words is None:
            raise FieldError("placeholder_words", 'must be given with interleaved: what takes a picture\'s place, such as "image {number}"')
        for path, field, is_many in self._all_fields():
            if wrong := fields.problem(field):
                raise FieldError(path, f"{wrong}, got {shown(field)}")
            if not is_many and fields.holds_many(field):
                raise FieldError(path, f'must name one value, without "*" and "{{0}}", got {shown(field)}')
        try:
            relative_path(self.folder or ".", "folder", "--image-root")
        except ValueError as error:
            raise FieldError("folder", str(error).removeprefix("folder: ").removesuffix(".")) from error
        if wrong := problem_of_template(self.placeholder_words or ""):
            raise FieldError("placeholder_words", f"{wrong}, got {shown(self.placeholder_words)}")
        if self.placeholder_form is not None and (
            self.placeholder_form.count("{number}") != 1 or not self.placeholder_form.replace("{number}", "").strip()
        ):
            raise FieldError("placeholder_form", f'must hold "{{number}}" once, and more, got {shown(self.placeholder_form)}')
        return self

    def _all_fields(self) -> Iterator[tuple[str, str, bool]]:
        """Setting, field, and whether it may mean several values."""
        for name in ("target", "prompt", "id", "split"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name), False
        for name in ("references", "phrases", "masks", "kinds"):
            yield from ((name, field, True) for field in as_fields(getattr(self, name)))
        yield from (("metadata", field, True) for field in self.metadata.values())
        yield from (("scores.field", score.field, False) for score in self.scores)
        if self.interleaved is not None:
            yield from ((f"interleaved.{name}", getattr(self.interleaved, name), False) for name in ("field", "text", "image"))

    def columns(self, names: list[str], place: str) -> list[str]:
        """The columns of a file that are needed.

        Args:
            names: All of its columns.
            place: The file, for messages.

        Raises:
            ValueError: One is missing that every row must have.
        """
        needed = [self.target, *(score.field for score in self.scores), *as_fields(self.id), *as_fields(self.split)]
        needed += [self.interleaved.field] if self.interleaved else [*as_fields(self.prompt), *as_fields(self.references)]
        for field in needed:
            fields.require_columns(field, names, place)
        given = [field for name, field, _ in self._all_fields() if not name.startswith("interleaved.")]
        given += [self.interleaved.field] if self.interleaved else []
        return list(dict.fromkeys(name for field in given for name in fields.columns(field, names)))


def as_fields(given: Fields | None) -> tuple[str, ...]:
    """The fields of a setting that is one, several or none."""
    return (given,) if isinstance(given, str) else given or ()


def ready() -> list[str]:
    """Names of the mappings that come with this project."""
    return sorted(path.stem for path in FOLDER.glob("*.json") if not path.name.endswith("schema.json"))


def load_mapping(name: str) -> Mapping:
    """Read a mapping.

    Args:
        name: Of a ready one, or a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON or no mapping; the message names the setting and the file.
    """
    path = FOLDER / f"{name}.json" if name in ready() else Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"--mapping: must be a file or one of {', '.join(ready())}, but there is no file {name}.{nearest(name, ready())}"
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a JSON object of settings, got {shown(values)}.")
    try:
        return Mapping(**{key: value for key, value in values.items() if key not in IGNORED_KEYS})
    except FieldError as error:
        raise FieldError(error.path, error.problem, str(path)) from error
