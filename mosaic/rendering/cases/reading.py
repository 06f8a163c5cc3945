"""The cases file: prompts with their reference pictures, checked completely before anything is computed."""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Guidance, Seed, Side, Steps
from mosaic.files import nearest, parse_json, read_json, read_text, shown
from mosaic.rendering.cases.grids import MAX_PER_CASE, MAX_PICTURES, expand_grid, num_pictures
from mosaic.rendering.cases.pictures import ReferencePictures
from mosaic.rendering.cases.references import Reference, check_text, named_prompt, read_paths, read_references
from mosaic.rendering.cases.shapes import IMAGE_PATHS, PROMPT, REFERENCES, Entry, unify

MAX_INDEX = 999_999_999  # the index names files
MAX_FILE = 64 * 2**20  # bytes
MAX_NOTES = 20  # on pictures that are shown
LINES = (".jsonl", ".ndjson")


class CaseOptions(Section):
    """What a case may decide for itself. None: as the section `inference` of the config says."""

    path: ClassVar[str] = "case"

    seed: Seed | None = None
    """Seed of the start noise; None: `inference.seed` + index."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=MAX_PER_CASE)] | None = None
    """Seeds of several pictures, instead of `seed` and `num_images_per_prompt`."""
    num_images_per_prompt: Annotated[int, Field(ge=1, le=MAX_PER_CASE)] | None = None
    """Number of pictures; their seeds are `seed`, `seed` + 1, and so on."""
    height: Side | None = None
    """Height of the picture in pixels; a multiple of the model's token size."""
    width: Side | None = None
    """Width of the picture in pixels; a multiple of the model's token size."""
    num_inference_steps: Steps | None = None
    """Sampling steps."""
    guidance_scale: Guidance | None = None
    """Embedded guidance of the text and target branch."""
    image_guidance_scale: Guidance | None = None
    """How far the velocity goes from that without references to that with them and beyond."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """There is one way to say which pictures are wanted."""
        for name in ("seed", "num_images_per_prompt"):
            if self.seeds is not None and getattr(self, name) is not None:
                raise FieldError(f"case.{name}", "must not be given together with seeds")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise FieldError("case.seeds", f"must differ, since they name the output files, got {shown(list(self.seeds))}")
        return self


OPTIONS = tuple(CaseOptions.model_fields)
KEYS = ("index", PROMPT, REFERENCES, IMAGE_PATHS, *OPTIONS)


@dataclass(frozen=True)
class Case:
    """A prompt with its references.

    Attributes:
        index: Number in the names of the case's output files; unique within a cases file.
        prompt: Text, not empty, as the model sees it: names without their brackets.
        references: One or more reference pictures.
        options: What the case decides for itself.
        place: Where it stands, for messages, such as "cases.json[3]".
    """

    index: int
    prompt: str
    references: tuple[Reference, ...]
    options: CaseOptions = CaseOptions()
    place: str = ""

    @property
    def image_paths(self) -> tuple[Path, ...]:
        """Files of the reference pictures."""
        return tuple(reference.path for reference in self.references)


class CaseFile(NamedTuple):
    """What a cases file holds.

    Attributes:
        cases: The good cases, in the order of the file.
        problems: One error for each bad case, in the order of the file.
        notes: What the reader should know of the file, one sentence each.
        pictures: The reference pictures, as far as they fit into memory.
    """

    cases: list[Case]
    problems: list[ValueError | FileNotFoundError]
    notes: list[str]
    pictures: ReferencePictures

    def all_good(self) -> Self:
        """The file itself, in which every case is good; raises as `load_cases` for the first that is not."""
        if self.problems:
            raise self.problems[0]
        return self


def load_cases(path: str | Path, reference_size: int = 512, reference_scale: float = 0.9) -> list[Case]:
    """Read a cases file in which every case must be good; see `read_cases`.

    Raises:
        FileNotFoundError: The file or a picture is missing.
        ValueError: Anything else is wrong with the file or a picture. Messages name the file and the place, such as
            `cases.json[3].image_paths[1]: ...`.
    """
    return read_cases(path, reference_size, reference_scale).all_good().cases


def read_cases(path: str | Path, reference_size: int = 512, reference_scale: float = 0.9) -> CaseFile:
    """Read a cases file: `[{"index": 0, "prompt": "...", "image_paths": ["..."]}]`, paths relative to the file.

    The forms are those of `configs/cases.schema.json`: JSON, or JSONL with a case per line; a case may be a grid of cases, or have the
    keys of another project. A case without an index has its position in the file. Where a grid before it failed, that position is not
    known, and the case is refused: it would have another name and seed once the grid is mended. Every picture is decoded and prepared
    once, so that no case fails after others have been rendered.

    Args:
        path: The file.
        reference_size: Side in pixels for which the references will be prepared.
        reference_scale: Share of that side that the subject's long side will fill.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is not a list of cases.
    """
    path = Path(path)
    problems: dict[int, ValueError | FileNotFoundError] = {}
    cases: dict[int, Case] = {}
    unused: set[str] = set()
    first: dict[int, tuple[str, bool]] = {}  # place of the case that has an index, and whether it was given
    lost: str | None = None  # place of the first grid of which nobody knows how many cases it has
    after_grid = unnamed = False
    checked: dict[Path, ValueError | FileNotFoundError | None] = {}
    pictures = ReferencePictures(reference_size, reference_scale)
    for position, (place, item, in_grid) in enumerate(_expanded(_entries(path), path)):
        after_grid |= in_grid
        if lost is None and in_grid and isinstance(item, Exception):
            lost = place
        try:
            entry = _unified(item, place)
            unused.update(entry.unused)
            given = "index" in entry.values
            unnamed |= after_grid and not in_grid and not given
            case = _read_case(entry, place, path.parent, position)
            if not given and lost is not None:
                cure = 'give it an "index", or mend the grid'
                raise ValueError(f"{place}.index: is missing, and the position is not known, since the grid {lost} failed: {cure}.")
            _check_index(case.index, place, given, first)
            _check_pictures(case, entry, checked, pictures)
            cases[position] = case
        except (ValueError, FileNotFoundError) as error:
            problems[position] = error
    notes = [f"{path}: {', '.join(sorted(unused))} of its cases: of no use here, since pictures are named by index."] if unused else []
    if unnamed:
        notes.append(f'{path}: cases after a grid have no "index": their names and seeds change when the grid grows. Give them one.')
    told = [f"{picture}: {note}." for picture, found in pictures.notes.items() for note in found]
    notes += told[:MAX_NOTES] + ([f"{path}: {len(told) - MAX_NOTES} more notes on pictures."] if len(told) > MAX_NOTES else [])
    return CaseFile(list(cases.values()), list(problems.values()), notes, pictures)


_FORM = 'expected [{"index": 0, "prompt": "...", "image_paths": ["..."]}].'


def _entries(path: Path) -> list[tuple[str, Any]]:
    """Place and value of every entry of the file; an error in place of a line that is not JSON."""
    _check_file(path)
    if path.suffix.lower() in LINES:
        return _lines(path)
    try:
        values = read_json(path)
    except ValueError as error:
        cure = f" A file with a case per line must be named {path.stem}.jsonl." if "Extra data" in str(error) else ""
        raise ValueError(f"{error}{cure}") from error
    if isinstance(values, dict) and "grid" in values:
        return [(str(path), values)]
    if not isinstance(values, list):
        raise ValueError(f"{path}: must be a list of cases, got {_kind(values)}: {_FORM}")
    if not values:
        raise ValueError(f"{path}: must hold at least one case, got an empty list: {_FORM}")
    if len(values) > MAX_PICTURES:
        raise ValueError(f"{path}: must hold at most {MAX_PICTURES} cases, got {len(values)}. Split it into several files.")
    return [(f"{path}[{number}]", value) for number, value in enumerate(values)]


def _check_file(path: Path) -> None:
    """Raise ValueError where the file is too large, or no file. What is missing or a folder is told when it is read."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path}: must be a regular file, but it is a pipe or device. Save the cases to a file first.")
    if status.st_size > MAX_FILE:
        cure = "Split it, or use patterns and grids"
        raise ValueError(f"{path}: must have at most {MAX_FILE >> 20} MiB, got {status.st_size >> 20}. {cure}.")


