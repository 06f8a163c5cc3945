"""Stage 5: the matchers of `match.py` on the pictures that stages 2 to 4 have made."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mosaic.data.multi_reference.records import reference_grid_of, target_grid_of
from mosaic.data.quality import coherence
from mosaic.files import save_tensors
from mosaic.method.grids import Grid
from preprocess.construct.candidates import Candidate, known, points_name, read_stage_picture
from preprocess.construct.points.settings import PointsSettings
from preprocess.construct.rows import Matched, PointsRow, Row
from preprocess.construct.stage import Stage
from preprocess.extractors import build_extractor, extractor_spec
from preprocess.matching.samples import ReferencePicture, SamplePictures, match_sample, sample_seed

Choose = Callable[[Candidate], tuple[int | None, ...]]


def points_stage(settings: PointsSettings, seed: int, dtype: torch.dtype, chosen: Choose) -> Stage:
    """The stage.

    Args:
        settings: Its section.
        seed: Of the run.
        dtype: Of the extractors' models.
        chosen: Which try of stage 4 is a subject's reference, for each of its subjects; None: it has none.
    """
    return Stage(
        name="points",
        row=PointsRow,
        settings=settings,
        load=partial(PointsWorker, settings, seed, dtype, chosen),
        reasons=partial(reasons, settings),
        inputs=lambda candidate: list(chosen(candidate)),
    )


def good_references(settings: PointsSettings, candidate: Candidate) -> list[int]:
    """The subjects of a candidate, by their places, whose reference has points within the limits."""
    return [k for k, _ in enumerate(candidate.prompt.subjects) if not _problem(settings, candidate, k)]


def reasons(settings: PointsSettings, candidate: Candidate) -> list[str]:
    """Why the sample is dropped: what its references miss, where too few are left."""
    if len(good_references(settings, candidate)) >= settings.limits.min_references:
        return []
    problems = [_problem(settings, candidate, k) for k, _ in enumerate(candidate.prompt.subjects)]
    return sorted({problem for problem in problems if problem}) or ["min_references"]


def _problem(settings: PointsSettings, candidate: Candidate, k: int) -> str:
    """The limit that the reference of subject k misses; "": none."""
    matched, limits = known(candidate.points).subjects[k], settings.limits
    if matched is None:
        return "no reference"
    if matched.number_of_points < limits.min_points:
        return "min_points"
    for name in ("similarity", "cyclic", "affine", "agreement", "coherence"):
        limit = getattr(limits, f"min_{name}")
        if limit is not None and matched.scores.get(name, -1.0) < limit:
            return f"min_{name}"
    return ""


class PointsWorker:
    """The extractors, loaded."""

    def __init__(self, settings: PointsSettings, seed: int, dtype: torch.dtype, chosen: Choose, device: torch.device) -> None:
        """Load them.

        Raises:
            FileNotFoundError, ValueError: A model cannot be had, or an option does not fit it.
        """
        self.settings, self.seed, self.chosen = settings, seed, chosen
        specs = [extractor_spec(name, options) for name, options in settings.extractors.items()]
        self.extractors = [build_extractor(spec, device, dtype) for spec in specs]
        self.provenance: dict[str, Any] = {
            spec.name: {**spec.options.model_dump(mode="json"), **extractor.provenance}
            for spec, extractor in zip(specs, self.extractors, strict=True)
        }

    def __call__(self, candidates: Sequence[Candidate], folder: Path) -> Iterator[Row]:
        """Match candidate after candidate."""
        for candidate in candidates:
            edits = {k: edit for k, edit in enumerate(self.chosen(candidate)) if edit is not None}
            matched: list[Matched | None] = [None] * len(candidate.prompt.subjects)
            tensors: dict[str, torch.Tensor] = {}
            pictures = sample_pictures(self.settings, candidate, edits)
            points = match_sample(pictures, self.extractors, self.settings.matching, sample_seed(self.seed, f"{candidate.number}"))
            for (k, edit), reference, found in zip(edits.items(), pictures.references, points, strict=True):
                scores = found.scores | ({"similarity": float(found.similarity.mean())} if len(found.pairs) else {})
                if (order := coherence(found.pairs, reference.grid, pictures.target_grid)) is not None:
                    scores["coherence"] = order
                matched[k] = Matched(edit=edit, number_of_points=len(found.pairs), scores=scores)
                tensors |= {f"{k}": found.pairs.int().contiguous(), f"{k}.similarity": found.similarity.half()}
            save_tensors(tensors, folder / points_name(candidate.number))
            yield PointsRow(number=candidate.number, subjects=tuple(matched))


def sample_pictures(settings: PointsSettings, candidate: Candidate, edits: Mapping[int, int]) -> SamplePictures:
    """The target and the references, with the grids of their points; `edits` are the chosen tries of the subjects that have a reference."""
    target = read_stage_picture(candidate, "synthesis")
    references = []
    for k, edit in edits.items():
        image = read_stage_picture(candidate, "references", f"ref{k}_{edit}")
        mask = np.asarray(read_stage_picture(candidate, "segmentation", f"mask{k}").convert("L")) > 127
        grid = Grid(*reference_grid_of((image.height, image.width), settings.reference_cells))
        references.append(ReferencePicture(image, grid, mask))
    return SamplePictures(target, Grid(*target_grid_of((target.height, target.width), settings.target_cells)), references)
