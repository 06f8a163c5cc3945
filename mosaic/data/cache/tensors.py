"""A folder of tensors that are found by what they were made of: safetensors shards, a Parquet index of their keys, a description.

    cache.json             what the tensors are, and of what they were made
    shards/000000.safetensors, ...
    index.parquet          key -> shard, group, row; sorted by key
    names.parquet          name of each sample or prompt -> shard

Entries of one shard whose tensors have equal shapes form a group, whose tensors are stacked: "<group>.key" uint8 [n, 16] and
"<group>.<name>" [n, ...]. A shard says in its metadata which names it covers ("unit") and which of them it holds ("names"). The two Parquet
files are there only while they describe the shards.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mosaic.files import first_difference, read_json, replacing, save_tensors, shown

T = TypeVar("T")
KEY_BYTES = 16
DESCRIPTION, INDEX, NAMES = "cache.json", "index.parquet", "names.parquet"
VERSION = 1
COMMAND = "accelerate launch preprocess/cache.py CONFIG"
INDEX_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("shard", pa.int32()), ("group", pa.int16()), ("row", pa.int32())])
NAMES_SCHEMA = pa.schema([("name", pa.string()), ("shard", pa.int32())])
_COLUMNS = ("shard", "group", "row")
_POSITION = np.dtype(list(zip(_COLUMNS, (np.int32, np.int16, np.int32), strict=True)))


def content_key(*parts: bytes) -> bytes:
    """The key of some content: the first 16 bytes of its sha256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()[:KEY_BYTES]


# ---- writing


def shard_path(root: Path, number: int) -> Path:
    """Path of the shard with this number, from 0."""
    return root / "shards" / f"{number:06d}.safetensors"


def write_shard(path: Path, unit: Sequence[str | None], names: Sequence[str], entries: Mapping[bytes, Mapping[str, Tensor]]) -> None:
    """Write a shard aside, then rename it.

    Args:
        path: Its `shard_path`; the folder must exist.
        unit: Names of all samples or prompts that the shard covers.
        names: Samples or prompts of `unit` whose tensors the shard holds.
        entries: Tensors by key and name.
    """
    groups: dict[Any, list[bytes]] = {}
    for key, tensors in entries.items():
        groups.setdefault(tuple((name, tensor.shape) for name, tensor in tensors.items()), []).append(key)
    stored = {}
    for group, keys in enumerate(groups.values()):
        stored[f"{group}.key"] = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
        for name in entries[keys[0]]:
            stored[f"{group}.{name}"] = torch.stack([entries[key][name] for key in keys])
    with replacing(path) as aside:
        save_tensors(stored, aside, {"unit": json.dumps(list(unit)), "names": json.dumps(list(names))})


