"""The work folder: what the stages have computed, chunk by chunk, each whole or not there.

`WORK/STAGE/CHUNK/rows.jsonl` holds the rows of the chunk's candidates that came so far, the files beside it their pictures.
"""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from mosaic.files import in_one_line, json_line, parse_json, read_text, recover, replacing
from preprocess.construct.candidates import Candidate
from preprocess.construct.rows import PromptRow, Row
from preprocess.construct.stage import Stage

ROWS = "rows.jsonl"


class Stored(NamedTuple):
    """A row and what it was computed from (`Stage.inputs`)."""

    row: Row
    inputs: Any


class Chunks:
    """Rows and files of all chunks. Chunk c holds the candidates c * size to (c + 1) * size - 1."""

    def __init__(self, work: Path, size: int) -> None:
        self.work, self.size = work, size

    def folder(self, stage: str, chunk: int) -> Path:
        """Where a stage keeps a chunk."""
        return self.work / stage / f"{chunk:06d}"

    def numbers(self, chunk: int) -> range:
        """The candidates of a chunk."""
        return range(chunk * self.size, (chunk + 1) * self.size)

    def count(self, stage: str) -> int:
        """Chunks that a stage has been through, from the first one on without a gap.

        Raises:
            FileNotFoundError: There is none.
        """
        count = next(chunk for chunk in itertools.count() if not (self.folder(stage, chunk) / ROWS).exists())
        if not count:
            raise FileNotFoundError(f"{self.work / stage}: has no rows. Run the stage {stage} first.")
        return count

    def recover(self, stage: str) -> None:
        """Put in order what a kill has left of a stage; one process, before all others begin."""
        recover(self.work / stage, "*")

    def read(self, stage: Stage, chunk: int) -> dict[int, Stored]:
        """The rows that a stage has of a chunk, by number; none where it has not been there.

        Raises:
            ValueError: The file is damaged.
        """
        path = self.folder(stage.name, chunk) / ROWS
        if not path.exists():
            return {}
        found = {}
        for line, text in enumerate(read_text(path).splitlines(), 1):
            entry = parse_json(text, f"{path}: line {line}")
            try:
                stored = Stored(stage.row.model_validate(entry["row"]), entry["inputs"])
            except (ValidationError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {line} is no row of this version ({in_one_line(error, 200)}). Remove {path.parent}."
                ) from error
            found[stored.row.number] = stored
        return found

    @contextmanager
    def adding(self, stage: Stage, chunk: int, kept: Mapping[int, Stored]) -> Iterator[tuple[Path, list[Stored]]]:
        """Write a chunk's folder anew: what is kept of before, and what is added.

        Args:
            stage: The stage.
            chunk: Its chunk.
            kept: Rows of before that stay, with their files.

        Yields:
            Where files go, and the list to which rows are added.
        """
        folder, added = self.folder(stage.name, chunk), list[Stored]()
        with replacing(folder) as aside:
            aside.mkdir()
            for number in kept:
                for path in folder.glob(f"{number:08d}[_.]*"):
                    shutil.copyfile(path, aside / path.name)
            yield aside, added
            rows = sorted([*kept.values(), *added], key=lambda stored: stored.row.number)
            lines = [json_line({"row": stored.row.model_dump(mode="json"), "inputs": stored.inputs}) + "\n" for stored in rows]
            (aside / ROWS).write_text("".join(lines), encoding="utf-8")

    def candidates(self, stages: Sequence[Stage], chunk: int) -> list[Candidate]:
        """The candidates of a chunk with the rows that the stages have; the first stage must have been there."""
        found = {stage.name: self.read(stage, chunk) for stage in stages}
        folders = {stage.name: self.folder(stage.name, chunk) for stage in stages}
        result = []
        for number in self.numbers(chunk):
            rows: dict[str, Any] = {name: rows[number].row for name, rows in found.items() if number in rows}
            if not isinstance(rows.get("prompts"), PromptRow):
                raise FileNotFoundError(f"{folders['prompts']}: has no prompt of candidate {number}. Run stage 1 first.")
            result.append(Candidate(number, folders, prompt=rows.pop("prompts"), **rows))
        return result


def as_json(value: Any) -> Any:
    """What reading JSON gives back of a value: tuples as lists."""
    return json.loads(json.dumps(value))
