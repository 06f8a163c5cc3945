"""What happens on the page, without the page: pictures come in, runs begin, are watched and cancelled."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from scripts.app.sessions import FinishedPicture, Session, Sessions, Shown
from scripts.app.state import PageState, make_form
from scripts.app.studio import Run, Studio
from scripts.app.views import notice, progress

POLL_SECONDS = 0.5
PATIENCE = 5.0  # s for which a page may begin to listen, and a run goes on while nobody does


class Watched(NamedTuple):
    """One look at a run.

    Attributes:
        status: HTML.
        ended: Whether it is the last look.
        picture: The picture, if there is one now.
    """

    status: str
    ended: bool
    picture: FinishedPicture | None = None


class Handlers:
    """The page's actions on sessions and studio.

    Attributes:
        runs: Runs by the id that the server gives to a loaded page; closing or reloading that page cancels its run.
    """

    def __init__(self, studio: Studio, sessions: Sessions, listens: Callable[[str], bool] = lambda page: True) -> None:
        """Bind them.

        Args:
            studio: Renders.
            sessions: Of all tabs.
            listens: Whether somebody reads what the server tells a loaded page. No picture is begun for one that nobody reads, and a run
                is cancelled once nobody does.
        """
        self.studio, self.sessions, self.config, self._listens = studio, sessions, studio.config, listens
        self.runs: dict[str, Run] = {}
        self._starting = threading.Lock()  # two tabs of one session never get one number

    def open(self, token: str, origin: str = "") -> Session:
        """The session of a page that was just loaded.

        Args:
            token: Of its tab.
            origin: Token of the tab that this one is a copy of: it begins with the references of that one, and then has its own.
        """
        session = self.sessions.get(token)
        if origin:
            session.replace(self.sessions.get(origin).references)
        elif session.run is not None:
            session.run.cancel()  # of the page before it was reloaded
        return session

    def add(self, session: Session, paths: Sequence[str], shown: Shown) -> str:
        """Take uploaded files as references; returns what to say about those that cannot be taken, or were read in an unexpected way."""
        taken = session.take(paths, self.config.data.reference_size, self.config.inference.reference_scale, shown)
        notes = [f"{upload.name}: {note}." for upload in taken.uploads for note in upload.notes]
        return notice(taken.problems) + notice(notes, "quiet")

    def start(self, page: str, session: Session, state: PageState, shown: Shown) -> Run:
        """Begin a picture.

        Args:
            page: Id of the loaded page.
            session: Its tab's.
            state: Its fields.
            shown: The references that it shows.

        Raises:
            ValueError: A field does not fit, the session has other references, a picture of it is on its way, or nobody listens.
        """
        self._wait_for_listener(page)
        with self._starting:
            mine = self.runs.get(page)
            if (mine is not None and not mine.ended) or session.busy:
                raise ValueError("This page has a picture on its way already. Wait for it or cancel it.")
            references = session.shown_references(shown)
            run = self.studio.submit(make_form(state, len(references)), references, session.num_pictures, bool(state.settings["attention"]))
            session.num_pictures += 1
            session.run = self.runs[page] = run
        return run

    def watch(self, page: str, session: Session, run: Run) -> Iterator[Watched]:
        """Looks at a run until it has ended; a picture is kept. One who stops looking cancels it."""
        note = notice([run.note], "quiet") if run.note else ""
        try:
            alone = 0.0
            while not run.ended and alone < PATIENCE:
                yield Watched(progress(run, self.studio.num_before(run)) + note, False)
                run.wait(POLL_SECONDS)
                alone = 0.0 if self._listens(page) else alone + POLL_SECONDS
            if run.result is not None:
                yield Watched(note, True, session.keep(run.result))
            else:
                yield Watched(progress(run, 0), True)
        finally:
            run.cancel()
            if self.runs.get(page) is run:
                del self.runs[page]

    def cancel(self, page: str) -> None:
        """Cancel the run of a page, if it has one."""
        if (run := self.runs.get(page)) is not None:
            run.cancel()

    def _wait_for_listener(self, page: str) -> None:
        """Give a page the time to open its stream of answers; one that does not holds no place in the line."""
        end = time.monotonic() + PATIENCE
        while not self._listens(page):
            if time.monotonic() > end:
                raise ValueError("This page does not read its answers, so that nobody would see the picture. Reload it.")
            time.sleep(POLL_SECONDS / 10)


def random_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**31)
