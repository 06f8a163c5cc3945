"""Training samples: the reader of the multi-reference format, batches, and the sampler that keeps batches to one number of references."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mosaic.correspondence import make_disjoint, reduce_points
from mosaic.images import load_image, to_rgb
from mosaic.manifest import Manifest, Row
from mosaic.tokens import Grid


@dataclass(frozen=True)
class Sample:
    """One target with its K references, ready for the model.

    Attributes:
        id: Name of the sample in its data set.
        prompt: Caption of the target.
        image: float32 [3, H, W] in [-1, 1].
        reference_images: float32 [K, 3, H_r, W_r] in [-1, 1].
        points: Per reference int64 [P_k, 2] of (u, v) on the training token grids; u unique within a reference, v in one reference only.
    """

    id: str
    prompt: str
    image: Tensor
    reference_images: Tensor
    points: list[Tensor]


@dataclass(frozen=True)
class MosaicBatch:
    """Samples that share K and all sizes.

    Attributes:
        ids: Names of the B samples.
        prompts: B captions.
        images: float32 [B, 3, H, W] in [-1, 1].
        reference_images: float32 [B, K, 3, H_r, W_r] in [-1, 1].
        points: Per sample, per reference int64 [P_k, 2] of (u, v).
    """

    ids: list[str]
    prompts: list[str]
    images: Tensor
    reference_images: Tensor
    points: list[list[Tensor]]

    @property
    def num_references(self) -> int:
        """K."""
        return self.reference_images.shape[1]


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
        image = self._read_picture(row.target, f"{row.place}.target", self.image_size)
        square = (self.reference_size, self.reference_size)
        references = [self._read_picture(path, f"{row.place}.references[{k}].image", square) for k, path in enumerate(row.references)]
        return Sample(row.id, row.prompt, image, torch.stack(references), self._read_points(row))

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


def collate(samples: Sequence[Sample]) -> MosaicBatch:
    """Join samples of one K and one size.

    Raises:
        ValueError: The samples differ in K or in size, or there are none.
    """
    if not samples:
        raise ValueError("a batch must hold at least one sample, got none.")
    for name, what in (("reference_images", "number and size of references"), ("image", "target size")):
        shapes = {tuple(getattr(sample, name).shape) for sample in samples}
        if len(shapes) > 1:
            raise ValueError(f"the samples of a batch must share the {what}, got shapes {sorted(shapes)}. KBatchSampler groups them.")
    return MosaicBatch(
        ids=[sample.id for sample in samples],
        prompts=[sample.prompt for sample in samples],
        images=torch.stack([sample.image for sample in samples]),
        reference_images=torch.stack([sample.reference_images for sample in samples]),
        points=[sample.points for sample in samples],
    )


class KBatchSampler(Sampler[list[int]]):
    """Batches of one K, in an order that is a pure function of (seed, epoch).

    Each K's samples are shuffled and cut into global batches of batch_size * world_size, of which every rank takes its own slice.
    So all ranks see the same K at the same step, have the same number of batches, and the global batches do not depend on how
    many ranks share them. The remainder of each K is left out of the epoch (another one in each epoch), except where a K has too
    few samples for one global batch: those make one smaller batch per rank, with samples used twice only if there are fewer than
    ranks. A data loader that shards by itself (accelerate) must not shard this sampler again.
    """

    def __init__(self, num_references: Sequence[int] | np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Group the samples by K.

        Args:
            num_references: [N], K of each sample.
            batch_size: Samples per batch and rank.
            seed: Seed of the order.
            rank: This process, from 0.
            world_size: Number of processes.

        Raises:
            ValueError: A number is out of range, or there are no samples.
        """
        values = np.asarray(num_references)
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size or not len(values):
            raise ValueError(
                "batch_size and world_size must be at least 1, rank in [0, world_size) and samples more than 0, got batch_size "
                f"{batch_size}, world_size {world_size}, rank {rank}, {len(values)} samples."
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self._groups = [np.flatnonzero(values == k) for k in np.unique(values)]
        self._epoch = self._first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and the number of its batches to leave out, for resuming."""
        self._epoch, self._first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Number of batches of a whole epoch, the same on every rank."""
        return sum(max(1, len(group) // (self.batch_size * self.world_size)) for group in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self._epoch])
        batches = [batch for group in self._groups for batch in self._global_batches(rng.permutation(group))]
        for number in rng.permutation(len(batches))[self._first_batch :]:
            yield np.split(batches[number], self.world_size)[self.rank].tolist()

    def _global_batches(self, indices: np.ndarray) -> list[np.ndarray]:
        """Cut the shuffled samples of one K into arrays whose lengths are equal multiples of world_size."""
        size = self.batch_size * self.world_size
        if len(indices) < size:
            size = max(1, len(indices) // self.world_size) * self.world_size
            indices = np.resize(indices, max(size, len(indices)))
        return [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]
