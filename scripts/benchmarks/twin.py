"""A training step of ours against the naive twin of tests/naive.py: part of the command `train` of scripts/benchmark.py.

Pocket size, random weights, cached latents. Three arms take turns in every order, step by step, in one process:
  ours            forward with captured rows of all blocks, paper losses, backward, AdamW
  flow_only       the same without capture, SCAL and MDL
  twin            LoRA on all tokens then masked, dense attention mask, full attention maps, losses in loops
Peak memory of each arm is read in a process of its own, above what the built objects take.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

ARMS = ("ours", "flow_only", "twin")
POCKET_CONFIG = ROOT / "assets/pocket/flux/transformer/config.json"
#: The shipped pocket transformer's geometry, for a checkout without its weights.
POCKET_GEOMETRY = {
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 2,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": [8, 12, 12],
}
TARGET_SIDE, REFERENCE_SIDE = 8, 4  # tokens: 64 px scenes and 32 px references at 8 px per token
CORRESPONDENCE_WEIGHT, DISENTANGLEMENT_WEIGHT = 0.4, 0.6  # the paper's
LEARNING_RATE, WARM_UP_STEPS = 1e-4, 2
SETTINGS = ("k", "points_per_reference", "batch_size", "rank", "text_tokens", "threads", "steps")  # flags that make the numbers


def transformer_config() -> dict[str, Any]:
    """Arguments of the pocket transformer, from the shipped folder if it is there."""
    if not POCKET_CONFIG.exists():
        return dict(POCKET_GEOMETRY)
    return {key: value for key, value in json.loads(POCKET_CONFIG.read_text()).items() if key in POCKET_GEOMETRY}


def draw_points(args: argparse.Namespace) -> list[list[Any]]:
    """Per sample, per reference, [P_k, 2] of (u, v): ragged, disjoint, `points_per_reference` in the mean."""
    import torch

    generator = torch.Generator().manual_seed(0)
    num_reference, num_target, mean = REFERENCE_SIDE**2, TARGET_SIDE**2, args.points_per_reference
    spread = min(mean, num_reference - mean, 4)
    samples = []
    for _ in range(args.batch_size):
        owners = torch.randperm(num_target, generator=generator).tensor_split(args.k)
        pairs = []
        for own in owners:
            count = int(torch.randint(mean - spread, mean + spread + 1, (1,), generator=generator))
            u = torch.randperm(num_reference, generator=generator)[:count]
            pairs.append(torch.stack([u, own[torch.randint(len(own), (count,), generator=generator)]], dim=1))
        samples.append(pairs)
    return samples


def build_inputs(args: argparse.Namespace, config: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Keyword arguments of the forward pass, noise and clean latents."""
    import torch

    from mosaic.method.grids import Grid
    from mosaic.method.tokens import position_ids, reference_position_ids, text_position_ids

    generator = torch.Generator().manual_seed(1)
    target, reference = Grid(TARGET_SIDE, TARGET_SIDE), Grid(REFERENCE_SIDE, REFERENCE_SIDE)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(args.batch_size, *shape, generator=generator)

    channels = config["in_channels"]
    noise, latents = draw(target.num_tokens, channels), draw(target.num_tokens, channels)
    timestep = torch.rand(args.batch_size, generator=generator)
    inputs = {
        "hidden_states": latents + timestep[:, None, None] * (noise - latents),
        "encoder_hidden_states": draw(args.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": draw(config["pooled_projection_dim"]),
        "timestep": timestep,
        "guidance": torch.ones(args.batch_size) if config["guidance_embeds"] else None,
        "img_ids": position_ids(target),
        "txt_ids": text_position_ids(args.text_tokens),
        "reference_hidden_states": draw(args.k, reference.num_tokens, channels),
        "reference_ids": reference_position_ids(reference, args.k),
    }
    return inputs, noise, latents


def build_ours(args: argparse.Namespace, supervised: bool) -> Callable[[], Any]:
    """A function that runs one training step of ours; with `supervised` including captured rows, SCAL and MDL."""
    import torch

    from mosaic.lora.adapter import attach_reference_lora, reference_lora_parameters
    from mosaic.method.correspondence import batch_points
    from mosaic.method.losses import correspondence_loss, disentanglement_loss, flow_matching_loss, reference_distributions
    from mosaic.model.attention_rows import CaptureRequest
    from mosaic.model.transformer import MosaicFluxTransformer2DModel

    torch.manual_seed(0)
    config = transformer_config()
    transformer = MosaicFluxTransformer2DModel(**config)
    attach_reference_lora(transformer, args.rank)
    optimizer = torch.optim.AdamW(list(reference_lora_parameters(transformer).values()), lr=LEARNING_RATE)
    inputs, noise, latents = build_inputs(args, config)
    samples = draw_points(args)

    def step() -> Any:
        if not supervised:
            total = flow_matching_loss(transformer(**inputs).sample, noise, latents).mean()
        else:
            points = batch_points(samples, REFERENCE_SIDE**2, TARGET_SIDE**2)
            output = transformer(**inputs, capture=CaptureRequest(points.global_index))
            distributions = reference_distributions(output.attention_rows, points)
            flow_matching = flow_matching_loss(output.sample, noise, latents).mean()
            correspondence = correspondence_loss(output.attention_rows, points).mean()
            disentanglement = disentanglement_loss(distributions, points.reference_mask).mean()
            total = flow_matching + CORRESPONDENCE_WEIGHT * correspondence + DISENTANGLEMENT_WEIGHT * disentanglement
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    return step


def build_twin(args: argparse.Namespace) -> Callable[[], Any]:
    """A function that runs one training step of the naive twin."""
    import torch
    from diffusers import FluxTransformer2DModel

    from mosaic.lora.adapter import attach_reference_lora, reference_lora_parameters
    from mosaic.model.transformer import MosaicFluxTransformer2DModel
    from tests import naive

    torch.manual_seed(0)
    config = transformer_config()
    with_lora = MosaicFluxTransformer2DModel(**config)
    stock = FluxTransformer2DModel(**config).requires_grad_(False)
    stock.load_state_dict(with_lora.state_dict())
    attach_reference_lora(with_lora, args.rank)
    lora = {key: p.detach().clone().requires_grad_() for key, p in reference_lora_parameters(with_lora).items()}
    del with_lora
    twin = naive.NaiveFlux(stock, naive.lora_matrices(lora))
    optimizer = torch.optim.AdamW(list(lora.values()), lr=LEARNING_RATE)
    inputs, noise, latents = build_inputs(args, config)
    samples = draw_points(args)

    def step() -> Any:
        output = twin(**inputs)
        maps = naive.mean_maps(output.maps)
        flow = naive.flow_matching(output.velocity, noise, latents)
        correspondence = naive.correspondence(maps, samples, REFERENCE_SIDE**2)
        disentanglement = naive.disentanglement(maps, samples, REFERENCE_SIDE**2)
        terms = zip(flow, correspondence, disentanglement, strict=True)
        total = torch.stack([f + CORRESPONDENCE_WEIGHT * c + DISENTANGLEMENT_WEIGHT * d for f, c, d in terms]).mean()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    return step


def build_arm(name: str, args: argparse.Namespace) -> Callable[[], Any]:
    """One training step of an arm, as a function."""
    return build_twin(args) if name == "twin" else build_ours(args, supervised=name == "ours")


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone; rusage also remembers the parent that started it
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure_memory(args: argparse.Namespace) -> None:
    """Print how far the peak rises over the built objects in three steps of `args.memory_of`, in MiB."""
    import torch

    torch.set_num_threads(args.threads)
    step = build_arm(args.memory_of, args)
    before = peak_memory_mib()
    for _ in range(3):
        step()
    print(json.dumps({"peak_mib": peak_memory_mib() - before}))


def memory_in_fresh_process(name: str, args: argparse.Namespace) -> float:
    """`measure_memory` of one arm, in MiB."""
    flags = [flag for key in SETTINGS for flag in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "train", "--memory-of", name, *flags]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])["peak_mib"]


