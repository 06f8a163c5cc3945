"""Sampling over K x size x mode: the table of the command `infer` of scripts/benchmark.py.

Each mode is a whole sampling run of the pipeline on encoded inputs; the modes of a cell take turns. Beside the time of a picture stand what
the FLOP model predicts, and how far latents and picture are from those of the plain path with the same weights, start noise and
`reference_attention`. The pocket model is the trained one; the others have random weights, and no VAE. A step is timed apart from the first
of its run, in which references are kept; on a CPU the naive twin makes one, too.
"""

import argparse
import gc
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import attention_backend
from diffusers.utils import logging
from torch import Tensor
from tqdm import tqdm

from mosaic.files import write_text
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.method.grids import token_grid
from mosaic.method.tokens import unpack_latents
from mosaic.model.acceleration import compile_blocks, set_attention_backend, set_step_cache
from mosaic.model.costs import Workload, sampling_flops
from mosaic.pipeline.encoders import PromptEmbeddings
from mosaic.pipeline.latents import decode_latents
from mosaic.pipeline.options import SamplingOptions
from mosaic.pipeline.pipeline import DTYPES, MosaicFluxPipeline
from mosaic.planning.memory_model import GIB
from mosaic.rendering.cases.reading import read_cases
from scripts.benchmarks import ROOT
from scripts.benchmarks.measuring import StepClock, device_name, peak_bytes, timed
from scripts.benchmarks.models import POCKET, MeasuredModel, measured_model
from scripts.benchmarks.train import rates, shown
from scripts.benchmarks.twin import INPUTS, Twin, check_agreement

FLUX_DEV_BYTES = 30 * GIB  # weights in bfloat16, an adapter of rank 128 and its start in float32
FLUX_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}  # FLUX.1-dev's; what is not named are diffusers' defaults
COLUMNS = (
    *("px", "K", "mode", "s", "first s", "s/step", "of product %", "x twin", "peak GiB", "above the model GiB", "TFLOP", "MFU %"),
    *("speed-up", "predicted", "over plain", "predicted over plain", "skipped", "latents", "levels", "mean level"),
)


@dataclass(frozen=True)
class Mode:
    """A way of sampling.

    Attributes:
        name: As on the command line.
        reference_attention: "target" or "isolated".
        cache: Arguments of the pipeline about kept references.
        step_cache: See `set_step_cache`.
        threshold: Its threshold.
        batch_size: Pictures at once.
        compiled: Whether the blocks are compiled.
        backend: Attention kernel, or None.
    """

    name: str
    reference_attention: str = "target"
    cache: tuple[tuple[str, Any], ...] = ()
    step_cache: str = "none"
    threshold: float | None = None
    batch_size: int = 1
    compiled: bool = False
    backend: str | None = None

    def reference_steps(self, num_inference_steps: int) -> int:
        """Steps in which the references run."""
        cache = dict(self.cache)
        return 1 if "reference_cache" in cache else math.ceil(num_inference_steps / cache.get("refresh_references", 1))


def parse_mode(text: str) -> Mode:
    """A mode by its name: target, isolated, isolated-cache, compile, or refresh:N, first-block:T, mag:T, batch:B, attention:KERNEL.

    Raises:
        ValueError: It is none of these.
    """
    name, _, value = text.partition(":")
    plain: dict[str, dict[str, Any]] = {
        "target": {},
        "isolated": {"reference_attention": "isolated"},
        "isolated-cache": {"reference_attention": "isolated", "cache": (("reference_cache", True),)},
        "compile": {"compiled": True},
    }
    if text in plain:
        return Mode(text, **plain[text])
    with_value: dict[str, Callable[[str], dict[str, Any]]] = {
        "refresh": lambda v: {"cache": (("refresh_references", _positive(int(v))),)},
        "first-block": lambda v: {"step_cache": "first_block", "threshold": _positive(float(v))},
        "mag": lambda v: {"step_cache": "mag", "threshold": _positive(float(v))},
        "batch": lambda v: {"batch_size": _positive(int(v))},
        "attention": lambda v: {"backend": v},
    }
    try:
        return Mode(text, **with_value[name](value))
    except (KeyError, ValueError):
        names = ", ".join([*plain, "refresh:N", "first-block:T", "mag:T", "batch:B", "attention:KERNEL"])
        raise ValueError(f"--modes must be of {names}, got {text}") from None


