"""Writer of the multi-reference sample format (preprocess/FORMAT.md)."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from mosaic.data.manifest import FORMAT, VERSION

_GRID = pa.list_(pa.int32())
SCHEMA = pa.schema([
    ("id", pa.string()), ("split", pa.string()), ("prompt", pa.string()), ("target", pa.string()),
    ("references", pa.list_(pa.struct([("image", pa.string()), ("phrase", pa.string()), ("mask", pa.string())]))),
    ("points", pa.string()), ("reference_grid", _GRID), ("target_grid", _GRID), ("metadata", pa.string()),
])


@dataclass(frozen=True)
class ReferenceRecord:
    """One reference of a sample.

    Attributes:
        image: prepared picture (square, white, centred).
        phrase: what the prompt calls it, e.g. "cat".
        points: int `[P, 2]` of (u, v) on the sample's grids.
        mask: uint8 `[H, W]`, non-zero where the reference is seen in the target; None if unknown.
    """

    image: Image.Image
    phrase: str
    points: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class SampleRecord:
    """One sample: a target picture, its prompt and its references; grids are (rows, columns)."""

    id: str
    split: str
    prompt: str
    target: Image.Image
    references: Sequence[ReferenceRecord]
    reference_grid: tuple[int, int]
    target_grid: tuple[int, int]
    metadata: dict[str, object] = field(default_factory=dict)


class DatasetWriter:
    """Writes a dataset aside and renames it when complete.

    Use as a context manager; an exception leaves nothing under `root` and removes what was written.

    Args:
        root: folder of the dataset; it must not exist yet.

    Raises:
        FileExistsError: `root` exists.
    """

    def __init__(self, root: Path) -> None:
        if root.exists():
            raise FileExistsError(f"{root}: exists already; choose another folder or remove it")
        self._root = root
        self._partial = root.with_name(root.name + ".partial")
        self._rows: list[dict[str, object]] = []
        self._ids: set[str] = set()

    def __enter__(self) -> "DatasetWriter":
        shutil.rmtree(self._partial, ignore_errors=True)
        for name in ("images", "points"):
            (self._partial / name).mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        pq.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA), self._partial / "manifest.parquet")
        header = {"format": FORMAT, "version": VERSION}
        (self._partial / "dataset.json").write_text(json.dumps(header, indent=2) + "\n")
        os.replace(self._partial, self._root)

    def add(self, sample: SampleRecord) -> None:
        """Write the files of one sample and remember its row.

        Raises:
            ValueError: the id is taken or unfit as a file name, or points leave their grids or share a target cell.
        """
        if sample.id in self._ids or not sample.id.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"sample id {sample.id!r}: must be unique, of letters, digits, '-' and '_'")
        check_points(sample)
        self._ids.add(sample.id)
        references = [self._write_reference(sample.id, k, reference) for k, reference in enumerate(sample.references)]
        points = {str(k): np.ascontiguousarray(r.points, dtype=np.int32) for k, r in enumerate(sample.references)}
        save_file(points, self._partial / "points" / f"{sample.id}.safetensors")
        self._rows.append({
            "id": sample.id, "split": sample.split, "prompt": sample.prompt,
            "target": self._write_image(sample.target, f"{sample.id}_target"), "references": references,
            "points": f"points/{sample.id}.safetensors", "reference_grid": list(sample.reference_grid),
            "target_grid": list(sample.target_grid), "metadata": json.dumps(sample.metadata, sort_keys=True),
        })

    def _write_reference(self, sample_id: str, k: int, reference: ReferenceRecord) -> dict[str, str | None]:
        mask = None
        if reference.mask is not None:
            picture = Image.fromarray((np.asarray(reference.mask) > 0).astype(np.uint8) * 255)
            mask = self._write_image(picture, f"{sample_id}_mask{k}")
        return {"image": self._write_image(reference.image, f"{sample_id}_ref{k}"), "phrase": reference.phrase, "mask": mask}

    def _write_image(self, image: Image.Image, stem: str) -> str:
        name = f"images/{stem}.png"
        image.save(self._partial / name, compress_level=4)
        return name


def check_points(sample: SampleRecord) -> None:
    """Refuse points that leave their grids or claim a target cell twice."""
    taken: set[int] = set()
    for k, reference in enumerate(sample.references):
        points = np.asarray(reference.points)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"sample {sample.id!r}, references[{k}]: points must be [P, 2]; got {list(points.shape)}")
        for column, grid, name in ((0, sample.reference_grid, "u"), (1, sample.target_grid, "v")):
            if len(points) and not 0 <= points[:, column].min() <= points[:, column].max() < grid[0] * grid[1]:
                raise ValueError(f"sample {sample.id!r}, references[{k}]: {name} must lie within the grid {list(grid)}")
        cells = points[:, 1].tolist()
        if len(set(cells)) != len(cells) or not taken.isdisjoint(cells):
            raise ValueError(f"sample {sample.id!r}, references[{k}]: a target cell is claimed twice")
        taken.update(cells)
