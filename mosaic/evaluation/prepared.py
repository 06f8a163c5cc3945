"""A benchmark made ready in a folder: a cases file for rendering, beside it what each case should show, and the pictures of a run of it."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mosaic.evaluation.entries import TILES, Entry, Listed, Question, Subject, tiles_of
from mosaic.files import read_json, relative_path, shown, write_text
from mosaic.images import picture_suffixes
from mosaic.rendering.notes import MANIFEST, read_manifest
from mosaic.weights.digests import file_digest

CASES, BENCHMARK = "cases.json", "benchmark.json"


@dataclass(frozen=True)
class Protocol:
    """How the pictures of a benchmark are made.

    Attributes:
        runs: Pictures per case.
        size: Their sides in px.
        seed: Of the first picture of a case; the others count on from it.
    """

    runs: int
    size: int
    seed: int


@dataclass(frozen=True)
class PreparedCase:
    """A case.

    Attributes:
        case: What tells it apart.
        prompt: The prompt.
        references: What the generator is given, one picture per subject.
        subjects: What scores compare with.
        questions: Of the prompt.
    """

    case: str
    prompt: str
    references: tuple[Path, ...]
    subjects: tuple[Subject, ...]
    questions: tuple[Question, ...] = ()


def write_prepared(folder: Path, name: str, protocol: Protocol, cases: Sequence[PreparedCase]) -> None:
    """Write `cases.json` for inference.py and `benchmark.json` for scores. Paths in them are relative to the folder.

    Raises:
        FileNotFoundError: Pictures are missing; all are named, up to a number. Nothing is written.
    """
    paths = dict.fromkeys(
        path for case in cases for path in (*case.references, *(p for subject in case.subjects for p in subject.references))
    )
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        named = "\n".join(missing[:50]) + (f"\n... and {len(missing) - 50} more." if len(missing) > 50 else "")
        raise FileNotFoundError(f"--data: {len(missing)} of {len(paths)} pictures are missing:\n{named}")
    seeds = [protocol.seed + run for run in range(protocol.runs)]

    rendered = [
        {
            "index": index,
            "prompt": case.prompt,
            "image_paths": [relative(path, folder) for path in case.references],
            "seeds": seeds,
            "height": protocol.size,
            "width": protocol.size,
        }
        for index, case in enumerate(cases)
    ]
    described = [
        {
            "case": case.case,
            "prompt": case.prompt,
            "references": [relative(path, folder) for path in case.references],
            "subjects": [
                {**asdict(subject), "references": [relative(path, folder) for path in subject.references]} for subject in case.subjects
            ],
            "questions": [asdict(question) for question in case.questions],
        }
        for case in cases
    ]
    folder.mkdir(parents=True, exist_ok=True)
    values = {"format": "mosaic-benchmark", "version": 1, "benchmark": name, "protocol": asdict(protocol), "cases": described}
    write_text(folder / BENCHMARK, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / CASES, json.dumps(rendered, indent=1, ensure_ascii=False) + "\n")


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, with "/" and, where it lies elsewhere, ".."."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


@dataclass(frozen=True)
class Prepared:
    """What `write_prepared` wrote."""

    name: str
    protocol: Protocol
    cases: tuple[PreparedCase, ...]


def read_prepared(folder: Path) -> Prepared:
    """Read a prepared benchmark.

    Raises:
        FileNotFoundError: The folder holds none.
        ValueError: Its file is damaged.
    """
    path = folder / BENCHMARK
    values = read_json(path)
    try:
        if values["format"] != "mosaic-benchmark":
            raise KeyError("format")
        cases = tuple(
            PreparedCase(
                case["case"],
                case["prompt"],
                tuple(folder / picture for picture in case["references"]),
                tuple(Subject(one["name"], tuple(folder / p for p in one["references"]), one["kind"]) for one in case["subjects"]),
                tuple(Question(question["text"], tuple(question["parents"])) for question in case["questions"]),
            )
            for case in values["cases"]
        )
        return Prepared(values["benchmark"], Protocol(**values["protocol"]), cases)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no benchmark that `bench.py prepare` wrote, or damaged ({error}). Prepare it again.") from error


def entries_of_run(run: Path, prepared: Prepared) -> Listed:
    """Pictures that a run of the prepared cases has made; what is missing, or of other cases, prompts, seeds or references, is a problem.

    Args:
        run: The output folder of inference.py.
        prepared: What was rendered.

    Raises:
        FileNotFoundError: There is no manifest.
    """
    manifest = run / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(
            f"--run: {run} must be the folder of a finished run, but there is no {MANIFEST}. Render it first, or let it end."
        )
    digests: dict[Path, str] = {}
    entries, problems = [], []
    rows = read_manifest(run)
    for number, row in enumerate(rows, 1):
        place = f"{manifest}:{number}"
        problem = _problem(row, prepared, digests)
        if problem:
            problems.append(f"{place}: {problem}")
            continue
        case = prepared.cases[row["index"]]
        number_of_run = row["seed"] - prepared.protocol.seed
        entries.append(Entry(run / row["file"], case.case, number_of_run, case.prompt, case.subjects, case.questions, place=place))
    wanted, found = len(prepared.cases) * prepared.protocol.runs, len(entries)
    if found < wanted:
        problems.append(f"{manifest}: {found} of the {wanted} pictures of {prepared.name} are there. Let the run end: it goes on.")
    return Listed(entries, problems)


def entries_of_grids(folder: Path, prepared: Prepared) -> Listed:
    """Pictures as XVerse saves them: of a case one file of its four pictures, two by two, whose name begins with the case's number and "_".

    A case without a file or with two, and a file of no case, are problems.

    Args:
        folder: The folder of the files; others in it, whose names begin otherwise, are left alone.
        prepared: The cases; they are found by the number before the "_".

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The protocol has another number of pictures.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--grids: there is no folder {folder}.")
    if prepared.protocol.runs != TILES:
        raise ValueError(f"--grids: a file holds {TILES} pictures of a case, but the prepared cases have {prepared.protocol.runs}.")
    files: dict[str, list[Path]] = {case.case: [] for case in prepared.cases}
    problems = []
    for path in sorted(folder.iterdir()):
        number = re.match(r"(\d+)_", path.name)
        if not number or path.suffix.lower() not in picture_suffixes():
            continue
        case = str(int(number[1]))
        if case in files:
            files[case].append(path)
        else:
            problems.append(f"{path}: is of the case {case}, which {prepared.name} does not have.")
    entries = []
    for one in prepared.cases:
        found = files[one.case]
        if len(found) == 1:
            entries += tiles_of(Entry(found[0], one.case, 0, one.prompt, one.subjects, one.questions, place=str(found[0])))
        else:
            named = " and ".join(str(path) for path in found) or "none"
            problems.append(f"{folder}: must hold one file whose name begins with {one.case}_, got {named}.")
    return Listed(entries, problems)


