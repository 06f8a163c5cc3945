"""Training of the identity judge on endless random scenes."""

import argparse
import json

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mosaic.files import replacing
from scripts.pocket import judge as pocket_judge
from scripts.pocket import world

MIN_VISIBLE = 0.35  # subjects hidden more than this teach nothing about looks
REPEATED_CLASS_SHARE = 0.15  # scenes with several subjects of a class: they teach counting only
GRID = 16  # side of the judge's feature map
FIRST_TEST_SEED = 10_000_000


class Batch:
    """Pictures float32 `[B, 3, 64, 64]` and what is true of them; -1 in `looks` means not to be learned."""

    def __init__(self, seeds: range, test_subjects: int | None = None) -> None:
        count, classes = len(seeds), len(world.CLASSES)
        self.pictures = torch.empty(count, 3, pocket_judge.JUDGE_SIZE, pocket_judge.JUDGE_SIZE)
        self.looks = torch.full((count, classes, 3), -1)
        self.regions = torch.zeros(count, classes, GRID * GRID)
        self.counts = torch.zeros(count, classes, dtype=torch.long)
        self.visible = torch.zeros(count, classes)
        self.background = torch.empty(count, dtype=torch.long)
        self.scenes: list[world.Scene] = []
        for row, seed in enumerate(seeds):
            self._add(row, seed, test_subjects)

    def _add(self, row: int, seed: int, test_subjects: int | None) -> None:
        rng = np.random.default_rng([seed, 0x10D6])
        regime = "distinct" if test_subjects is not None or rng.random() >= REPEATED_CLASS_SHARE else "repeated"
        split = "heldout" if rng.random() < 0.3 else "train"
        scene = world.sample_scene(seed, split, test_subjects or int(rng.integers(1, 5)), regime)
        rendered = world.render_scene(scene, pocket_judge.JUDGE_SIZE)
        self.scenes.append(scene)
        self.pictures[row] = pocket_judge.to_tensor(np.asarray(rendered.image))
        self.background[row] = world.BACKGROUNDS.index(scene.background)
        cell = pocket_judge.JUDGE_SIZE // GRID
        for placement, mask, visible in zip(scene.placements, rendered.masks, rendered.visible_fraction, strict=True):
            c = world.CLASSES.index(placement.identity.class_name)
            share = mask.reshape(GRID, cell, GRID, cell).mean(axis=(1, 3)).ravel()
            self.regions[row, c] = torch.maximum(self.regions[row, c], torch.from_numpy(share).float())
            self.counts[row, c] += 1
            self.visible[row, c] = visible
            identity = placement.identity
            if visible >= MIN_VISIBLE:
                self.looks[row, c] = torch.tensor(
                    [
                        world.PALETTES.index(identity.palette),
                        world.PATTERNS.index(identity.pattern),
                        world.MARKINGS.index(identity.marking),
                    ]
                )
        self.looks[row, self.counts[row] > 1] = -1


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Mildly blur, recolour and roughen, as generated pictures may be."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = (draw(count, 1, 1, 1) - 0.4).clamp(min=0) * 1.2
    pictures = pictures.lerp(blurred, strength)
    gain, offset = 1 + 0.16 * (draw(count, 3, 1, 1) - 0.5), 0.12 * (draw(count, 3, 1, 1) - 0.5)
    noise = torch.randn(pictures.shape, generator=generator) * 0.12 * draw(count, 1, 1, 1) ** 2
    return (pictures * gain + offset + noise).clamp(-1, 1)


def judge_loss(verdict: pocket_judge.Verdict, batch: Batch, regions: Tensor) -> Tensor:
    """Sum of the heads' mean losses; looking at the subject is rewarded as well."""
    loss = F.cross_entropy(verdict.background, batch.background) * 0.2
    loss = loss + F.binary_cross_entropy_with_logits(verdict.presence, (batch.counts > 0).float()) * 0.5
    loss = loss + F.cross_entropy(verdict.count.flatten(0, 1), batch.counts.flatten()) * 0.3
    valid = batch.looks[..., 0] >= 0
    for index, logits in enumerate((verdict.palette, verdict.pattern, verdict.marking)):
        loss = loss + F.cross_entropy(logits[valid], batch.looks[..., index][valid])
    on_subject = (verdict.attention * regions).sum(-1)[valid]
    return loss - 0.3 * on_subject.clamp(min=1e-4).log().mean()


def train_step(
    judge: pocket_judge.Judge,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    generator: torch.Generator,
) -> float:
    """One update; returns the loss."""
    mirror = torch.rand(len(batch.pictures), generator=generator) < 0.5
    regions = batch.regions.unflatten(-1, (GRID, GRID))
    regions = torch.where(mirror[:, None, None, None], regions.flip(-1), regions).flatten(-2)
    pictures = torch.where(mirror[:, None, None, None], batch.pictures.flip(-1), batch.pictures)
    pictures = augment(pictures, generator).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        verdict = judge(pictures)
    loss = judge_loss(verdict, batch, regions)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(judge.parameters(), 2.0)
    optimizer.step()
    return loss.item()


def evaluate(judge: pocket_judge.Judge, scenes_per_count: int, first_seed: int = FIRST_TEST_SEED) -> dict[str, float]:
    """Share of subjects (at least half visible) recognised among eight candidates, for every number of subjects."""
    result: dict[str, float] = {}
    judge.eval()
    for subjects in range(1, 5):
        right, total = 0, 0
        batch = Batch(range(first_seed, first_seed + scenes_per_count), subjects)
        for row, scene in enumerate(batch.scenes):
            for placement in scene.placements:
                name = placement.identity.class_name
                if batch.visible[row, world.CLASSES.index(name)] < 0.5:
                    continue
                rng = np.random.default_rng([scene.seed, total])
                candidates = pocket_judge.make_candidates(placement.identity, rng)
                choice = int(judge.identify(batch.pictures[row : row + 1], name, candidates))
                right, total = right + (candidates[choice] == placement.identity), total + 1
        result[f"subjects_{subjects}"] = right / total
    return result


def run(args: argparse.Namespace) -> None:
    """Train, test, write the weights."""
    output = args.output or pocket_judge.WEIGHTS
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    judge = pocket_judge.Judge()
    for parameter in judge.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1)
    checkpoint, start = args.run_dir / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    args.run_dir.mkdir(parents=True, exist_ok=True)
    judge.train()
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="judge", mininterval=5)
    for step in progress:
        batch = Batch(range(step * args.batch_size, (step + 1) * args.batch_size))
        loss = train_step(judge, optimizer, batch, torch.Generator().manual_seed(step))
        schedule.step()
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            state = {"judge": judge.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            with replacing(checkpoint) as aside:
                torch.save(state | {"step": step + 1}, aside)
            print(step + 1, json.dumps(evaluate(judge, 40)), flush=True)
            judge.train()
    pocket_judge.save_judge(judge, output)
    accuracy = evaluate(pocket_judge.load_judge(output), args.test_scenes)
    (args.run_dir / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")
    print(f"wrote {output}; right among eight candidates: {json.dumps(accuracy)}")
