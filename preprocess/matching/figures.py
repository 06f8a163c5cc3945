"""What the doctor's figures are for points that are known to be right or wrong: where its thresholds come from."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mosaic.data.placement import subject_cells
from mosaic.data.quality import coherence, coverage
from mosaic.method.grids import Grid
from preprocess.matching.matching import NO_MATCH, Match, points_from_index
from preprocess.matching.metrics import Truth, cell_positions
from preprocess.matching.samples import ReferencePicture, accepted, match_scores
from preprocess.matching.settings import MatchingSettings

WRONG = {"exact": 0.0, "a fifth at random": 0.2, "half at random": 0.5, "all at random": 1.0}
"""Points made of the exact ones, by the share of them whose u is exchanged for that of another point."""
QUANTILE = 0.05
_FILTERS = {"": MatchingSettings(), ", cycle within 2": MatchingSettings(cycle=2)}


@dataclass(frozen=True)
class Figures:
    """Of the points of one reference: the share that is right, and what can be told of them without the truth."""

    right: float
    coherence: float | None
    coverage: float | None
    cyclic: float | None = None
    agreement: float | None = None


def figures(
    truth: Truth, reference: ReferencePicture, names: Sequence[str], matches: Sequence[Match], target_grid: Grid, correct: float
) -> Iterator[tuple[str, Figures]]:
    """Yield the figures of exact and spoilt points, and of what each extractor and all of them together find, by name.

    Args:
        truth: The exact points of the pair.
        reference: The reference.
        names: Of the extractors.
        matches: Of each of them, with both masks.
        target_grid: Grid of v.
        correct: Largest error of a right match, in units of the subject's box.
    """
    subject = subject_cells(reference.image, truth.grid)

    def told(pairs: Tensor) -> tuple[float | None, float | None]:
        return coherence(pairs, truth.grid, target_grid), coverage(pairs[:, 0], subject, truth.grid)

    for name, share in WRONG.items():
        pairs = _spoilt(truth, share)
        yield name, Figures((pairs[:, 0] == truth.u).float().mean().item(), *told(pairs))
    together = [(" + ".join(names), matches)] if len(names) > 1 else []
    for who, chosen in [*((name, [match]) for name, match in zip(names, matches, strict=True)), *together]:
        scores = match_scores(chosen, target_grid, truth.grid, MatchingSettings())
        for words, settings in _FILTERS.items():
            keep = accepted(chosen, target_grid, truth.grid, settings) & (chosen[0].index != NO_MATCH)
            pairs = points_from_index(chosen[0].index, keep)
            hits = keep[truth.v] & (truth.errors(cell_positions(chosen[0].index, truth.grid)) <= correct)
            if len(pairs):
                own = Figures(hits.sum().item() / len(pairs), *told(pairs), scores.get("cyclic"), scores.get("agreement"))
                yield f"{who}{words}", own


def entries(found: Sequence[tuple[str, Figures]]) -> list[dict[str, Any]]:
    """Per name, of every figure: mean, 5th and 95th percentile over the references that have it, as JSON types."""
    result = []
    for name in dict.fromkeys(name for name, _ in found):
        own = [asdict(figures) for other, figures in found if other == name]
        entry: dict[str, Any] = {"points": name, "references": len(own)}
        for figure in own[0]:
            values = [one[figure] for one in own if one[figure] is not None]
            entry[figure] = [float(np.mean(values)), *np.quantile(values, [QUANTILE, 1 - QUANTILE]).tolist()] if values else None
        result.append(entry)
    return result


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: means, and the range in brackets."""
    columns = [name for name in found[0] if name not in ("points", "references")]
    lines = [f"| points | {' | '.join(columns)} | references |", "|---" * (len(columns) + 2) + "|"]
    for entry in found:
        cells = ["" if (own := entry[name]) is None else f"{own[0]:.2f} [{own[1]:.2f}, {own[2]:.2f}]" for name in columns]
        lines.append(f"| {entry['points']} | {' | '.join(cells)} | {entry['references']} |")
    return lines


def _spoilt(truth: Truth, share: float) -> Tensor:
    """The exact points, int64 [P, 2], of which a share, drawn with a fixed seed, has the u of another one."""
    generator = torch.Generator().manual_seed(0)
    others = truth.u[torch.randperm(len(truth.u), generator=generator)]
    is_wrong = torch.rand(len(truth.u), generator=generator) < share
    return torch.stack([torch.where(is_wrong, others, truth.u), truth.v], dim=1)
