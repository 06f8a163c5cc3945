"""The reader of SemAlign-MS-Subjects200K, the data set released with the paper: one reference per sample, 512 px."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mosaic.data.inspection import Inspection, token_masks
from mosaic.data.masks import mask_problem
from mosaic.data.samples import Sample
from mosaic.data.semalign.ids import deflate_library, open_ids, pixel_digest
from mosaic.data.semalign.points import FIELD_GRID, FIELD_TOKEN, consensus_points, corner_cells, release_points, vote_points
from mosaic.data.semalign.rows import SemAlignRows, StoredRow, find_parquet
from mosaic.data.semalign.store import open_store, read_field, read_mask
from mosaic.files import shown
from mosaic.images import to_rgb
from mosaic.method.grids import Grid

INDEX_NAME = "semalign_ids.parquet"
Downsample = Literal["vote", "release"]
Split = Literal["all", "train", "heldout"]


@dataclass(frozen=True)
class Supervision:
    """What a sample's points are made of; None where the data set has no such file.

    Attributes:
        mask: Square mask of the subject in the target.
        dift: int64 [4096, 2], the first coordinate field (`mosaic.data.semalign.points`).
        geoaware: The second one.
    """

    mask: Image.Image | None
    dift: Tensor | None
    geoaware: Tensor | None

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the parts that are missing: "mask", and "points" for a coordinate field."""
        parts = {"mask": self.mask is None, "points": self.dift is None or self.geoaware is None}
        return tuple(name for name, is_missing in parts.items() if is_missing)

    @property
    def whole(self) -> tuple[Tensor, Tensor, Image.Image] | None:
        """Both fields and the mask; None where one is missing."""
        if self.dift is None or self.geoaware is None or self.mask is None:
            return None
        return self.dift, self.geoaware, self.mask


