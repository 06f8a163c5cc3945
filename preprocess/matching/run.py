"""What preprocess/match.py does: the points of a data set, each process of its own share."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from mosaic.data import Manifest, Row
from mosaic.data.multi_reference.repository import Repository
from mosaic.locks import FolderLock, acquire_for_all
from mosaic.reports.figures import contact_sheet, save_picture
from mosaic.weights.frozen import DTYPES
from preprocess.extractors import build_extractor, weakness
from preprocess.extractors.arguments import check_device, extractor_specs
from preprocess.extractors.protocol import Extractor
from preprocess.matching.layouts import CompactLayout, Layout, ReleaseLayout
from preprocess.matching.rows import read_pictures
from preprocess.matching.run_settings import claim_settings, run_settings
from preprocess.matching.samples import sample_seed
from preprocess.matching.settings import MatchingSettings
from preprocess.matching.sheets import correspondence_panel

FILTERS = ("consensus", "cycle", "affine", "min_similarity", "min_margin", "soft_argmax", "temperature", "unique_u")


def matching_settings(arguments: argparse.Namespace) -> MatchingSettings:
    """Return the settings of matching that the command line asks for.

    Raises:
        ValueError: A value is out of range, or a filter was asked for in the released layout, which cannot hold its result.
    """
    given = {name: getattr(arguments, name) for name in MatchingSettings.model_fields if hasattr(arguments, name)}
    filters = [name for name in FILTERS if name in given]
    if arguments.layout == "release" and filters:
        raise ValueError(
            f"--{filters[0].replace('_', '-')} must not be given with --layout release: its files hold a match for every target cell, "
            "and consensus is left to their reader."
        )
    return MatchingSettings(**given)


def match(arguments: argparse.Namespace, state: PartialState) -> str:
    """Match this process's share; returns a summary.

    Raises:
        FileNotFoundError, ValueError: Data, models or settings do not fit, or another run is matching there.
    """
    settings, specs = matching_settings(arguments), extractor_specs(arguments)
    if (arguments.limit is not None and arguments.limit < 1) or arguments.contact_sheet < 0:
        raise ValueError(f"--limit must be at least 1 and --contact-sheet at least 0, got {arguments.limit} and {arguments.contact_sheet}.")
    root = arguments.output or arguments.data
    layout = CompactLayout(root, settings) if arguments.layout == "compact" else ReleaseLayout(root, settings, [s.name for s in specs])
    manifest = Manifest(arguments.data, arguments.split)
    if isinstance(manifest.folder, Repository):
        raise ValueError(
            f"{manifest.path}: is in the repository form, and matching writes files into a folder. Write it as one first: "
            "`python preprocess/convert.py repository`."
        )
    count = min(len(manifest), arguments.limit or len(manifest))
    check_grids(manifest, count, settings, arguments.layout)
    note = weakness(spec.name for spec in specs)
    if note and state.is_main_process:
        print(f"match.py: note: {note}.", file=sys.stderr)
    device = check_device(arguments.device or str(state.device))
    with FolderLock(root, "--output" if arguments.output else "--data") as lock:
        acquire_for_all(lock, state)
        extractors = [build_extractor(spec, device, DTYPES[arguments.dtype]) for spec in specs]
        wanted = run_settings(arguments, settings, specs, extractors, device.type)
        with state.main_process_first():
            claim_settings(layout, wanted, (manifest.row(index) for index in range(count)))
        summary = match_share(manifest, range(state.process_index, count, state.num_processes), layout, extractors, settings.seed, state)
        if arguments.contact_sheet and state.is_main_process:
            rows = [manifest.row(index) for index in range(0, count, state.num_processes)[: arguments.contact_sheet]]
            draw_sheet(manifest, rows, layout, root / "contact_sheet.png")
        state.wait_for_everyone()  # the lock is the main process's
    return f"{summary} ({root})"


def match_share(manifest: Manifest, share: range, layout: Layout, extractors: Sequence[Extractor], seed: int, state: PartialState) -> str:
    """Match what is not finished of a share of the samples; returns a summary."""
    todo, again, unknown = [], [], 0
    for index in tqdm(share, desc="looking at what is finished", unit="sample", disable=not state.is_main_process, leave=False):
        row = manifest.row(index)
        if not layout.is_finished(row):
            todo.append(index)
            continue
        made_of = layout.pictures_of(row)
        unknown += made_of is None
        if made_of is not None and made_of != manifest.digest(row):
            again.append(row.id)
            todo.append(index)
    progress = tqdm(
        todo, desc="matching", unit="sample", initial=len(share) - len(todo), total=len(share), disable=not state.is_main_process
    )
    num_references = num_empty = num_hidden = 0
    for row in (manifest.row(index) for index in progress):
        digest = manifest.digest(row)  # before the pictures are read, so that a change until then shows the next time
        pictures = read_pictures(manifest, row)
        num_hidden += sum(one.target_mask is not None and not one.target_mask.any() for one in pictures.references)
        counts = layout.match(row, pictures, digest, extractors, sample_seed(seed, row.id))
        num_references, num_empty = num_references + len(counts), num_empty + counts.count(0)
    changed = f", {len(again)} of them again, for their pictures or grids have changed ({shown_ids(again)})" if again else ""
    hidden = f", {num_hidden} of them since their masks are empty" if num_hidden else ""
    kept = f", {unknown} of these by an earlier version, which did not note their pictures" if unknown else ""
    return (
        f"{len(todo)} samples matched{changed}, {len(share) - len(todo)} were finished before{kept}; "
        f"{num_empty} of {num_references} references have no points{hidden}"
    )


def shown_ids(ids: Sequence[str], most: int = 3) -> str:
    """The first few ids of many."""
    return ", ".join(ids[:most]) + (", ..." if len(ids) > most else "")


def check_grids(manifest: Manifest, count: int, settings: MatchingSettings, layout: str) -> None:
    """Raise ValueError for the first sample to whose grids points found on `settings.grid` cannot be carried."""
    if settings.grid is None or layout == "release":
        return
    for row in (manifest.row(index) for index in range(count)):
        for name, grid in (("target_grid", row.target_grid), *((f"references[{k}]: grid", r.grid) for k, r in enumerate(row.references))):
            if settings.grid[0] % grid.rows or settings.grid[1] % grid.columns:
                raise ValueError(
                    f"{row.place}.{name} is {grid.rows} x {grid.columns}, of which --grid must be a whole multiple in both sides, "
                    f"got {settings.grid[0]} x {settings.grid[1]}."
                )


def draw_sheet(manifest: Manifest, rows: Sequence[Row], layout: Layout, path: Path) -> None:
    """Draw samples of this process's share with their points."""
    panels = []
    for row in rows:
        pictures = read_pictures(manifest, row)
        references = [reference.image for reference in pictures.references]
        panels.append(correspondence_panel(pictures.target, references, **layout.drawn_points(row)))
    save_picture(contact_sheet(panels, columns=3), path)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: sums then have one order, so that the machine's cores do not change results. More processes use more cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises as `match`."""
    # Without `cpu`, accelerate takes several processes on a machine without an accelerator for one each.
    on_cpu = arguments.device.startswith("cpu") if arguments.device else not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))  # the first process to end waits for the last one
    try:
        with one_thread():
            summary = match(arguments, state)
    finally:
        state.destroy_process_group()
    print(f"process {state.process_index + 1} of {state.num_processes}: {summary}")