def is_finished(path: Path, unit: Sequence[str | None]) -> bool:
    """Whether a shard is there, whole, and covers these names."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("unit") == json.dumps(list(unit))
    except (OSError, SafetensorError):
        return False


def write_index(root: Path, num_shards: int) -> None:
    """Write both Parquet files over the first `num_shards` shards; of equal keys the first is kept."""
    keys, positions, names, owners = [], [], [], []
    for shard in range(num_shards):
        with safe_open(shard_path(root, shard), framework="pt") as file:
            for group in sorted(int(name.removesuffix(".key")) for name in file.keys() if name.endswith(".key")):  # noqa: SIM118
                found = file.get_tensor(f"{group}.key").numpy()
                keys.append(found.view(f"S{KEY_BYTES}")[:, 0])
                rows = np.zeros(len(found), _POSITION)
                rows["shard"], rows["group"], rows["row"] = shard, group, np.arange(len(found))
                positions.append(rows)
            held = json.loads(file.metadata()["names"])
        names.extend(held)
        owners.extend([shard] * len(held))
    joined, place = np.concatenate([np.zeros(0, f"S{KEY_BYTES}"), *keys]), np.concatenate([np.zeros(0, _POSITION), *positions])
    joined, first = np.unique(joined, return_index=True)
    place = place[first]
    raw = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(joined), [None, pa.py_buffer(joined.tobytes())])
    _replace_table(root / NAMES, pa.Table.from_arrays([pa.array(names, pa.string()), pa.array(owners, pa.int32())], schema=NAMES_SCHEMA))
    columns = [raw, *(pa.array(np.ascontiguousarray(place[name])) for name in _COLUMNS)]
    _replace_table(root / INDEX, pa.Table.from_arrays(columns, schema=INDEX_SCHEMA))


def _replace_table(path: Path, table: pa.Table) -> None:
    with replacing(path, shared=True) as aside:  # several processes may write the same index at once
        pq.write_table(table, aside)


# ---- reading


class TensorCache:
    """A finished cache: tensors by key. Picklable; a shard is opened for each read, so nothing is shared after a fork.

    Attributes:
        root: The folder.
        setting: Name of the setting that gives it, for messages.
        encoding: How its tensors were made.
    """

    def __init__(self, root: str | Path, setting: str, kind: str, encoding: Mapping[str, Any]) -> None:
        """Read the index, and check that the tensors are those that are wanted.

        Args:
            root: Folder of the cache.
            setting: Name of the setting that gives the folder.
            kind: "latents" or "text".
            encoding: How the tensors must have been made, as JSON values.

        Raises:
            FileNotFoundError: There is no cache, or it is not finished.
            ValueError: It is of another kind or made otherwise, its index is damaged, or a shard is missing or cut short.
        """
        self.root, self.setting, self.encoding = Path(root), setting, encoding
        if not (self.root / DESCRIPTION).is_file():
            raise FileNotFoundError(f"{setting}: there is no cache in {self.root}. Build it: {COMMAND} --set {setting}={self.root}")
        found = read_json(self.root / DESCRIPTION)
        if not isinstance(found, dict) or (found.get("kind"), found.get("version")) != (kind, VERSION):
            raise ValueError(f'{self.root / DESCRIPTION}: must describe a cache of kind "{kind}", version {VERSION}, got {shown(found)}.')
        difference = first_difference(found.get("encoding"), dict(encoding))
        if difference:
            raise ValueError(
                f"{setting}: the cache in {self.root} is stale: {difference}. Build another one: {COMMAND} --set {setting}=NEW_FOLDER; "
                "or train with the settings of the cache."
            )
        if not (self.root / INDEX).is_file() or not (self.root / NAMES).is_file():
            raise FileNotFoundError(f"{setting}: the cache in {self.root} is not finished. The same command goes on with it: {COMMAND}")
        table = self._read_table(INDEX, INDEX_SCHEMA)
        keys = table["key"].combine_chunks().buffers()[1] if len(table) else b""
        self._keys = np.frombuffer(keys, f"S{KEY_BYTES}", table.num_rows)
        self._positions = [table[name].to_numpy() for name in _COLUMNS]
        for shard in np.unique(self._positions[0]).tolist():
            self._open(shard_path(self.root, shard), lambda file: None)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, key: bytes) -> dict[str, Tensor] | None:
        """Return copies of the tensors of a key by name, None if the cache has no such key.

        Raises:
            ValueError: Its shard is missing or damaged.
        """
        wanted = np.frombuffer(key, f"S{KEY_BYTES}")[0]
        at = int(np.searchsorted(self._keys, wanted))
        if at == len(self._keys) or self._keys[at] != wanted:
            return None
        shard, group, row = (int(column[at]) for column in self._positions)

        def entry(file: safe_open) -> dict[str, Tensor]:
            names = [name for name in file.keys() if name.startswith(f"{group}.") and not name.endswith(".key")]  # noqa: SIM118
            return {name.split(".", 1)[1]: file.get_slice(name)[row].clone() for name in names}

        return self._open(shard_path(self.root, shard), entry)

    def _open(self, path: Path, action: Callable[[safe_open], T]) -> T:
        try:
            with safe_open(path, framework="pt") as file:
                return action(file)
        except (OSError, SafetensorError, IndexError) as error:
            raise ValueError(f"{path}: cannot be read ({error}). Remove the file and build it again: {COMMAND}") from error

    def check_names(self, names: Iterable[str | None], what: str) -> None:
        """Refuse a cache that does not hold all samples or prompts.

        Args:
            names: The names.
            what: What they name, in the plural.

        Raises:
            ValueError: Some are missing.
        """
        wanted = pa.array(names, pa.string()).drop_null()
        missing = wanted.filter(pc.invert(pc.is_in(wanted, value_set=self._read_table(NAMES, NAMES_SCHEMA)["name"])))
        if len(missing):
            raise ValueError(
                f"{self.setting}: the cache in {self.root} lacks {len(missing)} of {len(wanted)} {what}, such as "
                f"{shown(missing[0].as_py())}. The same command adds them: {COMMAND}"
            )

    def shard_of(self, name: str) -> Path | None:
        """Return the shard that holds a sample or prompt."""
        table = self._read_table(NAMES, NAMES_SCHEMA)
        found = pc.index(table["name"], name).as_py()
        return None if found < 0 else shard_path(self.root, table["shard"][found].as_py())

    def _read_table(self, name: str, schema: pa.Schema) -> pa.Table:
        path = self.root / name
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error}). Remove it; the same command writes it again: {COMMAND}") from error
        if not table.schema.equals(schema):
            raise ValueError(f"{path}: is no index of this version. Remove it; the same command writes it again: {COMMAND}")
        return table