class SemAlignDataset(Dataset[Sample]):
    """Samples of SemAlign-MS-Subjects200K in its released layout (data facts A1-A8).

    `root` holds `data/*.parquet` (Subjects200K), `mask/<id>.png` or `mask.zip`, and `coord/{dift,geoaware}/<id>_ref0.pt` or `coord.zip`;
    where a folder and an archive are both there, the folder is read. Each may also be elsewhere.

    A sample has K = 1. `points[0]` is int64 [P, 2] of (u, v) on grids of image side / token size, sorted by u, with u and v unique. A
    sample whose mask or coordinates are missing has no points, and `missing` says so; `report()` counts those. Damaged files raise an error
    that names them. Nothing is skipped or replaced.

    Ids come from an index file that is made the first time (`mosaic.data.semalign.ids`). A row whose pixels are not those of the index is
    refused. Samples are held out by their id: those whose first 8 hexadecimal digits, as a share of 16^8, lie below `heldout_share`.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int = 512,
        downsample: Downsample = "vote",
        *,
        reference_size: int | None = None,
        token_size: int = FIELD_TOKEN,
        split: str = "all",
        heldout_share: float = 0.01,
        parquet: str | Path | None = None,
        masks: str | Path | None = None,
        coordinates: str | Path | None = None,
        id_index: str | Path | None = None,
        check_pixels: bool = True,
        rows: SemAlignRows | None = None,
        with_masks: bool = False,
    ) -> None:
        """Find the files, filter the rows, read or make the index of ids. Pictures, masks and points are read when a sample is asked for.

        Args:
            root: Folder of the data set.
            image_size: Side of the targets in pixels.
            downsample: The way from the 64 x 64 grid to the training grids: "vote", or "release" for the released loader's, bit for bit.
                Equal at 1024 px.
            reference_size: Side of the references in pixels; None: `image_size`.
            token_size: Pixels of a token; 16 for FLUX.1.
            split: "all", or the samples that are not held out ("train"), or those that are ("heldout").
            heldout_share: Share of the samples that is held out, from 0 to 1.
            parquet: Folder of the Parquet files, or one file; None: `root/data`.
            masks: Folder with `<id>.png`, or an archive with `mask/<id>.png`; None: `root/mask` or `root/mask.zip`.
            coordinates: Folder with `dift/` and `geoaware/`, or an archive with `coord/` above them; None: `root/coord` or
                `root/coord.zip`.
            id_index: The index file of ids; None: `root/semalign_ids.parquet`.
            check_pixels: Refuse rows whose pixels are not those of the index. To be switched off only for an index that was made with
                another decoder of JPEG files.
            rows: The rows of the Parquet files, where those are open already.
            with_masks: Whether samples bring their masks.

        Raises:
            FileNotFoundError: The folder, the Parquet files or a location given are missing.
            ValueError: A size, grid, split or share does not fit; no row passes the filter or belongs to the split; a Parquet file or
                archive is damaged; or ids are not to be had (`open_ids`).
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: there is no such folder; root must be a SemAlign-MS-Subjects200K data set.")
        self.image_size, self.token_size, self.downsample = image_size, token_size, downsample
        self.reference_size = image_size if reference_size is None else reference_size
        _check_choice("downsample", downsample, get_args(Downsample))
        _check_choice("split", split, get_args(Split))
        self.heldout_share, self.with_masks = heldout_share, with_masks
        self.target_side = _side(image_size, token_size, downsample, "image_size")
        self.reference_side = _side(self.reference_size, token_size, downsample, "reference_size")
        index = self.root / INDEX_NAME if id_index is None else Path(id_index)
        self.rows = SemAlignRows(find_parquet(self.root, parquet, exclude=[index])) if rows is None else rows
        if not len(self.rows.good):
            raise ValueError(
                f"{self.rows.files[0].parent}: none of {self.rows.num_rows} rows passes the quality filter, which keeps rows of "
                "collection_2 with all three scores at 5."
            )
        self.masks = open_store(self.root, "mask", masks)
        self.coordinates = open_store(self.root, "coord", coordinates)
        self.check_pixels = check_pixels
        self._ids = open_ids(index, self.rows)
        self._choose(split)

    def of_split(self, split: str) -> "SemAlignDataset":
        """The samples of another split, over the same open files and ids.

        Raises:
            ValueError: There is no such split, or no sample belongs to it.
        """
        _check_choice("split", split, get_args(Split))
        other = copy(self)
        other._choose(split)
        return other

    def _choose(self, split: str) -> None:
        self._members = _members(self._ids["id"], split, self.heldout_share)
        if not len(self._members):
            raise ValueError(
                f'{self.root}: has no sample of the split "{split}" with a heldout_share of {self.heldout_share:g}; '
                f"{len(self.rows.good)} rows pass the quality filter. Change data.heldout_share."
            )

    @property
    def num_references(self) -> np.ndarray:
        """Array [N] of K of each sample, all 1."""
        return np.ones(len(self), dtype=np.int64)

    @property
    def batch_keys(self) -> np.ndarray:
        """Array [N, 2], what the samples of a batch share: K and size, of which there is one here. For `BucketBatchSampler`."""
        return np.column_stack([self.num_references, np.zeros(len(self), dtype=np.int64)])

    def sample_ids(self) -> list[str | None]:
        """Names of all samples in order, None where the row cannot be read; no picture is read."""
        return self._ids["id"].take(pa.array(self._members)).to_pylist()

    def prompts(self) -> list[str]:
        """Prompts of all samples in order, without those that are null; no picture is read."""
        return self.rows.captions(self.rows.good[self._members])

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            IndexError: There is no such sample.
            ValueError: The row, the mask or a coordinate file is damaged, or the row's pixels are not those of the index.
        """
        row, target, reference = self.stored(index)
        supervision = self.supervision(index)
        return Sample(
            id=self.sample_id(index),
            prompt=row.caption,
            target=_panel(target, self.image_size),
            references=_panel(reference, self.reference_size)[None],
            points=[self._points(supervision, self.downsample)],
            missing=supervision.missing,
            masks=token_masks([supervision.mask], Grid(self.target_side, self.target_side)) if self.with_masks else None,
        )

    def inspect(self, index: int) -> Inspection:
        """Look at one sample as it is stored, its points on the 64 x 64 grids. Raises as `__getitem__`."""
        row, target, reference = self.stored(index)
        found = self.supervision(index)
        mask = None if found.mask is None else corner_cells(found.mask, FIELD_GRID.rows, FIELD_TOKEN)
        return Inspection(
            id=self.sample_id(index),
            prompt=row.caption,
            target=to_rgb(target),
            references=(to_rgb(reference),),
            points=(self.consensus(index),),
            reference_grids=(FIELD_GRID,),
            target_grid=FIELD_GRID,
            masks=(mask,),
            missing=found.missing,
            mask_problems=("" if found.mask is None else mask_problem(np.asarray(found.mask) > 0),),
        )

    def row_number(self, index: int) -> int:
        """Return the row of a sample, counted over all Parquet files."""
        return int(self.rows.good[self._member(index)])

    def sample_id(self, index: int) -> str:
        """Return the released id of a sample: 64 hexadecimal digits.

        Raises:
            ValueError: The row cannot be read.
        """
        identifier = self._ids["id"][self._member(index)].as_py()
        if identifier is None:
            row = self.rows.read(self.row_number(index))
            target, _ = row.panels()
            raise ValueError(
                f"{row.place}: has no id. Ids are hashes of PNG files, which hold no picture of mode CMYK, YCbCr or LAB, and this one has "
                f"{target.mode}; or the row has been repaired since: open the data set anew."
            )
        return identifier

    def stored(self, index: int) -> tuple[StoredRow, Image.Image, Image.Image]:
        """Read a row and cut out its panels, target and reference, of 512 x 512 px in the mode of the file.

        Raises:
            IndexError: There is no such sample.
            ValueError: The row is damaged, or its pixels are not those of the index.
        """
        self.sample_id(index)  # of an unreadable row the reason comes before all else
        row = self.rows.read(self.row_number(index))
        target, reference = row.panels()
        if self.check_pixels and pixel_digest(target) != self._ids["pixels"][self._member(index)].as_py():
            raise ValueError(
                f"{row.place}: the pixels are not those from which the index of ids was made. Either the index belongs to other Parquet "
                "files, or to the same ones in another order: remove it to have it made anew. Or this machine decodes JPEG files to other "
                "pixels: make the index with the same Pillow, or switch check_pixels off."
            )
        return row, target, reference

    def supervision(self, index: int) -> Supervision:
        """Read the mask and the two coordinate fields of a sample.

        Raises:
            ValueError: A file is damaged.
        """
        identifier = self.sample_id(index)
        fields = [read_field(self.coordinates, matcher, identifier) for matcher in ("dift", "geoaware")]
        return Supervision(read_mask(self.masks, identifier), *fields)

    def consensus(self, index: int) -> Tensor:
        """Return the points of a sample on the 64 x 64 grids, int64 [P, 2] of (u, v), u not unique; [0, 2] where files are missing."""
        found = self.supervision(index)
        return torch.zeros(0, 2, dtype=torch.long) if found.whole is None else consensus_points(*found.whole)

    def report(self, num_compared: int = 64) -> dict[str, int | str]:
        """Count what is there.

        Args:
            num_compared: Samples, spread evenly over those with a mask and points, on which the two ways of downsampling are compared.

        Returns:
            `rows`: in the Parquet files; `kept`: that pass the quality filter; `samples`: of those, in the split; `unreadable`: samples
            whose row cannot be read; `duplicate_ids`: samples that share their id with an earlier one; `found_mask`, `found_points`,
            `missing_mask`, `missing_points`: samples with and without; `canary`: the deflate library (`deflate_library`);
            `compared_samples`, `vote_points`, `release_points`: how many samples were compared and how many points each way keeps on them.

        Raises:
            ValueError: A mask or coordinate file of the compared samples is damaged.
        """
        numbers = [index for index in range(len(self)) if self._ids["id"][self._member(index)].is_valid]
        identifiers = [self.sample_id(index) for index in numbers]
        masks = [self._has_mask(identifier) for identifier in identifiers]
        points = [self._has_points(identifier) for identifier in identifiers]
        supervised = [index for index, mask, fields in zip(numbers, masks, points, strict=True) if mask and fields]
        count = min(num_compared, len(supervised))
        compared = [self.supervision(supervised[position * len(supervised) // count]) for position in range(count)]
        return {
            "rows": self.rows.num_rows,
            "kept": len(self.rows.good),
            "samples": len(self),
            "unreadable": len(self) - len(numbers),
            "duplicate_ids": len(identifiers) - len(set(identifiers)),
            "found_mask": sum(masks),
            "found_points": sum(points),
            "missing_mask": len(masks) - sum(masks),
            "missing_points": len(points) - sum(points),
            "canary": deflate_library(),
            "compared_samples": count,
            "vote_points": sum(len(self._points(found, "vote")) for found in compared),
            "release_points": sum(len(self._points(found, "release")) for found in compared),
        }

    def _points(self, found: Supervision, downsample: Downsample) -> Tensor:
        if found.whole is None:
            return torch.zeros(0, 2, dtype=torch.long)
        sides = (self.reference_side, self.target_side)
        if downsample == "vote":
            return vote_points(*found.whole, *sides)
        return release_points(*found.whole, *sides, self.token_size)

    def _has_mask(self, identifier: str) -> bool:
        return self.masks is not None and self.masks.has(f"{identifier}.png")

    def _has_points(self, identifier: str) -> bool:
        names = [f"{matcher}/{identifier}_ref0.pt" for matcher in ("dift", "geoaware")]
        return self.coordinates is not None and all(self.coordinates.has(name) for name in names)

    def _member(self, index: int) -> int:
        """Position of a sample among the kept rows."""
        return int(self._members[index])


def _members(ids: pa.ChunkedArray, split: str, heldout_share: float) -> np.ndarray:
    """Positions of the samples of a split. Rows without an id, which cannot be read, belong to "train"."""
    if not 0 <= heldout_share <= 1:
        raise ValueError(f"heldout_share must lie in [0, 1], got {heldout_share}.")
    if split == "all":
        return np.arange(len(ids))
    held_out = [identifier is not None and int(identifier[:8], 16) < heldout_share * 16**8 for identifier in ids.to_pylist()]
    return np.flatnonzero(np.array(held_out) == (split == "heldout"))


def _panel(panel: Image.Image, size: int) -> Tensor:
    """A panel as float32 [3, size, size] in [-1, 1], resized (bilinear, antialiased) as the released loader does."""
    picture = to_rgb(panel)
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}.")


def _side(size: int, token_size: int, downsample: Downsample, name: str) -> int:
    """Rows and columns of a square picture in tokens."""
    if not isinstance(size, int) or size < 1 or size % token_size:
        raise ValueError(f"{name} must be a positive multiple of the token size {token_size} px, a single number, got {shown(size)}.")
    side = size // token_size
    if downsample == "vote" and FIELD_GRID.rows % side:
        raise ValueError(
            f'{name}: the points were found on a grid of 64 x 64 cells, and downsample "vote" needs a token grid that divides it, but '
            f"{size} px make {side} x {side} tokens of {token_size} px. Use 64, 32, 16, 8, 4, 2 or 1 tokens a side "
            f'({64 * token_size}, {32 * token_size}, ... px), or downsample "release".'
        )
    return side
