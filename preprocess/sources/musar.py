"""MUSAR-Gen-style Parquet: columns `tgt_img`, `prompt`, and `cond_img_k`, `cond_prompt_k` for k = 0, 1, ..."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mosaic.data.multi_reference.records import ReferenceRecord, SampleRecord
from mosaic.data.multi_reference.storage import Folder
from mosaic.data.schemas import require_distinct
from mosaic.files import relative_path, shown
from preprocess.sources.invalid import InvalidSamples
from preprocess.sources.pairs import unmatched_sample

BATCH_ROWS = 16  # rows held at a time; each carries its pictures


def samples(root: Path, invalid: InvalidSamples, split: str = "train", grid: int = 64) -> Iterator[SampleRecord]:
    """Yield the samples in the order of the files' names and rows.

    Pictures are encoded files: binary cells, or structs of `bytes` and `path` as the datasets library writes them.

    Args:
        root: A Parquet file, or a folder that holds some, at any depth.
        invalid: What to do with rows that cannot be converted.
        split: Split of all samples.
        grid: Cells per side of a square picture.

    Raises:
        FileNotFoundError, ValueError: There are no Parquet files, one is damaged or lacks a column; or a row is invalid and not skipped.
    """
    for path in _files(root):
        folder = Folder(path.parent)
        start = 0
        with _opened(path) as file:
            columns = _columns(file.schema_arrow, path)
            for batch in _batches(file, columns, path):
                for offset, values in enumerate(batch.to_pylist()):
                    place = f"{path}[{start + offset}]"
                    with invalid.at(place):
                        yield _sample(values, start + offset, place, path.name, folder, split, grid)
                start += len(batch)


def count(root: Path) -> int:
    """Return the number of rows."""
    total = 0
    for path in _files(root):
        with _opened(path) as file:
            total += file.metadata.num_rows
    return total


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() == ".parquet")
    if not found:
        raise FileNotFoundError(f"{root}: must be a Parquet file or a folder that holds some, found none.")
    return found


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}.") from error


def _batches(file: pq.ParquetFile, columns: list[str], path: Path) -> Iterator[pa.RecordBatch]:
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
            batch.validate(full=True)
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}.") from error


def _columns(schema: pa.Schema, path: Path) -> list[str]:
    """Return the columns to read, those of the references in order."""
    names = schema.names
    require_distinct(schema, names, str(path))
    count = next(k for k in range(len(names) + 1) if f"cond_img_{k}" not in names)
    wanted = [f"cond_img_{k}" for k in range(count)]
    beyond = [name for name in names if name.lower().startswith("cond_img") and name not in wanted]
    if count and beyond:
        raise ValueError(
            f"{path}: the column {beyond[0]} would be left out: references are cond_img_0, cond_img_1, ... without a gap, and "
            f"cond_img_{count} is missing. Rename the columns."
        )
    wanted = ["tgt_img", "prompt", *(f"cond_img_{k}" for k in range(max(count, 1)))]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{path}: the column {missing[0]} is missing. Found: {', '.join(names)}.")
    return [*wanted, *(f"cond_prompt_{k}" for k in range(count) if f"cond_prompt_{k}" in names)]


def _sample(values: dict[str, Any], row: int, place: str, source: str, folder: Folder, split: str, grid: int) -> SampleRecord:
    """Convert one row."""
    prompt = values["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f"{place}.prompt: must be a string, got {shown(prompt)}.")
    captions: list[str | None] = []
    references = []
    for k in range(sum(name.startswith("cond_img_") for name in values)):
        caption = values.get(f"cond_prompt_{k}")
        captions.append(caption)
        phrase = caption.strip() if isinstance(caption, str) else ""
        picture = _picture(values[f"cond_img_{k}"], f"{place}.cond_img_{k}", folder)
        references.append(ReferenceRecord(picture, phrase=phrase if phrase in prompt else ""))
    target = _picture(values["tgt_img"], f"{place}.tgt_img", folder)
    metadata = {"source": "musar", "file": source, "row": row, "cond_prompts": captions}
    return unmatched_sample(target, references, prompt, metadata, split, grid)


def _picture(cell: Any, place: str, folder: Folder) -> bytes:
    """Return the encoded picture of a cell."""
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
        cell = data if data is not None or path is None else folder.read(relative_path(path, f"{place}.path"), f"{place}.path")
    if not isinstance(cell, bytes) or not cell:
        raise ValueError(f"{place}: must hold an encoded picture, got {shown(cell)}.")
    return cell
