"""The record of a run: `metrics.jsonl`, which a resumed run continues, and the tracker, whose loss costs nothing but its pictures."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mosaic.durable import flush, write_text

logger = logging.getLogger(__name__)
PROJECT = "mosaic"


class RunLog:
    """Entries by optimizer step. A failure to log is reported once and never ends a run."""

    def __init__(self, accelerator: Accelerator, file: Path) -> None:
        """Name the tracker's owner and the file; nothing is written yet."""
        self.accelerator, self.file = accelerator, file
        self._failed: set[str] = set()

    def start(self, step: int) -> None:
        """Drop the entries beyond `step`, which will be written again, and those that a kill has cut; start the tracker."""
        if self.accelerator.is_main_process and self.file.is_file():
            kept = [entry for entry in self.entries() if entry["step"] <= step] if step else []
            write_text(self.file, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._guard("tracker", self.accelerator.init_trackers, PROJECT)

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
        """Log values at a step; numbers also go to the tracker. Does something on the main process only."""
        if not self.accelerator.is_main_process:
            return
        self._guard("file", self._append, {"step": step, **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if "tracker" not in self._failed:
            self._guard("tracker", self.accelerator.log, numbers, step)

    def flush(self) -> None:
        """Have the file on the disk; before a checkpoint, which counts on the entries up to it."""
        if self.accelerator.is_main_process and self.file.is_file():
            self._guard("file", flush, self.file)

    def close(self) -> None:
        """End the tracker."""
        self._guard("tracker", self.accelerator.end_training)

    def best_step(self, metric: str | None, steps: list[int]) -> int | None:
        """The step, among `steps`, whose entry has the largest value of a metric; the later one of equals; None without any."""
        values = {entry["step"]: entry[metric] for entry in self.entries() if metric in entry and entry["step"] in steps}
        return max(values, key=lambda step: (values[step], step)) if values else None

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _guard(self, what: str, function: Any, *arguments: Any) -> None:
        """Call a function; an error becomes a warning, the first of its kind only."""
        try:
            function(*arguments)
        except Exception as error:
            if what not in self._failed:
                logger.warning("logging (%s) failed, training goes on without it: %s: %s", what, type(error).__name__, error)
            self._failed.add(what)
