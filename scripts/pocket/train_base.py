"""Training of the pocket FLUX from scratch: transformer and both text encoders, by flow matching."""

import argparse
import datetime
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import T5Tokenizer

from scripts.pocket import base_data, runs
from scripts.pocket.base_data import LAYOUTS, Layout, TokenStore, caption_ids
from scripts.pocket.model import build_pocket_flux, save_pocket_flux
from scripts.pocket.sampling import fast_attention, predict_velocity, sample_pictures, time_shift
from scripts.pocket.tokenizers import caption_words, known_words

TRAINED = ("transformer", "text_encoder", "text_encoder_2")
#: Share of samples whose caption is replaced by the empty one.
EMPTY_CAPTIONS = 0.05
CHECKPOINT_MINUTES, SAMPLE_MINUTES, EXPORT_MINUTES = 1.0, 5.0, 10.0


def build_components(run_dir: Path, seed: int) -> dict[str, Any]:
    """A fresh pocket FLUX with the trained VAE and the caption words that the run keeps."""
    words = (run_dir / "words.txt").read_text().split()
    vae = AutoencoderKL.from_pretrained(run_dir / "vae").eval().requires_grad_(False)
    return {**build_pocket_flux(seed, words, pixels=vae.config.sample_size), "vae": vae}


def prepare_tokens(run_dir: Path, vae_dir: Path, device: str = "cpu", start: Path | None = None) -> None:
    """Encodes the pictures that are not encoded yet; keeps the VAE beside the tokens, and the words of the captions and of `start`."""
    pictures = vae_dir / "pictures"
    rank, world = runs.processes()
    vae = AutoencoderKL.from_pretrained(vae_dir / "export").eval().to(device)
    shards = base_data.encode_all(pictures, run_dir / "tokens", vae, rank, world)
    for _ in tqdm(shards, desc="encoding", mininterval=5.0, disable=rank > 0):
        pass
    if rank == 0:
        vae.save_pretrained(run_dir / "vae")
    if rank == 0 and not (run_dir / "words.txt").exists():
        files = [file for layout in LAYOUTS for file in base_data.shard_files(pictures, layout)]
        words = set(caption_words(caption for file in files for caption in base_data.read_captions(file)))
        if start is not None:
            words |= known_words(T5Tokenizer.from_pretrained(start / "tokenizer_2"))
        (run_dir / "words.txt").write_text("\n".join(sorted(words)) + "\n")
    if world > 1:
        dist.barrier()