def _positive(number: Any) -> Any:
    if not number > 0:
        raise ValueError
    return number


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell, print the table, return the result.

    Raises:
        ValueError: If the model cannot run here.
        FileNotFoundError: If the pocket weights are not here.
    """
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modes = [parse_mode(text) for text in args.modes]
    modes = with_plain_paths(modes)
    pipeline = build_pipeline(args, device)
    for mode in modes:
        check_mode(pipeline, mode, args.steps, device)
    if any(mode.compiled for mode in modes):
        compile_blocks(pipeline.transformer)
    rate, peak = rates(args, device.type, pipeline.transformer.dtype)
    rows = []
    for size, k in tqdm([(size, k) for size in args.sizes for k in args.references], desc="cells", unit="cell"):
        rows += measure_cell(Cell(args, pipeline, size, k, max(mode.batch_size for mode in modes)), modes, peak, rate)
    model = args.model if args.config is None else args.config.model.pretrained
    result = {
        "model": model,
        "device": device_name(device.type, args.threads),
        "clock": "device" if device.type == "cuda" else args.clock,
        "dtype": str(pipeline.transformer.dtype),
        "product_tflops": rate,
        "peak_tflops": peak,
        "rows": rows,
    }
    print_table(args, result)
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result


def with_plain_paths(modes: list[Mode]) -> list[Mode]:
    """The modes, `target` first; `isolated`, if one of them is of its attention mode and it is not there, before that."""
    if modes[0].name != "target":
        modes = [parse_mode("target"), *modes]
    names = [mode.name for mode in modes]
    first = next((mode for mode in modes if mode.reference_attention == "isolated"), None)
    if first is None or "isolated" in names:
        return modes
    place = modes.index(first)
    return [*modes[:place], parse_mode("isolated"), *modes[place:]]


def check_mode(pipeline: MosaicFluxPipeline, mode: Mode, steps: int, device: torch.device) -> None:
    """Refuse before anything is measured what cannot run: an attention kernel that is not here, another model's table."""
    if mode.backend is not None:
        set_attention_backend(pipeline.transformer, mode.backend, device)
        pipeline.transformer.reset_attention_backend()
    set_step_cache(pipeline.transformer, mode.step_cache, mode.threshold, steps)
    set_step_cache(pipeline.transformer, "none", None, steps)


def build_pipeline(args: argparse.Namespace, device: torch.device) -> MosaicFluxPipeline:
    """The pipeline of a config, the trained pocket pipeline, or a random transformer of another shape in a pipeline without encoders.

    Raises:
        ValueError: If there is no GPU for the large one.
        FileNotFoundError: If the pocket weights are not here.
    """
    if args.config is not None:
        settings = args.config.inference
        if settings.lora is None:
            raise ValueError("--config: inference.lora must name a reference LoRA, got null")
        pipeline = MosaicFluxPipeline.from_pretrained(args.config.model.pretrained, dtype=DTYPES[args.config.model.dtype])
        pipeline.load_reference_lora(settings.lora, settings.lora_weight_name)
    elif args.model == "pocket":
        if not (POCKET / "lora.safetensors").is_file():
            raise FileNotFoundError(f"{POCKET}: the pocket weights are not in this checkout; get them with git lfs pull or a full clone.")
        pipeline = MosaicFluxPipeline.from_pretrained(POCKET / "flux")
        pipeline.load_reference_lora(POCKET / "lora.safetensors")
    else:
        pipeline = random_pipeline(measured_model(args.model, rank=args.rank), device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def random_pipeline(model: MeasuredModel, device: torch.device, quantization: str = "none") -> MosaicFluxPipeline:
    """A random transformer with an adapter, in a pipeline without encoders and VAE.

    Raises:
        ValueError: If there is no GPU for the large one.
    """
    if model.half:
        memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else 0
        if memory < FLUX_DEV_BYTES:
            found = f"{torch.cuda.get_device_name(0)} has {memory / GIB:.0f} GiB" if memory else "there is none here"
            raise ValueError(f"--model flux_dev needs a CUDA GPU with {FLUX_DEV_BYTES / GIB:.0f} GiB, but {found}. Use --model pocket.")
    config = model.config(1, quantization=quantization)
    transformer = model.build(config, device.type)
    for parameter in reference_lora_parameters(transformer).values():
        parameter.data = parameter.data.to(DTYPES[config.model.dtype])
    transformer.requires_grad_(False).eval()
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return MosaicFluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER), transformer=transformer, **nothing)


