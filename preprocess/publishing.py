"""A data set of the multi-reference format as a repository of the Hugging Face hub: Parquet shards that hold the pictures, and a card."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData
from tqdm import tqdm

from mosaic.data import Manifest
from mosaic.data.multi_reference.repository import HUB
from mosaic.data.multi_reference.storage import DESCRIPTION
from mosaic.files import move, write_text
from mosaic.locks import new_folder, refuse_existing
from preprocess.construct.licences import licence_of

if TYPE_CHECKING:
    from datasets import Features

SHARD_BYTES = 500_000_000  # of pictures in a shard: the hub's habit
GROUP_BYTES, GROUP_ROWS = 64 * 2**20, 100  # a reader holds one row group at a time
_SPLIT = re.compile(r"\w+(\.\w+)*")  # what the hub takes as the name of a split


def features() -> "Features":
    """The columns of the repository form, for `datasets`."""
    from datasets import Features, Image, List, Value

    text, pair = Value("string"), List(Value("int32"))
    reference = {"image": Image(), "phrase": text, "mask": Image(), "grid": pair, "scores": text, "kind": text}
    columns = {"id": text, "prompt": text, "target": Image(), "references": List(reference), "points": Value("binary")}
    grids = {"reference_grid": pair, "target_grid": pair, "target_size": pair}
    return Features({**columns, **grids, "scores": text, "metadata": text})


@dataclass
class SplitFacts:
    """What the card says about a split.

    Attributes:
        samples: How many there are.
        matched: Those with points.
        num_references: How many samples have how many references.
        grids: How many samples have which grids, "target 64 x 64, references 64 x 64".
        num_bytes: Of all pictures and points.
    """

    samples: int = 0
    matched: int = 0
    num_references: Counter[int] = field(default_factory=Counter)
    grids: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row of the repository form."""
        self.samples += 1
        self.matched += row["points"] is not None
        self.num_references[len(row["references"])] += 1
        reference_grids = {_grid(entry["grid"] or row["reference_grid"]) for entry in row["references"]}
        self.grids[f"target {_grid(row['target_grid'])}, references {' or '.join(sorted(reference_grids))}"] += 1
        self.num_bytes += row_bytes(row)


class ShardWriter:
    """Writes the rows of a split into `data/SPLIT-<i>-of-<n>.parquet`, at most one row group in memory."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema, shard_bytes: int) -> None:
        self._folder, self._split, self._schema, self._shard_bytes = folder, split, schema, shard_bytes
        self._shards: list[Path] = []
        self._rows: list[Mapping[str, Any]] = []
        self._group_bytes = self._written = 0
        self._file: pq.ParquetWriter | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row; full row groups and shards are written."""
        size = row_bytes(row)
        if self._rows and (self._group_bytes + size > GROUP_BYTES or len(self._rows) == GROUP_ROWS):
            self._flush()
        if self._written and self._written + size > self._shard_bytes:
            self._flush()
            self._close()
        self._rows.append(row)
        self._group_bytes, self._written = self._group_bytes + size, self._written + size

    def finish(self) -> int:
        """Write what is left, and name the shards by their number; returns the bytes of the files."""
        self._flush()
        self._close()
        for number, path in enumerate(self._shards):
            move(path, path.with_name(f"{self._split}-{number:05d}-of-{len(self._shards):05d}.parquet"))
        return sum(path.stat().st_size for path in self._folder.glob(f"{self._split}-*-of-{len(self._shards):05d}.parquet"))

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            self._shards.append(self._folder / f"{self._split}-{len(self._shards)}.partial")
            texts = [name for name in self._schema.names if self._schema.field(name).type == pa.string()]
            self._file = pq.ParquetWriter(
                self._shards[-1], self._schema, use_dictionary=texts, write_page_checksum=True, write_statistics=False
            )
        self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._group_bytes = [], 0

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._written = None, 0


