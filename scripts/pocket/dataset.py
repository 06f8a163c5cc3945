"""Scenes of the pocket world as a multi-reference dataset (preprocess/FORMAT.md), or as plain folders of pictures."""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import asdict
from itertools import starmap
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mosaic.data import DatasetWriter, ReferenceRecord, SampleRecord
from mosaic.locks import new_folder
from scripts.pocket import world
from scripts.pocket.workers import drawing_processes

REFERENCE_GRID = 32
_DRAWN_AT_ONCE = 800


def make_sample(seed: int, split: str, num_subjects: int, scene_size: int, reference_size: int, regime: str | None = None) -> SampleRecord:
    """Draw one sample; points are found on the pixels of the scene and on a 32 x 32 grid of each reference."""
    scene = world.sample_scene(seed, split, num_subjects, regime)
    rendered, order = world.render_scene(scene, scene_size), world.reference_order(scene)
    references = [
        ReferenceRecord(
            image=world.render_reference(scene.placements[k].identity, reference_size),
            phrase=scene.placements[k].identity.class_name,
            points=world.correspondences(scene, k, REFERENCE_GRID, scene_size, reference_size),
            mask=rendered.masks[k],
        )
        for k in order
    ]
    return SampleRecord(
        id=f"{split}-{seed:08d}",
        split=split,
        prompt=world.caption(scene),
        target=rendered.image,
        references=references,
        reference_grid=(REFERENCE_GRID, REFERENCE_GRID),
        target_grid=(scene_size, scene_size),
        metadata={"world": "pocket", "scene": asdict(scene), "subjects": order},
    )


def write_dataset(
    output: Path,
    num_samples: int,
    num_heldout: int,
    max_subjects: int,
    seed: int,
    scene_size: int = 64,
    reference_size: int = world.REFERENCE_SIZE,
    shares: world.RegimeShares = world.USUAL,
    workers: int = 1,
) -> None:
    """Write `num_samples` scenes of the split "train" and `num_heldout` of "heldout", of 1..`max_subjects` subjects (evenly mixed).

    `shares` of the scenes of both splits are twins or mixed. With several `workers`, that many processes draw what this one writes.

    Raises:
        FileExistsError: `output` exists.
        ValueError: a number is out of range.
    """
    if num_samples < 0 or num_heldout < 0 or num_samples + num_heldout < 1:
        raise ValueError(f"--num-samples and --num-heldout must not be negative, nor both 0; got {num_samples} and {num_heldout}")
    if not 1 <= max_subjects <= world.MAX_SUBJECTS:
        raise ValueError(f"--max-subjects must be within 1..{world.MAX_SUBJECTS}; got {max_subjects}")
    if seed < 0:
        raise ValueError(f"--seed must not be negative; got {seed}")
    if workers < 1:
        raise ValueError(f"--workers must be at least 1; got {workers}")
    with DatasetWriter(output) as writer, drawing_processes(workers) if workers > 1 else nullcontext() as pool:
        for split, count in (("train", num_samples), ("heldout", num_heldout)):
            numbers = [1 + i % max_subjects for i in range(count)]
            scenes = [
                (seed + i, split, subjects, scene_size, reference_size, shares.draw(seed + i, subjects))
                for i, subjects in enumerate(numbers)
            ]
            for sample in tqdm(_draw(scenes, pool), total=count, desc=f"drawing {split} scenes", unit="scene"):
                writer.add(sample)


def _draw(scenes: Sequence[tuple[Any, ...]], pool: Executor | None) -> Iterator[SampleRecord]:
    """The samples of `make_sample`'s arguments, in order; of a pool's processes some hundreds at a time, for they wait in memory."""
    if pool is None:
        yield from starmap(make_sample, scenes)
        return
    for start in range(0, len(scenes), _DRAWN_AT_ONCE):
        yield from pool.map(make_sample, *zip(*scenes[start : start + _DRAWN_AT_ONCE], strict=True), chunksize=8)


def write_folders(
    output: Path,
    num_samples: int,
    max_subjects: int,
    seed: int,
    scene_size: int,
    reference_size: int,
    shares: world.RegimeShares = world.USUAL,
) -> None:
    """Write scenes as people keep their own pictures: a folder each, of target.png, ref_K.png and prompt.txt, without points or masks.

    Raises:
        FileExistsError: `output` exists.
    """
    with new_folder(output, "--output") as aside:
        for i in tqdm(range(num_samples), desc="drawing scenes", unit="scene"):
            subjects = 1 + i % max_subjects
            sample = make_sample(seed + i, "train", subjects, scene_size, reference_size, shares.draw(seed + i, subjects))
            folder = aside / sample.id
            folder.mkdir(parents=True)
            pictures = {"target": sample.target} | {f"ref_{k}": reference.image for k, reference in enumerate(sample.references)}
            for name, picture in pictures.items():
                assert isinstance(picture, Image.Image), "drawn here"
                picture.save(folder / f"{name}.png")
            (folder / "prompt.txt").write_text(sample.prompt + "\n")


def run(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        FileExistsError, ValueError: The folder is there already, or a number is out of range.
    """
    shares = world.RegimeShares(args.twins_share, args.mixed_share)
    if args.folders:
        write_folders(args.output, args.num_samples, args.max_subjects, args.seed, args.scene_size, args.reference_size, shares)
        print(f"wrote {args.num_samples} folders to {args.output}")
        return
    write_dataset(
        args.output,
        args.num_samples,
        args.num_heldout,
        args.max_subjects,
        args.seed,
        args.scene_size,
        args.reference_size,
        shares,
        args.workers,
    )
    print(f"wrote {args.num_samples} + {args.num_heldout} samples to {args.output}")
