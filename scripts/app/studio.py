"""The page's engine: one pipeline, one thread that renders picture after picture, and runs that can be watched and cancelled."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image

from mosaic.config.loading import Config
from mosaic.files import in_one_line
from mosaic.pipeline.attention_report import attention_numbers
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.pipeline.prompt_lengths import TextWindow
from mosaic.planning.memory_choice import choose_preset, free_memory, largest_demand, lora_rank
from mosaic.rendering.memory_presets import PRESETS, resolve_preset
from mosaic.rendering.recipe import RunRecipe
from mosaic.rendering.recipes import PictureJob
from mosaic.rendering.rendering import call_arguments
from mosaic.rendering.start import Start
from mosaic.reports.figures import attention_panel
from mosaic.weights.digests import vae_scale_factor
from mosaic.weights.hub import resolve_lora_file
from scripts.app.form import Form, plan_picture
from scripts.app.uploads import Upload

MAX_WAITING = 8
TYPICAL_REFERENCES = 4  # of a picture, by which "auto" predicts the memory
WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
RUN_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)  # RuntimeError: also that a device's memory is full


class Rendered(NamedTuple):
    """A finished picture.

    Attributes:
        picture: RGB.
        panel: The attention maps of its references; None where they were not asked for or there are no references.
        numbers: Of its attention, by `attention_numbers`; None where `panel` is.
        job: Its job, with the recipe.
        seconds: What it took.
    """

    picture: Image.Image
    panel: Image.Image | None
    numbers: dict[str, Any] | None
    job: PictureJob
    seconds: float


class Run:
    """A picture on its way from the form to the page. The rendering thread writes; any thread may read, wait and cancel."""

    def __init__(self, job: PictureJob, uploads: Sequence[Upload], with_attention: bool) -> None:
        self.job, self.uploads, self.with_attention = job, tuple(uploads), with_attention and bool(uploads)
        self.state, self.step, self.num_steps = WAITING, 0, job.recipe.options.num_inference_steps
        self.started: float | None = None
        self.error = ""
        self.note = ""
        self.result: Rendered | None = None
        self._cancelled, self._changed = threading.Event(), threading.Condition()

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.state in ENDED

    @property
    def cancel_asked(self) -> bool:
        """Whether somebody wants the run to stop."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the run to stop: at once while it waits, after the step that it is in while it runs."""
        self._cancelled.set()
        with self._changed:
            if self.state == WAITING:
                self.state = CANCELLED
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Return at the next change, or after some time."""
        with self._changed:
            if not self.ended:
                self._changed.wait(seconds)

    def change(self, **values: Any) -> bool:
        """Set attributes and wake up those who wait; false if the run has ended already."""
        with self._changed:
            if self.ended:
                return False
            for name, value in values.items():
                setattr(self, name, value)
            self._changed.notify_all()
            return True

    def seconds_left(self) -> float | None:
        """An estimate from the steps so far; None before there is one."""
        if self.started is None or not self.step:
            return None
        return (time.perf_counter() - self.started) / self.step * (self.num_steps - self.step)


class Studio:
    """Renders what forms ask for, one picture at a time, first come, first served.

    Attributes:
        config: The settings.
        vae_scale_factor: Pixels per latent.
        sees_references: Whether a reference LoRA is loaded.
    """

    def __init__(self, pipeline: MosaicFluxPipeline, config: Config, shared: RunRecipe, window: TextWindow | None = None) -> None:
        self.config, self.vae_scale_factor = config, pipeline.encoders.vae_scale_factor
        self.sees_references = shared.lora is not None
        self.shared = shared
        self._pipeline = pipeline
        self._window = window  # has a tokenizer of its own, since that of the pipeline belongs to the rendering thread
        # Threads have their own number of threads, and pictures are equal bit for bit only at equal numbers.
        self._thread = ThreadPoolExecutor(1, "studio", torch.set_num_threads, (config.inference.num_threads,))
        self._line: list[Run] = []
        self._lock = threading.Lock()

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "Studio":
        """Load the model and the reference LoRA of a config.

        Raises:
            FileNotFoundError, OSError, ValueError: They cannot be loaded, or do not fit each other or the sizes.
        """
        config = with_memory(config, device)
        settings = config.inference
        if resolve_preset(config).encoders_leave:
            raise ValueError(
                'inference.memory must be "none" or "80gb" for the page, whose prompts are not known beforehand, so that the text encoders '
                f'stay; got "{settings.memory}". inference.quantization makes the transformer smaller; inference.py takes every preset.'
            )
        if settings.step_cache != "none":
            raise ValueError(f'inference.step_cache must be "none" for the page, which shows attention, got "{settings.step_cache}".')
        start = Start.check(config, device)
        window = TextWindow.of_model(config.model.pretrained, config.model.text_length)
        return cls(start.load(), config, start.shared, window)

    def submit(self, form: Form, uploads: Sequence[Upload], index: int, with_attention: bool = True) -> Run:
        """Check a form and put its picture into the line.

        Raises:
            ValueError: A field does not fit, or the line is full.
        """
        if uploads and not self.sees_references:
            raise ValueError("References: the model is loaded without a reference LoRA and sees none. Start the page with --lora.")
        run = Run(plan_picture(form, uploads, index, self.config, self.shared, self.vae_scale_factor), uploads, with_attention)
        lost = self._window and self._window.lost(run.job.recipe.prompt)
        run.note = f"The prompt {lost}." if lost else ""
        with self._lock:
            self._line = [other for other in self._line if not other.ended]
            if len(self._line) > MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} pictures are waiting already. Try again in a while.")
            self._line.append(run)
        self._thread.submit(self._work, run)
        return run

    def num_before(self, run: Run) -> int:
        """How many pictures come before a waiting run's."""
        with self._lock:
            line = [other for other in self._line if other is run or not other.ended]
        return line.index(run) if run in line else 0

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._lock:
            line = list(self._line)
        for run in line:
            run.cancel()
        self._thread.shutdown()

    def _work(self, run: Run) -> None:
        if not run.change(state=RUNNING, started=time.perf_counter()):
            return
        try:
            result = self._render(run)
        except RUN_ERRORS as error:
            if self._pipeline.device.type == "cuda":
                torch.cuda.empty_cache()
            run.change(state=FAILED, error=_in_words(error))
        except BaseException as error:
            run.change(state=FAILED, error=f"The program stopped unexpectedly ({in_one_line(error, with_kind=True)}).")
            raise
        else:
            run.change(state=CANCELLED) if run.cancel_asked else run.change(result=result, state=DONE)

    def _render(self, run: Run) -> Rendered:
        references = [upload.prepared for upload in run.uploads]

        def after_step(pipeline: MosaicFluxPipeline, step: int, *_: object) -> dict[str, Any]:
            run.change(step=step + 1)
            pipeline._interrupt = run.cancel_asked  # diffusers' way to skip the steps that are left
            return {}

        output = self._pipeline(
            reference_images=[references] if references else None,
            **call_arguments([run.job.recipe]),
            output_attention=run.with_attention,
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=(),
        )
        assert isinstance(output.images, list)
        assert run.started is not None
        picture, seconds = output.images[0], time.perf_counter() - run.started
        attention = output.attention[0] if output.attention is not None else None
        if attention is None or run.cancel_asked:
            return Rendered(picture, None, None, run.job, seconds)
        panel = attention_panel([reference.picture for reference in references], picture, attention)
        return Rendered(picture, panel, attention_numbers(attention, ()), run.job, seconds)


