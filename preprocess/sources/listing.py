"""What a folder of a user holds: what operating systems leave is counted and left out, all else is for the caller to use or refuse."""

import logging
from collections import Counter
from pathlib import Path

from mosaic.images import picture_suffixes

logger = logging.getLogger(__name__)
LITTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"})


class Listing:
    """Lists folders. What it leaves out are hidden files and folders, and those that file managers write.

    Attributes:
        left_out: How often each name was left out.
    """

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()

    def of(self, folder: Path) -> list[Path]:
        """The files and folders in a folder, sorted by name; links count as what they lead to."""
        found = []
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name.lower() in LITTER:
                self.left_out["._*" if path.name.startswith("._") else path.name] += 1
            else:
                found.append(path)
        return found

    def report(self) -> None:
        """Say what was left out, if anything was."""
        if self.left_out:
            names = ", ".join(f"{name.strip()} ({count})" for name, count in sorted(self.left_out.items()))
            logger.info("%d hidden files and files of operating systems are ignored: %s", self.left_out.total(), names)


def is_picture(path: Path) -> bool:
    """Whether a path is that of a picture file, by its ending."""
    return path.suffix.lower() in picture_suffixes() and not path.is_dir()


def formats_in_words() -> str:
    """The endings that are read, for messages; the common ones first."""
    common = [".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".bmp", ".gif"]
    return ", ".join(sorted(picture_suffixes(), key=lambda suffix: (common.index(suffix) if suffix in common else len(common), suffix)))
