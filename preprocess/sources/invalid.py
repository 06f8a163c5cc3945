"""What a converter does with samples that it cannot convert: end with the first one, or count, log and list them all."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mosaic.files import in_one_line, write_text

logger = logging.getLogger(__name__)


class InvalidSamples:
    """Collects the samples that were left out.

    Attributes:
        problems: One line for each: place and what is wrong.
    """

    def __init__(self, skip: bool = False) -> None:
        """Choose what an invalid sample does.

        Args:
            skip: True: it is logged and listed, and the conversion goes on. False: it ends the conversion.
        """
        self._skip = skip
        self.problems: list[str] = []

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Guard the work on one sample.

        Args:
            place: File and row or folder of the sample; put before the message unless that begins with it.

        Raises:
            ValueError: The sample is invalid, and samples are not skipped.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            message = in_one_line(error)
            line = message if message.startswith(place) else f"{place}: {message}"
            if not self._skip:
                raise ValueError(line) from error
            logger.warning("left out: %s", line)
            self.problems.append(line)

    def write(self, path: Path) -> None:
        """Write the list, one line per sample."""
        write_text(path, "".join(f"{line}\n" for line in self.problems))