def draw_batch(
    store: TokenStore, layout: Layout, size: int, empty: tuple[Tensor, Tensor], generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Clean tokens [size, tokens, channels] and caption ids of random samples, some with the empty caption.

    The store, the ids and the generator are on one device.
    """
    device = generator.device
    chosen = torch.randint(len(store.tokens[layout.name]), (size,), generator=generator, device=device)
    dropped = (torch.rand(size, generator=generator, device=device) < EMPTY_CAPTIONS)[:, None]
    first, second = (torch.where(dropped, blank, known[chosen]) for blank, known in zip(empty, store.ids[layout.name], strict=True))
    return store.tokens[layout.name][chosen].float(), (first, second)


class NoisyBatch(NamedTuple):
    """The share of a process in a batch of the objective: x_t = (1 - t) x_0 + t eps.

    Attributes:
        tokens: x_t, [batch, tokens, channels].
        velocity: eps - x_0, [batch, tokens, channels].
        time: t, [batch].
        ids: caption ids of the CLIP and the T5 encoder, each [batch, text length].
    """

    tokens: Tensor
    velocity: Tensor
    time: Tensor
    ids: tuple[Tensor, Tensor]


def draw_noise(layout: Layout, clean: Tensor, ids: tuple[Tensor, Tensor], generator: torch.Generator) -> NoisyBatch:
    """Noise and times, drawn for the whole batch [batch, tokens, channels], of which each process keeps its share.

    Half of the times are FLUX's logit-normal ones, half are spread as a sampler's steps: the first steps, in which a picture's subjects
    find their places, would else hardly be seen.
    """
    on: dict[str, Any] = {"generator": generator, "device": generator.device}
    count = len(clean)
    logit_normal, even = torch.sigmoid(torch.randn(count, **on)), torch.rand(count, **on)
    time_ = time_shift(torch.where(torch.rand(count, **on) < 0.5, logit_normal, even), layout.tokens)
    noise = torch.randn(clean.shape, **on)
    mine = slice(runs.processes()[0], None, runs.processes()[1])
    clean, noise, time_ = clean[mine], noise[mine], time_[mine]
    mixed = time_[:, None, None]
    return NoisyBatch((1 - mixed) * clean + mixed * noise, noise - clean, time_, (ids[0][mine], ids[1][mine]))


@torch.no_grad()
def without_guidance(transformer: FluxTransformer2DModel) -> dict[str, Tensor]:
    """The weights of a transformer without guidance embedding that is one with it, at guidance 1.

    What the embedding adds there is the same for all samples and times, so that the last bias of the time's embedding takes it over.
    """
    state, embedding = transformer.state_dict(), transformer.time_text_embed
    if not transformer.config.guidance_embeds:
        return state
    added = embedding.guidance_embedder(embedding.time_proj(torch.tensor([1000.0])))[0]
    state = {name: weights for name, weights in state.items() if "guidance_embedder" not in name}
    state["time_text_embed.timestep_embedder.linear_2.bias"] = state["time_text_embed.timestep_embedder.linear_2.bias"] + added
    return state


def load_start(components: dict[str, Any], folder: Path) -> None:
    """Copies the trained parts of a pocket FLUX into fresh ones; a word that it does not know keeps its fresh embedding.

    One into which guidance was distilled goes on as the model that it is at guidance 1.

    Raises:
        ValueError: it knows words that this run's captions do not have.
    """
    start = FluxPipeline.from_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        lost = start.components[name].get_vocab().keys() - components[name].get_vocab().keys()
        if lost:
            raise ValueError(f"{folder}/{name} has words that this run's captions lack, such as {min(lost)!r}: start without --start-from.")
    for name in TRAINED:
        fresh = components[name].state_dict()
        state = without_guidance(start.components[name]) if name == "transformer" else start.components[name].state_dict()
        for key, weights in state.items():
            tokenizer = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}.get(name)
            known, wanted = (parts[tokenizer].get_vocab() if tokenizer else {} for parts in (start.components, components))
            if known and key in fresh and (len(weights), len(fresh[key])) == (len(known), len(wanted)):  # an embedding by token
                state[key] = fresh[key].clone()
                state[key][[wanted[token] for token in known]] = weights[list(known.values())]
        components[name].load_state_dict(state)


class BaseTraining:
    """The state of one training run."""

    trained: tuple[str, ...] = TRAINED
    subfolder = "."
    sample_guidance: float | None = None

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.run_dir, self.device = arguments, arguments.run_dir / self.subfolder, torch.device(arguments.device)
        self.layout_weights = torch.tensor(base_data.layout_weights(arguments.sheets_share), device=self.device)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.components = self.build()
        for part in self.components.values():
            if isinstance(part, nn.Module):
                part.to(self.device)
        self.modules = {name: self.components[name].train() for name in self.trained}
        self.parameters = runs.named_parameters(self.modules)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.average = runs.MovingAverage(self.parameters, 0.999)
        minutes = 1.0 if arguments.stop_at else arguments.max_minutes
        self.clock, self.progress = runs.Clock(arguments.steps, minutes), 0.0
        runs.load_checkpoint(self.checkpoint, self.modules, self.optimizer, self.average, self.clock)
        if arguments.stop_at:
            self.clock.minutes = (self.clock.seconds + seconds_until(arguments.stop_at)) / 60.0
        tokenizers = (self.components["tokenizer"], self.components["tokenizer_2"])
        self.store = TokenStore(arguments.run_dir / "tokens", *tokenizers, self.device)
        first, second = (caption_ids(tokenizer, [""]).to(self.device) for tokenizer in tokenizers)
        self.empty = (first, second)
        self.last = {"checkpoint": time.monotonic(), "samples": time.monotonic(), "export": time.monotonic() - 420}
        if arguments.compile:
            self.compile()

    @property
    def checkpoint(self) -> Path:
        """Where the run keeps its state."""
        return self.run_dir / "checkpoint.pt"

    def compile(self) -> None:
        """Compiles the transformer's blocks: on a CPU for each number of tokens, on a GPU, where that takes long, once for all."""
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 32
        self.modules["transformer"].compile_repeated_blocks(dynamic=True if self.device.type == "cuda" else None)

    def build(self) -> dict[str, Any]:
        """The components at the start of a run."""
        components = build_components(self.arguments.run_dir, self.arguments.seed)
        if self.arguments.start_from and not self.checkpoint.exists():
            load_start(components, self.arguments.start_from)
        return components

    def loss(self, layout: Layout, clean: Tensor, ids: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        """The loss of a batch of clean tokens [batch, tokens, channels] and caption ids; noise is drawn for all of it, and this
        process's share is computed.
        """
        noisy = draw_noise(layout, clean, ids, generator)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            velocity = predict_velocity(self.components, layout, noisy.tokens, noisy.time, noisy.ids)
        return (velocity - noisy.velocity).square().mean()

    def export(self) -> None:
        """Writes the averaged weights of the latest checkpoint."""
        export(self.run_dir, self.run_dir / "export")

    def save(self) -> None:
        """Writes a checkpoint."""
        runs.save_checkpoint(self.checkpoint, self.modules, self.optimizer, self.average, self.clock)

    def step(self) -> tuple[str, float]:
        """One optimiser step on a batch of one layout; everything random follows from seed and step number."""
        generator = torch.Generator(self.device).manual_seed(self.arguments.seed * 1_000_003 + self.clock.step)
        layout = LAYOUTS[int(torch.multinomial(self.layout_weights, 1, generator=generator))]
        clean, ids = draw_batch(self.store, layout, self.arguments.batch_size, self.empty, generator)
        loss = self.loss(layout, clean, ids, generator)
        loss.backward()
        value, progress = runs.average_gradients(self.parameters, loss.item(), self.clock.progress())
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        factor = runs.learning_rate(self.clock.step, progress, self.arguments.warmup, self.arguments.decay_from)
        self.optimizer.param_groups[0]["lr"] = self.arguments.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.parameters)
        self.clock.step += 1
        self.progress = progress
        return layout.name, value

    def due(self, what: str, minutes: float) -> bool:
        """Whether something that is done every so many minutes is to be done now."""
        if time.monotonic() - self.last[what] < 60.0 * minutes:
            return False
        self.last[what] = time.monotonic()
        return True

    def sample(self) -> None:
        """Writes pictures drawn with the averaged weights, one row per layout, beside the checkpoint."""
        rows = []
        with self.average.applied(self.parameters), torch.compiler.set_stance("force_eager"):
            for layout in (LAYOUTS[0], LAYOUTS[1], LAYOUTS[3], LAYOUTS[5]):
                captions = self.store.captions[layout.name][:: len(self.store.captions[layout.name]) // 8][:8]
                pictures = sample_pictures(self.components, layout, captions, 42, guidance=self.sample_guidance)
                rows.append(np.concatenate(list(pictures), axis=1))
        width = 768
        rows = [np.pad(row[:, :width], ((0, 0), (0, width - min(width, row.shape[1])), (0, 0))) for row in rows]
        picture = Image.fromarray(np.concatenate(rows))
        (self.run_dir / "samples").mkdir(exist_ok=True)
        large = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
        large.save(self.run_dir / "samples" / f"step-{self.clock.step:06d}.png")

    def run(self) -> None:
        """Trains to the end, with logs, checkpoints, samples and exports on their intervals."""
        first = runs.processes()[0] == 0
        total, start = self.arguments.steps, self.clock.step
        bar = tqdm(initial=start, total=total, desc="base", mininterval=10.0, disable=not first)
        losses: dict[str, list[float]] = {}
        while self.progress < 1.0 and self.clock.step != total:
            name, loss = self.step()
            if not first:
                continue
            losses.setdefault(name, []).append(loss)
            bar.update()
            if self.clock.step % 50 == 0:
                means = self.log(losses)
                bar.set_postfix(scene=means.get("scene"), left=f"{self.clock.remaining() / 60:.1f} min")
                losses = {}
            if self.due("checkpoint", CHECKPOINT_MINUTES):
                self.save()
            if self.due("samples", SAMPLE_MINUTES):
                self.sample()
            if self.due("export", EXPORT_MINUTES):
                self.save()
                self.export()
        if first:
            if losses:
                self.log(losses)
            self.save()
            self.sample()
            self.export()

    def log(self, losses: dict[str, list[float]]) -> dict[str, float]:
        """Adds the mean losses since the last entry, by layout, to the log; returns them."""
        means = {name: round(float(np.mean(values)), 5) for name, values in losses.items()}
        runs.append_log(self.run_dir / "log.jsonl", step=self.clock.step, seconds=round(self.clock.elapsed(), 1), **means)
        return means


def seconds_until(clock_time: str) -> float:
    """Seconds from now to the next time the clock shows HH:MM."""
    now = datetime.datetime.now()
    hour, minute = (int(part) for part in clock_time.split(":"))
    target = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return ((target - now).total_seconds()) % 86_400


def export(run_dir: Path, folder: Path) -> int:
    """Writes the averaged weights of the latest checkpoint as a diffusers folder (the transformer's in bfloat16).

    Returns:
        The step of the checkpoint.
    """
    state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    components = build_components(run_dir, 0)
    parameters = runs.named_parameters({name: components[name] for name in TRAINED})
    with torch.no_grad():
        for name, value in state["average"].items():
            parameters[name].copy_(value)
    # Only the transformer: a stock pipeline loaded without a dtype would else mix types between its parts.
    components["transformer"].to(torch.bfloat16)
    save_pocket_flux(components, folder)
    (folder / "training.txt").write_text(f"{state['step']} steps\n")
    return state["step"]


def run(arguments: argparse.Namespace) -> None:
    """Prepares the data, trains, exports."""
    if arguments.export:
        step = export(arguments.run_dir, arguments.export)
        print(f"{arguments.export}: step {step}")
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    runs.join_processes()
    if arguments.vae_dir:
        prepare_tokens(arguments.run_dir, arguments.vae_dir, arguments.device, arguments.start_from)
    with fast_attention(arguments.device):
        BaseTraining(arguments).run()
