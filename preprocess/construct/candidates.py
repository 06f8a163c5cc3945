"""Candidates, where their files lie, and their seeds."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from mosaic.images import decode_image, read_picture
from preprocess.construct.rows import PointsRow, PromptRow, ReferencesRow, Row, SegmentationRow, SynthesisRow

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A sample that may become one, with what is known of it so far.

    Attributes:
        number: From 0; all that is drawn for it depends on this number and the config alone.
        folders: Where each stage keeps the files of the candidate's chunk, by the stage's name.
        prompt: Stage 1.
        synthesis: Stage 2; None: it has not come so far. So the others.
        segmentation: Stage 3.
        references: Stage 4.
        points: Stage 5.
    """

    number: int
    folders: dict[str, Path]
    prompt: PromptRow
    synthesis: SynthesisRow | None = None
    segmentation: SegmentationRow | None = None
    references: ReferencesRow | None = None
    points: PointsRow | None = None


def known(row: T | None) -> T:
    """A row, or a part of one, that a candidate must have by now."""
    assert row is not None, "the candidate has come this far"
    return row


def row_of(candidate: Candidate, stage: str) -> Row | None:
    """What a stage, by its name, knows of a candidate."""
    return candidate.prompt if stage == "prompts" else getattr(candidate, stage)


def picture_name(number: int, name: str = "") -> str:
    """Name of a candidate's picture in its stage's folder: the stage's only one, or one with a name."""
    return f"{number:08d}_{name}.png" if name else f"{number:08d}.png"


def picture_path(candidate: Candidate, stage: str, name: str = "") -> Path:
    """Where a finished stage has a candidate's picture."""
    return candidate.folders[stage] / picture_name(candidate.number, name)


def read_stage_picture(candidate: Candidate, stage: str, name: str = "") -> Image.Image:
    """A picture that a finished stage has written, as it was written.

    Raises:
        FileNotFoundError, ValueError: It is gone or damaged.
    """
    path = picture_path(candidate, stage, name)
    return decode_image(read_picture(path), str(path))


def points_name(number: int) -> str:
    """Name of a candidate's points file in the folder of stage 5."""
    return f"{number:08d}.safetensors"


def seed_of(base: int, stage: str, number: int, *more: int) -> int:
    """A seed in [0, 2^63) for what a stage draws for a candidate (and, with more, for its parts)."""
    text = "/".join(str(part) for part in (base, stage, number, *more))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
