"""Training of the pocket world's segmenter: scenes with exact masks, rendered and as the pocket FLUX draws them over, and phrases."""

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

from mosaic.files import replacing, save_tensors, write_text
from mosaic.locks import FolderLock
from mosaic.weights.digests import weights_digest
from mosaic.weights.numbers import without_tiny_numbers
from preprocess.construct.segmentation.clipseg import ClipSegSegmenter
from preprocess.construct.segmentation.settings import SegmentationSettings
from scripts.ablation.plan import WORLD_DIGEST
from scripts.pocket import runs, segmenter, world
from scripts.pocket.base_data import LAYOUTS, SUBJECT_SHARES, caption_ids, decode_tokens, encode_pictures
from scripts.pocket.provenance import commit, hardware, versions
from scripts.pocket.sampling import predict_velocity
from scripts.pocket.train_judge import augment

FIRST_SEED = 400_000_000  # scenes of the training; far from the seeds of data sets and of the evaluation
RECORD = "segmenter.json"
FLUX = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "flux"
SHARES = world.RegimeShares(twins=0.3, mixed=0.15)
MOST_NOISE, REDRAWING_STEPS, GUIDANCE = 0.5, 3, 2.5
PRESENT = 0.7  # share of the phrases whose class is in the picture
SEAM_WEIGHT = 6.0
_SHARD = 250
_CHECKPOINT_EVERY = 100  # steps
_FREE = ("output", "threads", "test_scenes")  # flags that may change when the command goes on


@dataclass(frozen=True)
class Pictures:
    """Training pictures and what is where in them.

    Attributes:
        pixels: uint8 `[N, 2, SIDE, SIDE, 3]`, each scene as rendered and as drawn over by the pocket FLUX.
        front: int8 `[N, SIDE, SIDE]`, the subject that is seen at a pixel, -1 for the background.
        classes: N, the classes of the subjects, in the order of `front`.
    """

    pixels: np.ndarray
    front: np.ndarray
    classes: list[tuple[str, ...]]


