"""The samples of a run before it starts, by the steps of the start itself: opened, held against caches and checkpoint, shared out."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mosaic.config.loading import Config, DataConfig
from mosaic.data import CachedSamples, ReadableSamples, TrainingDataset, check_placement, check_supervision, find_unreadable, open_dataset
from mosaic.data.cache.latents import LatentCache
from mosaic.data.cache.opening import Caches, latent_encoding, latent_settings, text_encoding, text_settings
from mosaic.data.cache.tensors import DESCRIPTION, TensorCache
from mosaic.data.cache.texts import TextCache
from mosaic.data.placement import Placement
from mosaic.data.semalign.dataset import INDEX_NAME
from mosaic.data.semalign.ids import has_all_ids
from mosaic.data.semalign.rows import SemAlignRows, find_parquet
from mosaic.files import read_json
from mosaic.method.grids import token_grid
from mosaic.pipeline.prompt_lengths import TextWindow, cut_captions
from mosaic.planning.findings import NOTE, STOP, Finding, Findings
from mosaic.planning.model_shape import ModelShape
from mosaic.training.checkpoints.run_state import describe_run, require_same_run
from mosaic.training.checkpoints.state_file import read_state
from mosaic.training.starting import training_sampler

Samples = TrainingDataset | ReadableSamples | CachedSamples
_SEMALIGN = {
    False: "{}: the released layout; the index of sample ids is made or completed when training starts.",
    True: "{}: the released layout.",
}


class DataFacts(NamedTuple):
    """What is known of the training data.

    Attributes:
        max_references: Largest K among the samples, or what the config allows where that is not known.
        num_samples: Samples of the split; None: not known.
        num_prompts: Different prompts; None: not known.
        steps_per_epoch: Optimizer steps; None: not known.
    """

    max_references: int
    num_samples: int | None = None
    num_prompts: int | None = None
    steps_per_epoch: int | None = None


def look_at_data(config: Config, shape: ModelShape, processes: int, checkpoint: Path | None) -> tuple[DataFacts, Findings]:
    """Open the samples and follow them to the batches; what fails ends the way there.

    Args:
        config: The run's settings.
        shape: The base model's shape, for the size of a token.
        processes: Number of processes.
        checkpoint: The one that would be continued.

    Raises:
        ValueError: A size does not fit the tokens.
    """
    findings, facts = Findings(), DataFacts(config.data.max_references)
    opened = _open(findings, config, shape)
    if opened is None:
        return facts, findings
    facts = DataFacts(int(opened.num_references.max()), len(opened), len(set(opened.prompts())))
    _look_at_captions(findings, config, shape, opened)
    samples = _supply(findings, config, shape, opened, checkpoint)
    if samples is None:
        return facts, findings
    return facts._replace(steps_per_epoch=_share_out(findings, config, samples, processes, checkpoint)), findings


def _open(findings: Findings, config: Config, shape: ModelShape) -> TrainingDataset | None:
    """The samples to train on; those of the validation are looked at, too."""
    data, rows = config.data, None
    if data.format == "semalign":
        found = findings.step("data.root", lambda: _check_semalign(data), lambda found: _SEMALIGN[found.has_ids].format(data.root))
        if found is None or not found.has_ids:  # damaged, or still to be indexed, which is no thing to do in a look
            return None
        rows = found.rows
    factor = shape.vae_scale_factor
    grids = (
        token_grid(*data.image_size, factor, where="data.image_size"),
        token_grid(data.reference_size, data.reference_size, factor, where="data.reference_size"),
    )

    def opened(split: str) -> TrainingDataset:
        return open_dataset(data, split, *grids, rows)

    dataset = findings.step("data.root", lambda: opened(data.split), partial(_describe, data.split))
    if config.validation.every is not None:
        split = config.validation.split  # where the samples to train on cannot be opened, these show whether all is damaged
        held_out = partial(opened, split) if dataset is None else partial(dataset.of_split, split)
        findings.step("validation.split", held_out, partial(_describe, split))
    return dataset


def _look_at_captions(findings: Findings, config: Config, shape: ModelShape, dataset: TrainingDataset) -> None:
    """Whether captions are longer than the model reads; where its tokenizer is not at hand, the start of training says it."""
    if not shape.is_local:
        return
    try:
        window = TextWindow.of_model(config.model.pretrained, config.model.text_length)
    except (OSError, ValueError):  # the look at the model tells
        return
    found = cut_captions(window, list(zip(dataset.sample_ids(), dataset.prompts(), strict=True)))
    if found.cut:
        findings.append(Finding(NOTE, "captions", str(found)))


def _supply(findings: Findings, config: Config, shape: ModelShape, dataset: TrainingDataset, checkpoint: Path | None) -> Samples | None:
    """The samples that can be read, with what the caches hold for them; None where that shows only when training starts, or never."""
    samples: Samples = dataset
    if config.data.skip_invalid:
        skipped = Path(config.training.output_dir) / "skipped.jsonl"
        if checkpoint is None or not skipped.is_file():  # one of an earlier start does not hold
            findings.append(Finding(NOTE, "data.skip_invalid", "samples that cannot be read are looked for when training starts."))
            return None
        readable = findings.step("data.skip_invalid", lambda: _readable(dataset, skipped), lambda found: f"{len(found):,} can be read.")
        if readable is None:
            return None
        samples = readable
    before = len(findings)
    caches = Caches(_open_latents(findings, config, shape, samples), _open_text(findings, config, shape, samples))
    if any(finding.level == STOP for finding in findings[before:]):
        return None
    return samples if caches == Caches(None, None) else CachedSamples(samples, *caches)


def _share_out(findings: Findings, config: Config, samples: Samples, processes: int, checkpoint: Path | None) -> int | None:
    """Look at points, batches and the checkpoint; returns the optimizer steps of an epoch."""
    minimum = config.data.min_point_coverage
    findings.step("points", lambda: check_supervision(samples, minimum), lambda found: f"in {found.share:.0%} of the references looked at.")
    findings.step("placement", lambda: check_placement(samples, config.data.max_points_outside), _describe_placement)
    sampler = findings.step(
        "batches", lambda: training_sampler(config, samples, 0, processes), lambda found: f"{found.steps_per_epoch:,} steps per epoch."
    )
    if sampler is None:
        return None
    if checkpoint is not None:
        run = describe_run(config, sampler.global_batch, processes, samples)
        findings.step(
            "--resume",
            lambda: require_same_run(read_state(checkpoint), run, str(checkpoint)),
            lambda _: f"{checkpoint.name} is of this config.",
        )
    return sampler.steps_per_epoch


def _readable(dataset: TrainingDataset, file: Path) -> Samples:
    """The samples without those that the run has found to be unreadable."""
    skipped = find_unreadable(dataset, file, 0, show_progress=False)
    return ReadableSamples(dataset, skipped) if skipped else dataset


def _describe_placement(found: Placement) -> str:
    if not found.reference:
        return "not looked at: data.max_points_outside is 1, or there are no points."
    masks = f"{np.mean(found.target):.1%} of the points outside the masks" if found.target else "no masks over the targets"
    return f"{masks}, {np.mean(found.reference):.1%} of the points on the white of the references, in the samples looked at."


def _describe(split: str, dataset: TrainingDataset) -> str:
    return f'{len(dataset):,} samples in the split "{split}", up to {dataset.num_references.max()} references.'


class _SemAlignLayout(NamedTuple):
    """The released layout, as it was found.

    Attributes:
        has_ids: Whether there is an index of ids, and it is complete.
        rows: The rows of the Parquet files; None where there is no index.
    """

    has_ids: bool
    rows: SemAlignRows | None


def _check_semalign(data: DataConfig) -> _SemAlignLayout:
    """Check for the released layout.

    Raises:
        FileNotFoundError, ValueError: A file or folder is missing, or damaged.
    """
    for name, given in (("root", data.root), ("parquet", data.parquet), ("masks", data.masks), ("coordinates", data.coordinates)):
        if given is not None and not Path(given).exists():
            raise FileNotFoundError(f"data.{name}: no such file or folder: {given}.")
    if data.parquet is None and not (Path(data.root) / "data").is_dir():
        raise FileNotFoundError(f"data.root: {data.root} lacks the folder data with the Parquet files; or name them by data.parquet.")
    index = Path(data.id_index or Path(data.root) / INDEX_NAME)
    if not index.is_file():
        return _SemAlignLayout(False, None)
    rows = SemAlignRows(find_parquet(Path(data.root), data.parquet, exclude=[index]))
    return _SemAlignLayout(has_all_ids(index, rows), rows)


def _open_latents(findings: Findings, config: Config, shape: ModelShape, dataset: Samples) -> LatentCache | None:
    """The latent cache, if the config names one, held against the samples."""
    folder = config.data.latent_cache
    if folder is None:
        return None

    def open_it() -> LatentCache:
        cache = LatentCache(folder, latent_encoding(config) if shape.is_local else {**_stored_encoding(folder), **latent_settings(config)})
        cache.check_names(dataset.sample_ids(), "samples")
        return cache

    return findings.step("data.latent_cache", open_it, partial(_describe_cache, shape))


def _open_text(findings: Findings, config: Config, shape: ModelShape, dataset: Samples) -> TextCache | None:
    """The text cache, if the config names one, held against the prompts."""
    folder = config.data.text_cache
    if folder is None:
        return None

    def open_it() -> TextCache:
        cache = TextCache(folder, text_encoding(config) if shape.is_local else {**_stored_encoding(folder), **text_settings(config)})
        cache.check_names(dict.fromkeys(dataset.prompts()), "prompts")
        return cache

    return findings.step("data.text_cache", open_it, partial(_describe_cache, shape))


def _describe_cache(shape: ModelShape, cache: TensorCache) -> str:
    remark = "" if shape.is_local else "; whether they are of this model shows when training starts"
    return f"{cache.root}: {len(cache):,} entries, all that are needed{remark}."


def _stored_encoding(folder: str) -> dict[str, Any]:
    """What a cache says of itself, where the model is not at hand to compare; empty where it says nothing, which opening it then tells."""
    file = Path(folder) / DESCRIPTION
    description = read_json(file) if file.is_file() else None
    encoding = description.get("encoding") if isinstance(description, dict) else None
    return encoding if isinstance(encoding, dict) else {}
