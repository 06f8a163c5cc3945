"""XVerseBench: lists of cases with their questions, and lines on anyone's pictures of them.

The lists are those of github.com/bytedance/XVerse, `eval/tools/XVerseBench_{single,multi}.json`, each with the questions of its cases in
`..._DSG.json`. A reference's kind is the folder in which its picture lies.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Text
from mosaic.evaluation.entries import Entry, Question, Subject, tiles_of
from mosaic.evaluation.prepared import PreparedCase
from mosaic.files import path_below, read_json, relative_path, shown

KINDS = ("human", "animal", "object")
PICTURES = "assets/XVerseBench"  # what the lists call the folder of the pictures
TOOLS = "eval/tools"  # where XVerse's repository has the lists


class Reference(NamedTuple):
    """A reference of a case.

    Attributes:
        path: Its picture, relative to the folder of the data.
        name: The words of the prompt that name it.
        kind: One of `KINDS`.
    """

    path: str
    name: str
    kind: str


class ListItem(NamedTuple):
    """A case of a list."""

    number: int
    prompt: str
    references: tuple[Reference, ...]
    questions: tuple[Question, ...]


def list_files(data: Path, name: str) -> tuple[Path, Path]:
    """The list and its questions in a folder: XVerse's repository, or one that holds the files themselves.

    Args:
        data: The folder.
        name: "single" or "multi".

    Raises:
        FileNotFoundError: They are in neither place.
    """
    for folder in (data / TOOLS, data):
        path = folder / f"XVerseBench_{name}.json"
        if path.is_file():
            return path, questions_file(path)
    raise FileNotFoundError(
        f"--data: {data} holds neither {TOOLS}/XVerseBench_{name}.json nor XVerseBench_{name}.json. Name the folder of "
        "github.com/bytedance/XVerse, or give a list with --list."
    )


def questions_file(path: Path) -> Path:
    """The file of the questions that belongs to a list."""
    return path.with_name(f"{path.stem}_DSG.json")


def read_list(path: Path, questions: Path) -> list[ListItem]:
    """Read a list with its questions.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file has another form, the two do not belong together, a path leads elsewhere, or a name is not in the prompt.
    """
    values, asked = read_json(path), read_json(questions)
    for place, found in ((path, values), (questions, asked)):
        if not isinstance(found, list) or not found or not all(isinstance(value, dict) for value in found):
            raise ValueError(f"{place}: must be a list of objects in XVerseBench's form, got {shown(found)}.")
    if len(values) != len(asked):
        raise ValueError(f"{questions}: must have the questions of the {len(values)} cases of {path}, got those of {len(asked)}.")
    items = [
        _read_item(value, questions_of, f"{path}[{number}]", f"{questions}[{number}]")
        for number, (value, questions_of) in enumerate(zip(values, asked, strict=True))
    ]
    doubled = [index for index, count in Counter(item.number for item in items).items() if count > 1]
    if doubled:
        raise ValueError(f"{path}: every case must have an index of its own, but {doubled[0]} is there twice.")
    return items


def _read_item(value: dict[str, Any], asked: dict[str, Any], place: str, place_of_questions: str) -> ListItem:
    index, prompt, modulation = value.get("index"), value.get("prompt"), value.get("modulation")
    if not isinstance(index, int) or not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'{place}: must have "index", a number, and "prompt", a text, got {shown(value)}.')
    if asked.get("prompt") != prompt:
        raise ValueError(
            f"{place_of_questions}.prompt: must be that of {place}, {shown(prompt)}, got {shown(asked.get('prompt'))}. "
            "The two files must be of one version."
        )
    if not isinstance(modulation, list) or not all(isinstance(part, dict) for part in modulation):
        raise ValueError(f'{place}.modulation: must be a list of objects with "src_inputs" and "use_words", got {shown(modulation)}.')
    references = tuple(
        reference for number, part in enumerate(modulation) for reference in _read_references(part, prompt, f"{place}.modulation[{number}]")
    )
    if not references:
        raise ValueError(f"{place}.modulation: must name at least one reference.")
    return ListItem(index, prompt, references, questions_of_dsg(asked, place_of_questions))


def _read_references(part: dict[str, Any], prompt: str, place: str) -> list[Reference]:
    inputs, uses = part.get("src_inputs"), part.get("use_words")
    if not isinstance(inputs, list) or not isinstance(uses, list):
        raise ValueError(f'{place}: must have the lists "src_inputs" and "use_words", got {shown(part)}.')
    words: dict[int, str] = {}
    for number, use in enumerate(uses):
        if not isinstance(use, list) or len(use) < 2 or not isinstance(use[0], int) or not isinstance(use[1], str):
            raise ValueError(f"{place}.use_words[{number}]: must be a list [position in src_inputs, words, ...], got {shown(use)}.")
        if not use[1].strip() or use[1] not in prompt:
            raise ValueError(f"{place}.use_words[{number}]: must be words of the prompt {shown(prompt)}, got {shown(use[1])}.")
        words.setdefault(use[0], use[1])
    found = []
    for number, source in enumerate(inputs):
        where = f"{place}.src_inputs[{number}]"
        path = relative_path(
            source.get("image_path") if isinstance(source, dict) else None, f"{where}.image_path", "the folder of the data"
        )
        if number not in words:
            raise ValueError(f"{where}: no entry of use_words says what the prompt calls it.")
        kind = Path(path).parent.name
        if kind not in KINDS:
            raise ValueError(f"{where}.image_path: must lie in a folder human, animal or object, got {shown(path)}.")
        found.append(Reference(path, words[number], kind))
    return found


def questions_of_dsg(value: dict[str, Any], place: str) -> tuple[Question, ...]:
    """Questions of an object in DSG's form: {"qid2question": {"1": "Is there a cat?", ...}, "qid2dependency": {"1": [0], ...}}.

    Args:
        value: The object; other keys are left alone. A parent that no question has, such as 0, stands for none.
        place: Where it stands.

    Raises:
        ValueError: It has another form.
    """
    texts, dependencies = value.get("qid2question"), value.get("qid2dependency", {})
    if not isinstance(texts, dict) or not texts or not all(isinstance(text, str) and text.strip() for text in texts.values()):
        raise ValueError(f"{place}.qid2question: must be an object with at least one question by its number, got {shown(texts)}.")
    if not isinstance(dependencies, dict) or not all(isinstance(parents, list) for parents in dependencies.values()):
        raise ValueError(f"{place}.qid2dependency: must be an object with lists of numbers of questions, got {shown(dependencies)}.")
    position = {qid: number for number, qid in enumerate(texts)}
    return tuple(
        Question(text, tuple(position[str(parent)] for parent in dependencies.get(qid, []) if str(parent) in position))
        for qid, text in texts.items()
    )


def cases_of_data(data: Path, listed: Path | None, name: str) -> list[PreparedCase]:
    """The cases of a folder of data.

    Args:
        data: XVerse's repository, or another folder with the pictures.
        listed: A list to take instead of the folder's, with its questions beside it.
        name: "single" or "multi".

    Raises:
        FileNotFoundError: A list is missing.
        ValueError: `read_list` refuses it.
    """
    files = (listed, questions_file(listed)) if listed else list_files(data, name)
    return prepared_cases(read_list(*files), data)


def prepared_cases(items: Sequence[ListItem], data: Path) -> list[PreparedCase]:
    """The cases of a list. A picture lies below `data` as the list says it, or without the list's "assets/XVerseBench"."""
    cases = []
    for item in items:
        subjects = []
        for path, name, kind in item.references:
            places = [data / path, data / path.removeprefix(f"{PICTURES}/")]
            subjects.append(Subject(name, (next((place for place in places if place.is_file()), places[0]),), kind))
        references = tuple(subject.references[0] for subject in subjects)
        cases.append(PreparedCase(str(item.number), item.prompt, references, tuple(subjects), item.questions))
    return cases


