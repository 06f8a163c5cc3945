"""The start of a run: what is checked before the base model is loaded, which checkpoint is continued, and the adapter."""

import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from mosaic.config.loading import Config
from mosaic.config.sections import LoraConfig
from mosaic.data import (
    BucketBatchSampler,
    CachedSamples,
    ReadableSamples,
    TrainingDataset,
    check_placement,
    check_supervision,
    find_unreadable,
    open_dataset,
)
from mosaic.data.cache.opening import Caches, open_caches, unneeded_components
from mosaic.data.inspection import QUICK_SAMPLES, spread_evenly
from mosaic.files import in_one_line, require_folder, shown
from mosaic.locks import FolderLock
from mosaic.lora.adapter import attach_reference_lora, reference_lora_parameters
from mosaic.lora.files import LoraFile
from mosaic.lora.loading import check_reference_lora, read_reference_lora
from mosaic.lora.resize import resize_reference_lora
from mosaic.lora.zeros import ALL_ZERO, changes_nothing
from mosaic.model.acceleration import compile_blocks, set_attention_backend
from mosaic.model.recomputation import set_gradient_checkpointing
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.encoders import LiveEncoders
from mosaic.pipeline.pipeline import DTYPES, MosaicFluxPipeline
from mosaic.pipeline.prompt_lengths import TextWindow, cut_captions
from mosaic.training.checkpoints.checkpoint import clean_up, find_checkpoint
from mosaic.training.distributed.environment import uses_deepspeed
from mosaic.training.distributed.waiting import STEP_LIMIT, main_alone
from mosaic.training.encoding import run_grids
from mosaic.training.optimizers import check_optimizer
from mosaic.training.validation import Panel, read_panels
from mosaic.weights.digests import model_file, vae_scale_factor
from mosaic.weights.hub import loading, resolve_lora_file
from mosaic.weights.quantization import check_quantization, quantize_base

logger = logging.getLogger(__name__)


def check_settings(config: Config) -> None:
    """Check where the run writes, and that what it asks for is installed.

    Raises:
        ValueError: The folder cannot be written to, a package that the quantization or the optimizer needs is missing, or DeepSpeed cannot
            do what is asked.
    """
    check_output(Path(config.training.output_dir))
    check_quantization(config.model.quantization)
    check_optimizer(config.optimizer)
    if config.loss.max_pull is not None and uses_deepspeed():
        raise ValueError("loss.max_pull must be null with DeepSpeed, whose engine keeps the gradients: use another Accelerate config.")
    warn_of_best(config)


@dataclass(frozen=True)
class Opened:
    """What a run reads, opened once and before the base model is loaded, which may take minutes.

    Attributes:
        vae_scale_factor: Pixels per latent cell.
        samples: Those to train on.
        held_out: The samples of the validation; None without one.
        panels: What the validation renders; None: held-out samples, or no validation.
        caches: The latents and embeddings that the run reads instead of encoding.
        adapter: The file that training starts from; None: a fresh adapter, or that of a checkpoint.
    """

    vae_scale_factor: int
    samples: TrainingDataset
    held_out: TrainingDataset | None
    panels: list[Panel] | None
    caches: Caches
    adapter: LoraFile | None


def open_run(config: Config, continues: bool) -> Opened:
    """Open what a run reads.

    Args:
        config: The run's settings.
        continues: Whether a checkpoint gives the adapter; `lora.pretrained` is behind then, and need not be there any more.

    Raises:
        FileNotFoundError: The base model, the data set, a cases file, the adapter or a cache is not there.
        OSError: A hub id is gated, missing or unreachable, or a folder damaged.
        ValueError: The data set is damaged or lacks the split, a case is not one, a cache is stale, or a size does not fit the tokens.
    """
    data, validation, lora = config.data, config.validation, config.lora
    factor = vae_scale_factor(config.model.pretrained)  # of a small file: the model itself would be minutes of loading
    grids = run_grids(data, factor)
    samples = open_dataset(data, data.split, grids.target, grids.reference, with_masks=config.loss.region_weight > 0)
    held_out = panels = None
    if validation.every:
        held_out = samples if validation.split == data.split else samples.of_split(validation.split)
        panels = read_panels(config, factor)
    adapter = open_adapter(config) if lora.pretrained is not None and not continues else None
    if adapter is not None and changes_nothing(adapter.path):
        logger.warning("lora.pretrained: %s: %s. A module whose two matrices are both zero never learns.", adapter.path, ALL_ZERO)
    return Opened(factor, samples, held_out, panels, open_caches(config), adapter)


