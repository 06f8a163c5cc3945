"""Training of the pocket world's encoders: pictures drawn once, and losses that bring what belongs together closer than all else."""

import argparse
import datetime
import json
from dataclasses import dataclass
from itertools import product, starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from mosaic.evaluation.encoders import ClipEncoder, DinoEncoder
from mosaic.files import replacing, save_tensors, write_text
from mosaic.locks import FolderLock
from mosaic.weights.digests import weights_digest
from scripts.ablation.plan import WORLD_DIGEST
from scripts.pocket import encoders, runs, world
from scripts.pocket.judge import ATTRIBUTES
from scripts.pocket.provenance import commit, hardware, versions
from scripts.pocket.scenes import sample_pose
from scripts.pocket.sheets import PANEL_LATTICE, PANEL_SCALES, render_pose
from scripts.pocket.train_judge import augment

FIRST_SEED = 300_000_000  # scenes of the training; far from the seeds of data sets and of the evaluation
POSES = 3  # of each identity, on white, beside its reference
RECORD = "encoders.json"
_SHARD = 500
_CHECKPOINT_EVERY = 100  # steps
_FREE = ("output", "threads", "test_scenes")  # flags that may change when the command goes on
_TEMPERATURE = 0.1  # of cosines between scenes and views; CLIP learns that of captions

#: All individuals that training may see, in an order of their own.
IDENTITIES: list[world.Identity] = [
    identity
    for identity in starmap(world.Identity, product(world.CLASSES, world.PALETTES, world.PATTERNS, world.MARKINGS))
    if not world.is_held_out(identity)
]
_INDEX = {identity: number for number, identity in enumerate(IDENTITIES)}


@dataclass(frozen=True)
class Drawn:
    """What is known of a drawn scene: who stands in it (indices of `IDENTITIES`), where, and its caption."""

    subjects: tuple[int, ...]
    background: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Training pictures as one encoder reads them.

    Attributes:
        scenes: uint8 `[N, SIDE, SIDE, 3]`.
        drawn: N, what they show.
        views: uint8 `[I, 1 + POSES, SIDE, SIDE, 3]`, every identity on white: its reference, then other poses.
    """

    scenes: np.ndarray
    drawn: list[Drawn]
    views: np.ndarray


def draw_pictures(folder: Path, num_scenes: int) -> None:
    """Draw what is not yet there: scenes of one to four subjects in shards, then views of all identities of the training split."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, num_scenes, _SHARD), desc="drawing scenes", unit="shard"):
        file = folder / f"scenes_{start:06d}.safetensors"
        if not file.exists():
            numbers = range(start, min(start + _SHARD, num_scenes))
            scenes = [world.sample_scene(FIRST_SEED + i, "train", 1 + i % 4) for i in numbers]
            drawn = [([_INDEX[p.identity] for p in scene.placements], scene.background, world.caption(scene)) for scene in scenes]
            pixels = np.stack([np.asarray(world.render_scene(scene, encoders.SIDE).image) for scene in scenes])
            with replacing(file) as aside:
                save_tensors({"scenes": torch.from_numpy(pixels)}, aside, {"drawn": json.dumps(drawn)})
    file = folder / "views.safetensors"
    if not file.exists():
        rng = np.random.default_rng(FIRST_SEED)
        references, poses = [], []
        for identity in tqdm(IDENTITIES, desc="drawing views", unit="identity", mininterval=5.0):
            references.append(np.asarray(world.render_reference(identity, world.REFERENCE_SIZE)))
            posed = (sample_pose(rng, identity, PANEL_SCALES, PANEL_LATTICE) for _ in range(POSES))
            poses.append(np.stack([np.asarray(render_pose(pose, encoders.SIDE)) for pose in posed]))
        with replacing(file) as aside:
            tensors = {"references": torch.from_numpy(np.stack(references)), "poses": torch.from_numpy(np.stack(poses))}
            save_tensors(tensors, aside)


def load_pictures(folder: Path, num_scenes: int, kind: str) -> Pictures:
    """Read the drawn pictures and prepare them for one kind of encoder."""

    def prepare(pixels: Tensor) -> np.ndarray:
        return encoders.prepare([Image.fromarray(picture) for picture in pixels.numpy()], kind)

    scenes, drawn = [], []
    for start in range(0, num_scenes, _SHARD):
        with safe_open(folder / f"scenes_{start:06d}.safetensors", framework="pt") as file:
            scenes.append(prepare(file.get_tensor("scenes")))
            drawn += [Drawn(tuple(subjects), *rest) for subjects, *rest in json.loads(file.metadata()["drawn"])]
    with safe_open(folder / "views.safetensors", framework="pt") as file:
        references, poses = file.get_tensor("references"), file.get_tensor("poses")
    views = np.concatenate([prepare(references)[:, None], prepare(poses.flatten(0, 1)).reshape(*poses.shape)], axis=1)
    return Pictures(np.concatenate(scenes), drawn, views)


