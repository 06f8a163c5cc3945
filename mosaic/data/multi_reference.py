"""The reader of the multi-reference format (preprocess/FORMAT.md)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from mosaic.correspondence import make_disjoint, reduce_points
from mosaic.data.manifest import Manifest, Row
from mosaic.data.samples import Sample
from mosaic.images import load_image, to_rgb
from mosaic.tokens import Grid


class MultiReferenceDataset(Dataset[Sample]):
    """Samples of one split of a data set in the multi-reference format, version 1 (preprocess/FORMAT.md).

    Pictures are resized, never cropped, since the points are tied to the stored frame. Points are reduced from the grids on which they were
    found to the training token grids. Anything wrong raises an error that names the row; nothing is skipped or replaced.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        image_size: tuple[int, int],
        reference_size: int,
        target_token_grid: Grid | tuple[int, int],
        reference_token_grid: Grid | tuple[int, int],
        max_references: int = 6,
    ) -> None:
        """Read the manifest; pictures and points are read when a sample is asked for.

        Args:
            root: Folder of the data set.
            split: Split to read.
            image_size: Height and width of the targets in pixels.
            reference_size: Side of the square references in pixels.
            target_token_grid: Rows and columns of the target in tokens.
            reference_token_grid: Rows and columns of one reference in tokens.
            max_references: Largest K.

        Raises:
            FileNotFoundError: The data set is missing.
            ValueError: The manifest is not of the format, a sample has more than `max_references` references, or its points were found
                on grids that are no multiples of the token grids.
        """
        self.image_size = image_size
        self.reference_size = reference_size
        self.target_token_grid = Grid(*target_token_grid)
        self.reference_token_grid = Grid(*reference_token_grid)
        self.manifest = Manifest(root, split)
        many = np.flatnonzero(self.num_references > max_references)
        if len(many):
            raise ValueError(
                f"{self.manifest.place(many[0])}.references: must be at most {max_references} (data.max_references), "
                f"got {self.num_references[many[0]]}; so {len(many)} of {len(self)} samples."
            )
        for name, token_grid in (("reference_grid", self.reference_token_grid), ("target_grid", self.target_token_grid)):
            grids = self.manifest.grids(name)
            bad = np.flatnonzero((grids % np.array(token_grid)).any(axis=1))
            if len(bad):
                raise ValueError(
                    f"{self.manifest.place(bad[0])}.{name}: must be a whole multiple of the token grid {token_grid.rows} x "
                    f"{token_grid.columns} in both sides, got {' x '.join(map(str, grids[bad[0]]))}; so {len(bad)} of {len(self)} samples."
                )

    @property
    def num_references(self) -> np.ndarray:
        """Array [N] of K of each sample, for `KBatchSampler`."""
        return self.manifest.num_references

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            FileNotFoundError: A picture or the points file is missing.
            ValueError: A file is damaged, a picture's sides are not in the ratio of `image_size` (references: not square), or a point is
                out of range or in two references.
        """
        row = self.manifest.row(index)
        target = self._read_picture(row.target, f"{row.place}.target", self.image_size)
        square = (self.reference_size, self.reference_size)
        references = [self._read_picture(path, f"{row.place}.references[{k}].image", square) for k, path in enumerate(row.references)]
        return Sample(row.id, row.prompt, target, torch.stack(references), self._read_points(row))

    def _read_picture(self, relative: str, place: str, size: tuple[int, int]) -> Tensor:
        """Read a picture as float32 [3, height, width] in [-1, 1], resized (Lanczos) to `size` (height, width)."""
        path = self.manifest.file(relative, place)
        try:
            picture = to_rgb(load_image(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{place}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        height, width = size
        if picture.height * width != picture.width * height:
            raise ValueError(
                f"{place}: {relative} is {picture.height} x {picture.width} pixels (height x width), whose ratio is not that of "
                f"{height} x {width}. Pictures are resized but never cropped, since the points are tied to the frame; prepare them anew."
            )
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1

    def _read_points(self, row: Row) -> list[Tensor]:
        """Read the points of a sample, check them on their own grids, and carry them to the token grids."""
        place = f"{row.place}.points"
        path = self.manifest.file(row.points, place)
        if not path.is_file():
            raise FileNotFoundError(f"{place}: file not found: {path}.")
        names = [str(k) for k in range(len(row.references))]
        try:
            with safe_open(path, framework="pt") as file:
                if sorted(file.keys()) != sorted(names):
                    raise ValueError(f"{place}: {row.points} must hold one tensor per reference, {names}, got {sorted(file.keys())}.")
                stored = [file.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{place}: {row.points} is not a readable safetensors file ({error}).") from error
        check_stored_points(stored, row.reference_grid, row.target_grid, f"{place}: {row.points}")
        grids = (row.reference_grid, row.target_grid, self.reference_token_grid, self.target_token_grid)
        return make_disjoint([reduce_points(pairs.long(), *grids) for pairs in stored])


def check_stored_points(points: Sequence[Tensor], reference_grid: Grid, target_grid: Grid, place: str) -> None:
    """Check the points of one sample on the grids on which they were found; there, u may carry several points.

    Args:
        points: Per reference an integer tensor [P_k, 2] of (u, v).
        reference_grid: u must lie on it.
        target_grid: v must lie on it.
        place: File and row, for messages.

    Raises:
        ValueError: Wrong shape or type, an index out of range, or a v that belongs to two references (Eq. 2).
    """
    owner = torch.full((target_grid.num_tokens,), -1)
    for k, pairs in enumerate(points):
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
            raise ValueError(f'{place}: tensor "{k}" must be int32 of shape [P, 2], got {pairs.dtype} {list(pairs.shape)}.')
        for column, name, grid in ((0, "u", reference_grid), (1, "v", target_grid)):
            outside = (pairs[:, column] < 0) | (pairs[:, column] >= grid.num_tokens)
            if outside.any():
                first = int(outside.int().argmax())
                raise ValueError(
                    f'{place}: tensor "{k}", point {first}: {name} must lie in [0, {grid.num_tokens}) (grid {grid.rows} x {grid.columns}), '
                    f"got {int(pairs[first, column])}."
                )
        v = pairs[:, 1].long()
        taken = (owner[v] >= 0).nonzero()
        if len(taken):
            first = int(v[taken[0]])
            raise ValueError(f"{place}: v = {first} belongs to references {int(owner[first])} and {k}; points must be disjoint (Eq. 2).")
        owner[v] = k
