"""What is to be scored: generated pictures with what they should show, read from a JSON Lines file."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mosaic.config.schema import FieldError
from mosaic.files import parse_json, read_text, shown
from mosaic.images import picture_suffixes

MAX_PICTURES = 1_000_000
MAX_SHOWN = 10  # problems that one message lists
TILES = 4  # pictures of a grid, two by two


@dataclass(frozen=True)
class Subject:
    """A subject that a picture should show.

    Attributes:
        name: In words: of DreamBench the name of its folder, of XVerseBench what the prompt calls it.
        references: Its pictures, at least one: all of them are compared with.
        kind: "human", "animal" or "object"; empty where nobody said.
    """

    name: str
    references: tuple[Path, ...]
    kind: str = ""


@dataclass(frozen=True)
class Question:
    """A yes-or-no question of a case.

    Attributes:
        text: The question.
        parents: Positions, from 0, of the questions without whose "yes" this one counts as "no".
    """

    text: str
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A generated picture with what it should show.

    Attributes:
        picture: The file.
        case: What tells cases apart; the pictures of a case have the same prompt, subjects and questions, and different seeds.
        run: Which of the case's pictures it is, from 0.
        prompt: The whole prompt.
        subjects: At least one.
        questions: Of the prompt; none where the benchmark asks none.
        tile: Position, row by row, in a grid of 2 x 2 pictures that the file holds; None: the file is the picture.
        place: Where this was said, for messages, such as "pictures.jsonl:3".
    """

    picture: Path
    case: str
    run: int
    prompt: str
    subjects: tuple[Subject, ...]
    questions: tuple[Question, ...] = ()
    tile: int | None = None
    place: str = ""


class Listed(NamedTuple):
    """Pictures that a list names.

    Attributes:
        entries: The sound ones.
        problems: What is wrong with the others, a sentence each that begins with the place.
    """

    entries: list[Entry]
    problems: list[str]


def read_lines(path: Path, read: Callable[[Any, str], Iterable[Entry]]) -> Listed:
    """Read a JSON Lines file.

    Args:
        path: The file.
        read: Makes the entries of a line's value; its second argument is the place. It raises FieldError, ValueError or FileNotFoundError.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is empty or too long.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = parse_json(line, place)
            if not isinstance(value, dict):
                raise ValueError(f"{place}: must be an object, got {shown(value)}.")
            entries += read(value, place)
        except FieldError as error:
            problems.append(f"{place}{error.path.removeprefix('line')}: {error.problem}.")
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
        if len(entries) > MAX_PICTURES:
            raise ValueError(f"{path}: must name at most {MAX_PICTURES} pictures. Score it in parts.")
    if not entries and not problems:
        raise ValueError(f"{path}: must name at least one picture, one a line, got an empty file.")
    return Listed(entries, problems)


def tiles_of(entry: Entry) -> list[Entry]:
    """The four pictures of a grid, given as one entry: runs 0 to 3, row by row."""
    return [replace(entry, run=tile, tile=tile) for tile in range(TILES)]


def subject_labels(subjects: Sequence[Subject]) -> list[str]:
    """The subjects' names; what would be the same name twice, two men of a case, is told apart by a number: "man", "man (2)"."""
    names = [subject.name for subject in subjects]
    return [name if names.index(name) == k else f"{name} ({names[: k + 1].count(name)})" for k, name in enumerate(names)]


def tile_of(picture: Image.Image, tile: int | None) -> Image.Image:
    """The picture at a position of a grid of 2 x 2, row by row; the picture itself where it lies in none."""
    if tile is None:
        return picture
    width, height = picture.width // 2, picture.height // 2
    left, top = tile % 2 * width, tile // 2 * height
    return picture.crop((left, top, left + width, top + height))


def raise_all(problems: Sequence[str]) -> None:
    """Raise ValueError that names the first of many problems, a line each, and how many more there are."""
    if problems:
        more = f"\n... and {len(problems) - MAX_SHOWN} more." if len(problems) > MAX_SHOWN else ""
        raise ValueError("\n".join(problems[:MAX_SHOWN]) + more)


def pictures_in(folder: Path, place: str) -> tuple[Path, ...]:
    """The pictures of a subject's folder, by name.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no pictures.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{place}: there is no folder {folder}, which should hold the subject's pictures.")
    found = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in picture_suffixes() and not path.name.startswith(".")))
    if not found:
        raise ValueError(f"{place}: the folder {folder} must hold the subject's pictures, but there is none in it.")
    return found


def check_entries(entries: Sequence[Entry]) -> list[str]:
    """What is wrong with entries as a whole, a sentence each: doubles, cases that disagree with themselves, and runs that lack cases."""
    problems = []
    first: dict[tuple[str, int], Entry] = {}
    of_case: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault((entry.case, entry.run), entry)
        if other is not entry:
            problems.append(
                f"{entry.place}: run {entry.run} of the case {shown(entry.case)} is that of {other.place} too. Keep one of them."
            )
        one = of_case.setdefault(entry.case, entry)
        if (one.prompt, one.subjects, one.questions) != (entry.prompt, entry.subjects, entry.questions):
            problems.append(f"{entry.place}: prompt, subjects and questions of a case must agree, and those of {one.place} are others.")
    runs: defaultdict[int, dict[str, Entry]] = defaultdict(dict)
    for (case, run), entry in first.items():
        runs[run][case] = entry
    for run, cases in sorted(runs.items()):
        missing = [case for case in of_case if case not in cases]
        if missing:
            named = ", ".join(shown(case) for case in missing[:3]) + (", ..." if len(missing) > 3 else "")
            problems.append(f"run {run} has {len(cases)} of {len(of_case)} cases: {named} missing. Every run must have every case.")
    return problems


def cases_of(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The pictures of each case together, in the order of their runs; cases in the order in which they first appear."""
    cases: dict[str, list[Entry]] = {}
    for entry in entries:
        cases.setdefault(entry.case, []).append(entry)
    return [sorted(of_case, key=lambda entry: entry.run) for of_case in cases.values()]