def with_memory(config: Config, device: torch.device) -> Config:
    """The config with a preset in the place of `inference.memory` "auto": one under which the text encoders stay.

    Raises:
        FileNotFoundError, OSError: The model or the reference LoRA is not there.
        ValueError: It does not fit into the free memory.
    """
    settings = config.inference
    if settings.memory != "auto":
        return config
    vae_scale_factor(config.model.pretrained)  # a wrong name is told before the reference LoRA is fetched
    rank = lora_rank(resolve_lora_file(settings.lora, settings.lora_weight_name)) if settings.lora else 0
    references, guided = TYPICAL_REFERENCES if rank else 0, settings.image_guidance_scale != 1
    demand = largest_demand((), config)._replace(num_references=references, guided=guided)
    staying = {name: preset for name, preset in PRESETS.items() if not preset.encoders_leave}
    try:
        preset = choose_preset(config, demand, rank, device, free_memory(device), staying).preset
    except ValueError as error:
        cure = "The page keeps the text encoders: set inference.quantization=int8 or nf4, or render by inference.py."
        raise ValueError(f"{error} {cure}") from error
    return config.replace(inference=settings.replace(memory=preset))


def _in_words(error: Exception) -> str:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "The memory is full. Choose a smaller size or fewer references."
    return in_one_line(error, 500)
