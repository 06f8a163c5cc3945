"""What happens on the page, without the page: pictures come in, runs begin, are watched and cancelled."""

import secrets
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scripts.app.sessions import FinishedPicture, Session, Sessions
from scripts.app.state import PageState, make_form
from scripts.app.studio import Run, Studio
from scripts.app.views import notice, progress

POLL_SECONDS = 0.5


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

    def __init__(self, studio: Studio, sessions: Sessions) -> None:
        self.studio, self.sessions, self.config = studio, sessions, studio.config
        self.runs: dict[str, Run] = {}

    def add(self, session: Session, paths: Sequence[str]) -> str:
        """Take uploaded files as references; returns what to say about those that cannot be taken."""
        return notice(session.take(paths, self.config.data.reference_size, self.config.inference.reference_scale).problems)

    def start(self, page: str, session: Session, state: PageState, num_shown: int) -> Run:
        """Begin a picture.

        Raises:
            ValueError: A field does not fit.
        """
        if page in self.runs and not self.runs[page].ended:
            raise ValueError("This page has a picture on its way already. Wait for it or cancel it.")
        if num_shown != len(session.references):
            raise ValueError("References: this page was left alone for too long and its pictures are gone. Drop them again.")
        form = make_form(state, num_shown)
        run = self.studio.submit(form, session.references, session.num_pictures, bool(state.settings["attention"]))
        session.num_pictures += 1
        session.run = self.runs[page] = run
        return run

    def watch(self, page: str, session: Session, run: Run) -> Iterator[Watched]:
        """Looks at a run until it has ended; a picture is kept. One who stops looking cancels it."""
        note = notice([run.note], "quiet") if run.note else ""
        try:
            while not run.ended:
                yield Watched(progress(run, self.studio.num_before(run)) + note, False)
                run.wait(POLL_SECONDS)
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


def random_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**31)