def _lines(path: Path) -> list[tuple[str, Any]]:
    """Place and value of every line of a file with a case per line."""
    entries: list[tuple[str, Any]] = []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if len(entries) == MAX_PICTURES:
                    raise ValueError(f"{path}: must hold at most {MAX_PICTURES} cases, got more. Split it into several files.")
                place = f"{path}:{number}"
                entries.append((place, _parsed(line.rstrip("\n"), place)))
    except OSError:
        read_text(path)  # says what is wrong with the file
        raise
    if not entries:
        raise ValueError(f"{path}: must hold at least one case, one per line, got an empty file: {_FORM[:-1]} without the brackets.")
    return entries


def _parsed(line: str, place: str) -> Any:
    """The value of a line; an error in its place where it is not JSON in UTF-8."""
    try:
        damaged = next((number for number, letter in enumerate(line, 1) if "\udc80" <= letter <= "\udcff"), None)
        if damaged is not None:
            raise ValueError(f"{place}: must be UTF-8 text, but its letter {damaged} is not. Save the file as UTF-8.")
        return parse_json(line, place)
    except ValueError as error:
        return error


def _expanded(entries: list[tuple[str, Any]], path: Path) -> list[tuple[str, Any, bool]]:
    """Place and value of every case, and whether it comes from a grid; an error in place of a grid that cannot be expanded.

    Raises:
        ValueError: The file asks for more than `MAX_PICTURES` pictures.
    """
    expanded: list[tuple[str, Any, bool]] = []
    pictures = 0
    for place, entry in entries:
        cases, is_grid = [(place, entry)], isinstance(entry, dict) and "grid" in entry
        if is_grid:
            try:
                cases = expand_grid(entry, place, path.parent)
            except ValueError as error:
                cases = [(place, error)]
        pictures += len(cases) * (num_pictures(entry) if isinstance(entry, dict) else 1)
        if pictures > MAX_PICTURES:
            raise ValueError(f"{path}: must ask for at most {MAX_PICTURES} pictures, got more at {place}. Split it into several files.")
        expanded += [(where, case, is_grid) for where, case in cases]
    return expanded