def near(number: int, rng: np.random.Generator) -> int:
    """Another individual of the class and of the training split, that shares its palette or its pattern."""
    identity = IDENTITIES[number]
    while True:
        other = world.sample_identity(rng, identity.class_name, "train")
        if other != identity and (other.palette == identity.palette or other.pattern == identity.pattern):
            return _INDEX[other]


@dataclass(frozen=True)
class Batch:
    """Pictures of one step, scenes before views.

    Attributes:
        pixels: float32 `[S + V, 3, SIDE, SIDE]` in [-1, 1].
        scenes: S, what the scenes show.
        views: V, whom the views show, all different; the first stand in the scenes, the others are near to them.
        contains: bool `[S, V]`, whether the scene shows the view's individual.
    """

    pixels: Tensor
    scenes: list[Drawn]
    views: list[int]
    contains: Tensor


def draw_batch(pictures: Pictures, num_scenes: int, rng: np.random.Generator) -> Batch:
    """Scenes, a view of each of their subjects, and one of another individual near to each."""
    rows = rng.choice(len(pictures.scenes), num_scenes, replace=False)
    scenes = [pictures.drawn[row] for row in rows]
    subjects = [number for scene in scenes for number in scene.subjects]
    views = list(dict.fromkeys([*subjects, *(near(number, rng) for number in subjects)]))
    shown = pictures.views[views, rng.integers(1 + POSES, size=len(views))]
    pixels = torch.from_numpy(np.concatenate([pictures.scenes[rows], shown])).permute(0, 3, 1, 2).float() / 127.5 - 1
    contains = torch.tensor([[view in scene.subjects for view in views] for scene in scenes])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    mirror = torch.rand(len(pixels), generator=generator) < 0.5
    pixels = torch.where(mirror[:, None, None, None], pixels.flip(-1), pixels)
    return Batch(augment(pixels, generator), scenes, views, contains)


def matching_loss(similarity: Tensor, positive: Tensor) -> Tensor:
    """Contrastive loss where a row may belong to several columns and a column to several rows.

    For every pair that belongs together the cross-entropy of telling it from all that do not, once along its row and once along its column;
    the mean over pairs and both.

    Args:
        similarity: float32 `[A, B]`, over the temperature.
        positive: bool `[A, B]`.
    """
    others = similarity.masked_fill(positive, -1e4)
    rows = F.softplus(others.logsumexp(1, keepdim=True) - similarity)
    columns = F.softplus(others.logsumexp(0, keepdim=True) - similarity)
    return (rows[positive].mean() + columns[positive].mean()) / 2


class LooksHead(nn.Module):
    """Which classes an embedding holds, and the looks of each; it helps the training and is left behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [1, *(len(names) for names in ATTRIBUTES.values())]
        self.linear = nn.Linear(width, len(world.CLASSES) * sum(self.sizes))

    def loss(self, embeddings: Tensor, shown: list[tuple[int, ...]]) -> Tensor:
        """Cross-entropies of presence, and of palette, pattern and marking where a class is there once, summed.

        Args:
            embeddings: `[N, width]`.
            shown: N, whom each picture shows.
        """
        logits = self.linear(embeddings).unflatten(-1, (len(world.CLASSES), sum(self.sizes))).split(self.sizes, dim=-1)
        present = torch.zeros(len(shown), len(world.CLASSES))
        looks = torch.full((len(shown), len(world.CLASSES), len(ATTRIBUTES)), -1)
        for row, numbers in enumerate(shown):
            for identity in (IDENTITIES[number] for number in numbers):
                c = world.CLASSES.index(identity.class_name)
                named = [names.index(getattr(identity, attribute)) for attribute, names in ATTRIBUTES.items()]
                looks[row, c] = torch.tensor(named) if not present[row, c] else -1
                present[row, c] = 1
        loss = F.binary_cross_entropy_with_logits(logits[0].squeeze(-1), present)
        for number, scores in enumerate(logits[1:]):
            loss = loss + F.cross_entropy(scores.flatten(0, 1), looks[..., number].flatten(), ignore_index=-1)
        return loss


def caption_pairs(batch: Batch, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Captions of the scenes, every other one naming looks, then of each view's individual; and which picture each belongs to.

    Returns:
        S + V texts and bool `[S + V pictures, S + V texts]`. A text that names one individual's looks belongs to scenes that show it, too.
    """
    plain = [scene.caption for scene in batch.scenes]
    full = [encoders.looks_caption([IDENTITIES[i] for i in scene.subjects], scene.background) for scene in batch.scenes]
    named = [pair[int(rng.integers(2))] for pair in zip(plain, full, strict=True)]
    own = torch.tensor([[text in pair for text in named] for pair in zip(plain, full, strict=True)])
    positive = torch.block_diag(own, torch.eye(len(batch.views))).bool()
    positive[: len(own), len(own) :] = batch.contains
    return named + [encoders.looks_phrase(IDENTITIES[i]) for i in batch.views], positive


