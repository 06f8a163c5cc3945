"""The data set that came out: who is in it, and some of its samples with their points."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mosaic.data.multi_reference.manifest import Manifest
from preprocess.construct.page.counting import Cast
from preprocess.construct.page.looking import even
from preprocess.matching.sheets import correspondence_panel

NUM_LINES = 12  # of a reference


class Samples:
    """The rows of a constructed data set, all splits.

    Attributes:
        cast: Who is in them.
        splits: Samples by split.
    """

    def __init__(self, root: Path) -> None:
        """Open it and go once through its rows.

        Raises:
            FileNotFoundError, ValueError: It is missing or damaged.
        """
        self.manifest = Manifest(root, None)
        self.cast = Cast()
        for references in self.manifest.column("references"):
            self.cast.add(reference.get("kind") for reference in references)
        self.splits: dict[str, int] = {}
        for split in self.manifest.column("split"):
            self.splits[split] = self.splits.get(split, 0) + 1

    def chosen(self, wanted: int) -> dict[int, int]:
        """The rows of some samples at even distances, by the number of the candidate that each was."""
        places = set(even(len(self.manifest), wanted))
        rows = {}
        for place, metadata in enumerate(self.manifest.column("metadata")):
            if place in places:
                rows[int(json.loads(metadata)["candidate"])] = place
        return rows

    def panel(self, row: int) -> Image.Image:
        """A sample's references beside its target, with lines between cells that show the same part.

        Raises:
            FileNotFoundError, ValueError: A file of it is missing or damaged.
        """
        read = self.manifest
        found = read.row(row)
        target = read.read_target(found)
        references = [read.read_picture(entry.image, f"{found.place}.references[{k}]") for k, entry in enumerate(found.references)]
        points: Sequence = read.read_points(found) or [()] * len(references)
        return correspondence_panel(target, references, points, found.target_grid, [entry.grid for entry in found.references], NUM_LINES)
