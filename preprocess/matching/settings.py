"""Settings of matching: everything that decides which points are found, beside the extractors."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mosaic.config.schema import Section
from mosaic.config.sections import Count, CountOrZero, Positive, Seed

Cosine = Annotated[float, Field(ge=-1, le=1)]
MAX_GRID = 512  # cells of a side: features of 1280 channels take 1.3 GB there
GridSide = Annotated[int, Field(ge=1, le=MAX_GRID)]


class MatchingSettings(Section):
    """How feature maps become points."""

    path: ClassVar[str] = "matching"

    score: Literal["cosine", "dot"] = "cosine"
    """What makes cells nearest: their cosine, or their raw dot product as in the release."""
    consensus: CountOrZero = 1
    """Cells (Chebyshev) by which the matches of several extractors may differ; 0: exact equality as in the release."""
    cycle: CountOrZero | None = None
    """Cells by which a target cell may miss itself on the way to its reference cell and back; 0: mutual nearest; null: no such filter."""
    affine: Count | None = None
    """Cells by which a match may miss the affine map that most matches of its reference follow; null: no such filter."""
    min_similarity: Cosine | None = None
    """Least cosine of a match, for every extractor."""
    min_margin: Annotated[float, Field(ge=0, le=2)] | None = None
    """Least difference between the cosine of a match and that of the best cell beyond its neighbours, for every extractor."""
    soft_argmax: Annotated[int, Field(ge=0, le=64)] = 0
    """Half the side in cells of the window in which u is refined to the expected position, which is then rounded; 0: not refined."""
    temperature: Positive = 0.02
    """Temperature of that refinement."""
    white_threshold: Annotated[int, Field(ge=0, le=254)] | None = 5
    """Reference pixels whose channels are all within this of 255 are background; null: the whole reference is searched."""
    background: Literal["keep", "black"] = "keep"
    """What extractors see outside the masks: the picture, or black as in the release."""
    unique_u: bool = False
    """Keep only the most similar point of every reference cell. Readers make u unique by votes when they reduce the grids."""
    grid: tuple[GridSide, GridSide] | None = None
    """Rows and columns on which both sides are matched; null: the manifest's grids. Points are carried to those by majority vote."""
    chunk_size: Annotated[int, Field(ge=1, le=16_384)] = 1024
    """Target cells whose similarities are held in memory at a time."""
    seed: Seed = 0
    """Seed of the extractors' noise, together with the sample's id."""