def time_in_turns(args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each measured step, the arms taking turns."""
    import torch

    torch.set_num_threads(args.threads)
    steps = {name: build_arm(name, args) for name in ARMS}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    losses: dict[str, list[float]] = {name: [] for name in ARMS}
    orders = list(itertools.permutations(ARMS))  # who runs after whom matters to caches and to the allocator
    for index in range(WARM_UP_STEPS + args.steps):
        for name in orders[index % len(orders)]:
            start = time.perf_counter()
            losses[name].append(float(steps[name]()))
            if index >= WARM_UP_STEPS:
                times[name].append(1000 * (time.perf_counter() - start))
    if (gap := max(abs(a - b) for a, b in zip(losses["ours"], losses["twin"], strict=True))) > 1e-3:  # the two must do the same work
        raise RuntimeError(f"ours and the twin disagree on the loss by {gap:.2e}; the comparison would mean nothing.")
    return times


def report(args: argparse.Namespace, times: dict[str, list[float]], memory: dict[str, float]) -> dict[str, Any]:
    """Medians, ratios to ours, and what capture and losses cost (median over paired steps)."""
    median = {name: statistics.median(values) for name, values in times.items()}
    costs = [100 * (ours - bare) / ours for ours, bare in zip(times["ours"], times["flow_only"], strict=True)]
    arms = {
        name: {
            "ms_per_step": median[name],
            "time_ratio": median[name] / median["ours"],
            "peak_mib": memory[name],
            "memory_ratio": memory[name] / memory["ours"],
        }
        for name in ARMS
    }
    settings = {key: getattr(args, key) for key in SETTINGS}
    return {"settings": settings, "arms": arms, "capture_and_losses_percent": statistics.median(costs)}


def print_table(result: dict[str, Any]) -> None:
    """The result as a Markdown table."""
    settings = result["settings"]
    print(
        f"One training step at pocket size: K = {settings['k']}, {settings['points_per_reference']} points per reference in the mean, "
        f"batch {settings['batch_size']}, rank {settings['rank']}, {settings['threads']} threads, median of {settings['steps']} steps.\n"
    )
    print("| arm | ms per step | x ours | peak MiB | x ours |\n|---|---:|---:|---:|---:|")
    for name, arm in result["arms"].items():
        print(f"| {name} | {arm['ms_per_step']:.0f} | {arm['time_ratio']:.2f} | {arm['peak_mib']:.0f} | {arm['memory_ratio']:.2f} |")
    print(f"\nCapture and losses cost {result['capture_and_losses_percent']:.1f} % of our step.")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all arms, print the table, return the result."""
    memory = {name: memory_in_fresh_process(name, args) for name in ARMS}
    result = report(args, time_in_turns(args), memory)
    print_table(result)
    return result
