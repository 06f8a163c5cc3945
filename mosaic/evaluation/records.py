"""One record per measured value, kept while a scoring goes on and read again when it is started anew."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from mosaic.files import json_line, write_text

RECORDS = "records.jsonl"


class Key(NamedTuple):
    """What a value is of.

    Attributes:
        metric: Its name, such as "clip_i".
        case: The case.
        run: Which picture of the case; None: all of them at once.
        subject: Which subject; None: the whole picture.
    """

    metric: str
    case: str
    run: int | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Record:
    """A measured value.

    Attributes:
        metric, case, run, subject: As in `Key`.
        value: In percent, unless the metric says otherwise.
        model, revision, preprocessing: What it was measured with.
        inputs: Digest of the pictures, texts and models that decide it.
    """

    metric: str
    case: str
    run: int | None
    subject: str | None
    value: float
    model: str
    revision: str
    preprocessing: str
    inputs: str

    @property
    def key(self) -> Key:
        """What it is of."""
        return Key(self.metric, self.case, self.run, self.subject)


class Records:
    """The records of a folder: `records.jsonl` of finished scorings, and a journal of each process of the one that goes on."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        """Read what is there."""
        self.folder, self.process = folder, process
        self.known = {record.key: record for path in [folder / RECORDS, *self._journals()] for record in _read(path)}

    def add(self, records: Iterable[Record]) -> None:
        """Note records in this process's journal, all or none of them."""
        found = list(records)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".records_{self.process}.jsonl", "a", encoding="utf-8") as file:
            # One write. A line break comes first: the last line of a killed process may be half a line.
            file.write("\n" + "".join(json_line(asdict(record)) + "\n" for record in found))
        self.known |= {record.key: record for record in found}

    def write(self, keys: Iterable[Key]) -> list[Record]:
        """Write and return the records of some keys, in their order, and remove the journals. For one process, when all have ended."""
        known = Records(self.folder).known
        found = [known[key] for key in keys]
        write_text(self.folder / RECORDS, "".join(json_line(asdict(record)) + "\n" for record in found))
        for path in self._journals():
            path.unlink()
        return found

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob(".records_*.jsonl"))


def _read(path: Path) -> Iterator[Record]:
    """The records of a file; lines that are not whole, of a killed process, are left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield Record(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                continue
