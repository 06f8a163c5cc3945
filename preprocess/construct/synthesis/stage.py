"""Stage 2 as the pipeline runs it."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mosaic.config.schema import FieldError
from mosaic.images import load_image
from preprocess.construct.candidates import Candidate, picture_name, seed_of
from preprocess.construct.chats import key_of
from preprocess.construct.pipelines import call_arguments, load_pipeline, means_of, pipeline_provenance
from preprocess.construct.rows import SynthesisRow
from preprocess.construct.stage import Stage
from preprocess.construct.synthesis.criteria import Criterion, load_criteria
from preprocess.construct.synthesis.settings import SynthesisLimits, SynthesisSettings

NAME = "synthesis"
Size = tuple[int, int]


class SynthesisWorker:
    """Makes pictures and measures them."""

    def __init__(
        self, pipeline: Any, criteria: Sequence[Criterion], settings: SynthesisSettings, base_seed: int, provenance: dict[str, Any]
    ) -> None:
        """Take what is loaded.

        Raises:
            FieldError: The pipeline does not take an argument that the settings have.
        """
        self.pipeline, self.criteria, self.settings, self.base_seed = pipeline, criteria, settings, base_seed
        self.arguments = call_arguments(pipeline, settings)
        self.provenance = provenance | {criterion.name: criterion.provenance for criterion in criteria if criterion.provenance}

    def __call__(self, candidates: Sequence[Candidate], folder: Path) -> Iterator[SynthesisRow]:
        """Pictures into the folder, then a row for each.

        Raises:
            ValueError: The pipeline makes pictures of another size than it was asked for.
            OSError: An endpoint cannot be reached.
        """
        sizes = {candidate.number: self._size(candidate) for candidate in candidates}
        for size in sorted(set(sizes.values())):
            equal = [candidate for candidate in candidates if sizes[candidate.number] == size]
            for start in range(0, len(equal), self.settings.batch_size):
                batch = equal[start : start + self.settings.batch_size]
                for candidate, picture in zip(batch, self._pictures(batch, size), strict=True):
                    picture.save(folder / picture_name(candidate.number))
        for candidate in candidates:
            picture = load_image(folder / picture_name(candidate.number))
            yield self._row(candidate, picture, sizes[candidate.number])

    def _seed(self, candidate: Candidate) -> int:
        return seed_of(self.base_seed, NAME, candidate.number)

    def _size(self, candidate: Candidate) -> Size:
        return self.settings.sizes[seed_of(self.base_seed, NAME, candidate.number, 1) % len(self.settings.sizes)]

    def _pictures(self, batch: Sequence[Candidate], size: Size) -> list[Image.Image]:
        """Noise is drawn on the CPU, of each picture by its own seed."""
        arguments = dict(self.arguments)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
        pictures = self.pipeline(
            prompt=[candidate.prompt.prompt for candidate in batch],
            height=size[0],
            width=size[1],
            generator=[torch.Generator("cpu").manual_seed(self._seed(candidate)) for candidate in batch],
            **arguments,
        ).images
        for picture in pictures:
            if (picture.height, picture.width) != size:
                raise FieldError(
                    "synthesis.sizes",
                    f"must hold sizes that {type(self.pipeline).__name__} makes; asked for {size[0]} x {size[1]}, it gave "
                    f"{picture.height} x {picture.width}",
                )
        return [picture.convert("RGB") for picture in pictures]

    def _row(self, candidate: Candidate, picture: Image.Image, size: Size) -> SynthesisRow:
        scores, remarks = dict[str, float](), dict[str, str]()
        for criterion in self.criteria:
            value, remark = criterion.score(picture, candidate)
            scores[criterion.name] = value if math.isfinite(value) else 0.0
            if remark or not math.isfinite(value):
                remarks[criterion.name] = remark if math.isfinite(value) else "no number"
        return SynthesisRow(
            number=candidate.number, seed=self._seed(candidate), height=size[0], width=size[1], scores=scores, remarks=remarks
        )


def synthesis_stage(settings: SynthesisSettings, base_seed: int, dtype: torch.dtype = torch.float32) -> Stage:
    """Stage 2.

    Args:
        settings: Its section.
        base_seed: Of the run.
        dtype: Of all models.

    Raises:
        FieldError, ValueError: A package is missing, or a key's variable not set.
    """
    means_of(settings)
    if settings.judge is not None:
        key_of(settings.judge)

    def load(device: torch.device) -> SynthesisWorker:
        from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image

        pipeline = load_pipeline(AutoPipelineForText2Image, settings, device, dtype)
        provenance = pipeline_provenance(pipeline, settings, dtype)
        return SynthesisWorker(pipeline, load_criteria(settings, device, dtype), settings, base_seed, provenance)

    return Stage(NAME, SynthesisRow, settings, load, lambda candidate: reasons(candidate, settings.limits))


def reasons(candidate: Candidate, limits: SynthesisLimits) -> list[str]:
    """The limits that a picture misses."""
    assert candidate.synthesis is not None
    missed = []
    for limit, value in dict(limits).items():
        end, _, name = limit.partition("_")
        if value is not None:
            score = candidate.synthesis.scores[name]
            missed += [limit] * (score < value if end == "min" else score > value)
    return missed