def write_repository(
    data: str | Path, folder: Path, license_id: str, address: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, SplitFacts]:
    """Write a data set in the repository form: `README.md` and `data/*.parquet`, aside, then renamed.

    Nothing is decoded or encoded anew: pictures and points keep their bytes, so samples are equal bit for bit. The same data set gives the
    same files, apart from what the versions of pyarrow and datasets change. Points are checked, pictures are not: `scripts/doctor.py` does.

    Args:
        data: The data set, in either form.
        folder: To be made.
        license_id: For the card, as the hub writes it.
        address: What the card calls the data set, for `data.root`.
        shard_bytes: Of pictures and points in a shard.

    Returns:
        What was written, by split.

    Raises:
        FileExistsError: `folder` exists.
        FileNotFoundError: The data set, or a file of it, is missing.
        ValueError: The data set or a points file is damaged, a split's name is none for the hub.
    """
    refuse_existing(folder)
    manifest = Manifest(data, None)
    for split in dict.fromkeys(manifest.column("split")):
        if not _SPLIT.fullmatch(split):
            raise ValueError(
                f'{manifest.path}: the hub takes splits of letters, digits, "_" and inner dots only, got "{split}". Rename it.'
            )
    columns, schema = features(), features().arrow_schema
    facts: dict[str, SplitFacts] = {}
    shards: dict[str, ShardWriter] = {}
    with new_folder(folder, "folder") as aside:
        (aside / "data").mkdir(parents=True)
        for split, row in tqdm(_rows(manifest), desc="writing", unit="sample", total=len(manifest)):
            if split not in shards:
                facts[split], shards[split] = SplitFacts(), ShardWriter(aside / "data", split, schema, shard_bytes)
            facts[split].add(row)
            shards[split].add(row)
        file_bytes = sum(writer.finish() for writer in shards.values())
        write_text(aside / "README.md", card(columns, facts, file_bytes, license_id, address, _matching(manifest), _described(manifest)))
    return facts


def license_of(data: str | Path) -> str:
    """The licence that a data set's description names, as that of a constructed one does.

    Raises:
        FileNotFoundError: The data set is missing.
        ValueError: It names none.
    """
    found = _described(Manifest(data, None)).get("license")
    if not isinstance(found, str):
        raise ValueError(f"--license must be given, for {data} names none: as the hub writes it, e.g. cc-by-4.0, or other.")
    return found


def card(
    columns: "Features",
    facts: Mapping[str, SplitFacts],
    file_bytes: int,
    license_id: str,
    address: str,
    matching: Mapping[str, Any] | None,
    made: Mapping[str, Any],
) -> str:
    """The `README.md` of a repository: what the hub and `datasets` read of it, and what a person does.

    Args:
        columns: Of the rows.
        facts: By split.
        file_bytes: Of all shards.
        license_id: As the hub writes it.
        address: For `data.root`.
        matching: The settings file beside the points (`matching.json`); None: there is none.
        made: The data set's description; where it was constructed, it says by which models.
    """
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs

    data = DatasetCardData(
        license=license_id, task_categories=["text-to-image"], tags=["mosaic-multi-reference", "subject-driven-generation"]
    )
    splits = SplitDict({name: SplitInfo(name, found.num_bytes, found.samples) for name, found in facts.items()})
    info = DatasetInfo(features=columns, splits=splits, download_size=file_bytes, dataset_size=sum(one.num_bytes for one in facts.values()))
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    files = [{"split": name, "path": f"data/{name}-*"} for name in facts]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(data)
    name = address.removeprefix(HUB).rstrip("/").rsplit("/", 1)[-1]
    parts = [f"---\n{data}\n---", f"# {name}", _INTRODUCTION, "## Samples", _counts(facts), "## Points", _points(facts, matching)]
    parts += ["## Training on it", _TRAINING.format(address=address), "## Columns", _COLUMNS]
    parts += ["## How it was made", models_table(made["construction"])] if isinstance(made.get("construction"), Mapping) else []
    parts += ["## Licence", f"`{license_id}`"]
    return "\n\n".join(parts) + "\n"


def models_table(construction: Mapping[str, Any]) -> str:
    """The models of each stage of a construction, with their revisions and what is known of their licences."""
    rows = ["By `preprocess/construct.py`.", "", "| stage | model | revision | licence |", "|---|---|---|---|"]
    for stage, made in construction.items():
        for model in _models(made):
            known = licence_of(model["model"])
            name, revision = (str(model.get(key) or "-").replace("|", "/") for key in ("model", "revision"))
            rows.append(f"| {stage} | `{name}` | {revision[:12]} | {known.licence if known else 'see its card'} |")
    return "\n".join(rows)


def _models(value: Any) -> Iterator[Mapping[str, Any]]:
    """The entries of models anywhere in JSON values of a construction."""
    if isinstance(value, Mapping):
        if isinstance(value.get("model"), str) and "revision" in value:
            yield value
        for name, inner in value.items():
            if name != "settings":  # where they are named once more
                yield from _models(inner)


