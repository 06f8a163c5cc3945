"""Training of the reference LoRA: the objects of a run and the loop around `mosaic.training.objective.train_step`."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from mosaic.config.loading import Config, config_to_json, resolved_dict
from mosaic.data import MosaicBatch
from mosaic.data.batches import batches_from
from mosaic.files import in_one_line, write_text
from mosaic.locks import FolderLock
from mosaic.lora.adapter import reference_lora_parameters, save_reference_lora
from mosaic.method.losses import SHORT_NAMES, MosaicLoss
from mosaic.model.attention_rows import resolve_capture_blocks
from mosaic.training.averaging import averaged
from mosaic.training.checkpoints.checkpoint import CheckpointError, folder_of, load_snapshot, set_aside
from mosaic.training.checkpoints.run_state import describe_run, require_same_run
from mosaic.training.checkpoints.snapshot import restore_snapshot, take_snapshot
from mosaic.training.checkpoints.writer import CheckpointWriter
from mosaic.training.distributed.comparison import ProcessesDiffer, check_adapter, check_base
from mosaic.training.distributed.environment import check_distribution, uses_deepspeed
from mosaic.training.distributed.sharding import is_sharded, place_models
from mosaic.training.distributed.waiting import ProcessFailed, failing_together, in_step, main_alone, on_any_process, read_together
from mosaic.training.distributed.zero import ZeroUpdates
from mosaic.training.objective import (
    call_settings,
    draw_inputs,
    logged_terms,
    loss_weights,
    sample_generators,
    scheduled_weights,
    train_step,
)
from mosaic.training.optimizers import build_optimizer
from mosaic.training.pull import PullLimit
from mosaic.training.signals import StopSignals, TrainingStopped, ignore_in_worker
from mosaic.training.starting import (
    attach_adapter,
    check_settings,
    choose_attention,
    choose_checkpoint,
    load_base,
    open_run,
    training_dataset,
    training_sampler,
)
from mosaic.training.updates import Updates
from mosaic.training.validation import ValidationStopped, validate
from mosaic.training.watch.non_finite import NonFiniteLoss, NonFiniteSteps
from mosaic.training.watch.run_log import RunLog
from mosaic.training.watch.throughput import ThroughputMeter, batch_work
from mosaic.training.watch.tracking import Trackers

logger = logging.getLogger(__name__)


def train(config: Config, resume: str | None = None) -> Path:
    """Train a reference LoRA as the config says.

    Args:
        config: The run's settings; `training.output_dir` gets the resolved config, logs, panels, checkpoints and the adapter.
        resume: A checkpoint folder, or "auto" for the newest sound one of the run, if there is one yet.

    Returns:
        The path of the adapter, `<output_dir>/lora.safetensors`.

    Raises:
        FileNotFoundError, OSError, ValueError: For data, weights, settings or a checkpoint that do not fit, before any training; for a
            checkpoint that cannot be written or a loss that is not finite, during it.
        TrainingStopped: A signal has asked for the end; all steps done are in a checkpoint.
    """
    check_distribution(config.optimizer)  # before any process looks for the others
    run_dir = Path(config.training.output_dir)
    with failing_together(TrainingStopped), StopSignals() as signals, FolderLock(run_dir, "training.output_dir") as lock:
        checkpoint = choose_checkpoint(resume, run_dir, lock)
        trainer = Trainer(config, signals, continues=checkpoint is not None)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        if trainer.accelerator.is_main_process and checkpoint is not None and resume != "auto":
            set_aside(run_dir / "checkpoints", checkpoint, [trainer.log.file, trainer.speed_log.file])
        with trainer.writer:
            return trainer.fit()


class Trainer:
    """The objects of a run: models, data, optimizer, and what a checkpoint holds."""

    def __init__(self, config: Config, signals: StopSignals | None = None, continues: bool = False) -> None:
        """Build everything; raises the errors of config, data and weights before any training.

        Args:
            config: The run's settings.
            signals: Those that ask for a stop.
            continues: Whether `resume` will be called, so that `lora.pretrained` need not be there any more, and the list of samples that
                cannot be read holds.
        """
        self.config = config
        training = config.training
        self.run_dir = Path(training.output_dir)
        self.signals = signals or StopSignals()
        check_settings(config)
        opened = open_run(config, continues)
        check_distribution(config.optimizer)
        self.accelerator = Accelerator(mixed_precision=training.mixed_precision)
        self.dataset = training_dataset(config, opened, self.accelerator, continues)
        self.sampler = training_sampler(config, self.dataset, self.accelerator.process_index, self.accelerator.num_processes)
        self.global_batch = self.sampler.global_batch
        self.held_out, self.panels = opened.held_out, opened.panels
        self.pipeline = load_base(config, opened, self.accelerator.device)
        self.call = call_settings(config, self.pipeline.transformer)
        blocks = self.pipeline.transformer.config
        resolve_capture_blocks(config.loss.capture_blocks, blocks.num_layers, blocks.num_single_layers)
        choose_attention(self.pipeline.transformer, config, self.accelerator.device)
        attach_adapter(self.pipeline, config, opened.adapter)
        check_base([self.pipeline.transformer, self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2])
        check_adapter(list(reference_lora_parameters(self.pipeline.transformer).values()), 0)
        placed = place_models(self.accelerator, self.pipeline)
        self.parameters = reference_lora_parameters(self.pipeline.transformer)
        trainable = list(self.parameters.values())
        self.optimizer = build_optimizer(config.optimizer, trainable)
        updates: Callable[..., Updates] = ZeroUpdates if uses_deepspeed() else Updates
        self.updates = updates(self.accelerator, placed, self.parameters, self.optimizer, config.optimizer.max_grad_norm)
        self.transformer = self.updates.transformer
        decay = config.optimizer.ema_decay
        self.ema = EMAModel(trainable, decay=decay, foreach=True) if decay is not None else None
        self.run = describe_run(config, self.global_batch, self.accelerator.num_processes, self.dataset)
        self.trackers = Trackers(training.trackers if self.accelerator.is_main_process else (), self.run_dir / "logs")
        self.log = RunLog(self.run_dir / "metrics.jsonl")
        self.speed_log = RunLog(self.run_dir / "throughput.jsonl")  # apart, for no two runs share it
        self.meter = ThroughputMeter(self.accelerator.num_processes, self.accelerator.device, training.peak_tflops)
        self.writer = CheckpointWriter(self.run_dir / "checkpoints", training, self._best_step)
        self.pull_limit = PullLimit(config.loss, trainable, self.accelerator)
        self.non_finite = NonFiniteSteps(self.accelerator, self.run_dir / "non_finite.json", training.non_finite)
        self.step = 0
        self._saved_step: int | None = None
        self._is_updating = False  # the adapter, its average or the optimizer, some of which may be of the next step already

    # ---- checkpoints

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint folder; nothing is changed unless all of it fits.

        Raises:
            FileNotFoundError, ValueError: The checkpoint is of another config, or a file is not what it must be.
        """
        saved = load_snapshot(path, self.pipeline.transformer)
        require_same_run(saved.state, self.run, str(path))
        restore_snapshot(saved, self.updates, self.ema)
        self.pull_limit.squares = saved.state["schedule"].get("pull_squares")
        self.step = saved.step
        if path.resolve() == folder_of(self.writer.folder, saved.step).resolve():
            self._saved_step = saved.step
        logger.info("resumed from %s at step %d", path, self.step)

    def save(self) -> None:
        """Copy everything to the host and start writing a checkpoint, on the main process; does nothing if this step has one."""
        self._look_back()
        if self._saved_step != self.step:
            self._settle()
            check_adapter(list(self.parameters.values()), self.step)
            self._submit()

    def _submit(self) -> None:
        """Copy everything to the host and start writing it."""
        optimizer = self.updates.optimizer_state()
        if optimizer is not None:  # on the main process
            self.log.flush()
            schedule: dict[str, Any] = {"learning_rate": self._learning_rate(), **scheduled_weights(self.config.loss, self.step)}
            if self.pull_limit.squares is not None:
                schedule["pull_squares"] = self.pull_limit.squares
            state = {"samples_seen": self.step * self.global_batch, "schedule": schedule, **self.run}
            self.writer.submit(take_snapshot(self.step, self.parameters, optimizer, self.ema, state))
        self._saved_step = self.step

    def _keep_steps(self) -> None:
        """After an error: the steps before it into a checkpoint, where that needs no other process; says where they are."""
        alone = self.accelerator.num_processes == 1 or not uses_deepspeed()
        if not self.accelerator.is_main_process or not self.step:
            return
        try:
            self.writer.wait()
            if alone and not self._is_updating:
                was_finite = self.non_finite.was_finite()
                if was_finite:
                    self._average()
                elif was_finite is False:
                    self.step -= 1
                if self.step and self._saved_step != self.step:
                    self._submit()
                    self.writer.wait()
        except Exception as error:
            logger.error("the steps since the last checkpoint are lost: %s", in_one_line(error, with_kind=True))
            self._saved_step = None
        if self._saved_step is not None:
            message = "the first %d of %d steps are in %s; --resume auto goes on from there"
            logger.warning(message, self._saved_step, self.step, folder_of(self.writer.folder, self._saved_step))

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written; where that has failed, raise on all processes."""
        main_alone(self.writer.wait)

    def _best_step(self, steps: list[int]) -> int | None:
        return self.log.best_step(self.config.training.best_metric, steps)

    # ---- one step

    def optimizer_step(self, batches: list[MosaicBatch], share: float = 1.0) -> MosaicLoss:
        """Accumulate the gradients of the micro-batches and update the adapter once; returns the mean terms over all processes.

        All of it is put into the device's queue, and the numbers come to the host while it prepares the next step: so this looks at the
        step before, and `_look_back` at the last one where something follows that needs to know.

        Args:
            batches: The micro-batches of this process.
            share: Factor on the gradient, not on the returned terms: of the sampler, for samples that are repeated to fill the step.

        Raises:
            NonFiniteLoss: The loss or the gradient of the step before is not finite and `training.non_finite` is "stop"; the adapter is as
                it was before that step, and in a checkpoint.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        terms = []
        if self.pull_limit.is_due(self.step):
            self._look_back()  # the limit's own numbers are waited for in any case
            self._measure_pull(batches[0])
        for micro_step, batch in enumerate(batches):
            generators = self._generators(batch, micro_step)
            with self.updates.micro_batch(is_last=micro_step == len(batches) - 1):
                inputs = draw_inputs(self.pipeline.encoders, batch, self.config, generators, self.pipeline.transformer.device)
                loss = train_step(self.transformer, *inputs, self.config.loss, self.step, self.call, self.pull_limit.scale)
                self.updates.backward(loss.total * share / len(batches))
            terms.append(torch.stack([term.detach().float() for term in loss]))
        # All slices have one size, so the mean of their means is the mean over the samples.
        means = self.accelerator.reduce(torch.stack(terms).mean(dim=0), reduction="mean")
        numbers = torch.cat([means, self.updates.gradient_norm().to(means)[None]])
        self._look_back()
        self._is_updating = True
        self.updates.apply(numbers.isfinite().all())
        self.non_finite.note((*MosaicLoss._fields, "gradient_norm"), numbers, self.step, self.step * self.global_batch, batches)
        self.step += 1
        self._is_updating = False
        return MosaicLoss(*means.unbind())

    def _look_back(self) -> None:
        """See whether the last update was taken, once its numbers are there, and do what depends on it; to be called on all processes.

        Raises:
            NonFiniteLoss: It was not, and the run is to stop; the steps before it are in a checkpoint.
        """
        was_finite = self.non_finite.was_finite()
        if was_finite:
            self._average()
        if was_finite is not False:
            return
        try:
            self.non_finite.refuse()
        except NonFiniteLoss:
            self.step -= 1
            self.save()
            self._settle()
            raise

    def _average(self) -> None:
        """Have the moving average follow an update that was taken: the weights are still those."""
        self._is_updating = True
        if self.ema is not None:
            self.ema.step(list(self.parameters.values()))
        self._is_updating = False

    def _measure_pull(self, batch: MosaicBatch) -> None:
        """On the first micro-batch of the step, drawn as the step itself will draw it."""
        with self.updates.micro_batch(is_last=False):  # nothing is joined
            device, loss = self.pipeline.transformer.device, self.config.loss
            inputs = draw_inputs(self.pipeline.encoders, batch, self.config, self._generators(batch, 0), device)
            weights = loss_weights(loss, self.step)
            self.pull_limit.measure(lambda: train_step(self.transformer, *inputs, loss, self.step, self.call), weights)

    def _learning_rate(self) -> float:
        """That of the current step: a linear warm-up, then constant."""
        settings = self.config.optimizer
        return settings.learning_rate * (min((self.step + 1) / settings.warmup_steps, 1.0) if settings.warmup_steps else 1.0)

    def _generators(self, batch: MosaicBatch, micro_step: int) -> list[torch.Generator]:
        """Generators of a micro-batch by global sample index; every optimizer step takes `global_batch` indices."""
        count, accelerator = len(batch.ids), self.accelerator
        place = (micro_step * accelerator.num_processes + accelerator.process_index) * count
        return sample_generators(self.config.training.seed, self.step * self.global_batch + place, count)

    # ---- the loop

    def fit(self) -> Path:
        """Train to the end; returns the path of the final adapter file."""
        training = self.config.training
        limits = (training.max_steps, training.max_epochs and training.max_epochs * self.sampler.steps_per_epoch)
        total = min(limit for limit in limits if limit is not None)
        loaded = batches_from(self.step, self.dataset, self.sampler, self.config.data.num_workers, ignore_in_worker)
        check_adapter(list(self.parameters.values()), self.step)
        self._start_log()
        if self.step:
            self.save()  # one that was continued from elsewhere, so that this run's folder has it
        progress = tqdm(total=total, initial=self.step, desc="training", unit="step", disable=not self.accelerator.is_local_main_process)
        with contextlib.closing(loaded), progress:  # in any case: no loading process stays, and an error message begins a line
            try:
                self._take_steps(read_together(islice(loaded, max(total - self.step, 0))), total, progress)
            except (TrainingStopped, CheckpointError, ProcessesDiffer):
                raise
            except Exception:
                self._keep_steps()
                raise
        return self._finish()

    def _take_steps(self, batches_of_steps: Iterator[tuple[list[MosaicBatch], float]], total: int, progress: tqdm) -> None:
        """Take all steps up to `total`, with what is due before the first and after each."""
        training = self.config.training
        if self._validation_is_due(total) and not self._has_validated():
            self.validate()  # what the run starts from, or what a signal or a kill has cut short
            self._stop_if_asked()
        elif self.step < total:
            self._stop_if_asked()
        for batches, share in self.meter.wait_for(batches_of_steps):
            self.optimizer_step(batches, share)
            logs = self.step % training.log_every == 0 or self.step == total
            saves = self.step % training.checkpoint_every == 0 or self.step == total
            validates = self._validation_is_due(total)
            if logs or saves or validates:
                self._look_back()
            self.meter.end_step(batch_work(batch, self.pipeline, self.config) for batch in batches)
            progress.update()
            if logs:
                self._log_step(progress)
            if saves:
                self.save()
            if validates:
                self.validate()
            if validates or self.step < total:  # the last step alone is finished in any case
                self._stop_if_asked()

    def _start_log(self) -> None:
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_text(self.run_dir / "config.json", config_to_json(self.config))
            self.log.start(self.step)
            self.speed_log.start(self.step)
        self.trackers.start(self.step, resolved_dict(self.config))

    def _log_step(self, progress: tqdm) -> None:
        """Loss terms, gradient norm and learning rate of this step, which was looked at, and the speed since the last entry."""
        speed = self.meter.report()
        self._write(self.speed_log, speed)
        given = self.non_finite.values
        if not all(map(math.isfinite, given.values())):
            return  # the log has an entry of its own
        terms = {name: given[name] for name in logged_terms(self.config.loss)}
        progress.set_postfix({short: f"{terms[name]:.3f}" for name, short in SHORT_NAMES.items() if name in terms})
        rate = self.optimizer.param_groups[0]["lr"]
        values = {f"loss/{name}": value for name, value in terms.items()}
        values |= {"optimizer/gradient_norm": given["gradient_norm"], "optimizer/learning_rate": rate}
        if self.config.loss.max_pull is not None:
            values |= {"optimizer/pull": self.pull_limit.pull, "optimizer/attention_scale": self.pull_limit.scale}
        self._write(self.log, values)

    def _write(self, log: RunLog, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            log.write(self.step, values)
            self.trackers.log(values, self.step)

    def _validation_is_due(self, total: int) -> bool:
        every = self.config.validation.every
        return every is not None and (self.step % every == 0 or self.step == total)

    def _has_validated(self) -> bool:
        """Whether the log has the validation of this step; the main process decides for all."""
        return main_alone(lambda: any("attention/exact" in entry for entry in self.log.entries() if entry["step"] == self.step))

    def validate(self) -> None:
        """Panels of held-out cases and attention accuracy, with the averaged adapter if there is one; written by the main process.

        A failure is logged and does not end a run, but where a process has left the others in a sharded forward pass. A stop signal cuts
        it short; the run then makes it when it is continued.
        """
        self._look_back()
        if is_sharded(self.transformer):
            with self._going_on(), in_step() as agree:
                self._validate(lambda: agree(self._asked_here()))
        else:
            main_alone(self._validate_here)

    def _validate_here(self) -> None:
        with self._going_on():
            self._validate(self._asked_here)

    def _validate(self, asked_to_stop: Callable[[], bool]) -> None:
        assert self.held_out is not None  # `open_run` has opened them where validation is asked for
        is_main = self.accelerator.is_main_process
        folder = self.run_dir / "validation" / f"step_{self.step:08d}" if is_main else None
        with averaged(self.ema, list(self.parameters.values())):
            accuracy = validate(self.pipeline, self.held_out, self.panels, self.config, folder, asked_to_stop)
        self._write(self.log, {f"attention/{name}": value for name, value in accuracy._asdict().items()})

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Context of a validation that may fail."""
        try:
            yield
        except ProcessFailed:
            raise
        except ValidationStopped:
            logger.warning("validation at step %d was cut short by a stop signal", self.step)
        except Exception:
            logger.exception("validation at step %d failed; training goes on", self.step)

    def _asked_here(self) -> bool:
        return self.signals.received is not None

    def _stop_if_asked(self) -> None:
        """At a step's end: end on all processes if a signal has come to any of them, or if a checkpoint could not be written."""
        failed, asked = on_any_process(self.writer.failed, self._asked_here())
        if failed:
            self._settle()
        if asked:
            self.save()
            self._settle()
            checkpoint = folder_of(self.writer.folder, self.step)
            raise TrainingStopped(self.step, checkpoint, self.signals.received or "a signal to another process")

    def _finish(self) -> Path:
        self._settle()
        path = self.run_dir / "lora.safetensors"
        if self.accelerator.is_main_process:
            with averaged(self.ema, list(self.parameters.values())):
                save_reference_lora(self.pipeline.transformer, path, resolved_dict(self.config))
        self.trackers.close()
        # DDP's wrapper must go before the process group: were it the last to hold that, it would end gloo's threads holding the GIL, for
        # which such a thread may be waiting.
        self.transformer = self.updates.transformer = self.pipeline.transformer
        self.accelerator.free_memory()
        self.accelerator.end_training()
        return path
