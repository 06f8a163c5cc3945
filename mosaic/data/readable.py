"""Leaving out the samples that cannot be read, where a user asks for it (`data.skip_invalid`): found once, counted and listed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mosaic.data.inspection import Inspection
from mosaic.data.samples import Sample
from mosaic.data.workers import loaded
from mosaic.files import write_text


@dataclass(frozen=True)
class Unreadable:
    """A sample that cannot be read.

    Attributes:
        index: Its number in the split.
        message: Why.
    """

    index: int
    message: str


class Attempt(Dataset):
    """What a reading function gives for each sample of a data set, or an `Unreadable` where it fails."""

    def __init__(self, dataset: Any, read: str) -> None:
        """Name the method of `dataset` that reads a sample by its number."""
        self.dataset, self.read = dataset, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return getattr(self.dataset, self.read)(index)
        except (OSError, ValueError) as error:
            return Unreadable(index, str(error))


class ReadableSamples(Dataset[Sample]):
    """The samples of a data set that can be read."""

    def __init__(self, dataset: Any, skipped: list[Unreadable]) -> None:
        """Leave out `skipped`.

        Raises:
            ValueError: No sample is left.
        """
        self.dataset, self.skipped = dataset, skipped
        self._readable = np.setdiff1d(np.arange(len(dataset)), [bad.index for bad in skipped])
        if not len(self._readable):
            raise ValueError(f"none of the {len(dataset)} samples can be read; the first: {skipped[0].message}")

    @property
    def batch_keys(self) -> np.ndarray:
        """int [N, columns]: what the samples of one batch must share, of the samples that are left."""
        return self.dataset.batch_keys[self._readable]

    def sample_ids(self) -> list[str | None]:
        """Names of the samples that are left."""
        names = self.dataset.sample_ids()
        return [names[index] for index in self._readable]

    def prompts(self) -> list[str]:
        """Prompts of the data set, also of the samples that are left out."""
        return self.dataset.prompts()

    def __len__(self) -> int:
        return len(self._readable)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample."""
        return self.dataset[int(self._readable[index])]

    def inspect(self, index: int) -> Inspection:
        """Look at one sample as it is stored."""
        return self.dataset.inspect(int(self._readable[index]))


def find_unreadable(dataset: Any, file: Path, num_workers: int, show_progress: bool) -> list[Unreadable]:
    """Try all samples, or take the list that an earlier start of the run has written.

    Args:
        dataset: The samples.
        file: Where the list is kept, one JSON object per line.
        num_workers: Processes that read.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: The list is damaged.
    """
    if not file.is_file():
        loader = DataLoader(Attempt(dataset, "__getitem__"), batch_size=None, num_workers=num_workers)
        tried = tqdm(loaded(loader), "reading all samples", total=len(loader), disable=not show_progress)
        found = [one for one in tried if isinstance(one, Unreadable)]
        write_text(file, "".join(json.dumps(asdict(bad)) + "\n" for bad in found))
    try:
        return [Unreadable(**json.loads(line)) for line in file.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: is no list of skipped samples ({error}). Remove it to have all samples read again.") from error
