"""What a look before a run finds, one thing at a time."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
OK, NOTE, STOP = "ok", "note", "stop"


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        level: "ok", "note" (worth knowing) or "stop" (training would fail).
        subject: What was looked at.
        message: What was found, and the cure.
    """

    level: str
    subject: str
    message: str


class Findings(list[Finding]):
    """What was found, in order."""

    def step(self, subject: str, action: Callable[[], T], describe: Callable[[T], str]) -> T | None:
        """Add what an action finds.

        Args:
            subject: What is looked at.
            action: Gives a result, or raises what would stop training.
            describe: The good news of a result.

        Returns:
            The result; None where the action fails.
        """
        try:
            result = action()
        except (OSError, ValueError) as error:
            self.append(Finding(STOP, subject, str(error)))
            return None
        self.append(Finding(OK, subject, describe(result)))
        return result
