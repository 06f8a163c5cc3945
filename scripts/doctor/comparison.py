"""A second matching of the same samples, held against the first: how far two extractors agree."""

from dataclasses import replace
from pathlib import Path

from mosaic.data import Inspection, MultiReferenceDataset
from mosaic.data.multi_reference.points_file import most_bytes, read_stored_points
from mosaic.data.multi_reference.storage import Folder
from mosaic.data.quality import agreement


class Compared:
    """A data set whose inspections tell the agreement with the points of another folder, such as `match.py --output` writes."""

    def __init__(self, dataset: MultiReferenceDataset, folder: Path) -> None:
        """Take the folder that holds the other points under the names that the manifest gives them.

        Raises:
            FileNotFoundError: There is no such folder.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"--against: there is no such folder: {folder}. `match.py --output FOLDER` writes one.")
        self.dataset, self.other = dataset, Folder(folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def inspect(self, index: int) -> Inspection:
        """Look at one sample as it is stored.

        Raises:
            FileNotFoundError: The other folder has no points of it.
            ValueError: The other points are damaged, or as the data set's `inspect`.
        """
        found, row = self.dataset.inspect(index), self.dataset.manifest.row(index)
        place = f"--against: {row.place}.points"
        data = self.other.read(row.points, place, most_bytes(row.target_grid))
        others = read_stored_points(data, found.reference_grids, found.target_grid, f"{place}: {row.points}")
        scores = []
        for k, (pairs, other, grid) in enumerate(zip(found.points, others, found.reference_grids, strict=True)):
            agreed = agreement(pairs, other, grid)
            own = {name: value for name, value in (found.scores[k] if found.scores else {}).items() if name != "agreement"}
            scores.append(own if agreed is None else own | {"agreement": agreed})
        return replace(found, scores=tuple(scores))
