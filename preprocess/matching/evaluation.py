"""What preprocess/evaluate_matching.py does: extractors and filters measured where every correspondence is known."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mosaic.data import Manifest, Row
from mosaic.files import require_file, write_text
from mosaic.method.grids import Grid
from mosaic.weights.frozen import DTYPES
from preprocess.extractors import build_extractor
from preprocess.extractors.arguments import check_device, extractor_specs
from preprocess.extractors.protocol import Extractor
from preprocess.matching import matching
from preprocess.matching.benchmark import benchmark
from preprocess.matching.benchmark import table as benchmark_table
from preprocess.matching.figures import Figures, entries, figures
from preprocess.matching.figures import table as figure_table
from preprocess.matching.masks import subject_mask
from preprocess.matching.matching import Match, match_features
from preprocess.matching.metrics import ALPHAS, FilterCounts, Truth, cell_positions, filter_counts, pck
from preprocess.matching.rows import read_pictures
from preprocess.matching.samples import PairFeatures, ReferencePicture, accepted, masks_of, pair_features, sample_seed
from preprocess.matching.settings import MatchingSettings
from preprocess.matching.sweep import sweep_table, swept_specs

CORRECT = 0.1
SOFT_WINDOW = 2


class Filter(NamedTuple):
    """A filter under test: its name, the masks it is given, and its settings."""

    name: str
    target_mask: bool
    reference_mask: bool
    settings: MatchingSettings
    needs_several: bool = False


def filters() -> list[Filter]:
    """The filters measured; all but the first three work on top of both masks."""

    def masked(name: str, several: bool = False, **settings: Any) -> Filter:
        return Filter(name, True, True, MatchingSettings(**{"consensus": 0, **settings}), several)

    plain = MatchingSettings(consensus=0)
    return [
        Filter("no mask", False, False, plain),
        Filter("target mask", True, False, plain),
        Filter("reference mask", False, True, plain),
        masked("both masks"),
        masked("mutual nearest", cycle=0),
        *(masked(f"cycle within {cells}", cycle=cells) for cells in (1, 2, 4)),
        *(masked(f"affine within {cells}", affine=cells) for cells in (1, 2)),
        *(masked(f"similarity >= {value:g}", min_similarity=value) for value in (0.95, 0.99)),
        *(masked(f"margin >= {value:g}", min_margin=value) for value in (0.002, 0.01)),
        *(masked(f"consensus within {cells}", True, consensus=cells) for cells in (0, 1, 2)),
        masked("consensus within 1, cycle within 2", True, consensus=1, cycle=2),
    ]


class Pair(NamedTuple):
    """A target and one of its references: exact points, features per extractor, and the reference itself."""

    truth: Truth
    features: list[PairFeatures]
    reference: ReferencePicture


def pairs(manifest: Manifest, extractors: Sequence[Extractor], limit: int | None) -> Iterator[Pair]:
    """Yield all pairs of the first samples.

    Raises:
        FileNotFoundError: A sample has no points file.
        ValueError: A file is damaged.
    """
    settings = MatchingSettings()
    for index in tqdm(range(min(len(manifest), limit or len(manifest))), desc="matching", unit="sample"):
        row = manifest.row(index)
        pictures, points = read_pictures(manifest, row), exact_points(manifest, row)
        features = pair_features(pictures, extractors, settings, sample_seed(settings.seed, row.id))
        for k, reference in enumerate(pictures.references):
            u, v = points[k].long().unbind(1)
            size = (reference.image.height, reference.image.width)
            yield Pair(Truth(u, v, reference.grid, size, box_side(reference)), features[k], reference)


def exact_points(manifest: Manifest, row: Row) -> list[torch.Tensor]:
    """Points of a sample, per reference."""
    points = manifest.read_points(row)
    if points is None:
        raise FileNotFoundError(
            f"{row.place}.points: file not found: {row.points}. A data set with exact points is needed: scripts/make_pocket_world.py."
        )
    return points


def box_side(reference: ReferencePicture) -> float:
    """Longer side in px of the bounding box of what is not white; of the whole picture if all is white."""
    rows, columns = np.nonzero(subject_mask(reference.image, 0))
    sides = (np.ptp(rows) + 1, np.ptp(columns) + 1) if len(rows) else reference.image.size
    return float(max(sides))


def masked_matches(pair: Pair, target_mask: bool, reference_mask: bool) -> list[Match]:
    """Matches of a pair by every extractor, with or without its masks."""
    result = []
    for features in pair.features:
        on_target, on_reference = masks_of(pair.reference, features, MatchingSettings())
        target, reference = on_target if target_mask else None, on_reference if reference_mask else None
        result.append(match_features(features.target, features.reference, target_mask=target, reference_mask=reference))
    return result


def evaluate(manifest: Manifest, names: Sequence[str], extractors: Sequence[Extractor], limit: int | None) -> dict[str, Any]:
    """Measure PCK of every extractor, and every filter with every extractor, or with all of them where it needs several.

    Returns:
        JSON values: "pck", "filters" and "figures", lists of entries.
    """
    errors: dict[tuple[str, bool], list[torch.Tensor]] = {(name, soft): [] for name in names for soft in (False, True)}
    counts: dict[tuple[str, str], FilterCounts] = {}
    told: list[tuple[str, Figures]] = []
    for pair in pairs(manifest, extractors, limit):
        matches = {masks: masked_matches(pair, *masks) for masks in ((a, b) for a in (False, True) for b in (False, True))}
        for name, features, match in zip(names, pair.features, matches[True, True], strict=True):
            hard = cell_positions(match.index, pair.truth.grid)
            mask = masks_of(pair.reference, features, MatchingSettings())[1]
            soft = matching.soft_argmax(features.target, features.reference, match.index, reference_mask=mask, window=SOFT_WINDOW)
            errors[name, False].append(pair.truth.errors(hard.cpu()))
            errors[name, True].append(pair.truth.errors(soft.cpu()))
        target_grid = Grid(*pair.features[0].target.shape[1:])
        told += figures(pair.truth, pair.reference, names, [match.to("cpu") for match in matches[True, True]], target_grid, CORRECT)
        for tested in filters():
            found = matches[tested.target_mask, tested.reference_mask]
            for who, chosen in _participants(names, found, tested.needs_several):
                counts[tested.name, who] = counts.get((tested.name, who), FilterCounts()) + _count(pair, tested, chosen)
    return {
        "pck": [{"extractor": name, "soft_argmax": soft, **asdict(pck(own))} for (name, soft), own in errors.items()],
        "filters": [
            {"filter": name, "extractors": who, **asdict(count), "precision": count.precision, "recall": count.recall}
            for (name, who), count in counts.items()
        ],
        "figures": entries(told),
    }


def tables(result: dict[str, Any]) -> str:
    """Markdown tables in percent."""
    names = [f"{alpha:g}" for alpha in ALPHAS]
    head = " | ".join(f"PCK@{name} per point | per pair" for name in names)
    lines = [f"| extractor | soft-argmax | {head} | points | pairs |", "|---" * (4 + 2 * len(names)) + "|"]
    for entry in result["pck"]:
        cells = [f"{100 * entry[kind][name]:.1f}" for name in names for kind in ("per_point", "per_pair")]
        soft = f"window {SOFT_WINDOW}" if entry["soft_argmax"] else "no"
        lines.append(f"| {entry['extractor']} | {soft} | {' | '.join(cells)} | {entry['num_points']} | {entry['num_pairs']} |")
    lines += ["", "| filter | extractors | precision | recall | kept |", "|---|---|---|---|---|"]
    for entry in result["filters"]:
        shares = f"{100 * entry['precision']:.1f} | {100 * entry['recall']:.1f}"
        lines.append(f"| {entry['filter']} | {entry['extractors']} | {shares} | {entry['kept']} |")
    return "\n".join([*lines, "", *figure_table(result["figures"])])


def _participants(names: Sequence[str], matches: list[Match], several: bool) -> list[tuple[str, list[Match]]]:
    """Who a filter is measured with: each extractor by itself, or all together (nobody if there is one only)."""
    if several:
        return [(" + ".join(names), matches)] if len(names) > 1 else []
    return [(name, [match]) for name, match in zip(names, matches, strict=True)]


def _count(pair: Pair, tested: Filter, matches: list[Match]) -> FilterCounts:
    """What a filter leaves of one pair."""
    target_grid = Grid(*pair.features[0].target.shape[1:])
    keep = accepted(matches, target_grid, pair.truth.grid, tested.settings)
    return filter_counts(keep.cpu(), cell_positions(matches[0].index, pair.truth.grid).cpu(), pair.truth, CORRECT)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        FileNotFoundError, OSError, ValueError: A flag, the data or an extractor will not do.
    """
    require_file(arguments.output, "--output")
    device = check_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.benchmark:
        if min(*arguments.sides, arguments.channels, arguments.repeats) < 1:
            raise ValueError("--sides, --channels and --repeats must be at least 1.")
        result: Any = benchmark(arguments.sides, arguments.channels, str(device), arguments.repeats)
        text = benchmark_table(result)
    else:
        if arguments.data is None or (arguments.limit is not None and arguments.limit < 1):
            raise ValueError("--data must name a data set, and --limit be at least 1.")
        manifest, dtype = Manifest(arguments.data, arguments.split), DTYPES[arguments.dtype]
        if arguments.sweep:
            result = {
                label: evaluate(manifest, [label], [build_extractor(spec, device, dtype)], arguments.limit)
                for label, spec in swept_specs(arguments).items()
            }
            text = sweep_table(result)
        else:
            specs = extractor_specs(arguments)
            extractors = [build_extractor(spec, device, dtype) for spec in specs]
            result = evaluate(manifest, [spec.name for spec in specs], extractors, arguments.limit)
            text = tables(result)
    print(text)
    if arguments.output:
        write_text(arguments.output, json.dumps(result, indent=2) + "\n")
