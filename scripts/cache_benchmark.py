"""What the reference cache gains, and what refreshing it only every N steps costs: `python scripts/cache_benchmark.py`.

Two tables, with the model, adapter and sizes of a config (default: the pocket weights) and the speed-up that the FLOP model predicts beside
the measured one. First `reference_cache` against none, on isolated references, for every K: the pictures must be equal. Then
`refresh_references` N against every step, in the mode the adapter was trained with, on cases of the config's cases file: how far the
pictures are from the exact ones. Arms take turns in one process; seconds are medians of a whole run of the sampler, encoders excluded.
On a CPU that others use as well, `--clock cpu` counts the seconds this process has really had.
"""

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from mosaic.cases.reading import load_cases
from mosaic.config import Config, load_config
from mosaic.hub import resolve_lora_file
from mosaic.images import load_image, prepare_reference
from mosaic.latents import decode_latents, encode_images, images_to_tensor
from mosaic.pipeline import MosaicFluxPipeline
from mosaic.planning.costs import sampling_flops
from mosaic.reference_cache import reference_cache_bytes
from mosaic.tokens import token_grid, unpack_latents

Arm = Callable[[], Tensor]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/pocket.json"), help="JSON file; its paths start at the current directory")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 6], help="references of the first table")
    parser.add_argument("--refresh", type=int, nargs="*", default=[2, 4, 10], help="N of the second table; none: leave it out")
    parser.add_argument("--cases", type=int, default=3, help="cases of the second table, the first ones of the file")
    parser.add_argument("--steps", type=int, help="sampling steps (default: inference.num_inference_steps)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each arm")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="seconds of the wall, or of this process on the CPU")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if any(number < 1 for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)):
            parser.error(f"--{name} must be at least 1, got {value}")
    return args


