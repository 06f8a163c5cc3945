"""Training of the VAE of the pocket FLUX, and its latents' shift and scale."""

import argparse
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from scripts.pocket import base_data, runs
from scripts.pocket.model import build_vae
from scripts.pocket.scenes import RegimeShares

#: Weights of squared error, of differences between neighbouring pixels, and of the KL term, beside L1 with weight 1.
MSE_WEIGHT, EDGE_WEIGHT, KL_WEIGHT = 2.0, 0.25, 2e-6


def load_pictures(folder: Path, most: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Scenes uint8 [n, side, side, 3] and panels of half the side, uint8 [m, half, half, 3], of at most `most` shards per layout."""
    scenes, panels = [], []
    for layout in base_data.LAYOUTS:
        for file in base_data.shard_files(folder, layout)[:most]:
            scene, panel = base_data.cut(layout, base_data.read_shard(file)[0])
            if scene is not None:
                scenes.append(scene)
            if panel is not None:
                panels.append(panel.reshape(-1, *panel.shape[2:]))
    return np.concatenate(scenes), np.concatenate(panels)


def draw_batch(scenes: np.ndarray, panels: np.ndarray, size: int, rng: np.random.Generator, device: torch.device | str = "cpu") -> Tensor:
    """A batch of scenes [size, 3, side, side], one time in four of panels of half the side, four times as many, in [-1, 1]."""
    if rng.random() < 0.25:
        return base_data.to_unit(panels[rng.integers(len(panels), size=4 * size)], device)
    return base_data.to_unit(scenes[rng.integers(len(scenes), size=size)], device)


def reconstruction_loss(output: Tensor, target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """L1 + squared error + L1 of neighbour differences + KL to the standard normal, means over all elements."""
    difference = output.float() - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    loss = difference.abs().mean() + MSE_WEIGHT * difference.square().mean()
    return loss + EDGE_WEIGHT * edges + KL_WEIGHT * divergence


def train_step(
    vae: AutoencoderKL,
    optimizer: torch.optim.Optimizer,
    pictures: Tensor,
    generator: torch.Generator,
    progress: float = 0.0,
) -> tuple[float, float]:
    """One optimiser step; returns the loss and the progress that all processes agree on."""
    with torch.autocast(pictures.device.type, dtype=torch.bfloat16):
        mean, log_variance = vae.encoder(pictures).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        output = vae.decoder(mean + (0.5 * log_variance).exp() * noise)
    loss = reconstruction_loss(output, pictures, mean, log_variance)
    loss.backward()
    value, progress = runs.average_gradients(dict(vae.named_parameters()), loss.item(), progress)
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value, progress


def train(arguments: argparse.Namespace, scenes: np.ndarray, panels: np.ndarray) -> tuple[AutoencoderKL, int]:
    """Trains (or goes on training) and returns the VAE with averaged weights and the number of steps."""
    vae = build_vae(arguments.seed, arguments.pixels).train().to(arguments.device)
    parameters = dict(vae.named_parameters())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    average = runs.MovingAverage(parameters, 0.995)
    clock = runs.Clock(arguments.steps, arguments.max_minutes)
    file = arguments.run_dir / "checkpoint.pt"
    runs.load_checkpoint(file, {"vae": vae}, optimizer, average, clock)
    rank, world = runs.processes()
    bar = tqdm(initial=clock.step, total=arguments.steps, desc="vae", mininterval=5.0, disable=rank > 0)
    progress = clock.progress()
    while progress < 1.0 and clock.step != arguments.steps:
        optimizer.param_groups[0]["lr"] = arguments.lr * runs.learning_rate(clock.step, progress, 100, 0.3)
        key = (arguments.seed * 1_000_003 + clock.step) * world + rank
        pictures = draw_batch(scenes, panels, arguments.batch_size, np.random.default_rng(key), arguments.device)
        generator = torch.Generator(arguments.device).manual_seed(key)
        loss, progress = train_step(vae, optimizer, pictures, generator, clock.progress())
        average.update(parameters)
        clock.step += 1
        bar.update()
        if (clock.step % 50 == 0 or progress >= 1.0 or clock.step == arguments.steps) and rank == 0:
            bar.set_postfix(loss=f"{loss:.4f}", left=f"{clock.remaining() / 60:.1f} min")
            runs.append_log(arguments.run_dir / "log.jsonl", step=clock.step, loss=loss, seconds=clock.elapsed())
        if clock.step % 500 == 0 and rank == 0:
            runs.save_checkpoint(file, {"vae": vae}, optimizer, average, clock)
    if rank == 0:
        runs.save_checkpoint(file, {"vae": vae}, optimizer, average, clock)
    with torch.no_grad():
        for name, value in average.values.items():
            parameters[name].copy_(value)
    return vae.eval(), clock.step


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKL, scenes: np.ndarray, panels: np.ndarray) -> None:
    """Sets `shift_factor` and `scaling_factor` so that (latent - shift) * scale has mean 0 and deviation 1.

    Scenes and panels count alike: both are denoised, and white panels would else be far off the scale.
    """
    with torch.autocast(vae.device.type, dtype=torch.bfloat16):
        parts = [vae.encode(base_data.to_unit(part, vae.device)).latent_dist.mode().float() for part in (scenes, panels)]
    flat = torch.stack([part.flatten()[: min(p.numel() for p in parts)] for part in parts])
    vae.register_to_config(shift_factor=flat.mean().item(), scaling_factor=1.0 / flat.std().item())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[np.ndarray, float]:
    """Pictures after encoding (posterior mode) and decoding in float32, and their mean PSNR in dB."""
    target = base_data.to_unit(pictures, vae.device)
    output = vae.decode(vae.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
    error = (output - target).square().mean(dim=(1, 2, 3))
    decibel = (10 * torch.log10(4.0 / error)).mean().item()
    return ((output + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy(), decibel


def report(vae: AutoencoderKL, scenes: np.ndarray, panels: np.ndarray, folder: Path, step: int) -> str:
    """Writes originals above reconstructions as a picture; returns one line of numbers."""
    rows, numbers = [], []
    for name, pictures, count in (("scenes", scenes, 8), ("panels", panels, 16)):
        output, decibel = reconstruct(vae, pictures)
        rows += [np.concatenate(list(pictures[:count]), axis=1), np.concatenate(list(output[:count]), axis=1)]
        numbers.append(f"{name} {decibel:.2f} dB")
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(folder / "latest.png")
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    return f"step {step}: PSNR {', '.join(numbers)}; shift {shift:.4f}, scale {scale:.4f}"


def run(arguments: argparse.Namespace) -> None:
    """Renders, trains, measures, exports."""
    runs.join_processes()
    folder, shares = arguments.run_dir / "pictures", RegimeShares(arguments.twins_share, arguments.mixed_share)
    workers = min(arguments.workers, multiprocessing.cpu_count())
    for done, total in base_data.render_all(folder, workers, arguments.scale, shares, arguments.pixels) if workers else ():
        if done % 10 == 0 or done == total:
            print(f"rendered {done} of {total} shards", flush=True)
    scenes, panels = load_pictures(folder)
    # The last pictures of each kind are kept out of the training, for the measurement.
    few, some = min(256, len(scenes) // 4), min(256, len(panels) // 4)
    vae, step = train(arguments, scenes[:-few], panels[:-some])
    if runs.processes()[0] > 0:
        return
    set_latent_statistics(vae, scenes[:1024], panels[:4096])
    print(report(vae, scenes[-few:], panels[-some:], arguments.run_dir, step), flush=True)
    vae.save_pretrained(arguments.run_dir / "export")