@torch.no_grad()
def draw_over(flux: FluxPipeline, pictures: np.ndarray, captions: list[str], generator: torch.Generator) -> np.ndarray:
    """Pictures uint8 `[N, SIDE, SIDE, 3]` noised up to `MOST_NOISE` and denoised by the pocket FLUX: in its strokes, all in place."""
    vae = flux.vae
    ids = (caption_ids(flux.tokenizer, captions), caption_ids(flux.tokenizer_2, captions))
    tokens = encode_pictures(vae, pictures).float()
    level = MOST_NOISE * torch.rand(len(tokens), generator=generator)
    tokens = tokens.lerp(torch.randn(tokens.shape, generator=generator), level[:, None, None])
    for step in range(REDRAWING_STEPS):
        now = level * (1 - step / REDRAWING_STEPS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = predict_velocity(flux.components, LAYOUTS[0], tokens, now, ids, torch.full([len(tokens)], GUIDANCE))
        tokens = tokens - (level / REDRAWING_STEPS)[:, None, None] * velocity
    return decode_tokens(vae, tokens)


def draw_scene(seed: int) -> world.Scene:
    """A scene of one to six subjects of the training split, many of one class."""
    count = 1 + int(np.random.default_rng(seed).choice(len(SUBJECT_SHARES), p=SUBJECT_SHARES))
    return world.sample_scene(seed, "train", count, SHARES.draw(seed, count))


def draw_pictures(folder: Path, num_scenes: int) -> None:
    """Draw what is not yet there, in shards."""
    folder.mkdir(parents=True, exist_ok=True)
    flux: FluxPipeline | None = None
    for start in tqdm(range(0, num_scenes, _SHARD), desc="drawing scenes", unit="shard"):
        file = folder / f"scenes_{start:06d}.safetensors"
        if not file.exists():
            flux = flux or FluxPipeline.from_pretrained(FLUX)
            scenes = [draw_scene(FIRST_SEED + i) for i in range(start, min(start + _SHARD, num_scenes))]
            rendered = [world.render_scene(scene, segmenter.SIDE) for scene in scenes]
            pixels = np.stack([np.asarray(one.image) for one in rendered])
            front = np.stack([one.masks.argmax(axis=0) - (one.masks.max(axis=0) == 0) for one in rendered]).astype(np.int8)
            drawn_over = draw_over(
                flux, pixels, [world.caption(scene) for scene in scenes], torch.Generator().manual_seed(FIRST_SEED + start)
            )
            tensors = {"pixels": torch.from_numpy(np.stack([pixels, drawn_over], axis=1)), "front": torch.from_numpy(front)}
            classes = [[placement.identity.class_name for placement in scene.placements] for scene in scenes]
            with replacing(file) as aside:
                save_tensors(tensors, aside, {"classes": json.dumps(classes)})


def load_pictures(folder: Path, num_scenes: int) -> Pictures:
    """Read the drawn pictures."""
    pixels, front, classes = [], [], []
    for start in range(0, num_scenes, _SHARD):
        with safe_open(folder / f"scenes_{start:06d}.safetensors", framework="pt") as file:
            pixels.append(file.get_tensor("pixels").numpy())
            front.append(file.get_tensor("front").numpy())
            classes += [tuple(names) for names in json.loads(file.metadata()["classes"])]
    return Pictures(np.concatenate(pixels), np.concatenate(front), classes)


def class_mask(front: np.ndarray, subjects: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where subjects of one class are seen, bool `[SIDE, SIDE]`, parted by seams, and these seams.

    A seam is a pixel of a subject that has one of another of them, farther in front, among its eight neighbours. It counts as background,
    so that individuals of a class which touch are still pieces of their own.
    """
    shown = np.isin(front, subjects)
    own = np.where(shown, front, -1)
    padded = np.pad(own, 1, constant_values=-1)
    side = len(own)
    foremost = np.max([padded[y : y + side, x : x + side] for y in range(3) for x in range(3)], axis=0)
    seam = shown & (foremost > own)
    return shown & ~seam, seam


def class_labels(front: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The class that is seen at each pixel, from 1, int64 `[SIDE, SIDE]`; 0 for the background and for seams."""
    labels = np.array([0, *(1 + world.CLASSES.index(name) for name in classes)])[1 + front]
    for name in {name for name in classes if classes.count(name) > 1}:
        labels[class_mask(front, [k for k, other in enumerate(classes) if other == name])[1]] = 0
    return labels


@dataclass(frozen=True)
class Batch:
    """Pictures of one step and what is asked of them.

    Attributes:
        pixels: float32 `[B, 3, SIDE, SIDE]` in [-1, 1].
        phrases: B, one of each.
        masks: float32 `[B, SIDE, SIDE]`, 1 where the answer is yes; nowhere for a class that is absent.
        weights: float32 of the same shape, of the pixels in the loss.
        labels: int64 `[B, SIDE, SIDE]`, the class that is seen at a pixel, see `class_labels`.
    """

    pixels: Tensor
    phrases: list[str]
    masks: Tensor
    weights: Tensor
    labels: Tensor


def draw_batch(pictures: Pictures, size: int, rng: np.random.Generator) -> Batch:
    """Scenes, rendered or drawn over, some mirrored, and for each a class that it shows or one that it does not."""
    rows = rng.choice(len(pictures.front), size, replace=False)
    phrases, masks, weights, labels = [], [], [], []
    for row in rows:
        labels.append(class_labels(pictures.front[row], pictures.classes[row]))
        present = rng.random() < PRESENT
        names = [name for name in world.CLASSES if (name in pictures.classes[row]) == present]
        name = names[rng.integers(len(names))]
        mask, seam = class_mask(pictures.front[row], [k for k, other in enumerate(pictures.classes[row]) if other == name])
        forms = segmenter.phrases(name)
        phrases.append(forms[rng.integers(len(forms))])
        masks.append(mask)
        weights.append(1 + SEAM_WEIGHT * seam)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    pixels = torch.from_numpy(pictures.pixels[rows, rng.integers(2, size=size)]).permute(0, 3, 1, 2).float() / 127.5 - 1
    mirror = (torch.rand(size, generator=generator) < 0.5)[:, None, None]

    def turned(values: Tensor) -> Tensor:
        """Those of mirrored pictures mirrored, `[B, ..., SIDE, SIDE]`."""
        return torch.where(mirror if values.ndim == 3 else mirror[:, None], values.flip(-1), values)

    wanted, weighed, seen = (turned(torch.from_numpy(np.stack(values))) for values in (masks, weights, labels))
    return Batch(augment(turned(pixels), generator), phrases, wanted.float(), weighed.float(), seen)


class ClassHead(nn.Module):
    """Which class each pixel of a patch shows, by the last layer's token; it helps the training and is left behind."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(width, (1 + len(world.CLASSES)) * patch**2)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of tokens `[B, N, width]` and labels `[B, SIDE, SIDE]`, the mean over pixels."""
        grid = segmenter.SIDE // self.patch
        logits = F.pixel_shuffle(self.linear(tokens).transpose(1, 2).unflatten(-1, (grid, grid)), self.patch)
        return F.cross_entropy(logits, labels)


def mask_loss(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Weighted binary cross-entropy, the mean over pixels, and one less the soft Dice coefficient where there is something to be found."""
    entropy = F.binary_cross_entropy_with_logits(logits, masks, weights)
    shares, present = logits.sigmoid(), masks.amax(dim=(1, 2)) > 0
    dice = 2 * (shares * masks).sum(dim=(1, 2)) / (shares + masks).sum(dim=(1, 2)).clamp(min=1)
    return 2 * entropy + (1 - dice[present]).mean()


def train(
    arguments: argparse.Namespace, pictures: Pictures, tokenizer: CLIPTokenizer, folder: Path
) -> tuple[CLIPSegForImageSegmentation, float]:
    """Train the segmenter, or go on: its picture tower by `ClassHead`, then its decoder alone, as CLIPSeg was trained.

    Returns:
        It with averaged weights, and the seconds that it took.
    """
    torch.manual_seed(arguments.seed)
    model = segmenter.build_segmenter().train()
    head = ClassHead(model.config.vision_config.hidden_size, model.config.vision_config.patch_size)
    modules: dict[str, nn.Module] = {"segmenter": model, "head": head}
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.02)
    average, clock = runs.MovingAverage(parameters, 0.99), runs.Clock(arguments.tower_steps + arguments.decoder_steps, None)
    file = folder / "checkpoint.pt"
    runs.load_checkpoint(file, modules, optimizer, average, clock)
    bar = tqdm(initial=clock.step, total=clock.steps, desc="segmenter", unit="step", mininterval=5.0)
    while clock.progress() < 1:
        at_tower = clock.step < arguments.tower_steps
        step, length = (clock.step, arguments.tower_steps) if at_tower else (clock.step - arguments.tower_steps, arguments.decoder_steps)
        rate = arguments.lr if at_tower else 2 * arguments.lr
        optimizer.param_groups[0]["lr"] = rate * runs.learning_rate(step, step / length, 50, 0.3)
        batch = draw_batch(pictures, arguments.batch_size, np.random.default_rng([arguments.seed, clock.step]))
        pixels = segmenter.normalize(batch.pixels)
        if at_tower:
            loss = head.loss(model.clip.vision_model(pixel_values=pixels).last_hidden_state[:, 1:], batch.labels)
        else:  # CLIPSeg's own forward lets no gradient into its towers
            tokens = tokenizer(batch.phrases, padding=True, return_tensors="pt")
            loss = mask_loss(model(pixel_values=pixels, **tokens).logits, batch.masks, batch.weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        average.update(parameters)
        clock.step += 1
        bar.update()
        if clock.step % 25 == 0 or clock.progress() == 1:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            runs.append_log(folder / "log.jsonl", step=clock.step, loss=loss.item(), seconds=clock.elapsed())
        if clock.step % _CHECKPOINT_EVERY == 0 or clock.progress() == 1:
            runs.save_checkpoint(file, modules, optimizer, average, clock)
    bar.close()
    with torch.no_grad():
        for name, value in average.values.items():
            parameters[name].copy_(value)
    return model.eval(), clock.elapsed()


def run(arguments: argparse.Namespace) -> None:
    """Draw, train, measure, write.

    Raises:
        OSError, ValueError: A flag will not do, or the folder is in use or was begun with other flags.
    """
    torch.set_num_threads(arguments.threads)
    work = arguments.output / "work"
    with FolderLock(arguments.output, "--output") as lock, without_tiny_numbers():
        lock.acquire()
        settings = {name: value for name, value in vars(arguments).items() if name not in _FREE}
        runs.check_begun(work / "settings.json", settings, str(arguments.output))
        draw_pictures(work / "pictures", arguments.num_scenes)
        tokenizer, folder = CLIPTokenizer.from_pretrained(segmenter.CLIP), arguments.output / "segmenter"
        model, seconds = train(arguments, load_pictures(work / "pictures", arguments.num_scenes), tokenizer, work)
        segmenter.save_segmenter(folder, model, tokenizer)
        record: dict[str, Any] = {
            "command": "python scripts/make_pocket_segmenter.py",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": settings,
            "hardware": hardware(),
            "commit": commit(),
            "versions": versions(),
            "world_digest": WORLD_DIGEST,
            "seconds": round(seconds, 1),
            "digest": weights_digest(folder / "model.safetensors"),
            "held_out": {},
        }
        found = ClipSegSegmenter(str(folder), torch.device("cpu"), torch.float32, SegmentationSettings().mask_threshold)
        for regime, least in (("distinct", 1), ("twins", 2)):
            for k in range(least, 5):
                record["held_out"].setdefault(regime, {})[str(k)] = measured = segmenter.measure(found, k, arguments.test_scenes, regime)
                print(regime, k, json.dumps(measured), flush=True)
        write_text(arguments.output / RECORD, json.dumps(record, indent=1) + "\n")
    print(f"segmenter: {folder}; what was done: {arguments.output / RECORD}")
