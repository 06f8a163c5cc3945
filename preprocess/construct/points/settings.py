"""Settings of stage 5."""

from typing import Any, ClassVar

from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Count, Probability
from preprocess.extractors import EXTRACTORS, extractor_spec
from preprocess.matching.settings import GridSide, MatchingSettings


class PointsLimits(Section):
    """What a reference's points must be; a reference that misses a limit is dropped, not its sample."""

    path: ClassVar[str] = "points.limits"

    min_points: Count = 16
    """Fewest points of a reference."""
    min_similarity: float | None = None
    """Least mean cosine of a reference's points; null: not asked for."""
    min_cyclic: Probability | None = None
    """Least share of a reference's matches that come back to where they started (`match.py`); null: not asked for."""
    min_affine: Probability | None = None
    """Least share of a reference's matches that follow one affine map; null: not asked for. Needs `points.matching.affine`."""
    min_agreement: Probability | None = None
    """Least share on which the extractors agree; null: not asked for. Needs two extractors."""
    min_coherence: Probability | None = None
    """Least spatial order of a reference's points, as the doctor measures it (1: that of right ones, 0: none); null: not asked for. Fewer
    than 16 points have none that could be told, and miss any limit."""
    min_references: Count = 1
    """Fewest references with such points, else the sample is dropped."""


class PointsSettings(Section):
    """How correspondences are found."""

    path: ClassVar[str] = "points"

    extractors: dict[str, dict[str, Any]] = Field(default_factory=lambda: dict[str, dict[str, Any]](dift={}, dinov2={}))
    """Extractors of features by name, as of `match.py`, each with its options; matches on which all agree stay."""
    matching: MatchingSettings = Field(default_factory=MatchingSettings)
    """How features become points."""
    target_cells: GridSide = 64
    """About how many cells a side of the target has, on which points lie."""
    reference_cells: GridSide = 64
    """Cells along the longer side of a reference."""
    limits: PointsLimits = Field(default_factory=PointsLimits)
    """What decides."""

    @model_validator(mode="after")
    def _check(self) -> "PointsSettings":
        if not self.extractors:
            raise FieldError("points.extractors", f"must name one or more of {', '.join(EXTRACTORS)}, got none")
        for name, options in self.extractors.items():
            try:
                extractor_spec(name, options)
            except ValueError as error:
                raise FieldError("points.extractors", f"must fit: {error}".rstrip(".")) from error
        if self.limits.min_affine is not None and self.matching.affine is None:
            raise FieldError("points.limits.min_affine", "needs points.matching.affine, got null there; give it a radius in cells")
        if self.limits.min_agreement is not None and len(self.extractors) < 2:
            raise FieldError("points.limits.min_agreement", "needs two extractors to agree, got one; add another to points.extractors")
        return self
