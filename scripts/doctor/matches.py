"""How good the matches are, as far as points and what matching recorded tell: figures per reference in, reasons and doubts out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mosaic.data.inspection import Inspection
from mosaic.data.placement import subject_cells
from mosaic.data.quality import coherence, coverage
from preprocess.extractors import weakness

FEW_POINTS = 8  # a reference with fewer is hardly supervised
# Thresholds lie between true and wrong points of the pocket world; docs/data.md has the measurement and the command.
UNFIT_COHERENCE, LEAST_COHERENCE = 0.35, 0.5  # of points of which half are wrong; of which about a third are
MOST_INCOHERENT = 0.1  # share of references that may lie below UNFIT_COHERENCE
LEAST_COVERAGE = 0.25
LEAST_CYCLIC = 0.5
LEAST_AGREEMENT = 0.2


@dataclass
class Matches:
    """The figures of the references seen so far; those that are not known are left out.

    Attributes:
        extractors: Names of those that made the points; () where that is not known.
        coherence: Of references with points enough to tell.
        coverage: Of the subjects of references that have not few points anyway.
        cyclic: As matching recorded it.
        agreement: As matching recorded it, or with another matching.
        too_few: References with points, but too few to tell their coherence.
        lowest: Samples by their lowest coherence.
    """

    extractors: Sequence[str] = ()
    coherence: list[float] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    cyclic: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    too_few: int = 0
    lowest: dict[str, float] = field(default_factory=dict)

    def add(self, found: Inspection) -> None:
        """Count one sample."""
        own = []
        for pairs, picture, grid in zip(found.points, found.references, found.reference_grids, strict=True):
            kept = coherence(pairs, grid, found.target_grid)
            own += [] if kept is None else [kept]
            self.too_few += kept is None and len(pairs) > 0
            covered = coverage(pairs[:, 0], subject_cells(picture, grid), grid) if len(pairs) >= FEW_POINTS else None
            self.coverage += [] if covered is None else [covered]
        self.coherence += own
        if own:
            self.lowest[found.id] = min(own)
        self.cyclic += [scores["cyclic"] for scores in found.scores if "cyclic" in scores]
        self.agreement += [scores["agreement"] for scores in found.scores if "agreement" in scores]

    def summary(self) -> dict[str, Any]:
        """The figures as JSON types: means, None where nothing is known."""
        worst = sorted(self.lowest.items(), key=lambda item: item[1])
        return {
            "extractors": list(self.extractors),
            "coherence": _mean(self.coherence),
            "incoherent_references": sum(value < UNFIT_COHERENCE for value in self.coherence),
            "too_few_points_to_tell": self.too_few,
            "coverage": _mean(self.coverage),
            "cyclic": _mean(self.cyclic),
            "agreement": _mean(self.agreement),
            "least_coherent": [[name, value] for name, value in worst[:20]],
        }

    def reasons(self) -> list[str]:
        """Why training should not start; empty where it may."""
        mean = _mean(self.coherence)
        if mean is None or mean >= UNFIT_COHERENCE:
            return []
        return [
            f"the matches have no spatial order: their coherence is {mean:.2f} of 1, which is what points of which half or more are wrong "
            f"have (below {UNFIT_COHERENCE}). Match with better extractors, or with stricter filters"
        ]

    def doubts(self) -> list[str]:
        """Why somebody should look at the matches before training; empty where no figure says so."""
        doubts = [] if (weak := weakness(self.extractors)) is None else [f"the points were made by {weak}"]
        mean, incoherent = _mean(self.coherence), sum(value < UNFIT_COHERENCE for value in self.coherence)
        if mean is not None and UNFIT_COHERENCE <= mean < LEAST_COHERENCE:
            doubts.append(
                f"the coherence of the matches is {mean:.2f} of 1: a third of them or more may be wrong (below {LEAST_COHERENCE})"
            )
        if mean is not None and mean >= LEAST_COHERENCE and incoherent > MOST_INCOHERENT * len(self.coherence):
            doubts.append(
                f"the matches of {incoherent} of {len(self.coherence)} references have no spatial order (below {UNFIT_COHERENCE})"
            )
        for name, values, least, what in (
            ("points", self.coverage, LEAST_COVERAGE, "cover {} of the subjects of the references"),
            ("matches", self.cyclic, LEAST_CYCLIC, "lead back to where they came from in {} of the cells"),
            ("extractors", self.agreement, LEAST_AGREEMENT, "agree on {} of the cells"),
        ):
            if values and (share := float(np.mean(values))) < least:
                doubts.append(f"the {name} {what.format(f'{share:.0%}')}, less than {least:.0%}")
        return doubts


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
