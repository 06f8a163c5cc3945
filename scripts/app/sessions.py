"""What the server keeps for each browser tab, so that a reloaded page finds it again, and for how long."""

import hashlib
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mosaic.rendering.recipe import Recipe, png_text
from mosaic.reports.figures import save_picture
from scripts.app.studio import Rendered, Run
from scripts.app.uploads import MAX_REFERENCES, Taken, Upload, take_uploads

MAX_SESSIONS = 32
MAX_PICTURES = 24  # per session
IDLE_SECONDS = 3600
SWEEP_SECONDS = 60  # between two looks for idle sessions
TOKEN = re.compile(r"[0-9a-f]{32,64}")
GONE = "References: this page was left alone for too long and its pictures are gone. Drop them again."
CHANGED = "References: they were changed in another tab of this page. Reload this one to see them."
Shown = tuple[tuple[str, str], ...]  # the references that a page shows, each as `Upload.identity`


class FinishedPicture(NamedTuple):
    """A finished picture of a session.

    Attributes:
        path: The PNG, with the recipe in its metadata.
        panel_path: The attention maps; None: there are none.
        numbers: Of the attention, by `attention_numbers`; None: there are no attention maps.
        recipe: What made it.
        seconds: What it took.
    """

    path: Path
    panel_path: Path | None
    numbers: dict[str, Any] | None
    recipe: Recipe
    seconds: float


class Session:
    """One tab: its references in memory, its finished pictures in a folder, newest first, and the run it waits for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: tuple[Upload, ...] = ()
        self.pictures: tuple[FinishedPicture, ...] = ()
        self.num_pictures = 0  # ever made; numbers them
        self.run: Run | None = None
        self.last_used = time.monotonic()
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a run goes on that nobody has cancelled."""
        return self.run is not None and not self.run.ended and not self.run.cancel_asked

    def shown_references(self, shown: Shown) -> tuple[Upload, ...]:
        """The references, if they are those that a page shows.

        Raises:
            ValueError: They are others, or gone.
        """
        references = self.references
        if tuple(upload.identity for upload in references) != tuple(shown):
            raise ValueError(CHANGED if references else GONE)
        return references

    def take(self, paths: Sequence[str], size: int, scale: float, shown: Shown) -> Taken:
        """Add uploaded files to the references that a page shows, as far as there is room; see `take_uploads`."""
        with self._lock:
            mine = not self.references or tuple(upload.identity for upload in self.references) == tuple(shown)
            taken = take_uploads(paths, MAX_REFERENCES - len(self.references) if mine else 0, size, scale)
            self.references += tuple(taken.uploads)
        return taken if mine else Taken([], [CHANGED])

    def remove(self, position: int, shown: Shown) -> None:
        """Forget one of the references that a page shows.

        Raises:
            ValueError: They are others, or gone.
        """
        with self._lock:
            references = self.shown_references(shown)
            self.references = references[:position] + references[position + 1 :]

    def replace(self, references: Sequence[Upload]) -> None:
        """Forget all references and have others."""
        with self._lock:
            self.references = tuple(references)

    def keep(self, rendered: Rendered) -> FinishedPicture:
        """Write a finished picture with its recipe into the session's folder; the oldest beyond `MAX_PICTURES` is removed."""
        recipe, text = rendered.job.recipe, png_text(rendered.job.recipe)
        path = save_picture(rendered.picture, self.folder / f"{rendered.job.name}.png", text)
        panel_path = None
        if rendered.panel is not None:
            panel_path = save_picture(rendered.panel, self.folder / f"{rendered.job.name}_attention.png", text)
        picture = FinishedPicture(path, panel_path, rendered.numbers, recipe, rendered.seconds)
        with self._lock:
            self.pictures = (picture, *self.pictures)
            gone, self.pictures = self.pictures[MAX_PICTURES:], self.pictures[:MAX_PICTURES]
        for old in gone:
            for file in filter(None, (old.path, old.panel_path)):
                file.unlink(missing_ok=True)
        return picture

    def picture(self, path: str) -> FinishedPicture | None:
        """The finished picture of a file, None where it is not kept any more."""
        return next((picture for picture in self.pictures if picture.path.name == Path(path).name), None)

    def close(self) -> None:
        """Cancel the run and remove everything."""
        if self.run is not None:
            self.run.cancel()
        self.references, self.pictures = (), ()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """The sessions by the secret tokens of their tabs. A thread removes idle ones, also while nobody uses the page, until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._sweep_regularly, name="idle sessions", daemon=True).start()

    def get(self, token: str) -> Session:
        """The session of a tab, made if it is new. Sessions idle for an hour, and some beyond `MAX_SESSIONS`, are removed.

        Raises:
            ValueError: The token is not one that the page makes.
        """
        if not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise ValueError("This page is still loading, or was opened without JavaScript. Try again, or reload it.")
        with self._lock:
            closed = self._sweep(MAX_SESSIONS - (token not in self._sessions))
            session = self._sessions.setdefault(token, Session(self.folder / hashlib.sha256(token.encode()).hexdigest()[:32]))
            session.last_used = time.monotonic()
        for old in closed:
            old.close()
        return session

    def close(self) -> None:
        """Close all sessions, and end the thread."""
        self._closed.set()
        with self._lock:
            sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.close()

    def _sweep_regularly(self) -> None:
        while not self._closed.wait(SWEEP_SECONDS):
            with self._lock:
                closed = self._sweep(MAX_SESSIONS)
            for old in closed:
                old.close()

    def _sweep(self, room: int) -> list[Session]:
        """Take out sessions that are idle for too long, and while there are more than `room` the empty ones, then the longest idle."""
        now, closed = time.monotonic(), []
        idle = {token: session for token, session in self._sessions.items() if session.run is None or session.run.ended}
        for token in sorted(idle, key=lambda t: (bool(idle[t].references or idle[t].pictures), idle[t].last_used)):
            if now - self._sessions[token].last_used > IDLE_SECONDS or len(self._sessions) > room:
                closed.append(self._sessions.pop(token))
        return closed