def row_bytes(row: Mapping[str, Any]) -> int:
    """Bytes of the files that a row holds."""
    pictures = [row["target"], *(entry[name] for entry in row["references"] for name in ("image", "mask"))]
    return len(row["points"] or b"") + sum(len(picture["bytes"]) for picture in pictures if picture is not None)


def _rows(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield split and row of each sample, the files that it names read."""
    for index in range(len(manifest)):
        row, values = manifest.row(index), manifest.values(index)
        references = []
        for k, (entry, stored) in enumerate(zip(row.references, values["references"], strict=True)):
            place = f"{row.place}.references[{k}]"
            image = _picture(manifest, entry.image, f"{place}.image")
            mask = None if entry.mask is None else _picture(manifest, entry.mask, f"{place}.mask")
            references.append({**stored, "image": image, "mask": mask, "grid": stored.get("grid")})
        target = _picture(manifest, row.target, f"{row.place}.target")
        points = None if manifest.read_points(row) is None else manifest.folder.read(row.points, f"{row.place}.points")
        yield row.split, {**values, "target": target, "references": references, "points": points}


def _picture(manifest: Manifest, path: str, place: str) -> dict[str, Any]:
    """A picture file as the hub's libraries store it."""
    return {"bytes": manifest.folder.read(path, place), "path": PurePosixPath(path).name}


def _described(manifest: Manifest) -> dict[str, Any]:
    """The data set's description; empty where it has none, as in the repository form."""
    try:
        found = json.loads(manifest.folder.read(DESCRIPTION))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _matching(manifest: Manifest) -> dict[str, Any] | None:
    """The settings that made the points, where `preprocess/match.py` left them; paths of weights on this machine are left out."""
    try:
        found = json.loads(manifest.folder.read("matching.json"))
        return {"extractors": list(found["order"]), **found["matching"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _grid(sides: list[int]) -> str:
    return f"{sides[0]} x {sides[1]}"


def _counts(facts: Mapping[str, SplitFacts]) -> str:
    """Tables of samples and grids."""
    largest = max(k for found in facts.values() for k in found.num_references)
    lines = ["| split | samples | with points | " + " | ".join(f"K = {k}" for k in range(1, largest + 1)) + " |"]
    lines.append("|---|" + "---:|" * (largest + 2))
    for name, found in facts.items():
        counts = [found.samples, found.matched, *(found.num_references[k] for k in range(1, largest + 1))]
        lines.append(f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    lines += ["", "K is the number of references of a sample. Grids of the points, in cells (rows x columns):", ""]
    grids: Counter[str] = sum((found.grids for found in facts.values()), Counter())
    lines += [f"* {grid}: {count:,} samples" for grid, count in grids.most_common(10)]
    lines += [f"* and {len(grids) - 10} others"] * (len(grids) > 10)
    return "\n".join(lines)


def _points(facts: Mapping[str, SplitFacts], matching: Mapping[str, Any] | None) -> str:
    """How the points were found."""
    if not any(found.matched for found in facts.values()):
        return "There are none yet: `preprocess/match.py` finds them, on the folder form."
    if matching is None:
        return "There is no `matching.json` beside them: they came with the data."
    settings = "\n".join(f"* {name}: `{json.dumps(value)}`" for name, value in matching.items())
    return f"Found by `preprocess/match.py` with these settings:\n\n{settings}"


_INTRODUCTION = """Samples for training a text-to-image model on several reference pictures at once: a target, its prompt, its
references, and the correspondences between the cells of each reference and of the target. The format is version 1 of MOSAIC's
multi-reference format, with the files in the rows."""
_TRAINING = """```bash
bash train.sh configs/mosaic_512.json --set data.root={address}
```

A copy of the shards goes into the cache of the Hugging Face libraries (`HF_HOME`), once. In Python:

```python
import datasets
import safetensors.torch

row = datasets.load_dataset("{address}", split="train")[0]
points = safetensors.torch.load(row["points"])  # per reference "0", "1", ...: int32 [P, 2] of (u, v)
```"""
_COLUMNS = """* `target`, `references[k].image`, `references[k].mask`: pictures; a mask is 255 where the target shows the reference.
* `references[k].phrase`: the words of the prompt that mean the reference.
* `points`: a safetensors file, null where a sample is not matched. `u` is a cell of the reference, `v` of the target, counted as
  `row * columns + column` on `references[k].grid` (or else `reference_grid`) and on `target_grid`, all `[rows, columns]`.
* `target_size`: height and width in pixels. `scores`, `metadata`: JSON objects."""