def open_adapter(config: Config) -> LoraFile:
    """Open the file that `lora.pretrained` names; its header is held against the base model's config, long before the base is loaded.

    Raises:
        FileNotFoundError, OSError: It is not there, gated or unreachable, or so is the config.
        ValueError: It is no safetensors file, does not fit the base, is no plain LoRA, or has another rank and `lora.resize` is false.
    """
    lora, name = config.lora, config.model.pretrained
    assert lora.pretrained is not None
    file = LoraFile(resolve_lora_file(lora.pretrained, lora.weight_name), "reference LoRA")
    config_file = model_file(name, "transformer/config.json")
    with loading(name), torch.device("meta"):  # its modules without their weights
        settings = MosaicFluxTransformer2DModel.load_config(config_file)
        base = MosaicFluxTransformer2DModel.from_config(settings)
    check_rank(check_reference_lora(file, base), lora, file.path)
    return file


def check_rank(rank: int, lora: LoraConfig, file: Path) -> None:
    """Check the rank of the file to start from.

    Raises:
        ValueError: It is another one than `lora.rank`, and `lora.resize` is false.
    """
    if rank != lora.rank and not lora.resize:
        raise ValueError(f"lora.rank is {lora.rank}, but {file} has rank {rank}. Set lora.rank={rank}, or lora.resize=true to change it.")


def check_output(folder: Path) -> None:
    """Check that a run can write into its folder, which may not be there yet.

    Raises:
        ValueError: It, the folder of its checkpoints, or a part of the path to them is a file or cannot be written to.
    """
    for place in (folder, folder / "checkpoints"):
        require_folder(place, "training.output_dir")


def warn_of_best(config: Config) -> None:
    """Warn where few checkpoints or none can be the best one, for only steps with both a checkpoint and a validation can."""
    training, validation = config.training, config.validation
    if training.best_metric is None or validation.every is None or training.keep_checkpoints is None:
        return
    both = math.lcm(training.checkpoint_every, validation.every)
    if both > max(training.checkpoint_every, validation.every):
        message = "training.best_metric: the best checkpoint is looked for every %d steps only, where training.checkpoint_every %d meets %s"
        logger.warning(message, both, training.checkpoint_every, f"validation.every {validation.every}")


def choose_checkpoint(resume: str | None, run_dir: Path, lock: FolderLock) -> Path | None:
    """The checkpoint that `--resume` names, found by the main process for all in the folder that it has locked; a new one is made.

    Raises:
        FileNotFoundError: `resume` is no checkpoint.
        ValueError: The checkpoints are damaged, the folder holds those of an earlier run, another run has it locked, or it cannot be
            written to.
    """

    def find() -> str | None:
        lock.acquire()  # before the look: another run may have begun, and even ended, since
        clean_up(run_dir / "checkpoints")
        path = find_checkpoint(resume, run_dir / "checkpoints")
        return str(path) if path is not None else None

    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=STEP_LIMIT)
    found = main_alone(find)
    return Path(found) if found is not None else None


