"""Filling a cache by several processes that may be killed: what is cached, and the sharing of the shards."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mosaic.data import TrainingDataset
from mosaic.data.cache import latents as latent_cache
from mosaic.data.cache import texts as text_cache
from mosaic.data.cache.tensors import DESCRIPTION, INDEX, NAMES, VERSION, is_finished, shard_path, write_index, write_shard
from mosaic.data.readable import Attempt, Unreadable
from mosaic.data.workers import loaded
from mosaic.files import first_difference, read_json, write_text
from mosaic.locks import LOCK_FILE
from mosaic.pipeline.encoders import Encoders
from mosaic.pipeline.pipeline import MosaicFluxPipeline


class Encoded(NamedTuple):
    """What one sample or prompt adds to a shard.

    Attributes:
        name: Its name, None if it cannot be read and is left out.
        entries: Its tensors by key and name.
    """

    name: str | None
    entries: Mapping[bytes, Mapping[str, Tensor]]


class Source(Protocol):
    """What a cache is filled with.

    Attributes:
        kind: Kind of the cache.
        unit: What is counted, for the progress bar.
    """

    kind: str
    unit: str

    @property
    def names(self) -> Sequence[str | None]:
        """Names of all samples or prompts in order; None where one has none."""
        ...

    def encode(self, numbers: Sequence[int]) -> Iterator[Encoded]:
        """Encode samples or prompts by their numbers, in this order."""
        ...


class PictureSource:
    """The pictures of a data set, through the VAE."""

    kind, unit = latent_cache.KIND, "sample"

    def __init__(self, dataset: TrainingDataset, pipeline: MosaicFluxPipeline, skip_invalid: bool, num_workers: int) -> None:
        """Name the samples.

        Args:
            dataset: The samples.
            pipeline: With its VAE.
            skip_invalid: Leave out samples that cannot be read, instead of stopping.
            num_workers: Processes that read.
        """
        self.dataset, self.pipeline, self.skip_invalid, self.num_workers = dataset, pipeline, skip_invalid, num_workers
        self.names = dataset.sample_ids()

    def encode(self, numbers: Sequence[int]) -> Iterator[Encoded]:
        """Encode sample by sample, while other processes read the next ones."""
        loader = DataLoader(Attempt(self.dataset, "__getitem__"), batch_size=None, sampler=numbers, num_workers=self.num_workers)
        for sample in loaded(loader):
            if not isinstance(sample, Unreadable):
                yield Encoded(sample.id, latent_cache.encode_sample(self.pipeline.vae, sample))
            elif self.skip_invalid:
                yield Encoded(None, {})
            else:
                raise ValueError(f"{sample.message} (data.skip_invalid=true leaves such samples out)")


class PromptSource:
    """The distinct prompts of a data set, through the text encoders."""

    kind, unit = text_cache.KIND, "prompt"

    def __init__(self, dataset: TrainingDataset, encoders: Encoders, text_length: int) -> None:
        """Find the distinct prompts.

        Args:
            dataset: The samples.
            encoders: Encode prompts.
            text_length: T5 tokens.
        """
        self.encoders, self.text_length = encoders, text_length
        self.names: list[str] = list(text_cache.distinct_prompts(dataset.prompts()))

    def encode(self, numbers: Sequence[int]) -> Iterator[Encoded]:
        """Encode each prompt by itself."""
        for prompt in (self.names[number] for number in numbers):
            prompt_embeds, pooled = self.encoders.encode_prompts([prompt], self.text_length)
            tensors = {"prompt_embeds": prompt_embeds[0].cpu().contiguous(), "pooled": pooled[0].cpu().contiguous()}
            yield Encoded(prompt, {text_cache.prompt_key(prompt): tensors})


def fill(root: Path, source: Source, encoding: Mapping[str, Any], made_of: Mapping[str, Any], shard_size: int, state: PartialState) -> str:
    """Write this process's shards, and the index once the last shard of all processes is there; returns a summary.

    A shard appears when it is complete. So a start after a kill encodes what the kill has cost, at most one shard per process.

    Args:
        root: Folder of the cache, which the caller has locked.
        source: What is cached.
        encoding: How, as JSON values; what readers of the cache check.
        made_of: The data set and the size of the shards; what only a further start must share.
        shard_size: Samples or prompts per shard.
        state: This process among the others.

    Raises:
        ValueError: The folder holds another cache, or a sample cannot be read.
    """
    units = [source.names[start : start + shard_size] for start in range(0, len(source.names), shard_size)]
    description = {"kind": source.kind, "version": VERSION, "made_of": dict(made_of), "encoding": dict(encoding)}
    with state.main_process_first():
        claim(root, description)
        todo = [number for number in range(len(units)) if not is_finished(shard_path(root, number), units[number])]
        if todo:
            for name in (INDEX, NAMES):  # they would not tell of the shards that come now
                (root / name).unlink(missing_ok=True)
    own = range(state.process_index, len(units), state.num_processes)
    mine = [number for number in own if number in set(todo)]
    numbers = [number * shard_size + offset for number in mine for offset in range(len(units[number]))]
    total = sum(len(units[number]) for number in own)
    left_out = 0
    label, hidden = f"caching {source.kind}", not state.is_main_process
    with tqdm(desc=label, total=total, initial=total - len(numbers), unit=source.unit, disable=hidden) as progress:
        encoded = source.encode(numbers)
        for number in mine:
            found = []
            for one in islice(encoded, len(units[number])):
                found.append(one)
                progress.update()
            assert len(found) == len(units[number]), "a source yields one result per number"
            names = [one.name for one in found if one.name is not None]
            entries = {key: tensors for one in found for key, tensors in one.entries.items()}
            write_shard(shard_path(root, number), units[number], names, entries)
            left_out += len(found) - len(names)
    is_complete = all(is_finished(shard_path(root, number), units[number]) for number in range(len(units)))
    if is_complete and not ((root / INDEX).is_file() and (root / NAMES).is_file()):
        write_index(root, len(units))  # the last process to get here; two at once write the same
    skipped = f", {left_out} could not be read" if left_out else ""
    return f"{len(numbers)} {source.unit}s encoded, {total - len(numbers)} were finished before{skipped} ({root})"


def claim(root: Path, description: dict[str, Any]) -> None:
    """Write the description of a new cache, or check that the one there is this one.

    Raises:
        ValueError: The folder holds another cache, or something else.
    """
    path = root / DESCRIPTION
    if path.is_file():
        difference = first_difference(read_json(path), description)
        if difference:
            raise ValueError(f"{root}: holds a cache that was made otherwise: {difference}. Name another folder, or remove this one.")
    else:
        if any(found.suffix != ".partial" and found.name != LOCK_FILE for found in root.iterdir()):
            raise ValueError(f"{root}: must be a new or empty folder, or a cache; it has no {DESCRIPTION}. Name another folder.")
        write_text(path, json.dumps(description, indent=2) + "\n")
    shard_path(root, 0).parent.mkdir(exist_ok=True)