class Cell:
    """The inputs of a size and a K, encoded once, and runs on them."""

    def __init__(self, args: argparse.Namespace, pipeline: MosaicFluxPipeline, size: int, num_references: int, batch_size: int) -> None:
        self.args, self.pipeline, self.size, self.num_references = args, pipeline, size, num_references
        factor = pipeline.encoders.vae_scale_factor
        self.grid = token_grid(size, size, factor, where="--sizes")
        self.reference_grid = token_grid(args.reference_size, args.reference_size, factor, where="--reference-size")
        generator = torch.Generator().manual_seed(args.seed)
        device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
        channels = pipeline.transformer.config.in_channels

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.noise = draw(batch_size, self.grid.num_tokens, channels)
        if pipeline.vae is not None:
            cases = args.config.inference.cases if args.config else ROOT / "example_cases.json"
            self.embeds, self.references = encode_example(pipeline, cases, num_references, args.reference_size, args.text_tokens)
        else:
            config, side = pipeline.transformer.config, 2 * self.reference_grid.rows
            self.embeds = PromptEmbeddings(draw(1, args.text_tokens, config.joint_attention_dim), draw(1, config.pooled_projection_dim))
            self.references = draw(num_references, channels // 4, side, side)

    def sample(self, mode: Mode, pictures: slice, steps: int | None = None, clock: StepClock | None = None) -> Tensor:
        """Packed latents [B, N, C] of these of the pictures, B of them at once; a clock is marked after every step."""
        noise = self.noise[pictures]
        options = SamplingOptions(
            height=self.size,
            width=self.size,
            num_inference_steps=steps or self.args.steps,
            reference_size=self.args.reference_size,
            reference_attention=mode.reference_attention,
            **dict(mode.cache),
        )
        set_step_cache(self.pipeline.transformer, mode.step_cache, mode.threshold, steps or self.args.steps)
        with torch.compiler.set_stance("default" if mode.compiled else "force_eager"), attention_backend(mode.backend or "native"):
            latents = self.pipeline(
                prompt_embeds=self.embeds[0].expand(len(noise), -1, -1),
                pooled_prompt_embeds=self.embeds[1].expand(len(noise), -1),
                reference_latents=[self.references] * len(noise),
                latents=noise,
                output_type="latent",
                callback_on_step_end=None if clock is None else clock.mark,
                **options.arguments,
            ).images
        assert isinstance(latents, Tensor)
        return latents

    def flops(self, mode: Mode, steps: int, reference_steps: int, skipped: int = 0) -> float:
        """FLOPs per picture of so many steps, in so many of which the references run."""
        transformer = self.pipeline.transformer
        rank = transformer.peft_config["reference"].r
        sizes = (self.grid.num_tokens, self.reference_grid.num_tokens, self.args.text_tokens)
        load = Workload(1, self.num_references, *sizes, rank, mode.reference_attention)
        return sampling_flops(transformer.config, load, steps, reference_steps, skipped)

    @torch.no_grad()
    def levels(self, latents: Tensor) -> Tensor | None:
        """The pictures in levels 0..255, or None without a VAE."""
        if self.pipeline.vae is None:
            return None
        return ((decode_latents(self.pipeline.vae, unpack_latents(latents, self.grid)) / 2 + 0.5).clamp(0, 1) * 255).round()


def encode_example(
    pipeline: MosaicFluxPipeline, cases: str | Path, num_references: int, size: int, text_tokens: int
) -> tuple[PromptEmbeddings, Tensor]:
    """Text embeddings [1, T, d], [1, d_pooled] and reference latents [K, C, h, w] of the case with the most references in a cases file.

    Raises:
        ValueError: It has fewer than K.
    """
    file = read_cases(cases, size).all_good()
    case = max(file.cases, key=lambda case: len(case.image_paths))
    if len(case.image_paths) < num_references:
        raise ValueError(
            f"--k must be at most {len(case.image_paths)}, as many as the cases of {Path(cases).name} have, got {num_references}"
        )
    pictures = [file.pictures.load(path).prepared.picture for path in case.image_paths[:num_references]]
    (latents,) = pipeline.encoders.encode_references([pictures])
    assert latents is not None, "there are references"
    return pipeline.encoders.encode_prompts([case.prompt], text_tokens), latents


def measure_cell(cell: Cell, modes: list[Mode], peak: float, rate: float) -> list[dict[str, Any]]:
    """The rows of a size and a K; the numbers of a mode that runs out of memory are None."""
    device = cell.pipeline.transformer.device.type
    plain: dict[str, Tensor] = {}
    for mode in modes:  # every picture by itself
        if mode.reference_attention not in plain:
            alone = Mode("", mode.reference_attention)
            singles = [cell.sample(alone, slice(index, index + 1)) for index in range(len(cell.noise))]
            plain[mode.reference_attention] = torch.cat(singles)
    rows: dict[str, dict[str, Any]] = {mode.name: {"px": cell.size, "K": cell.num_references, "mode": mode.name} for mode in modes}
    seconds: dict[str, list[list[float]]] = {mode.name: [] for mode in modes}
    for turn in range(cell.args.runs + 1):
        for mode in modes:
            if "s" in rows[mode.name]:
                continue  # does not fit
            try:
                if turn == 0:  # the first run of each compiles, and is not timed
                    rows[mode.name] |= quality(cell, mode, plain[mode.reference_attention]) | peak_memory(cell, mode, device)
                else:
                    clock = StepClock(device, cell.args.clock)
                    cell.sample(mode, slice(mode.batch_size), clock=clock)
                    seconds[mode.name].append(clock.seconds())
            except torch.OutOfMemoryError:
                rows[mode.name] |= dict.fromkeys([column for column in COLUMNS if column not in ("px", "K", "mode")])
                gc.collect()
                torch.cuda.empty_cache()
    for mode in modes:
        row = rows[mode.name]
        if "s" not in row:
            row |= step_times(cell, mode, seconds[mode.name], rate)
            row["MFU %"] = 100 * row["TFLOP"] / (row["s"] * peak)
            row["x twin"] = None
    if cell.args.twin and device == "cpu" and rows["target"]["s"] is not None:
        rows["target"]["x twin"] = twin_seconds(cell) / rows["target"]["s/step"]
    for mode in modes:
        row = rows[mode.name]
        row["speed-up"], row["predicted"] = gains(row, rows["target"])
        row["over plain"], row["predicted over plain"] = gains(row, rows.get(mode.reference_attention))
    return list(rows.values())


def gains(row: dict[str, Any], base: dict[str, Any] | None) -> tuple[float | None, float | None]:
    """How much faster a row is than another one, measured and by FLOPs; None where one of them is not there or does not fit."""
    if base is None or row["s"] is None or base["s"] is None:
        return None, None
    return base["s"] / row["s"], base["TFLOP"] / row["TFLOP"]


def step_times(cell: Cell, mode: Mode, runs: list[list[float]], rate: float) -> dict[str, float]:
    """Seconds per picture of a run, of its first step and of one of the others, and the rate of the latter over a large product's."""
    later = statistics.median(own for run in runs for own in (run[1:] or run)) / mode.batch_size
    # Of a step after the first one: the mean over those with references and those without.
    steps, with_references = max(cell.args.steps - 1, 1), mode.reference_steps(cell.args.steps) - (cell.args.steps > 1)
    return {
        "s": statistics.median(map(sum, runs)) / mode.batch_size,
        "first s": statistics.median(run[0] for run in runs) / mode.batch_size,
        "s/step": later,
        "of product %": 100 * cell.flops(mode, steps, with_references) / 1e12 / steps / (later * rate),
    }


def twin_seconds(cell: Cell) -> float:
    """Seconds of one step of the naive twin in the mode `target`, on the inputs of a first step.

    Raises:
        RuntimeError: Its velocity is not ours.
    """
    transformer = cell.pipeline.transformer
    seen: dict[str, Any] = {}
    handle = transformer.register_forward_hook(lambda _, __, inputs, output: seen.update(inputs, output=output), with_kwargs=True)
    cell.sample(parse_mode("target"), slice(1), steps=1)
    handle.remove()
    twin = Twin(transformer)
    inputs = {name: seen[name] for name in INPUTS if name in seen}
    with torch.inference_mode():
        check_agreement(seen["output"][0], twin(**inputs).sample)
        return statistics.median(timed(partial(twin, **inputs), "cpu", cell.args.clock) for _ in range(2))


def quality(cell: Cell, mode: Mode, plain: Tensor) -> dict[str, Any]:
    """Skipped steps, FLOPs, and the distance of a mode's latents and pictures from the plain ones."""
    pictures = slice(mode.batch_size)
    count = step_counter(cell) if mode.step_cache != "none" else nullcontext([None] * cell.args.steps)
    with count as steps:
        latents = cell.sample(mode, pictures)
    skipped = cell.args.steps - len(steps)
    ours, theirs = cell.levels(latents), cell.levels(plain[pictures])
    distance = None if ours is None or theirs is None else (ours - theirs).abs()
    return {
        "skipped": skipped,
        "TFLOP": cell.flops(mode, cell.args.steps, mode.reference_steps(cell.args.steps), skipped) / 1e12,
        "latents": float((latents.float() - plain[pictures].float()).abs().max()),
        "levels": None if distance is None else float(distance.max()),
        "mean level": None if distance is None else float(distance.mean()),
    }


@contextmanager
def step_counter(cell: Cell) -> Iterator[list[None]]:
    """A list that grows with every step in which the last block runs."""
    steps: list[None] = []
    last = cell.pipeline.transformer.single_transformer_blocks[-1]
    handle = last.get_submodule("attn.norm_q").register_forward_hook(lambda *_: steps.append(None))
    try:
        yield steps
    finally:
        handle.remove()


def peak_memory(cell: Cell, mode: Mode, device: str) -> dict[str, float | None]:
    """GiB at the fullest moment, and above the transformer. On a CPU tensors are counted, which a compiled block would not show: None."""
    if device == "cpu" and mode.compiled:
        return {"peak GiB": None, "above the model GiB": None}
    steps = cell.args.steps if device == "cuda" else min(2, cell.args.steps)  # the second step has everything that is kept
    transformer = cell.pipeline.transformer
    weights = [*transformer.parameters(), *transformer.buffers()]
    peak = peak_bytes(lambda: cell.sample(mode, slice(mode.batch_size), steps), weights, device)
    return {"peak GiB": peak / GIB, "above the model GiB": (peak - sum(tensor.nbytes for tensor in weights)) / GIB}


def print_table(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result as a Markdown table."""
    print(
        f"Sampling of {result['model']} ({result['dtype']}) on {result['device']}: {args.steps} steps, references of "
        f"{args.reference_size} px, per picture, median of {args.runs} in turns ({result['clock']} time). s/step: of a step after the "
        f"first; of product: its rate over {result['product_tflops']:.4g} TFLOP/s, a large product's here; x twin: the naive twin's step "
        f"over it. MFU against {result['peak_tflops']:.4g} TFLOP/s. Speed-up: measured over "
        "`target`; predicted: the same of FLOPs. Over plain: both over the plain path of the same attention mode, that of "
        "`isolated-cache` over `isolated`. Latents, levels: largest difference from the plain path of the same attention mode.\n"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---:|" * len(COLUMNS))
    for row in result["rows"]:
        print("| " + " | ".join(shown(row[column], row["s"] is not None) for column in COLUMNS) + " |")
