"""A file of a run's numbers by optimizer step, such as `metrics.jsonl`, which a resumed run continues."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mosaic.files import flush, json_line, write_text

logger = logging.getLogger(__name__)


class RunLog:
    """Entries by optimizer step, written by the main process. A failure to write is reported once and never ends a run."""

    def __init__(self, file: Path) -> None:
        """Name the file; nothing is written yet."""
        self.file = file
        self._failed = False

    def start(self, step: int) -> None:
        """Drop the entries beyond `step`, which will be written again, and those that a kill has cut."""
        if self.file.is_file():
            still_true = [entry for entry in self.entries() if entry["step"] <= step] if step else []
            write_text(self.file, "".join(json_line(entry) + "\n" for entry in still_true))

    def entries(self) -> list[dict[str, Any]]:
        """The complete entries of the file, oldest first."""
        found = []
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines() if self.file.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut by a kill
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
        return found

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log values at a step."""
        self._guard(self._append, {"step": step, **values})

    def flush(self) -> None:
        """Have the file on the disk; before a checkpoint, which counts on the entries up to it."""
        if self.file.is_file():
            self._guard(flush, self.file)

    def best_step(self, metric: str | None, steps: list[int]) -> int | None:
        """The step, among `steps`, whose entry has the largest value of a metric; the later one of equals; None without any."""
        if metric is None:
            return None
        values = {entry["step"]: entry[metric] for entry in self.entries() if entry.get(metric) is not None and entry["step"] in steps}
        return max(values, key=lambda step: (values[step], step)) if values else None

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json_line(entry) + "\n")

    def _guard(self, function: Callable[..., None], argument: Any) -> None:
        """Call a function; an error becomes a warning, once."""
        try:
            function(argument)
        except OSError as error:
            if not self._failed:
                logger.warning("%s: cannot be written, training goes on without it: %s", self.file, error)
            self._failed = True
