"""Find the correspondences of a data set: accelerate launch preprocess/match.py --data DIR --extractors dift,dinov2

Reads a data set in the multi-reference format (preprocess/FORMAT.md) and writes the points files its manifest names; the manifest stays as
it is. Every process takes its own share of the samples; finished samples are skipped, so an interrupted run goes on when started again.
Plain `python preprocess/match.py` runs one process. Neither the number of processes nor interruptions change the results.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import PartialState
from tqdm import tqdm

from mosaic.data import Manifest, Row
from mosaic.data.multi_reference.repository import Repository
from mosaic.files import in_one_line
from mosaic.reports.figures import contact_sheet, save_picture
from preprocess.extractors import build_extractor
from preprocess.extractors.arguments import add_extractor_arguments, check_device, extractor_specs
from preprocess.extractors.weights import DTYPES
from preprocess.matching.layouts import CompactLayout, Layout, ReleaseLayout
from preprocess.matching.rows import read_pictures
from preprocess.matching.run_settings import claim_settings, run_settings
from preprocess.matching.samples import sample_seed
from preprocess.matching.settings import MatchingSettings
from preprocess.matching.sheets import correspondence_panel

FILTERS = ("consensus", "cycle", "min_similarity", "min_margin", "soft_argmax", "temperature", "unique_u")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Flags of matching have no default here: `MatchingSettings` has it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--split", default="train", help="split to match (default: train)")
    parser.add_argument("--limit", type=int, help="match only the first samples of the split")
    parser.add_argument("--output", type=Path, help="folder for the results instead of the data set's own")
    parser.add_argument("--layout", choices=("compact", "release"), default="compact", help="points files, or released coordinate files")
    parser.add_argument("--contact-sheet", type=int, default=0, metavar="N", help="draw N samples with correspondence lines as a PNG")
    add_extractor_arguments(parser, "dift,dinov2")
    group = parser.add_argument_group("matching", argument_default=argparse.SUPPRESS)
    group.add_argument("--score", choices=("cosine", "dot"), help="dot: raw dot product, as in the release (default: cosine)")
    group.add_argument("--consensus", type=int, metavar="CELLS", help="tolerance between extractors; 0: exact equality (default: 1)")
    group.add_argument(
        "--cycle", type=int, metavar="CELLS", help="largest miss on the way there and back; 0: mutual nearest (default: off)"
    )
    group.add_argument("--min-similarity", type=float, metavar="COSINE", help="least cosine of a match (default: off)")
    group.add_argument("--min-margin", type=float, metavar="COSINE", help="least lead over the best distant cell (default: off)")
    group.add_argument("--soft-argmax", type=int, metavar="CELLS", help="refine u in a window of this radius (default: off)")
    group.add_argument("--temperature", type=float, help="of the refinement (default: 0.02)")
    group.add_argument(
        "--white-threshold", type=int, metavar="LEVELS", help="reference pixels this near to white are background (default: 5)"
    )
    group.add_argument(
        "--whole-references", dest="white_threshold", action="store_const", const=None, help="near-white pixels are no background"
    )
    group.add_argument("--background", choices=("keep", "black"), help="what extractors see outside the masks (default: keep)")
    group.add_argument("--unique-u", action="store_true", help="one point per reference cell")
    group.add_argument(
        "--grid", type=parse_grid, metavar="ROWSxCOLUMNS", help="match on this grid, then vote (default: the manifest's grids)"
    )
    group.add_argument("--chunk-size", type=int, metavar="CELLS", help="target cells held in memory at a time (default: 1024)")
    group.add_argument("--seed", type=int, help="of the extractors' noise (default: 0)")
    return parser.parse_args(argv)


def parse_grid(text: str) -> list[int]:
    """Read "64x64" as rows and columns."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be rows and columns such as 64x64, got {text}")
    return [int(side) for side in sides]


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


def run(arguments: argparse.Namespace, state: PartialState) -> str:
    """Match this process's share; returns a summary.

    Raises:
        FileNotFoundError, ValueError: Data, models or settings do not fit.
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
    device = check_device(arguments.device or str(state.device))
    extractors = [build_extractor(spec, device, DTYPES[arguments.dtype]) for spec in specs]
    wanted = run_settings(arguments, settings, specs, extractors, device.type)
    with state.main_process_first():
        claim_settings(layout, wanted, (manifest.row(index) for index in range(count)))
    share = range(state.process_index, count, state.num_processes)
    todo = [index for index in share if not layout.is_finished(manifest.row(index))]
    progress = tqdm(
        todo, desc="matching", unit="sample", initial=len(share) - len(todo), total=len(share), disable=not state.is_main_process
    )
    num_references = num_empty = 0
    for row in (manifest.row(index) for index in progress):
        counts = layout.match(row, read_pictures(manifest, row), extractors, sample_seed(settings.seed, row.id))
        num_references, num_empty = num_references + len(counts), num_empty + counts.count(0)
    if arguments.contact_sheet and state.is_main_process:
        rows = [manifest.row(index) for index in share[: arguments.contact_sheet]]
        draw_sheet(manifest, rows, layout, root / "contact_sheet.png")
    return (
        f"{len(todo)} samples matched, {len(share) - len(todo)} were finished before; "
        f"{num_empty} of {num_references} references have no points ({root})"
    )


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


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    # Without `cpu`, accelerate takes several processes on a machine without an accelerator for one each.
    on_cpu = arguments.device.startswith("cpu") if arguments.device else not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    try:
        with one_thread():
            summary = run(arguments, state)
    except (ValueError, OSError) as error:
        print(f"match.py: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        state.destroy_process_group()
    print(f"process {state.process_index + 1} of {state.num_processes}: {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
