"""The repository form of the multi-reference format (preprocess/FORMAT.md): rows that hold their pictures, opened by `datasets`.

It has the manifest's columns; where the manifest names a file, the row holds it. So `Repository` is a table of such rows, in which a file's
name is where it stands ("target/7"), and the folder in which the files of these names are read: everything above reads both forms alike.

Training draws samples at random, in an order that depends on the seed and the step alone, and groups them by their number of references
and size. A stream of shards has neither: its order comes out of the shards and a shuffling buffer, and what it groups is what the buffer
holds. Hence a repository is never streamed; `datasets` fetches its shards once into the cache of the Hugging Face libraries (finished ones
are not fetched again after an interruption, and of several processes one fetches), and rows are read from there by memory maps.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import split_protocol, url_to_fs

from mosaic.data.multi_reference.columns import BATCH_ROWS, OPTIONAL, REQUIRED
from mosaic.data.multi_reference.storage import DESCRIPTION, MANIFEST
from mosaic.data.schemas import require_distinct
from mosaic.images import MAX_FILE

if TYPE_CHECKING:  # importing it takes a second and more; a data set in a folder does without
    from datasets import Dataset

logger = logging.getLogger(__name__)
HUB = "hf://datasets/"
POCKET_DATA = "data/pocket"  # as configs/pocket.json names it
HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
COLUMNS = tuple(name for name in (*REQUIRED, *OPTIONAL) if name != "split")
_LIGHT_FIELDS = ("phrase", "grid", "scores", "kind")


class HubId(NamedTuple):
    """A data set on the Hugging Face hub.

    Attributes:
        id: "user/name".
        revision: Commit, tag or branch; None: the newest.
    """

    id: str
    revision: str | None


def hub_id(address: str) -> HubId | None:
    """Read "user/name", "user/name@revision", or the same after "hf://datasets/"; None where the address is another one."""
    found = HUB_ID.fullmatch(address.removeprefix(HUB).rstrip("/"))
    return None if found is None else HubId(found["id"], found["revision"])


def looks_local(address: str) -> bool:
    """Whether an address like "user/name" rather means a folder that is not there yet, since a folder of its first part is."""
    return not address.startswith(HUB) and Path(address.split("/")[0]).is_dir()


def find_repository(root: str | Path) -> "Repository | None":
    """Open what `root` names, if that is in the repository form: a local folder of Parquet files, or a data set on the hub.

    Raises:
        FileNotFoundError: There is no such data set, or a slip in a folder's name would ask the hub.
        ValueError: The hub cannot be reached, a shard is damaged, or the columns are not those of the format.
    """
    protocol, path = split_protocol(str(root))
    if protocol in (None, "file", "local") and Path(path).is_dir():
        is_repository = not any((Path(path) / name).exists() for name in (DESCRIPTION, MANIFEST)) and parquet_columns(Path(path))
        return Repository(path, None) if is_repository else None
    hub = hub_id(str(root)) if protocol in (None, "hf") and not Path(path).exists() else None
    if hub is None or (protocol == "hf" and _has_description(str(root))):
        return None
    if str(root) == POCKET_DATA:
        raise FileNotFoundError(absent(root))
    if looks_local(str(root)):
        raise FileNotFoundError(f"{absent(root)} One on the Hugging Face hub is written {HUB}{root} here.")
    return Repository(str(root), hub)


def absent(root: str | Path) -> str:
    """What to say of a data set that is not there, and the command that makes it."""
    if str(root) == POCKET_DATA:
        cure = f"This one is drawn by: python scripts/make_pocket_world.py --output {root} --num-samples 20000 --num-heldout 400"
    else:
        cure = "preprocess/convert.py makes one of your pictures (docs/data.md)"
    return f"{root}: there is no such folder; data.root must be a data set in the multi-reference format. {cure}."


def parquet_columns(folder: Path) -> list[str]:
    """Return the columns of the first Parquet file of a local folder or of its folder `data`; none where there is no readable one."""
    for path in sorted((*folder.glob("*.parquet"), *folder.glob("data/*.parquet"))):
        try:
            return pq.read_schema(path).names
        except (pa.ArrowException, OSError):
            return []
    return []


class Repository:
    """A `Table` (`mosaic.data.multi_reference.columns`) over all splits, and the files that its rows hold. Picklable; safe after a fork.

    Attributes:
        root: What the user gave, for messages: a folder or an id of the hub.
        path: The same text, under the name that every `Table` has.
    """

    is_local = False

    def __init__(self, root: str, hub: HubId | None) -> None:
        """Open the repository; what the cache lacks is fetched, which may take long.

        Args:
            root: A local folder, or what names the data set on the hub.
            hub: The data set on the hub; None: `root` is a folder.

        Raises:
            FileNotFoundError: There is no such data set, or none that this user may read.
            ValueError: The hub cannot be reached and the cache does not hold the data set, a shard is damaged, or the columns are not
                those of the format; the latter shows before the shards are fetched.
        """
        self.root = self.path = root
        self._splits: dict[str, Dataset] = {}
        for name, split in _opened(root, hub).items():
            self._splits[name] = split.with_format("arrow", columns=check_file_columns(split.data.schema, root))
        self._ends = np.cumsum([len(split) for split in self._splits.values()])

    @property
    def schema(self) -> pa.Schema:
        """The columns of a manifest with the same rows."""
        name, split = next(iter(self._splits.items()))
        return self._as_manifest(pa.RecordBatch.from_pylist([], split.data.schema), name, 0).schema

    def place(self, number: int) -> str:
        """Return repository, split and row, for messages."""
        name, first, _ = self._find(number)
        return f"{self.root}[{name}][{number - first}]"

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, as a manifest holds them, a few thousand at a time.

        Raises:
            ValueError: A picture is missing.
        """
        start = 0
        for name, split in self._splits.items():
            for table in split.iter(BATCH_ROWS):
                for batch in table.to_batches():
                    rows = self._as_manifest(batch, name, start).select(list(columns))
                    rows.validate(full=True)
                    yield rows
                    start += len(rows)

    def values(self, number: int) -> dict[str, Any]:
        """Return a row, as a manifest holds it, as value by column."""
        name, first, split = self._find(number)
        return self._as_manifest(split[number - first].to_batches()[0], name, number).to_pylist()[0]

    def read(self, relative: str, place: str | None = None, max_bytes: int = MAX_FILE) -> bytes:
        """Return the content of a file that a row holds.

        Args:
            relative: Its name in the rows of this table.
            place: Where the name stands, for messages.
            max_bytes: A file with more is refused.

        Raises:
            FileNotFoundError: The row holds none.
            ValueError: It is too large.
        """
        column, number, *inner = relative.split("/")
        _, first, split = self._find(int(number))
        cell: Any = split[int(number) - first][column][0]
        if inner:
            cell = cell.values[int(inner[0])][inner[1]]
        content: Any = cell if column == "points" else cell["bytes"] if cell.is_valid else cell
        if not content.is_valid:
            raise FileNotFoundError(f"{place or self.path}: {relative} is not held by its row.")
        size = content.as_buffer().size
        if size > max_bytes:
            raise ValueError(f"{place or self.path}: {relative} must have at most {max_bytes} bytes, got {size}.")
        return content.as_py()

    def names(self, relative: str) -> set[str]:
        """Return the names of the files in a folder of the names; only that of the points is known."""
        if relative != "points":
            return set()
        is_there = [table["points"].is_valid() for split in self._splits.values() for table in split.iter(BATCH_ROWS)]
        found = np.concatenate([np.zeros(0, bool), *(column.to_numpy() for column in is_there)])
        return set(np.flatnonzero(found).astype(str).tolist())

    def local_path(self, relative: str, place: str) -> Path:
        """Refuse: a file of a row has no path.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{place}: must be a file in a local folder, but {self.root} holds its files in its rows.")

    def _find(self, number: int) -> tuple[str, int, "Dataset"]:
        """Return name, first row and rows of the split that holds a row."""
        position = int(np.searchsorted(self._ends, number, side="right"))
        name = list(self._splits)[position]
        return name, int(self._ends[position - 1]) if position else 0, self._splits[name]

    def _as_manifest(self, batch: pa.RecordBatch, split: str, start: int) -> pa.RecordBatch:
        """Return rows as a manifest holds them; only lengths and offsets of the files are touched."""
        numbers = pa.array(np.arange(start, start + len(batch)).astype(str), pa.string())
        columns = {name: batch[name] for name in COLUMNS if name in batch.schema.names}
        self._refuse_missing(_is_missing(batch["target"]), np.arange(len(batch)), start, lambda _: "target")
        columns["target"] = pc.binary_join_element_wise("target", numbers, "/")
        columns["points"] = pc.binary_join_element_wise("points", numbers, "/")
        columns["references"] = self._references(batch["references"], start)
        columns["split"] = pa.array([split] * len(batch), pa.string())
        return pa.RecordBatch.from_pydict(columns)

    def _references(self, column: pa.Array, start: int) -> pa.Array:
        """Return the column `references` as a manifest holds it."""
        items, parents = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        k = np.arange(len(items)) - offsets[parents]
        image = pc.struct_field(items, "image")
        self._refuse_missing(_is_missing(image), parents, start, lambda item: f"references[{k[item]}].image")
        places = zip((start + parents).tolist(), k.tolist(), strict=True)
        stems = pa.array([f"references/{row}/{number}" for row, number in places], pa.string())
        fields = {"image": pc.binary_join_element_wise(stems, "image", "/")}
        if "mask" in items.type.names:
            has_mask = pa.array(~_is_missing(pc.struct_field(items, "mask")))
            fields["mask"] = pc.if_else(has_mask, pc.binary_join_element_wise(stems, "mask", "/"), pa.scalar(None, pa.string()))
        fields |= {name: pc.struct_field(items, name) for name in _LIGHT_FIELDS if name in items.type.names}
        structs = pa.StructArray.from_arrays(list(fields.values()), list(fields))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs, mask=column.is_null() if column.null_count else None)

    def _refuse_missing(self, missing: np.ndarray, rows: np.ndarray, start: int, field: Callable[[int], str]) -> None:
        """Raise ValueError for the first picture that is not there."""
        if missing.any():
            first = int(missing.argmax())
            raise ValueError(
                f"{self.place(start + int(rows[first]))}.{field(first)}: must hold the encoded picture itself, got none; pictures that are "
                "named by a path or an address are not read."
            )


def check_file_columns(schema: pa.Schema, place: str) -> list[str]:
    """Return the columns to read of a repository's rows. The types of those that hold no files are checked later, as a manifest's are.

    Args:
        schema: Of the rows.
        place: The repository, for messages.

    Raises:
        ValueError: A column is missing or there twice, or should hold files and does not.
    """
    missing = [name for name in REQUIRED if name != "split" and name not in schema.names]
    if missing:
        raise ValueError(f"{place}: the column {missing[0]} is missing. Found: {', '.join(schema.names)}.")
    require_distinct(schema, COLUMNS, place)
    references = schema.field("references").type
    is_list = pa.types.is_list(references) or pa.types.is_large_list(references)
    item = references.value_type if is_list and pa.types.is_struct(references.value_type) else None
    fields = {} if item is None else {field.name: field.type for field in item}
    kinds = {"target": schema.field("target").type, "references[].image": fields.get("image")}
    kinds |= {"references[].mask": fields["mask"]} if "mask" in fields else {}
    for name, kind in kinds.items():
        if kind is None or not pa.types.is_struct(kind) or "bytes" not in kind.names or not _is_binary(kind.field("bytes").type):
            raise ValueError(f"{place}: the column {name} must hold pictures, as structs with a field bytes (Image), got {kind}.")
    points = schema.field("points").type
    if not (_is_binary(points) or pa.types.is_null(points)):
        raise ValueError(f"{place}: the column points must hold the content of safetensors files (binary), got {points}.")
    return [name for name in COLUMNS if name in schema.names]


def _has_description(root: str) -> bool:
    """Whether a data set on the hub is in the folder form, which is read file by file; false where the hub cannot be asked."""
    try:
        filesystem, path = url_to_fs(root)
        return bool(filesystem.exists(f"{path}/{DESCRIPTION}"))
    except (OSError, ValueError):
        return False


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_missing(pictures: pa.Array) -> np.ndarray:
    """bool [N]: which pictures have no bytes."""
    return pc.is_null(pc.struct_field(pictures, "bytes")).to_numpy(zero_copy_only=False)


def _opened(root: str, hub: HubId | None) -> dict[str, "Dataset"]:
    """Have `datasets` open all splits, and fetch what its cache lacks, once the columns of the first shard have been looked at."""
    import datasets

    path, revision = (str(Path(root).absolute()), None) if hub is None else (HUB + hub.id, hub.revision)
    with _errors_named(root):
        builder = datasets.load_dataset_builder(path, revision=revision)
        is_cached = Path(builder.cache_dir).is_dir()
        features = None if is_cached else next(iter(builder.as_streaming_dataset().values())).features
    if features is not None:  # of a kind of file that does not say, the rows will
        check_file_columns(features.arrow_schema, root)
    if not is_cached:
        logger.info("%s: is put into the cache, once: %s", root, builder.cache_dir)
    with _errors_named(root):
        builder.download_and_prepare()
        return dict(builder.as_dataset())


@contextmanager
def _errors_named(root: str) -> Iterator[None]:
    """What `datasets` raises becomes a FileNotFoundError or ValueError that names the repository and the cure."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root}: {_reason(error)} Log in with `hf auth login` if the data set is private or gated.") from error
    except ConnectionError as error:
        raise ValueError(
            f"{root}: the Hugging Face hub cannot be reached, and the cache does not hold this data set ({_reason(error)}) Connect once to "
            "have it fetched (without HF_HUB_OFFLINE), or name a folder that holds it."
        ) from error
    except Exception as error:  # of damaged or foreign files all kinds of errors come, and each means the same here
        raise ValueError(f"{root}: cannot be read as a data set of the Hugging Face hub ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """An error and what caused it, in one line."""
    causes = [error] + ([error.__cause__] if error.__cause__ is not None else [])
    return " ".join(" ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(".") + "." for cause in causes)
