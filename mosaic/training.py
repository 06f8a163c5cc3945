"""Training of the reference LoRA: the objects of a run and the loop around `mosaic.objective.train_step`."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mosaic.attention import resolve_capture_blocks
from mosaic.caches import Caches, open_caches, unneeded_components
from mosaic.cases import load_cases
from mosaic.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from mosaic.config import Config, config_to_json, resolved_dict
from mosaic.data import (
    BucketBatchSampler,
    CachedSamples,
    MosaicBatch,
    ReadableSamples,
    TrainingDataset,
    check_dataset,
    check_supervision,
    collate,
    find_unreadable,
    open_dataset,
)
from mosaic.hub import resolve_lora_file
from mosaic.lora import attach_reference_lora, read_reference_lora, reference_lora_parameters, save_reference_lora
from mosaic.losses import MosaicLoss
from mosaic.objective import run_grids, step_generator, train_step
from mosaic.pipeline import MosaicFluxPipeline
from mosaic.validation import validate

logger = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def train(config: Config, resume: str | None = None) -> Path:
    """Train a reference LoRA as the config says.

    Args:
        config: The run's settings; `training.output_dir` gets the resolved config, logs, panels, checkpoints and the adapter.
        resume: A checkpoint folder, or "auto" for the newest one of the run, if there is one yet.

    Returns:
        The path of the adapter, `<output_dir>/lora.safetensors`.

    Raises:
        FileNotFoundError, OSError, ValueError: For data, weights or settings that do not fit, before any training.
    """
    checkpoint = find_checkpoint(resume, Path(config.training.output_dir) / "checkpoints")
    trainer = Trainer(config)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer.fit()


class Trainer:
    """The objects of a run: models, data, optimizer, and what a checkpoint holds."""

    def __init__(self, config: Config) -> None:
        """Build everything; raises the errors of config, data and weights before any training."""
        self.config = config
        training = config.training
        self.run_dir = Path(training.output_dir)
        self.metrics_file = self.run_dir / "metrics.jsonl"
        check_files(config)
        self.accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            log_with="tensorboard",
            project_dir=str(self.run_dir / "logs"),
        )
        self.caches = open_caches(config)
        absent = dict.fromkeys(unneeded_components(config, self.caches))
        self.pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=DTYPES[config.model.dtype], **absent)
        if "vae" in absent:  # from which the pipeline would have it
            self.pipeline.vae_scale_factor = self.caches.latents.encoding["vae"]["scale_factor"]
        self.pipeline.set_progress_bar_config(disable=True)
        blocks = self.pipeline.transformer.config
        resolve_capture_blocks(config.loss.capture_blocks, blocks.num_layers, blocks.num_single_layers)
        grids = run_grids(self.pipeline, config)
        self.dataset = self._supervised(open_dataset(config.data, config.data.split, grids.target, grids.reference))
        validation = config.validation
        self.held_out = open_dataset(config.data, validation.split, grids.target, grids.reference) if validation.every else None
        self._attach_adapter()
        self.pipeline.to(self.accelerator.device)
        self.parameters = reference_lora_parameters(self.pipeline.transformer)
        trainable = list(self.parameters.values())
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            trainable, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )
        self.ema = EMAModel(trainable, decay=optimizer.ema_decay) if optimizer.ema_decay is not None else None
        self.transformer = self.accelerator.prepare(self.pipeline.transformer)
        self.step = 0

    def _supervised(self, dataset: TrainingDataset) -> TrainingDataset | ReadableSamples | CachedSamples:
        """The data set, if it can supervise; without the samples that cannot be read where `data.skip_invalid` asks for that, and with
        what the caches hold, where there are any.
        """
        data = self.config.data
        if data.skip_invalid:
            file = self.run_dir / "skipped.jsonl"
            with self.accelerator.main_process_first():
                skipped = find_unreadable(dataset, file, data.num_workers, self.accelerator.is_local_main_process)
            if skipped:
                logger.warning("%d of %d samples cannot be read and are left out, see %s", len(skipped), len(dataset), file)
                dataset = ReadableSamples(dataset, skipped)
        if self.caches != Caches(None, None):
            dataset = CachedSamples(dataset, *self.caches)
        check_supervision(dataset, data.min_point_coverage)
        return dataset

    def _attach_adapter(self) -> None:
        """A fresh adapter (the same on every rank), or the file that `lora.pretrained` names; trained in float32."""
        settings, transformer = self.config.lora, self.pipeline.transformer
        for module in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2, transformer):
            if module is not None:  # its outputs may be cached
                module.requires_grad_(False)
        start = None
        if settings.pretrained is None:
            torch.manual_seed(self.config.training.seed)
            attach_reference_lora(transformer, settings.rank)
        else:
            path = resolve_lora_file(settings.pretrained, settings.weight_name)
            start, rank = read_reference_lora(path, transformer)
            if rank != settings.rank:
                raise ValueError(f"lora.rank is {settings.rank}, but {path} has rank {rank}. Set lora.rank={rank}.")
            attach_reference_lora(transformer, rank)
        if self.config.model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        for key, parameter in reference_lora_parameters(transformer).items():
            parameter.data = parameter.data.float() if start is None else start[key].float()
            parameter.requires_grad_(True)

    # ---- checkpoints

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint folder."""
        self.step, ema = load_checkpoint(path, self.pipeline.transformer, self.parameters, self.optimizer)
        if self.ema is not None:  # a checkpoint without an average starts one from its weights
            self.ema.shadow_params = [(ema[key] if ema else p.detach()).to(p, copy=True) for key, p in self.parameters.items()]
            self.ema.optimization_step = self.step if ema else 0
        logger.info("resumed from %s at step %d", path, self.step)

    def save(self) -> None:
        """Write a checkpoint, on the main process."""
        if self.accelerator.is_main_process:
            ema = dict(zip(self.parameters, self.ema.shadow_params, strict=True)) if self.ema else None
            averaged = {key: value.detach().cpu().contiguous() for key, value in ema.items()} if ema else None
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.step,
                self.parameters,
                self.optimizer,
                averaged,
                resolved_dict(self.config),
                self.config.training.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    # ---- the loop

    def optimizer_step(self, batches: list[MosaicBatch]) -> MosaicLoss:
        """Accumulate the gradients of the micro-batches and update the adapter once; returns the mean terms."""
        settings, accelerator = self.config.optimizer, self.accelerator
        warmup = min((self.step + 1) / settings.warmup_steps, 1.0) if settings.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warmup
        terms = []
        for micro_step, batch in enumerate(batches):
            generator = step_generator(self.config.training.seed, self.step, micro_step, accelerator.process_index)
            is_last = micro_step == len(batches) - 1  # gradients of the processes are joined once, at the last micro-batch
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.transformer):
                loss = train_step(self.pipeline, self.transformer, batch, self.config, self.step, generator)
                accelerator.backward(loss.total / len(batches))
            terms.append(torch.stack([term.detach().float() for term in loss]))
        if settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(list(self.parameters.values()))
        self.step += 1
        return MosaicLoss(*accelerator.reduce(torch.stack(terms).mean(dim=0), reduction="mean").cpu().unbind())

    def fit(self) -> Path:
        """Train to the end; returns the path of the final adapter file."""
        training, validation = self.config.training, self.config.validation
        sampler = BucketBatchSampler(
            self.dataset.batch_keys,
            training.batch_size,
            seed=training.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        steps_per_epoch = len(sampler) // training.gradient_accumulation_steps
        if steps_per_epoch == 0:
            raise ValueError(
                f"training.gradient_accumulation_steps is {training.gradient_accumulation_steps}, "
                f"but an epoch has {len(sampler)} batches only."
            )
        limits = (training.max_steps, training.max_epochs and training.max_epochs * steps_per_epoch)
        total = min(limit for limit in limits if limit is not None)
        self._start_logs()
        if validation.every and self.step == 0:
            self.validate()  # what the run starts from
        progress = tqdm(total=total, initial=self.step, desc="training", unit="step", disable=not self.accelerator.is_local_main_process)
        with progress:  # closed in any case, so that an error message starts on a line of its own
            for batches in islice(self._batches(sampler, steps_per_epoch), max(total - self.step, 0)):
                loss = self.optimizer_step(batches)
                progress.update()
                if self.step % training.log_every == 0 or self.step == total:
                    shown = zip(("flow", "scal", "mdl"), loss[1:], strict=True)
                    progress.set_postfix({name: f"{value:.3f}" for name, value in shown})
                    self._log({f"loss/{name}": value.item() for name, value in loss._asdict().items()})
                if self.step % training.checkpoint_every == 0 or self.step == total:
                    self.save()
                if validation.every and (self.step % validation.every == 0 or self.step == total):
                    self.validate()
        return self._finish()

    def _batches(self, sampler: BucketBatchSampler, steps_per_epoch: int) -> Iterator[list[MosaicBatch]]:
        """The micro-batches of each optimizer step, from the current step on: the order is a function of (seed, epoch) only."""
        accumulation, workers = self.config.training.gradient_accumulation_steps, self.config.data.num_workers
        epoch, done = divmod(self.step, steps_per_epoch)
        while True:
            sampler.set_epoch(epoch, done * accumulation)
            loader = iter(DataLoader(self.dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers))
            for _ in range(done, steps_per_epoch):
                yield list(islice(loader, accumulation))
            epoch, done = epoch + 1, 0

    def validate(self) -> None:
        """Panels of held-out cases and attention accuracy, with the averaged adapter if there is one; on the main process."""
        if self.accelerator.is_main_process:
            with averaged(self.ema, list(self.parameters.values())):
                accuracy = validate(self.pipeline, self.held_out, self.config, self.run_dir / "validation" / f"step_{self.step:08d}")
            self._log({f"attention/{name}": value for name, value in accuracy._asdict().items()})
        self.accelerator.wait_for_everyone()

    def _start_logs(self) -> None:
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_text(self.run_dir / "config.json", config_to_json(self.config))
            if self.metrics_file.is_file():  # entries beyond the checkpoint will be written again; a new run keeps none
                lines = self.metrics_file.read_text().splitlines(keepends=True) if self.step else []
                complete = [line for line in lines if line.endswith("}\n")]  # a killed run may leave half a line
                write_text(self.metrics_file, "".join(line for line in complete if json.loads(line)["step"] <= self.step))
        self.accelerator.init_trackers("mosaic")

    def _log(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            with open(self.metrics_file, "a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")

    def _finish(self) -> Path:
        path = self.run_dir / "lora.safetensors"
        if self.accelerator.is_main_process:
            with averaged(self.ema, list(self.parameters.values())):
                save_reference_lora(self.pipeline.transformer, path, resolved_dict(self.config))
        self.accelerator.end_training()
        return path


def check_files(config: Config) -> None:
    """Check what can be checked before the base model is loaded, which may take minutes.

    Raises:
        FileNotFoundError, OSError, ValueError: Those of `check_dataset`, `load_cases` and `resolve_lora_file`; or the output folder is a
        file.
    """
    if Path(config.training.output_dir).exists() and not Path(config.training.output_dir).is_dir():
        raise ValueError(f"training.output_dir: must be a folder, but {config.training.output_dir} is a file.")
    check_dataset(config.data, config.data.split)
    if config.validation.every:
        check_dataset(config.data, config.validation.split)
        if config.validation.cases is not None:
            load_cases(config.validation.cases, config.data.reference_size)
    if config.lora.pretrained is not None:
        resolve_lora_file(config.lora.pretrained, config.lora.weight_name)


def write_text(path: Path, text: str) -> None:
    """Write a text file aside, then rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def averaged(ema: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Context in which the adapter holds its moving average, if there is one; the trained weights come back after it."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