def _problem(row: dict[str, Any], prepared: Prepared, digests: dict[Path, str]) -> str | None:
    """Why a line of the manifest is no picture of the benchmark; `digests` grows."""
    index, seed, protocol = row.get("index"), row.get("seed"), prepared.protocol
    if not isinstance(index, int) or not 0 <= index < len(prepared.cases):
        return f"index must be one of the {len(prepared.cases)} cases of {prepared.name}, got {shown(index)}."
    case = prepared.cases[index]
    if row.get("prompt") != case.prompt:
        return f"prompt must be that of the case, {shown(case.prompt)}, got {shown(row.get('prompt'))}."
    if not isinstance(seed, int) or not 0 <= seed - protocol.seed < protocol.runs:
        return f"seed must be one of {protocol.seed}..{protocol.seed + protocol.runs - 1}, got {shown(seed)}."
    if (row.get("height"), row.get("width")) != (protocol.size, protocol.size):
        return f"the picture must have {protocol.size} x {protocol.size} px, got {shown(row.get('height'))} x {shown(row.get('width'))}."
    for path in case.references:
        if path not in digests:
            digests[path] = file_digest(path)
    given = [reference.get("sha256") for reference in row.get("references", [])]
    if given != [digests[path] for path in case.references]:
        return "its references are others than the case's, or have changed since."
    try:
        relative_path(row.get("file"), "file", "the run's folder")
    except ValueError as error:
        return str(error)
    return None
