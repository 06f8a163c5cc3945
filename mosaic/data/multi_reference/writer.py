"""Writer of the multi-reference sample format (preprocess/FORMAT.md). It holds the rows of one row group, not those of the data set."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mosaic.data.masks import mask_picture, mask_problem
from mosaic.data.multi_reference.manifest import FORMAT, VERSION
from mosaic.data.multi_reference.records import Picture, ReferenceRecord, SampleRecord
from mosaic.data.multi_reference.rows import MAX_GRID_SIDE, MAX_JSON, MAX_REFERENCES, MAX_TEXT
from mosaic.data.multi_reference.storage import DESCRIPTION, MANIFEST
from mosaic.files import save_tensors
from mosaic.images import decode_image, read_picture, reading_notes, to_rgb
from mosaic.locks import new_folder, refuse_existing

ROWS_PER_GROUP = 1000
_PAIR = pa.list_(pa.int32())
_REFERENCE = pa.struct(
    [
        ("image", pa.string()),
        ("phrase", pa.string()),
        ("mask", pa.string()),
        ("grid", _PAIR),
        ("scores", pa.string()),
        ("kind", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("prompt", pa.string()),
        ("target", pa.string()),
        ("references", pa.list_(_REFERENCE)),
        ("points", pa.string()),
        ("reference_grid", _PAIR),
        ("target_grid", _PAIR),
        ("target_size", _PAIR),
        ("scores", pa.string()),
        ("metadata", pa.string()),
    ]
)
_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "WEBP": "webp"}


class DatasetWriter:
    """Writes a dataset aside and renames it when complete.

    Use as a context manager; an exception leaves nothing under `root` and removes what was written.
    """

    def __init__(self, root: Path, pictures: Literal["given", "png"] = "given", provenance: Mapping[str, object] | None = None) -> None:
        """Name the folder; it is made when the context is entered.

        Args:
            root: Folder of the dataset; it must not exist yet.
            pictures: "given": picture files are copied byte by byte, once they are seen to decode; "png": all are stored as RGB PNG.
            provenance: What made the data set, JSON values by name, for its description beside format and version.

        Raises:
            FileExistsError: `root` exists. When the context is entered also ValueError: another process is writing it.
        """
        refuse_existing(root)
        self._replacing = new_folder(root, "folder")
        self._pictures = pictures
        self._header = {"format": FORMAT, "version": VERSION, **(provenance or {})}
        self._rows: list[dict[str, object]] = []
        self._ids: set[str] = set()
        self._notes: Counter[str] = Counter()
        self._masks: dict[str, list[str]] = {"empty": [], "full": []}
        self._table: pq.ParquetWriter | None = None

    def __enter__(self) -> "DatasetWriter":
        self._aside = self._replacing.__enter__()
        for name in ("images", "points"):
            (self._aside / name).mkdir(parents=True)
        self._table = pq.ParquetWriter(self._aside / MANIFEST, SCHEMA, write_page_checksum=True, write_statistics=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._table is not None, "the writer is used as a context manager"
        if kind is None:
            self._flush()
        self._table.close()
        if kind is None:
            (self._aside / DESCRIPTION).write_text(json.dumps(self._header, indent=2) + "\n")
        self._replacing.__exit__(kind, error, trace)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._ids

    def remarks(self) -> list[str]:
        """What the user should know of the pictures and masks that were written, a line each."""
        lines = [f"{count} pictures: {note}" for note, count in self._notes.most_common()]
        meanings = {
            "empty": "their references are seen nowhere, so that matching finds no points",
            "full": "right where a subject fills it",
        }
        for problem, samples in self._masks.items():
            if samples:
                more = ", ..." if len(samples) > 5 else ""
                lines.append(f"{len(samples)} masks are {problem} ({meanings[problem]}), of the samples {', '.join(samples[:5])}{more}")
        return lines

    def add(self, sample: SampleRecord) -> None:
        """Write the files of one sample and keep its row for the manifest.

        Raises:
            FileNotFoundError: a picture file is missing.
            ValueError: the id is taken or unfit as a file name, prompt or references are missing, a picture does not decode, a mask has
                another size than the target, a grid, a score or a text is out of range, or points are refused by `check_points`.
        """
        check_sample(sample)
        if sample.id in self._ids:
            raise ValueError(f"sample id {sample.id!r}: must be unique, but it was written before")
        decoded = [decode_picture(picture) for picture in (sample.target, *(reference.image for reference in sample.references))]
        target = decoded[0]
        for k, reference in enumerate(sample.references):
            if reference.mask is not None and np.shape(reference.mask) != (target.height, target.width):
                raise ValueError(
                    f"sample {sample.id!r}, references[{k}]: the mask must have the target's size {target.height} x {target.width}; "
                    f"got {list(np.shape(reference.mask))}"
                )
        metadata = json.dumps(dict(sample.metadata), sort_keys=True)
        if len(metadata) > MAX_JSON:
            raise ValueError(f"sample {sample.id!r}: metadata must have at most {MAX_JSON} characters as JSON, got {len(metadata)}")
        self._ids.add(sample.id)
        self._notes.update(note for picture in decoded for note in reading_notes(picture))
        for reference in sample.references:
            if reference.mask is not None and (problem := mask_problem(np.asarray(reference.mask) > 0)):
                self._masks[problem].append(sample.id)
        row: dict[str, object] = {
            "id": sample.id,
            "split": sample.split,
            "prompt": sample.prompt,
            "target": self._write_picture(sample.target, target, f"{sample.id}_target"),
            "references": [
                self._write_reference(sample.id, k, reference, picture)
                for k, (reference, picture) in enumerate(zip(sample.references, decoded[1:], strict=True))
            ],
            "points": f"points/{sample.id}.safetensors",
            "reference_grid": list(sample.reference_grid),
            "target_grid": list(sample.target_grid),
            "target_size": [target.height, target.width],
            "scores": _to_json(sample.scores),
            "metadata": metadata,
        }
        if tensors := points_tensors(sample):
            save_tensors(tensors, self._aside / "points" / f"{sample.id}.safetensors")
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        assert self._table is not None, "the writer is used as a context manager"
        if self._rows:
            self._table.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
            self._rows = []

    def _write_reference(self, sample_id: str, k: int, reference: ReferenceRecord, picture: Image.Image) -> dict[str, object]:
        mask = None
        if reference.mask is not None:
            drawn = mask_picture(reference.mask)
            mask = self._write_picture(drawn, drawn, f"{sample_id}_mask{k}")
        return {
            "image": self._write_picture(reference.image, picture, f"{sample_id}_ref{k}"),
            "phrase": reference.phrase,
            "mask": mask,
            "grid": None if reference.grid is None else list(reference.grid),
            "scores": _to_json(reference.scores),
            "kind": reference.kind,
        }

    def _write_picture(self, given: Picture, decoded: Image.Image, stem: str) -> str:
        """Write a picture as it was given, or as PNG; returns its path below the root."""
        if self._pictures == "given" and not isinstance(given, Image.Image):
            suffix = _SUFFIXES.get(decoded.format or "", (decoded.format or "").lower())
            name = f"images/{stem}.{suffix}"
            (self._aside / name).write_bytes(given if isinstance(given, bytes) else given.read_bytes())
            return name
        name = f"images/{stem}.png"
        picture = decoded if decoded.mode in ("L", "RGB") and isinstance(given, Image.Image) else to_rgb(decoded)
        picture.save(self._aside / name, format="PNG", compress_level=4)
        return name


def points_tensors(sample: SampleRecord) -> dict[str, torch.Tensor]:
    """What the points file of a sample holds; nothing where it is not matched."""
    tensors: dict[str, torch.Tensor] = {}
    for k, reference in enumerate(sample.references):
        if reference.points is not None:
            tensors[f"{k}"] = torch.from_numpy(np.ascontiguousarray(reference.points, dtype=np.int32))
        if reference.similarity is not None:
            tensors[f"{k}.similarity"] = torch.from_numpy(np.ascontiguousarray(reference.similarity, dtype=np.float16))
        tensors |= {f"{k}.{name}": torch.tensor([score]) for name, score in reference.match_scores.items()}
    return tensors


def decode_picture(picture: Picture) -> Image.Image:
    """Return a picture of a record, decoded; its `format` is that of its file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file, too large, or does not decode.
    """
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, bytes):
        return decode_image(picture, "picture given as bytes")
    return decode_image(read_picture(picture), str(picture))


def check_sample(sample: SampleRecord) -> None:
    """Refuse, before anything is written, what a reader would refuse.

    Raises:
        ValueError: The id is unfit as a file name, split, prompt or references are missing, a grid is no grid, or points do not fit theirs.
    """
    if not _ID.fullmatch(sample.id):
        raise ValueError(f"sample id {sample.id!r}: must be of at most 200 letters a to z, digits, '-' and '_', for files are named by it")
    for name in ("split", "prompt"):
        if not getattr(sample, name).strip():
            raise ValueError(f"sample {sample.id!r}: {name} must not be empty")
        if len(getattr(sample, name)) > MAX_TEXT:
            raise ValueError(f"sample {sample.id!r}: {name} must have at most {MAX_TEXT} characters, got {len(getattr(sample, name))}")
    if not sample.references:
        raise ValueError(f"sample {sample.id!r}: must have at least one reference")
    if len(sample.references) > MAX_REFERENCES:
        raise ValueError(f"sample {sample.id!r}: must have at most {MAX_REFERENCES} references, got {len(sample.references)}")
    grids = {"reference_grid": sample.reference_grid, "target_grid": sample.target_grid}
    grids |= {f"references[{k}].grid": r.grid for k, r in enumerate(sample.references) if r.grid is not None}
    for name, grid in grids.items():
        if len(grid) != 2 or any(not 1 <= side <= MAX_GRID_SIDE for side in grid):
            raise ValueError(f"sample {sample.id!r}: {name} must be two integers within 1..{MAX_GRID_SIDE}; got {list(grid)}")
    check_points(sample)


def check_points(sample: SampleRecord) -> None:
    """Refuse points that leave their grids or claim a target cell twice, and samples that are matched in part."""
    matched = [reference.points is not None for reference in sample.references]
    if any(matched) and not all(matched):
        raise ValueError(f"sample {sample.id!r}, references[{matched.index(False)}]: must have points, for other references have")
    taken: set[int] = set()
    for k, reference in enumerate(sample.references if all(matched) else ()):
        points = np.asarray(reference.points)
        if points.ndim != 2 or points.shape[1] != 2 or (len(points) and not np.issubdtype(points.dtype, np.integer)):
            found = f"{points.dtype} {list(points.shape)}"
            raise ValueError(f"sample {sample.id!r}, references[{k}]: points must be integers [P, 2]; got {found}")
        for column, grid, name in ((0, reference.grid or sample.reference_grid, "u"), (1, sample.target_grid, "v")):
            if len(points) and not 0 <= points[:, column].min() <= points[:, column].max() < grid[0] * grid[1]:
                raise ValueError(f"sample {sample.id!r}, references[{k}]: {name} must lie within the grid {list(grid)}")
        cells = points[:, 1].tolist()
        if len(set(cells)) != len(cells) or not taken.isdisjoint(cells):
            raise ValueError(f"sample {sample.id!r}, references[{k}]: a target cell is claimed twice")
        taken.update(cells)


def _to_json(scores: Mapping[str, float]) -> str | None:
    """Return scores as a JSON object; None where there are none."""
    return json.dumps(dict(scores), sort_keys=True, allow_nan=False) if scores else None
