"""Stages of a long command that share a time: what each may take, and a file of what was done in how many seconds."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mosaic.files import read_json, write_text

#: By stage of scripts/make_pocket_weights.py, parts of the time as a GPU beside 16 cores needs them.
SHARES = {
    "pictures": 9.0, "vae": 12.0, "tokens": 4.0, "base": 40.0, "guidance": 11.0, "latents": 5.0, "adapter": 18.0, "finish": 6.0,
    "evaluation": 7.0,
}  # fmt: skip
LEAST = 0.1  # of the whole time, which the stages to come share in any case


class Record:
    """A JSON file of settings, seconds and results; a command that is started again finds its stages in it."""

    def __init__(self, file: Path, settings: Mapping[str, Any], shares: Mapping[str, float], seconds: float) -> None:
        """Read the file, or begin one.

        Args:
            file: The file.
            settings: What must stay when the command is started again, as JSON types.
            shares: Of the time, by stage, in the order of the stages.
            seconds: The whole time.

        Raises:
            ValueError: The file was begun with other settings.
        """
        self.file, self.shares, self.seconds = file, shares, seconds
        self.state: dict[str, Any] = read_json(file) if file.is_file() else {"settings": dict(settings), "stages": {}}
        changed = {name: (value, settings.get(name)) for name, value in self.state["settings"].items() if value != settings.get(name)}
        if changed:
            said = ", ".join(f"{name} was {before}, is {now}" for name, (before, now) in changed.items())
            raise ValueError(f"{file.parent} was begun with other settings: {said}. Set these back to go on, or choose another folder.")

    def entry(self, stage: str) -> dict[str, Any]:
        """What is known of a stage: "done", "seconds" over all starts, "planned_seconds", and its results."""
        return self.state["stages"].setdefault(stage, {"done": False, "seconds": 0.0})

    def planned(self, stage: str) -> float:
        """The seconds that a stage gets, decided at its first start: its share of what the stages before it have left."""
        entry = self.entry(stage)
        if "planned_seconds" not in entry:
            names = list(self.shares)
            coming = [self.shares[name] for name in names[names.index(stage) :]]
            left = self.seconds - sum(other["seconds"] for other in self.state["stages"].values())
            entry["planned_seconds"] = round(max(left, LEAST * self.seconds) * self.shares[stage] / sum(coming), 1)
        return entry["planned_seconds"]

    @contextlib.contextmanager
    def stage(self, stage: str) -> Iterator[dict[str, Any]]:
        """Context of a start of a stage, which puts its results into the entry; its seconds are added also where it ends by an error."""
        entry, start = self.entry(stage), time.monotonic()
        self.write()
        try:
            yield entry
            entry["done"] = True
        finally:
            entry["seconds"] = round(entry["seconds"] + time.monotonic() - start, 1)
            self.write()

    def write(self) -> None:
        """Write the file."""
        write_text(self.file, json.dumps(self.state, indent=1) + "\n")