def load_base(config: Config, opened: Opened, device: torch.device) -> MosaicFluxPipeline:
    """The frozen base, quantised where the config asks for it, without the models whose outputs are cached.

    Raises:
        FileNotFoundError, OSError: The base model is not there, gated, unreachable or damaged.
    """
    absent = dict.fromkeys(unneeded_components(config, opened.caches))
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=DTYPES[config.model.dtype], **absent)
    pipeline.encoders = LiveEncoders(pipeline, opened.vae_scale_factor, device=device)  # no VAE may be there to say it
    quantize_base(pipeline.transformer, config.model.quantization, device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def training_dataset(
    config: Config, opened: Opened, accelerator: Accelerator, continues: bool
) -> TrainingDataset | ReadableSamples | CachedSamples:
    """The samples to train on, with what the caches hold; without those that cannot be read where `data.skip_invalid` asks for that.

    Args:
        config: The run's settings.
        opened: What the run reads.
        accelerator: The processes.
        continues: Whether a checkpoint is continued, for which the samples that were left out stay so; else they are looked for anew.

    Raises:
        ValueError: A sample cannot be read, or the data cannot supervise.
    """
    data = config.data
    dataset: TrainingDataset | ReadableSamples | CachedSamples = opened.samples
    file = Path(config.training.output_dir) / "skipped.jsonl"
    if accelerator.is_main_process and not continues:
        file.unlink(missing_ok=True)  # of an earlier start in this folder, maybe with other data
    if data.skip_invalid:
        find = partial(find_unreadable, opened.samples, file, data.num_workers, accelerator.is_local_main_process)
        main_alone(lambda: len(find()))
        skipped = find()  # from the list that the main process has written
        if skipped:
            logger.warning("%d of %d samples cannot be read and are left out, see %s", len(skipped), len(dataset), file)
            dataset = ReadableSamples(opened.samples, skipped)
    if opened.caches != Caches(None, None):
        dataset = CachedSamples(dataset, *opened.caches)
    check_supervision(dataset, data.min_point_coverage)
    check_placement(dataset, data.max_points_outside)
    if accelerator.is_main_process:
        warn_of_cut_captions(config, opened)
        if config.loss.region_weight > 0:
            warn_of_missing_masks(dataset)
    return dataset


def warn_of_missing_masks(dataset: TrainingDataset | ReadableSamples | CachedSamples) -> None:
    """Warn where references have no mask, as far as 64 samples show it: their region loss is 0."""
    masks = [dataset[index].masks for index in spread_evenly(len(dataset), QUICK_SAMPLES)]
    seen = torch.cat([found.any(dim=1) for found in masks if found is not None])
    if not seen.all():
        message = "loss.region_weight: %d of %d references have no mask in which they are seen; of these the region loss is 0"
        logger.warning(message, int((~seen).sum()), len(seen))


def warn_of_cut_captions(config: Config, opened: Opened) -> None:
    """Warn where captions, or the prompts of `validation.cases`, are longer than the model reads: of some words it learns nothing."""
    try:
        window = TextWindow.of_model(config.model.pretrained, config.model.text_length)
    except (OSError, ValueError) as error:  # with a text cache the tokenizer need not be there
        logger.warning("whether captions are longer than model.text_length is not known: %s", in_one_line(error))
        return
    samples = opened.samples
    found = cut_captions(window, list(zip(samples.sample_ids(), samples.prompts(), strict=True)))
    if found.cut:
        logger.warning("%s", found)
    for prompt, lost in window.all_lost(panel.prompt for panel in opened.panels or ()):
        logger.warning("validation.cases: the prompt %s %s", shown(prompt), lost)


def training_sampler(
    config: Config, dataset: TrainingDataset | ReadableSamples | CachedSamples, process: int, processes: int
) -> BucketBatchSampler:
    """The order of the data: a function of the seed and of the number of samples per optimizer step over all processes.

    Args:
        config: The run's settings.
        dataset: The samples.
        process: Number of this process, from 0.
        processes: Number of processes.

    Raises:
        ValueError: A step takes more samples than there are.
    """
    training, accumulation = config.training, config.training.gradient_accumulation_steps
    sampler = BucketBatchSampler(dataset.batch_keys, training.batch_size, training.seed, process, processes, accumulation)
    if sampler.global_batch > len(dataset):
        raise ValueError(
            f"training.batch_size {training.batch_size} x training.gradient_accumulation_steps {accumulation} x {processes} processes "
            f"must be at most the number of samples, {len(dataset)}, got {sampler.global_batch}."
        )
    if sampler.num_repeated:
        message = (
            "%d samples are of a number of references or a size that fewer than %d samples have: they are repeated to fill a step, and the "
            "step's gradient is scaled down to their share of it, so that no sample counts more than another"
        )
        logger.warning(message, sampler.num_repeated, sampler.global_batch)
    return sampler


def choose_attention(transformer: MosaicFluxTransformer2DModel, config: Config, device: torch.device) -> None:
    """Apply `model.attention_backend`, after a trial.

    Args:
        transformer: The base.
        config: The run's settings.
        device: Of the training.

    Raises:
        ValueError: There is no such kernel, or it does not run here, forwards and backwards.
    """
    if config.model.attention_backend is not None:
        dtype = torch.bfloat16 if config.training.mixed_precision == "bf16" else transformer.dtype
        set_attention_backend(transformer, config.model.attention_backend, device, "model.attention_backend", dtype)


def attach_adapter(pipeline: MosaicFluxPipeline, config: Config, file: LoraFile | None) -> None:
    """A fresh adapter (the same on every rank), or the file that `lora.pretrained` names; trained in float32.

    Args:
        pipeline: Gets the adapter.
        config: The run's settings.
        file: Of `open_adapter`; None: a fresh adapter, whose weights a checkpoint may replace.

    Raises:
        ValueError: A value of the file is not finite.
    """
    settings, transformer = config.lora, pipeline.transformer
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, transformer):
        if module is not None:  # its outputs may be cached
            module.requires_grad_(False)
    start = None
    if file is None:
        torch.manual_seed(config.training.seed)
        attach_reference_lora(transformer, settings.rank)
    else:
        start, rank = read_reference_lora(file, transformer)
        if rank != settings.rank:
            start, share = resize_reference_lora(start, settings.rank, config.training.seed)
            logger.info("%s: rank %d resized to %d, %.2f %% of the squared norm kept", file.path, rank, settings.rank, 100 * share)
        attach_reference_lora(transformer, settings.rank)
    set_gradient_checkpointing(transformer, config.model.gradient_checkpointing)
    if config.model.compile:
        compile_blocks(transformer, fullgraph=True)
    for key, parameter in reference_lora_parameters(transformer).items():
        parameter.data = parameter.data.float() if start is None else start[key].float()
        parameter.requires_grad_(True)
