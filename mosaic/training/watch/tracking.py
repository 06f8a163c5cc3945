"""Trackers: TensorBoard and Weights & Biases. A tracker that fails is reported once and left out; it never ends a run."""

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)
PROJECT = "mosaic"


class Tracker(Protocol):
    """What a run needs of a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values at an optimizer step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardTracker:
    """Event files in a folder."""

    def __init__(self, folder: Path, step: int, _: Mapping[str, Any]) -> None:
        """Open a file; entries of an earlier part of the run beyond `step` are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values at an optimizer step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WandbTracker:
    """A W&B run, which a resumed run continues; where and as whom is W&B's own business (WANDB_PROJECT, WANDB_MODE, ...)."""

    def __init__(self, folder: Path, _: int, config: Mapping[str, Any]) -> None:
        """Start or continue a run; its id is kept in the folder."""
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "wandb_id.txt"
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        name = folder.parent.name
        self.run = wandb.init(
            project=project, name=name, id=file.read_text(encoding="utf-8"), resume="allow", dir=str(folder), config=config
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values at an optimizer step."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}


class Trackers:
    """The trackers that `training.trackers` names, less those that have failed."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Name them; nothing is started yet.

        Args:
            names: Keys of `TRACKERS`.
            folder: Where they keep their files.
        """
        self.names, self.folder = tuple(names), folder
        self.running: dict[str, Tracker] = {}

    def start(self, step: int, config: Mapping[str, Any]) -> None:
        """Start all, for a run that begins at `step`, with its resolved config; to be called on the main process only."""
        for name in self.names:
            try:
                self.running[name] = TRACKERS[name](self.folder, step, config)
            except Exception as error:
                cure = f" (pip install {name})" if isinstance(error, ImportError) else ""
                logger.warning("tracker %s does not start, the run goes on without it%s: %s: %s", name, cure, type(error).__name__, error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values at an optimizer step, wherever a tracker runs."""
        self._each(lambda tracker: tracker.log(values, step))

    def close(self) -> None:
        """End all."""
        self._each(lambda tracker: tracker.close())
        self.running.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.running.items()):
            try:
                call(tracker)
            except Exception as error:
                del self.running[name]
                logger.warning("tracker %s failed, the run goes on without it: %s: %s", name, type(error).__name__, error)
