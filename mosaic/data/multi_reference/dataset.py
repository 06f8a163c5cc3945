"""The reader of the multi-reference format (preprocess/FORMAT.md)."""

from collections import Counter
from collections.abc import Sequence
from copy import copy
from math import log, log1p
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mosaic.data.inspection import Inspection, token_masks, touched_cells
from mosaic.data.masks import mask_picture, mask_problem
from mosaic.data.multi_reference.framing import COARSEST_CELL, Frame, cover, fit, nearest_bucket
from mosaic.data.multi_reference.manifest import Manifest
from mosaic.data.multi_reference.rows import Row
from mosaic.data.samples import Sample, left_to_right
from mosaic.method.correspondence import majority_points, make_disjoint
from mosaic.method.grids import Grid


class MultiReferenceDataset(Dataset[Sample]):
    """Samples of one split of a data set in the multi-reference format, version 1 (preprocess/FORMAT.md).

    A reference is fitted whole onto a white square. A target goes to the bucket of the nearest aspect, which its middle then covers.
    Points go along: a cell belongs to the token that holds its centre; the fine points of each pair of tokens vote
    (`majority_points`); what was cut off with the picture has no points. Where the aspects agree nothing is cut off. A sample whose
    points file is absent has no points and says so in `Sample.missing`; anything else that is wrong raises an error that names the row.
    Nothing is skipped or replaced.

    Attributes:
        buckets: Height and width of the targets of each bucket in pixels.
        bucket: int16 [N], the bucket of each sample.
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
        buckets: Sequence[tuple[int, int]] = (),
        with_masks: bool = False,
        reference_order: str = "stored",
    ) -> None:
        """Read the manifest; pictures and points are read when a sample is asked for.

        Args:
            root: Folder of the data set, or a URL that fsspec knows.
            split: Split to read.
            image_size: Height and width of the targets in pixels, where there are no buckets.
            reference_size: Side of the square references in pixels.
            target_token_grid: Rows and columns of a target of `image_size` in tokens; so it gives the size of a token.
            reference_token_grid: Rows and columns of one reference in tokens.
            max_references: Largest K.
            buckets: Heights and widths of targets; none: every target becomes `image_size`.
            with_masks: Whether samples bring their masks.
            reference_order: "stored" or "left_to_right" (`left_to_right`).

        Raises:
            FileNotFoundError: The data set is missing.
            ValueError: The manifest is not of the format, a bucket is no multiple of the token size, a sample has more than
                `max_references` references, or its points' grids are coarser than the tokens.
        """
        self.reference_size, self.max_references, self.with_masks = reference_size, max_references, with_masks
        self.reference_order = reference_order
        self.reference_token_grid = Grid(*reference_token_grid)
        self.buckets = [(height, width) for height, width in buckets or [image_size]]
        token = (image_size[0] // target_token_grid[0], image_size[1] // target_token_grid[1])
        self._token_grids = [_bucket_grid(bucket, token) for bucket in self.buckets]
        self._take(Manifest(root, split))

    def of_split(self, split: str) -> "MultiReferenceDataset":
        """The samples of another split of the same data set, which is not opened again.

        Raises:
            ValueError: As for a new one, of what concerns the rows of the split.
        """
        other = copy(self)
        other._take(self.manifest.of_split(split))
        return other

    def _take(self, manifest: Manifest) -> None:
        self.manifest = manifest
        many = np.flatnonzero(self.num_references > self.max_references)
        if len(many):
            raise ValueError(
                f"{self.manifest.place(many[0])}.references: must be at most {self.max_references} (data.max_references), "
                f"got {self.num_references[many[0]]}; so {len(many)} of {len(self)} samples."
            )
        geometries = np.array(self.manifest.geometries)
        sizes = np.where(geometries[:, 2:3] > 0, geometries[:, 2:4], geometries[:, :2])  # the grid's aspect where no size is stated
        by_geometry = nearest_bucket(sizes[:, 0], sizes[:, 1], self.buckets)
        self.bucket: np.ndarray = by_geometry[self.manifest.geometry]
        self._refuse_coarse_grids(geometries, by_geometry)

    @property
    def num_references(self) -> np.ndarray:
        """int16 [N], K of each sample."""
        return self.manifest.num_references

    @property
    def batch_keys(self) -> np.ndarray:
        """int16 [N, 2], what the samples of a batch share: K and bucket. For `BucketBatchSampler`."""
        return np.column_stack([self.num_references, self.bucket])

    def sample_ids(self) -> list[str | None]:
        """Names of all samples in order; no picture is read."""
        return list(self.manifest.column("id"))

    def prompts(self) -> list[str]:
        """Prompts of all samples in order; no picture is read."""
        return list(self.manifest.column("prompt"))

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            FileNotFoundError: A picture is missing.
            ValueError: A file is damaged, the target has another size than the manifest says, a point is out of range or in two
                references, or a grid is coarser than the tokens.
        """
        row = self.manifest.row(index)
        bucket = int(self.bucket[index])
        picture = stored_target = self.manifest.read_target(row)
        if row.target_size is None:
            self._refuse_wrong_bucket(row, picture.size[::-1], bucket)
        frame = cover(picture.size[::-1], self.buckets[bucket])
        target = _to_tensor(frame.apply(picture))
        frames, references = [], []
        for k, reference in enumerate(row.references):
            picture = self.manifest.read_picture(reference.image, f"{row.place}.references[{k}].image")
            frames.append(fit(picture.size[::-1], self.reference_size))
            references.append(_to_tensor(frames[-1].apply(picture)))
        stored = self.manifest.read_points(row)
        if stored is None:
            points = [torch.zeros(0, 2, dtype=torch.long) for _ in row.references]
        else:
            points = self._carry_points(stored, row, frame, self._token_grids[bucket], frames)
        masks = None
        if self.with_masks:
            found = [self.manifest.read_mask(row, k, stored_target) for k in range(len(row.references))]
            masks = token_masks([None if mask is None else frame.apply(mask_picture(mask)) for mask in found], self._token_grids[bucket])
        missing = () if stored is not None else ("points",)
        sample = Sample(row.id, row.prompt, target, torch.stack(references), points, missing, masks=masks)
        return left_to_right(sample, self._token_grids[bucket].columns) if self.reference_order == "left_to_right" else sample

    def inspect(self, index: int) -> Inspection:
        """Look at one sample as it is stored. Raises as `__getitem__`, and for a mask that cannot be read, or points of other pictures."""
        row = self.manifest.row(index)
        target = self.manifest.read_target(row)
        if row.target_size is None:
            self._refuse_wrong_bucket(row, target.size[::-1], int(self.bucket[index]))
        references = [
            self.manifest.read_picture(entry.image, f"{row.place}.references[{k}].image") for k, entry in enumerate(row.references)
        ]
        masks = [self.manifest.read_mask(row, k, target) for k in range(len(row.references))]
        points = self.manifest.read_points(row)
        self.manifest.check_digest(row)
        return Inspection(
            id=row.id,
            prompt=row.prompt,
            target=target,
            references=tuple(references),
            points=tuple(torch.zeros(0, 2, dtype=torch.long) for _ in references) if points is None else tuple(points),
            reference_grids=tuple(entry.grid for entry in row.references),
            target_grid=row.target_grid,
            masks=tuple(None if mask is None else touched_cells(mask, row.target_grid) for mask in masks),
            mask_problems=tuple("" if mask is None else mask_problem(mask) for mask in masks),
            missing=() if points is not None else ("points",),
            scores=self.manifest.read_match_scores(row),
        )

    def report(self) -> dict[str, int]:
        """Count what is there; the folders of the points files are listed once, no file is read.

        Returns:
            `samples`: in the split; `found_points`, `missing_points`: samples with and without a points file; `references_K` for every K
            that occurs: samples with K references.
        """
        files: dict[str, set[str]] = {}
        found = 0
        for points in self.manifest.column("points"):
            path = PurePosixPath(points)
            folder = str(path.parent)
            if folder not in files:
                files[folder] = self.manifest.folder.names(folder)
            found += path.name in files[folder]
        counts = {"samples": len(self), "found_points": found, "missing_points": len(self) - found}
        return counts | {f"references_{k}": count for k, count in sorted(Counter(self.num_references.tolist()).items())}

    def _carry_points(self, stored: list[Tensor], row: Row, frame: Frame, token_grid: Grid, frames: list[Frame]) -> list[Tensor]:
        """Carry points to the training token grids: cut off, voted on, disjoint (Eq. 2)."""
        frame.check_grid(row.target_grid, token_grid, f"{row.place}.target_grid")
        carried = []
        for k, (pairs, reference, own_frame) in enumerate(zip(stored, row.references, frames, strict=True)):
            own_frame.check_grid(reference.grid, self.reference_token_grid, f"{row.place}.references[{k}].grid")
            u = own_frame.carry(pairs[:, 0].long(), reference.grid, self.reference_token_grid)
            v = frame.carry(pairs[:, 1].long(), row.target_grid, token_grid)
            inside = v >= 0
            carried.append(majority_points(u[inside], v[inside], self.reference_token_grid.num_tokens, token_grid.num_tokens))
        return make_disjoint(carried)

    def _refuse_wrong_bucket(self, row: Row, size: tuple[int, int], bucket: int) -> None:
        """Raise ValueError where the grid, whose aspect stands for that of the target, is so far from it that the bucket is another one."""
        height, width = size
        found = int(nearest_bucket(np.array([height]), np.array([width]), self.buckets)[0])
        rows, columns = row.target_grid
        rounding = log1p(1 / rows) + log1p(1 / columns)  # a grid of whole cells may be off by one in each side
        if found != bucket and abs(log(height * columns / (width * rows))) > rounding:
            raise ValueError(
                f"{row.place}.target_grid: {rows} x {columns} cells stand for the target's aspect, as there is no target_size, but "
                f"{row.target} has {height} x {width} px (height x width). Put its size into the column target_size."
            )

    def _refuse_coarse_grids(self, geometries: np.ndarray, by_geometry: np.ndarray) -> None:
        """Raise ValueError for grids that are too coarse whatever the pictures' sizes; the rest shows when a picture is read."""
        tokens = np.array([tuple(grid) for grid in self._token_grids])[by_geometry]
        coarse_target = (tokens > geometries[:, :2] * float(COARSEST_CELL)).any(axis=1)
        coarse_reference = max(self.reference_token_grid) > geometries[:, 4] * float(COARSEST_CELL)
        for name, coarse in (("target_grid", coarse_target), ("reference_grid", coarse_reference)):
            bad = np.flatnonzero(coarse[self.manifest.geometry])
            if not len(bad):
                continue
            row = self.manifest.row(bad[0])
            grid, wanted = row.target_grid, self._token_grids[self.bucket[bad[0]]]
            if name == "reference_grid":
                grid, wanted = min((reference.grid for reference in row.references), key=max), self.reference_token_grid
            raise ValueError(
                f"{row.place}.{name}: must be about as fine as the token grid {wanted.rows} x {wanted.columns} or finer, got "
                f"{grid.rows} x {grid.columns}; so {len(bad)} of {len(self)} samples. Match on a finer grid, or train at a smaller size."
            )


def _bucket_grid(bucket: tuple[int, int], token: tuple[int, int]) -> Grid:
    """Return a bucket's token grid, or raise ValueError."""
    if any(side < size or side % size for side, size in zip(bucket, token, strict=True)):
        raise ValueError(
            f"data.buckets: height and width must be positive multiples of the token size {token[0]} px, got {bucket[0]} x {bucket[1]}."
        )
    return Grid(bucket[0] // token[0], bucket[1] // token[1])


def _to_tensor(picture: Image.Image) -> Tensor:
    """Return a picture as float32 [3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