class Trained(nn.Module):
    """An encoder in training and what its losses need beside it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.tokenizer: CLIPTokenizer | None = encoders.build_tokenizer() if kind == "clip" else None
        self.model: CLIPModel | ViTModel = encoders.build_dino() if self.tokenizer is None else encoders.build_clip(self.tokenizer)
        self.head = LooksHead(128)

    def loss(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        """The sum of all that is trained for on one batch."""
        embeddings = encoders.embed_pixels(self.model, encoders.normalize(batch.pixels, self.kind))
        loss = self.head.loss(embeddings, [*(scene.subjects for scene in batch.scenes), *((view,) for view in batch.views)])
        unit = F.normalize(embeddings, dim=-1)
        scenes, views = unit.split([len(batch.scenes), len(batch.views)])
        loss = loss + matching_loss(scenes @ views.T / _TEMPERATURE, batch.contains)
        if isinstance(self.model, CLIPModel):
            assert self.tokenizer is not None, "CLIP has one"
            texts, positive = caption_pairs(batch, rng)
            parts = (texts[: len(scenes)], texts[len(scenes) :])  # by themselves, for the latter are much shorter
            captions = F.normalize(torch.cat([encoders.embed_texts(self.model, self.tokenizer, part) for part in parts]), dim=-1)
            scale = self.model.logit_scale.clamp(max=np.log(100)).exp()
            loss = loss + matching_loss(scale * unit @ captions.T, positive)
        return loss


def train(kind: str, arguments: argparse.Namespace, pictures: Pictures, folder: Path) -> tuple[Trained, float]:
    """Train an encoder, or go on; returns it with averaged weights, and the seconds that it took."""
    torch.manual_seed(arguments.seed)
    trained = Trained(kind).train()
    parameters = dict(trained.named_parameters())
    optimizer = torch.optim.AdamW(trained.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.02)
    average, clock = runs.MovingAverage(parameters, 0.995), runs.Clock(arguments.steps, None)
    file = folder / "checkpoint.pt"
    runs.load_checkpoint(file, {"trained": trained}, optimizer, average, clock)
    bar = tqdm(initial=clock.step, total=arguments.steps, desc=kind, unit="step", mininterval=5.0)
    while clock.step < arguments.steps:
        optimizer.param_groups[0]["lr"] = arguments.lr * runs.learning_rate(clock.step, clock.progress(), 100, 0.2)
        rng = np.random.default_rng([arguments.seed, clock.step, encoders.KINDS.index(kind)])
        loss = trained.loss(draw_batch(pictures, arguments.batch_size, rng), rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        average.update(parameters)
        clock.step += 1
        bar.update()
        if clock.step % 50 == 0 or clock.step == arguments.steps:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            runs.append_log(folder / "log.jsonl", step=clock.step, loss=loss.item(), seconds=clock.elapsed())
        if clock.step % _CHECKPOINT_EVERY == 0 or clock.step == arguments.steps:
            runs.save_checkpoint(file, {"trained": trained}, optimizer, average, clock)
    bar.close()
    with torch.no_grad():
        for name, value in average.values.items():
            parameters[name].copy_(value)
    return trained.eval(), clock.elapsed()


def measure(folder: Path, kind: str, count: int) -> dict[str, Any]:
    """What a saved encoder can do on held-out identities."""
    encoder = ClipEncoder(str(folder)) if kind == "clip" else DinoEncoder(str(folder))
    found: dict[str, Any] = {"identification": {str(k): encoders.identification(encoder, k, count) for k in range(1, 5)}}
    if isinstance(encoder, ClipEncoder):
        for name, looks in (("retrieval", False), ("retrieval_with_looks", True)):
            found[name] = encoders.retrieval(encoder, count, looks)
    return found


def run(arguments: argparse.Namespace) -> None:
    """Draw, train both, measure, write.

    Raises:
        OSError, ValueError: A flag will not do, or the folder is in use or was begun with other flags.
    """
    torch.set_num_threads(arguments.threads)
    work = arguments.output / "work"
    with FolderLock(arguments.output, "--output") as lock:
        lock.acquire()
        settings = {name: value for name, value in vars(arguments).items() if name not in _FREE}
        runs.check_begun(work / "settings.json", settings, str(arguments.output))
        draw_pictures(work / "pictures", arguments.num_scenes)
        record: dict[str, Any] = {
            "command": "python scripts/make_pocket_encoders.py",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": settings,
            "hardware": hardware(),
            "commit": commit(),
            "versions": versions(),
            "world_digest": WORLD_DIGEST,
            "encoders": {},
        }
        for kind in encoders.KINDS:
            pictures = load_pictures(work / "pictures", arguments.num_scenes, kind)
            trained, seconds = train(kind, arguments, pictures, work / kind)
            encoders.save_encoder(arguments.output / kind, kind, trained.model, trained.tokenizer)
            record["encoders"][kind] = {
                "seconds": round(seconds, 1),
                "digest": weights_digest(arguments.output / kind / "model.safetensors"),
                **measure(arguments.output / kind, kind, arguments.test_scenes),
            }
            print(kind, json.dumps(record["encoders"][kind]), flush=True)
        write_text(arguments.output / RECORD, json.dumps(record, indent=1) + "\n")
    print(f"encoders: {arguments.output}/clip and {arguments.output}/dino; what was done: {arguments.output / RECORD}")
