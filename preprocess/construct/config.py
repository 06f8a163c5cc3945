"""The settings of a construction: one section per stage, and what holds for all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from mosaic.config.loading import load_settings
from mosaic.config.schema import Section
from mosaic.config.sections import Count, Probability, Seed, Text
from preprocess.construct.estimate_settings import EstimateSettings
from preprocess.construct.points.settings import PointsSettings
from preprocess.construct.prompts.settings import PromptsSettings
from preprocess.construct.references.settings import ReferencesSettings
from preprocess.construct.segmentation.settings import SegmentationSettings
from preprocess.construct.synthesis.settings import SynthesisSettings


class OutputSettings(Section):
    """The data set."""

    path: ClassVar[str] = "output"

    test_share: Probability = 0.0
    """Share of the samples that go to the split "test"; all subjects of a picture are its own, so that no two splits share one."""
    license: Text = "other"
    """What the data set's card names as its licence; models restrict what may be done with what they make."""
    doctor_config: Text | None = None
    """Config of the training that is planned, by whose sizes the doctor looks at the data set; null: the doctor's own."""


class ConstructConfig(Section):
    """All settings of a construction."""

    num_samples: Count = 1000
    """Samples that pass all limits."""
    max_candidates: Count = 20
    """Candidates that are tried for each sample that is wanted; then the run ends and says what they failed for."""
    seed: Seed = 0
    """Of everything that is drawn."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of all models."""
    chunk_size: Count = 16
    """Candidates that are computed, written and resumed together."""
    prompts: PromptsSettings = Field(default_factory=PromptsSettings)
    """Stage 1."""
    synthesis: SynthesisSettings = Field(default_factory=SynthesisSettings)
    """Stage 2."""
    segmentation: SegmentationSettings = Field(default_factory=SegmentationSettings)
    """Stage 3."""
    references: ReferencesSettings = Field(default_factory=ReferencesSettings)
    """Stage 4."""
    points: PointsSettings = Field(default_factory=PointsSettings)
    """Stage 5."""
    output: OutputSettings = Field(default_factory=OutputSettings)
    """Stage 6."""
    estimate: EstimateSettings = Field(default_factory=EstimateSettings)
    """Assumptions of `--dry-run`."""


def load_construct_config(path: str | Path, overrides: Sequence[str] = ()) -> ConstructConfig:
    """Read a config of `construct.py`. Arguments and errors as of `mosaic.config.loading.load_settings`."""
    return load_settings(ConstructConfig, path, overrides)
