"""Measures the pictures of all cases, each process its share; what is measured already is left alone."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from mosaic.evaluation.entries import Entry, Listed, cases_of, check_entries, raise_all, tile_of
from mosaic.evaluation.measures import Measure
from mosaic.evaluation.records import Record, Records
from mosaic.images import decode_image, read_picture, to_rgb
from mosaic.locks import FolderLock, acquire_for_all
from mosaic.weights.digests import file_digest


class Sound(NamedTuple):
    """Pictures that can be scored.

    Attributes:
        entries: The pictures.
        left_out: What was wrong with others, a sentence each; empty unless that was allowed.
    """

    entries: list[Entry]
    left_out: list[str]


def sound_entries(listed: Listed, partial: bool, *, shown: bool = True) -> Sound:
    """Look over all pictures before long work.

    Args:
        listed: The pictures, and what is wrong with the list.
        partial: Go on with the sound ones.
        shown: Whether to show how far it is.

    Raises:
        ValueError: Something is wrong, and `partial` is false. Every problem is named, up to a number.
    """
    entries = listed.entries
    problems, sound, taken = [*listed.problems, *check_entries(entries)], [], set()
    checked: dict[Path, str | None] = {}
    files = [path for entry in entries for path in (entry.picture, *(path for subject in entry.subjects for path in subject.references))]
    grids = {entry.picture for entry in entries if entry.tile is not None}
    for path in tqdm(list(dict.fromkeys(files)), desc="looking at pictures", unit="picture", leave=False, disable=not shown):
        checked[path] = _problem(path, path in grids)
    for entry in entries:
        wrong = [checked[entry.picture]] if checked[entry.picture] else []
        wrong += [text for subject in entry.subjects for path in subject.references if (text := checked[path])]
        if wrong:
            problems.append(f"{entry.place}: {wrong[0]}")
        elif (entry.case, entry.run) not in taken:
            taken.add((entry.case, entry.run))
            sound.append(entry)
    if problems and not partial:
        raise_all([*problems, "Nothing was scored. Mend the list, or score its sound part with --partial."])
    if not sound:
        raise_all([*problems, "No picture can be scored."])
    return Sound(sound, problems)


def _problem(path: Path, is_grid: bool) -> str | None:
    """What is wrong with a picture file."""
    try:
        width, height = decode_image(read_picture(path), str(path)).size
    except (ValueError, OSError) as error:
        return str(error)
    return (
        f"a grid of two by two pictures must have even sides, got {width} x {height} px: {path}."
        if is_grid and (width | height) % 2
        else None
    )


def score(entries: Sequence[Entry], measures: Sequence[Measure], folder: Path, state: PartialState) -> list[Record]:
    """Measure all pictures; on all processes that were started together, each case on one of them.

    Values do not depend on the number of processes, nor on where an earlier scoring stopped: the pictures of a case are encoded together.

    Args:
        entries: The pictures, each sound (`sound_entries`).
        measures: What to measure.
        folder: Where the records are kept.
        state: This process among others.

    Returns:
        The records of all values, case by case.

    Raises:
        ValueError: Another process scores there, or a measured value is no number.
    """
    with FolderLock(folder, "--output") as lock:
        acquire_for_all(lock, state)
        cases, records = cases_of(entries), Records(folder, state.process_index)
        share = cases[state.process_index :: state.num_processes]
        digests = {
            path: file_digest(path)
            for path in dict.fromkeys(p for case in share for subject in case[0].subjects for p in subject.references)
        }
        for case in tqdm(share, desc="scoring", unit="case", disable=not state.is_main_process):
            records.add(_measure(case, measures, records, digests))
        state.wait_for_everyone()
        if state.is_main_process:
            records.write([key for case in cases for measure in measures for key in measure.keys(case)])
        state.wait_for_everyone()
        return list(Records(folder).known.values())


def _measure(case: Sequence[Entry], measures: Sequence[Measure], records: Records, digests: Mapping[Path, str]) -> list[Record]:
    """Records of what is not known yet of a case; `digests` are those of reference pictures."""
    contents = [read_picture(entry.picture) for entry in case]
    content = [hashlib.sha256(data).hexdigest() for data in contents]
    pictures: list[Image.Image] = []
    found = []
    for measure in measures:
        keys, inputs = measure.keys(case), _inputs(case, content, digests, measure)
        if all(key in records.known and records.known[key].inputs == inputs for key in keys):
            continue
        if not pictures:
            pictures = [tile_of(to_rgb(decode_image(data, str(e.picture))), e.tile) for data, e in zip(contents, case, strict=True)]
        made = measure.provenance
        for key, value in zip(keys, measure(case, pictures), strict=True):
            found.append(Record(*key, value, made.model, made.revision, made.preprocessing, inputs))
    return found


def _inputs(case: Sequence[Entry], content: Sequence[str], digests: Mapping[Path, str], measure: Measure) -> str:
    """Digest of all that decides a measure's values of a case."""
    made = measure.provenance
    parts: list[object] = [made, case[0].prompt, case[0].questions, content, [entry.tile for entry in case]]
    parts += [(subject.name, subject.kind, [digests[path] for path in subject.references]) for subject in case[0].subjects]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
