"""What preprocess/compose.py does: samples of K >= 2 references out of the single-subject samples of a data set."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mosaic.config.loading import Config, load_config
from mosaic.data import DatasetWriter, Manifest, ReferenceRecord, Row, SampleRecord, sample_id
from mosaic.files import parse_json
from mosaic.images import decode_image
from mosaic.method.grids import Grid
from mosaic.pipeline.prompt_lengths import TextWindow, cut_captions
from preprocess.composition import (
    Panel,
    cell_size,
    compose_mask,
    compose_picture,
    compose_points,
    draw_layout,
    has_square_cells,
    join_captions,
)


@dataclass(frozen=True)
class Candidates:
    """The single-subject samples of a data set, in groups that can share a canvas.

    Attributes:
        manifest: The data set.
        groups: Row numbers of samples whose targets have one grid, and that grid.
    """

    manifest: Manifest
    groups: list[tuple[Grid, np.ndarray]]

    def draw(self, num_panels: int, rng: np.random.Generator) -> tuple[Grid, list[int]]:
        """Draw different samples of one group, groups in proportion to their size."""
        sizes = np.array([len(rows) if len(rows) >= num_panels else 0 for _, rows in self.groups], float)
        grid, rows = self.groups[int(rng.choice(len(sizes), p=sizes / sizes.sum()))]
        return grid, [int(row) for row in rng.choice(rows, num_panels, replace=False)]


def compose(
    src: str | Path, dest: Path, num_samples: int, references: Sequence[int], seed: int = 0, size: int = 1024, split: str = "train"
) -> None:
    """Write `num_samples` composed samples.

    Args:
        src: Data set with single-subject samples.
        dest: Folder to create.
        num_samples: Samples to write.
        references: Values of K, evenly drawn.
        seed: Seed of everything drawn.
        size: Largest side of the targets in pixels.
        split: Split that is taken, and that the result belongs to.

    Raises:
        FileExistsError: `dest` exists.
        FileNotFoundError, ValueError: `src` is no data set, or cannot be composed.
    """
    with DatasetWriter(dest) as writer:
        candidates = find_candidates(Manifest(src, split), max(references))
        for sample in tqdm(
            compose_samples(candidates, num_samples, references, seed, size, split), desc="composing", unit="sample", total=num_samples
        ):
            writer.add(sample)


def find_candidates(manifest: Manifest, num_panels: int) -> Candidates:
    """Group the single-subject samples by the grid of their targets.

    Raises:
        ValueError: No group has `num_panels` samples.
    """
    geometries = np.array(manifest.geometries)
    fitting = np.array([g.target_height == 0 or has_square_cells(g[2:4], Grid(*g[:2])) for g in manifest.geometries])
    single = np.flatnonzero((manifest.num_references == 1) & fitting[manifest.geometry])
    grids = geometries[manifest.geometry[single], :2]
    groups = [(Grid(*map(int, grid)), single[(grids == grid).all(axis=1)]) for grid in np.unique(grids, axis=0)]
    if max((len(rows) for _, rows in groups), default=0) < num_panels:
        raise ValueError(
            f"{manifest.path}: must hold at least {num_panels} single-subject samples with one target_grid, whose cells are about square; "
            f"found {len(single)} of {len(manifest)} samples in {len(groups)} groups."
        )
    return Candidates(manifest, groups)


def compose_samples(
    candidates: Candidates, num_samples: int, references: Sequence[int], seed: int, size: int, split: str
) -> Iterator[SampleRecord]:
    """Yield the samples; number i is a pure function of the data set, the seed and i."""
    matched: bool | None = None
    for number in range(num_samples):
        rng = np.random.default_rng([seed, number])
        grid, rows = candidates.draw(int(rng.choice(references)), rng)
        parts = [(row, *read_panel(candidates.manifest, row)) for row in (candidates.manifest.row(index) for index in rows)]
        for row, panel, _ in parts:
            if matched is None:
                matched = panel.points is not None
            if matched != (panel.points is not None):
                raise ValueError(
                    f"{row.place}.points: must be there for all single-subject samples or for none, since a composed sample is matched "
                    "as a whole; this one differs from those before. Run preprocess/match.py on the data set first."
                )
        yield _sample(parts, grid, {"source": "composition", "seed": seed, "number": number}, rng, size, split)


def read_panel(manifest: Manifest, row: Row) -> tuple[Panel, bytes]:
    """Read target, points and mask of a single-subject sample, and its reference as the file's content.

    Raises:
        FileNotFoundError, ValueError: A file is missing or damaged; but points may be missing.
    """
    entry = row.references[0]

    target = manifest.read_target(row)
    if not has_square_cells((target.height, target.width), row.target_grid):
        raise ValueError(f"{row.place}.target_grid: its cells must be about square to be composed, got a target of {target.size} px.")
    mask = manifest.read_mask(row, 0, target)
    points = manifest.read_points(row)
    reference = manifest.folder.read(entry.image, f"{row.place}.references[0].image")
    return Panel(row.prompt, target, row.target_grid, None if points is None else points[0].numpy(), mask), reference


def _sample(
    parts: Sequence[tuple[Row, Panel, bytes]], grid: Grid, metadata: dict[str, object], rng: np.random.Generator, size: int, split: str
) -> SampleRecord:
    """Put drawn samples on one canvas."""
    panels = [panel for _, panel, _ in parts]
    layout = draw_layout(len(panels), grid, rng)
    cell = cell_size(panels, layout.side, size)
    target = compose_picture(panels, layout, cell)
    prompt = join_captions([panel.prompt for panel in panels], layout, rng)
    references = []
    for (row, panel, data), corner in zip(parts, layout.corners, strict=True):
        entry = row.references[0]
        references.append(
            ReferenceRecord(
                image=data,
                phrase=entry.phrase,
                points=None if panel.points is None else compose_points(panel.points, grid, corner, layout.side),
                mask=None if panel.mask is None else compose_mask(panel.mask, grid, corner, layout.side, cell),
                grid=entry.grid,
            )
        )
    pictures = [decode_image(data, row.references[0].image) for row, _, data in parts]
    return SampleRecord(
        id=sample_id([target, *pictures], prompt),
        split=split,
        prompt=prompt,
        target=target,
        references=references,
        reference_grid=parts[0][0].references[0].grid,
        target_grid=(layout.side, layout.side),
        metadata=metadata
        | {
            "layout": {"slots": layout.slots, "side": layout.side, "cell": cell, "margin_colour": layout.colour},
            "panels": [
                {"id": row.id, "corner": corner, "grid": grid, "metadata": parse_json(row.metadata, f"{row.place}.metadata")}
                for (row, _, _), corner in zip(parts, layout.corners, strict=True)
            ],
        },
    )


def report_captions(dest: Path, split: str, window: TextWindow) -> None:
    """Say which of the composed captions will be cut."""
    manifest = Manifest(dest, split)
    found = cut_captions(window, list(zip(manifest.column("id"), manifest.column("prompt"), strict=True)))
    if found.cut:
        print(f"warning: {found}", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises as `compose`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load_config(args.config).model if args.config else None
    window = TextWindow.of_model(model.pretrained, model.text_length) if model else TextWindow.of_words(Config().model.text_length)
    compose(args.src, args.dest, args.num_samples, args.references, args.seed, args.size, args.split)
    print(f"wrote {args.num_samples} samples to {args.dest}")
    report_captions(args.dest, args.split, window)