def _check_index(index: int, place: str, given: bool, first: dict[int, tuple[str, bool]]) -> None:
    """Raise ValueError where another case has the index; `first` grows.

    Args:
        index: The index.
        place: The case that has it.
        given: Whether the file gives it; else it is the case's position.
        first: Place of the first case of every index, and whether the file gives it there.
    """
    other, other_given = first.setdefault(index, (place, given))
    if other == place:
        return
    if given and other_given:
        raise ValueError(f"{place}.index: must be unique, since it names the output files, but {index} is also the index of {other}.")
    cure = f'Give {other if given else "it"} an "index" of its own'
    whose = f"the position of {other}, which has no index" if given else f"its position in the file, and the index of {other}"
    raise ValueError(f"{place}.index: must be unique, since it names the output files, but {index} is also {whose}. {cure}.")


def _unified(item: Any, place: str) -> Entry:
    """The entry in our keys; raises what stands in its place."""
    if isinstance(item, Exception):
        raise item
    if not isinstance(item, dict):
        raise ValueError(f"{place}: must be an object with the keys index, prompt, image_paths, got {_kind(item)}.")
    try:
        return unify(item)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _read_case(entry: Entry, place: str, folder: Path, position: int) -> Case:
    """Check the keys and types of one case; no picture is opened."""
    values, names = entry.values, {key: entry.given_keys.get(key, key) for key in KEYS}
    unknown = [key for key in values if key not in KEYS]
    key = IMAGE_PATHS if REFERENCES not in values else REFERENCES
    missing = [name for name in (PROMPT, key) if name not in values]
    if missing:
        found = f" Found instead: {', '.join(unknown)}." if unknown else ""
        raise ValueError(f'{place}: the key "{names[missing[0]]}" is missing.{found}')
    if unknown:
        raise ValueError(f"{place}.{unknown[0]}: is not a known key.{nearest(unknown[0], KEYS)} Known here: {', '.join(KEYS)}.")
    if REFERENCES in values and IMAGE_PATHS in values:
        raise ValueError(f"{place}: references and {names[IMAGE_PATHS]} mean the same: give one of them.")
    index, prompt = values.get("index", position), values[PROMPT]
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= MAX_INDEX:
        raise ValueError(f"{place}.index: must be an integer from 0 to {MAX_INDEX} (it names the output files), got {shown(index)}.")
    check_text(prompt, f"{place}.{names[PROMPT]}")
    read = read_references if key == REFERENCES else read_paths
    references = read(values[key], f"{place}.{names[key]}", folder)
    if key == REFERENCES:
        prompt = named_prompt(prompt, references, f"{place}.{names[PROMPT]}")
    try:
        options = CaseOptions(**{name: values[name] for name in OPTIONS if name in values})
    except FieldError as error:
        raise ValueError(f"{place}{error.path.removeprefix('case')}: {error.problem}.") from error
    return Case(index, prompt, references, options, place)


def _check_pictures(case: Case, entry: Entry, checked: dict[Path, Any], pictures: ReferencePictures) -> None:
    """Load every picture of a case that has not been checked yet, and place its points, naming the case in errors."""
    key = next(key for key in (REFERENCES, IMAGE_PATHS) if key in entry.values)
    place = f"{case.place}.{entry.given_keys.get(key, key)}"
    by_name = isinstance(entry.values[key], dict)
    for position, reference in enumerate(case.references):
        path, where = reference.path, f"{place}{f'.{reference.name}' if by_name else f'[{position}]'}"
        if path not in checked:
            checked[path] = _picture_problem(path, pictures)
        if checked[path] is not None:
            raise type(checked[path])(f"{where}: {checked[path]}")
        for number, point in enumerate(reference.points):
            try:
                pictures.load(path).prepared.position(point)
            except ValueError as error:
                raise ValueError(f"{where}.points[{number}]: {error}") from error


def _picture_problem(path: Path, pictures: ReferencePictures) -> ValueError | FileNotFoundError | None:
    """What is wrong with a reference picture, or None."""
    try:
        pictures.load(path)
    except FileNotFoundError as error:
        return FileNotFoundError(f"{error} Paths are relative to the JSON file.")
    except ValueError as error:
        return error
    return None


def _kind(value: Any) -> str:
    """Return the JSON type of a value in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]
