"""How fast the reader of our format is and how much memory it holds: the command `data` of scripts/benchmark.py."""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import DataLoader

from mosaic.data import BucketBatchSampler, DatasetWriter, MultiReferenceDataset, ReferenceRecord, SampleRecord, collate
from mosaic.data.multi_reference.manifest import FORMAT, VERSION
from mosaic.data.multi_reference.storage import DESCRIPTION, MANIFEST
from mosaic.data.multi_reference.writer import ROWS_PER_GROUP, SCHEMA
from mosaic.files import write_text
from scripts.benchmarks.measuring import resident_mib

GRID = 64  # cells per side of the grids that points are found on
POINTS = 600  # per reference
NUM_STORED = 48  # different samples on disk; the epochs go through them again and again
ROWS_READ = 200  # rows read at random after opening


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, print a table, return the result."""
    if args.open_only:
        print(json.dumps(measure_opening(args.open_only)))
        return None
    with tempfile.TemporaryDirectory() as folder:
        root = write_samples(Path(folder) / "samples", args)
        speed = {str(workers): samples_per_second(root, workers, args) for workers in args.workers}
        cpu = cpu_ms_per_sample(root, args)
        memory = {str(rows): memory_in_fresh_process(write_manifest(Path(folder) / str(rows), rows, args.k)) for rows in args.rows}
    settings = {"size": args.size, "k": args.k, "batch_size": args.batch_size, "stored_as": "JPEG", "points_per_reference": POINTS}
    result = {"settings": settings, "cores": os.cpu_count(), "samples_per_second": speed, "cpu_ms_per_sample": cpu, "manifest": memory}
    print_tables(result)
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result


def write_samples(root: Path, args: argparse.Namespace) -> Path:
    """Write matched samples with smooth pictures as JPEG files, which is what real ones mostly are."""
    with DatasetWriter(root) as writer:
        for index in range(max(NUM_STORED, args.batch_size)):
            rng = np.random.default_rng(index)
            owners = np.array_split(rng.permutation(GRID**2), args.k)
            references = []
            for own in owners:
                v = own[:POINTS]
                points = np.stack([rng.integers(0, GRID**2, len(v)), v], axis=1)
                references.append(ReferenceRecord(_photo(rng, args.size), "thing", points))
            grids = ((GRID, GRID), (GRID, GRID))
            writer.add(SampleRecord(f"s{index}", "train", "a prompt", _photo(rng, args.size), references, *grids))
    return root


def samples_per_second(root: Path, workers: int, args: argparse.Namespace) -> float:
    """Read and collate for a while, after the first batch of every worker."""
    dataset = open_dataset(root, args.size)
    sampler = BucketBatchSampler(dataset.batch_keys, args.batch_size, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
    seen, start = -max(workers, 1), 0.0  # the first batches carry the start of the workers
    for epoch in range(10**6):
        sampler.set_epoch(epoch)
        for _ in loader:
            seen += 1
            if seen == 0:
                start = time.perf_counter()
            elif seen > 0 and time.perf_counter() - start > args.seconds:
                return seen * args.batch_size / (time.perf_counter() - start)
    raise AssertionError("unreachable: a million epochs take longer than any --seconds")


def cpu_ms_per_sample(root: Path, args: argparse.Namespace) -> float:
    """Time of one core per sample, read and collated in this process: what other programs leave to us does not change it."""
    dataset = open_dataset(root, args.size)
    dataset[0]
    start = time.process_time()
    for first in range(0, len(dataset) - args.batch_size + 1, args.batch_size):
        collate([dataset[index] for index in range(first, first + args.batch_size)])
    count = len(dataset) // args.batch_size * args.batch_size
    return 1000 * (time.process_time() - start) / count


def open_dataset(root: Path, size: int) -> MultiReferenceDataset:
    """The reader at `size` px, tokens of 16 px."""
    tokens = (size // 16, size // 16)
    return MultiReferenceDataset(
        root, image_size=(size, size), reference_size=size, target_token_grid=tokens, reference_token_grid=tokens, max_references=99
    )


def write_manifest(root: Path, rows: int, k: int) -> Path:
    """Write a data set that has a manifest only, with ids and paths as long as real ones."""
    root.mkdir()
    (root / DESCRIPTION).write_text(json.dumps({"format": FORMAT, "version": VERSION}))
    with pq.ParquetWriter(root / MANIFEST, SCHEMA, write_page_checksum=True, write_statistics=False) as writer:
        for start in range(0, rows, ROWS_PER_GROUP):
            ids = [f"{number:032x}" for number in range(start, min(start + ROWS_PER_GROUP, rows))]
            writer.write_table(_rows(ids, k))
    return root


def memory_in_fresh_process(root: Path) -> dict[str, float]:
    """`measure_opening` in a process of its own."""
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "data", "--open-only", str(root)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def measure_opening(root: Path) -> dict[str, float]:
    """Open a manifest and read rows at random; seconds, and MiB above what the imported program holds."""
    before = resident_mib("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    dataset = open_dataset(root, 512)
    opened, opened_cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resident_mib("VmHWM")
    cpu = time.process_time()
    for index in np.random.default_rng(0).integers(0, len(dataset), ROWS_READ):
        dataset.manifest.row(int(index))
    return {
        "open_seconds": opened,
        "open_cpu_seconds": opened_cpu,
        "cpu_ms_per_row": 1000 * (time.process_time() - cpu) / ROWS_READ,
        "resident_mib": resident_mib("VmRSS") - before,
        "peak_while_opening_mib": peak - before,
    }


def print_tables(result: dict[str, Any]) -> None:
    """The result as Markdown tables."""
    settings = result["settings"]
    print(
        f"Reading and collating: {settings['size']} px, K = {settings['k']}, {settings['points_per_reference']} points per reference, "
        f"batch {settings['batch_size']}, {settings['stored_as']} files on a local disk, {result['cores']} cores.\n"
    )
    print("| workers | samples per second |\n|---:|---:|")
    for workers, speed in result["samples_per_second"].items():
        print(f"| {workers} | {speed:.1f} |")
    print(f"\nOne core needs {result['cpu_ms_per_sample']:.0f} ms per sample.\n")
    print("| manifest rows | resident MiB | peak while opening MiB | seconds to open | of one core | ms of one core per row at random |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rows, entry in result["manifest"].items():
        print(
            f"| {int(rows):,} | {entry['resident_mib']:.0f} | {entry['peak_while_opening_mib']:.0f} | {entry['open_seconds']:.2f} "
            f"| {entry['open_cpu_seconds']:.2f} | {entry['cpu_ms_per_row']:.2f} |"
        )


def _photo(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG file with large smooth forms and a little grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    grain = rng.integers(-6, 7, (side, side, 3))
    picture = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def _rows(ids: list[str], k: int) -> pa.Table:
    """A row group of the manifest."""
    count = len(ids)

    def repeated(value: Any, kind: pa.DataType, times: int = count) -> pa.Array:
        return pa.array([value] * times, kind)

    struct = SCHEMA.field("references").type.value_type
    columns = {
        "image": pa.array([f"images/{name}_ref{index}.jpg" for name in ids for index in range(k)]),
        "phrase": repeated("a thing", pa.string(), count * k),
    }
    entries = pa.StructArray.from_arrays(
        [columns.get(field.name, pa.nulls(count * k, field.type)) for field in struct], fields=list(struct)
    )
    offsets = pa.array(range(0, (count + 1) * k, k), pa.int32())
    pair = SCHEMA.field("target_grid").type
    values = {
        "id": pa.array(ids),
        "split": repeated("train", pa.string()),
        "prompt": pa.array([f"a thing numbered {name[-8:]} beside another one, in a place of its own" for name in ids]),
        "target": pa.array([f"images/{name}_target.jpg" for name in ids]),
        "references": pa.ListArray.from_arrays(offsets, entries, type=SCHEMA.field("references").type),
        "points": pa.array([f"points/{name}.safetensors" for name in ids]),
        "reference_grid": repeated([GRID, GRID], pair),
        "target_grid": repeated([GRID, GRID], pair),
        "target_size": repeated([512, 512], pair),
        "scores": pa.nulls(count, pa.string()),
        "metadata": repeated('{"source": "synthetic"}', pa.string()),
    }
    return pa.table(values, schema=SCHEMA)
