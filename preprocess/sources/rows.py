"""Rows of a list that others have written, a JSON list, JSON Lines or Parquet, one after the other: no list is held as a whole."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from mosaic.data.schemas import require_distinct
from mosaic.files import parse_json, read_text, shown

BATCH_ROWS = 16  # Parquet rows held at a time; each may carry its pictures
CHUNK = 2**20  # letters read at a time
MAX_ENTRY = 2**24  # letters of one entry
LINES, PARQUET = (".jsonl", ".ndjson"), ".parquet"


class Row(NamedTuple):
    """One row, which may yet turn out to be none.

    Attributes:
        path: The file that it is in.
        number: Its place there, from 0; of JSON Lines the line's.
        content: Values by column, or the JSON text of an entry.
    """

    path: Path
    number: int
    content: dict[str, Any] | str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.path}[{self.number}]"

    def values(self) -> dict[str, Any]:
        """Values by column.

        Raises:
            ValueError: It is no JSON object.
        """
        values = parse_json(self.content, self.place) if isinstance(self.content, str) else self.content
        if not isinstance(values, dict):
            raise ValueError(f"{self.place}: must be an object, got {shown(values)}.")
        return values


def rows(root: Path, columns: Callable[[list[str], str], list[str]]) -> Iterator[Row]:
    """Go through a list, in the order of the files' names and rows.

    Args:
        root: A file, or a folder that holds Parquet files, or else JSON Lines, at any depth.
        columns: Says which of a Parquet file's columns are needed, given all of them and the file's name for messages.

    Raises:
        FileNotFoundError, ValueError: There is no list, it is of none of these forms, or damaged.
    """
    for path in _files(root):
        if _is_parquet(path):
            yield from _parquet_rows(path, columns)
        else:
            for number, text in _texts(path):
                yield Row(path, number, text)


def count(root: Path) -> int:
    """Return the number of rows; a list of JSON is gone through for it.

    Raises:
        FileNotFoundError, ValueError: As `rows`.
    """
    total = 0
    for path in _files(root):
        if _is_parquet(path):
            with _opened(path) as file:
                total += file.metadata.num_rows
        else:
            total += sum(1 for _ in _texts(path))
    return total


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.exists():
        raise FileNotFoundError(f"{root}: file not found.")
    found: list[Path] = []
    for endings in ((PARQUET,), LINES):
        found = found or sorted(path for path in root.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not found:
        raise FileNotFoundError(f"{root}: must be a list (JSON, JSON Lines, Parquet) or a folder that holds Parquet files or JSON Lines.")
    return found


# ---- Parquet


def _is_parquet(path: Path) -> bool:
    if path.suffix.lower() == PARQUET:
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}.") from error


def _parquet_rows(path: Path, columns: Callable[[list[str], str], list[str]]) -> Iterator[Row]:
    number = 0
    with _opened(path) as file:
        wanted = columns(file.schema_arrow.names, str(path))
        require_distinct(file.schema_arrow, wanted, str(path))
        for batch in _batches(file, wanted, path):
            for values in batch.to_pylist():
                yield Row(path, number, values)
                number += 1


def _batches(file: pq.ParquetFile, columns: list[str], path: Path) -> Iterator[pa.RecordBatch]:
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
            batch.validate(full=True)
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}.") from error


# ---- JSON


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Number and JSON text of every entry of a JSON list or of JSON Lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(CHUNK)
            file.seek(0)
            if path.suffix.lower() in LINES or _is_lines(start):
                yield from _lines(file, path)
            elif start.lstrip()[:1] == "[":
                yield from _entries(file, path)
            else:
                value = parse_json(read_text(path), str(path))
                raise ValueError(
                    f"{path}: must be a list of objects, as JSON ([{{...}}, {{...}}]) or JSON Lines (an object in every line), "
                    f"got {shown(value)}."
                )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be a UTF-8 text file, but byte {error.start} of a part of it is not UTF-8.") from error


def _is_lines(start: str) -> bool:
    """Whether the first of several lines of a text is an object."""
    lines = [line for line in start.splitlines() if line.strip()][:2]
    try:
        return len(lines) == 2 and isinstance(parse_json(lines[0], "a line"), dict)
    except ValueError:
        return False


def _lines(file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(MAX_ENTRY):
        if len(line) == MAX_ENTRY:
            raise ValueError(f"{path}[{number}]: must have fewer than {MAX_ENTRY} characters. Is it JSON Lines?")
        if line.strip():
            yield number, line
        number += 1


def _entries(file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    """The entries of a JSON list as texts, read piece by piece: the decoder says where each ends."""
    window = _Window(file)
    decoder = json.JSONDecoder()
    assert window.next() == "["
    window.start += 1
    number = 0
    while window.next() != "]" or number:
        end = _end_of_entry(window, decoder, f"{path}: not valid JSON: entry {number}")
        yield number, window.text[window.start : end]
        window.start, number = end, number + 1
        after = window.next()
        if after == "]":
            break
        if after != ",":
            raise ValueError(f'{path}: not valid JSON: entry {number - 1}: "," or "]" must follow it, got {shown(after)}.')
        window.start += 1
    window.start += 1
    if after := window.next():
        raise ValueError(f"{path}: not valid JSON: nothing must follow the list, got {shown(after)}.")


def _end_of_entry(window: "_Window", decoder: json.JSONDecoder, place: str) -> int:
    """Where the value that begins at the window's start ends."""
    while True:
        try:
            window.next()
            end = decoder.raw_decode(window.text, window.start)[1]
            if end < len(window.text):  # else the last number may go on
                return end
            reason = "it has no end"
        except json.JSONDecodeError as error:
            reason = error.msg
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}.") from error
        if len(window.text) - window.start > MAX_ENTRY or not window.grow():
            raise ValueError(f"{place}: {reason}.")


class _Window:
    """A part of a text file that moves on.

    Attributes:
        text: The part.
        start: Where in it the rest begins that is not used yet.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.text, self.start = "", 0

    def grow(self) -> bool:
        """Drop what is used, and read at least as much as there is left; false at the end of the file."""
        self.text, self.start = self.text[self.start :], 0
        read = self._file.read(max(CHUNK, len(self.text)))
        self.text += read
        return bool(read)

    def next(self) -> str:
        """The letter at the start, after white space is passed over; "" at the end of the file."""
        while True:
            while self.start < len(self.text) and self.text[self.start] in " \t\r\n":
                self.start += 1
            if self.start < len(self.text) or not self.grow():
                return self.text[self.start : self.start + 1]