def take_turns(arms: Mapping[str, Arm], repeats: int, clock: Callable[[], float]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds and result of every arm. Each round begins with another arm; one round before is not counted."""
    names, seconds, results = list(arms), {name: [] for name in arms}, {}
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            results[name] = arms[name]().cpu()  # waits for a GPU
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


class Sampler:
    """A pipeline with everything but the references fixed."""

    def __init__(self, config: Config, num_inference_steps: int | None) -> None:
        """Load the model and its adapter.

        Raises:
            ValueError: The config names no adapter.
            FileNotFoundError, OSError, ValueError: They cannot be loaded.
        """
        settings = config.inference
        if settings.lora is None:
            raise ValueError("inference.lora: must name a reference adapter, got null.")
        pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=getattr(torch, config.model.dtype))
        pipeline.load_reference_lora(resolve_lora_file(settings.lora, settings.lora_weight_name))
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.config, self.steps = pipeline, config, num_inference_steps or settings.num_inference_steps
        self.grid = token_grid(settings.height, settings.width, pipeline.vae_scale_factor)
        size = config.data.reference_size
        self.reference_grid = token_grid(size, size, pipeline.vae_scale_factor)

    def arm(self, prompt: str, reference_latents: Tensor, **how: object) -> Arm:
        """Sampling of one picture, packed latents [1, N, C], the prompt encoded beforehand."""
        settings = self.config.inference
        with torch.no_grad():
            embeds, pooled, _ = self.pipeline.encode_prompt(prompt, None, max_sequence_length=self.config.model.text_length)
        return lambda: (
            self.pipeline(
                prompt_embeds=embeds,
                pooled_prompt_embeds=pooled,
                reference_latents=[reference_latents],
                height=settings.height,
                width=settings.width,
                num_inference_steps=self.steps,
                guidance_scale=settings.guidance_scale,
                image_guidance_scale=settings.image_guidance_scale,
                generator=torch.Generator().manual_seed(settings.seed),
                output_type="latent",
                **how,
            ).images
        )

    def flops(self, num_references: int, mode: str, reference_steps: int | None) -> float:
        """FLOPs of one arm, up to a factor that all have."""
        sizes = (self.grid.num_tokens, self.reference_grid.num_tokens, self.config.model.text_length, self.config.lora.rank)
        return sampling_flops(self.pipeline.transformer.config, 1, num_references, *sizes, mode, self.steps, reference_steps)

    def pictures(self, latents: Tensor) -> Tensor:
        """[1, N, C] -> [1, 3, H, W] in 0..255."""
        vae = self.pipeline.vae
        with torch.no_grad():
            pixels = decode_latents(vae, unpack_latents(latents.to(vae.device), self.grid)).float().cpu()
        return (pixels / 2 + 0.5).clamp(0, 1) * 255


def measure_cache(sampler: Sampler, counts: Sequence[int], **timing: Any) -> Iterator[dict[str, str]]:
    """A row per K: `reference_cache` against none, on isolated references of noise."""
    grid, config = sampler.reference_grid, sampler.pipeline.transformer.config
    for count in counts:
        shape = (count, config.in_channels // 4, grid.rows * 2, grid.columns * 2)
        references = torch.randn(shape, generator=torch.Generator().manual_seed(count))
        arms = {
            name: sampler.arm("two of them", references, reference_attention="isolated", reference_cache=cached)
            for name, cached in (("none", False), ("cache", True))
        }
        seconds, latents = take_turns(arms, **timing)
        held = reference_cache_bytes(config, count, grid.num_tokens, bytes_per_number=sampler.pipeline.transformer.dtype.itemsize)
        yield {
            "K": str(count),
            "none s": f"{seconds['none']:.3f}",
            "cache s": f"{seconds['cache']:.3f}",
            "speed-up": f"{seconds['none'] / seconds['cache']:.2f}",
            "by FLOPs": f"{sampler.flops(count, 'isolated', None) / sampler.flops(count, 'isolated', 1):.2f}",
            "largest error": f"{float((latents['cache'] - latents['none']).abs().max()):.1e}",
            "cache MiB": f"{held / 2**20:.1f}",
        }


def measure_refreshing(sampler: Sampler, intervals: Sequence[int], num_cases: int, **timing: Any) -> list[dict[str, str]]:
    """A row per N, over some cases: seconds of all, and the error of their pictures in 255ths."""
    config, mode = sampler.config, sampler.config.model.reference_attention
    cases = load_cases(config.inference.cases, config.data.reference_size, config.inference.reference_scale)[:num_cases]
    names = {1: {}} | {n: {"refresh_references": n} for n in intervals}
    total, exact_flops = dict.fromkeys(names, 0.0), 0.0
    flops, errors = dict.fromkeys(names, 0.0), {n: [] for n in names}
    for case in cases:
        loaded = [load_image(path) for path in case.image_paths]
        prepared = [prepare_reference(image, config.data.reference_size, config.inference.reference_scale) for image in loaded]
        with torch.no_grad():
            vae = sampler.pipeline.vae
            references = encode_images(vae, images_to_tensor(prepared).to(vae.device, vae.dtype))
        arms = {str(n): sampler.arm(case.prompt, references, reference_attention=mode, **how) for n, how in names.items()}
        seconds, latents = take_turns(arms, **timing)
        exact_flops += sampler.flops(len(prepared), mode, None)
        exact = sampler.pictures(latents["1"])
        for n in names:
            total[n] += seconds[str(n)]
            flops[n] += sampler.flops(len(prepared), mode, math.ceil(sampler.steps / n))
            errors[n].append((sampler.pictures(latents[str(n)]) - exact).abs())
    return [
        {
            "N": str(n),
            "seconds": f"{total[n]:.3f}",
            "speed-up": f"{total[1] / total[n]:.2f}",
            "by FLOPs": f"{exact_flops / flops[n]:.2f}",
            "mean error of 255": f"{float(torch.cat(errors[n]).mean()):.2f}",
            "worst case's mean": f"{max(float(error.mean()) for error in errors[n]):.2f}",
            "largest": f"{max(float(error.max()) for error in errors[n]):.0f}",
        }
        for n in names
    ]


def show(rows: Iterable[Mapping[str, str]]) -> None:
    """Print rows as a Markdown table, each as soon as it is there."""
    for number, row in enumerate(rows):
        for line in [row.keys(), ["---:"] * len(row), row.values()][2 if number else 0 :]:
            print("| " + " | ".join(line) + " |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    try:
        config = load_config(args.config, args.set)
        settings, mode = config.inference, config.model.reference_attention
        if args.refresh and mode == "isolated":
            raise ValueError('--refresh is for the modes "target" and "joint", but model.reference_attention is "isolated".')
        sampler = Sampler(config, args.steps)
        print(
            f"{config.model.pretrained}, {settings.height} x {settings.width} px, references of {config.data.reference_size} px, "
            f"{sampler.steps} steps, image guidance {settings.image_guidance_scale:g}, "
            f"{args.threads} threads, {args.repeats} repeats, {args.clock} clock, torch {torch.__version__}, {platform.machine()}\n\n"
            "reference_cache, isolated references:\n"
        )
        timing = {"repeats": args.repeats, "clock": CLOCKS[args.clock]}
        show(measure_cache(sampler, args.k, **timing))
        if args.refresh:
            print(f'\nrefresh_references, mode "{mode}", {args.cases} cases of {settings.cases}:\n')
            show(measure_refreshing(sampler, args.refresh, args.cases, **timing))
    except (ValueError, OSError) as error:
        print(f"cache_benchmark: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