def group_name(subjects: Sequence[Subject]) -> str:
    """The kinds of a case's subjects by their first letters, humans first: "H" for one human, "HAO" for one of each."""
    return "".join(kind[0].upper() for kind in KINDS for subject in subjects if subject.kind == kind)


class ReferenceLine(Section):
    """A reference in a line."""

    path: ClassVar[str] = "line.references"

    picture: Annotated[Text, Field(alias="path")]
    """The file, relative to the file of lines."""
    name: Text
    """What the prompt calls it."""
    kind: Literal["human", "animal", "object"]
    """What it is; humans are compared by their faces."""


class PictureLine(Section):
    """A line on a generated picture, or on a grid of four."""

    path: ClassVar[str] = "line"

    picture: Text
    """The file, relative to the file of lines."""
    case: Text | Annotated[int, Field(ge=0)]
    """Which case it is of; a number and its digits are the same."""
    run: Annotated[int, Field(ge=0)] | None = None
    """Which of the case's pictures it is; none of a grid."""
    grid: bool = False
    """Whether the file holds runs 0 to 3, two by two, row by row."""
    prompt: Text
    """The prompt."""
    references: Annotated[tuple[ReferenceLine, ...], Field(min_length=1, max_length=10)]
    """The subjects."""
    questions: Any = None
    """A list of questions, or an object in DSG's form, which says what depends on what."""


def read_entry(value: dict[str, Any], place: str, root: Path) -> list[Entry]:
    """The entries of a line, as `entries.read_lines` takes it: one, or those of a grid's four pictures.

    Args:
        value: The line's value, such as {"picture": "a.png", "case": 0, "run": 0, "prompt": "a cat on a mug", "references":
            [{"path": "cat.jpg", "name": "cat", "kind": "animal"}], "questions": ["Is there a cat?"]}; of a grid "grid": true, no "run".
        place: Where it stands.
        root: Folder at which paths start and that they may not leave.

    Raises:
        FieldError, ValueError: A key or a path will not do.
    """
    line = PictureLine(**value)
    if (line.run is None) != line.grid:
        raise FieldError("line.run", 'must be given, or "grid": true for a file of four pictures, two by two; one of both')
    picture = path_below(root, line.picture, f"{place}.picture", str(root))
    subjects = tuple(
        Subject(one.name, (path_below(root, one.picture, f"{place}.references[{k}].path", str(root)),), one.kind)
        for k, one in enumerate(line.references)
    )
    entry = Entry(picture, str(line.case), line.run or 0, line.prompt, subjects, _questions(line.questions, place), place=place)
    return tiles_of(entry) if line.grid else [entry]


def _questions(value: Any, place: str) -> tuple[Question, ...]:
    """The questions of a line."""
    if isinstance(value, dict):
        return questions_of_dsg(value, f"{place}.questions")
    if not isinstance(value, tuple) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise FieldError(
            "line.questions", f'must be a list of questions, or an object with "qid2question" and "qid2dependency", got {shown(value)}'
        )
    return tuple(Question(text) for text in value)
