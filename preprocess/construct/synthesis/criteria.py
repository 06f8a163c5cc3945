"""What a picture is measured by, one number each."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from mosaic.evaluation.aesthetics import SiglipAesthetic
from mosaic.evaluation.detection import ScoringDetector, load_detector
from mosaic.evaluation.encoders import load_picture_text
from preprocess.construct.candidates import Candidate
from preprocess.construct.chats import load_chat
from preprocess.construct.synthesis.judge import SubjectJudge
from preprocess.construct.synthesis.scored import Scored
from preprocess.construct.synthesis.settings import SynthesisSettings

SHARP_SIDE = 256  # px, at which sharpness is measured
SHADES = 16  # of a channel, by which colours are told apart


class Criterion(Protocol):
    """Measures a picture.

    Attributes:
        name: Of its score; the limits "min_NAME" and "max_NAME" decide about it.
        provenance: Its models, as JSON values.
    """

    name: str
    provenance: dict[str, Any]

    def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
        """Of an RGB picture that was made from the candidate's prompt."""


class Contrast:
    """The largest standard deviation of a channel, of values in 0 to 1."""

    name = "contrast"

    def __init__(self) -> None:
        self.provenance: dict[str, Any] = {}

    def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
        """0 for one colour, 0.5 at most."""
        return Scored(float((np.asarray(picture, dtype=np.float64) / 255).std(axis=(0, 1)).max()))


class Uniformity:
    """The share of the commonest colour, of 16 shades a channel."""

    name = "uniformity"

    def __init__(self) -> None:
        self.provenance: dict[str, Any] = {}

    def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
        """1 for one colour."""
        shades = np.asarray(picture, dtype=np.int64) // (256 // SHADES)
        counts = np.bincount((shades @ np.array([SHADES**2, SHADES, 1])).ravel())
        return Scored(float(counts.max() / counts.sum()))


class Sharpness:
    """The variance of the Laplacian of the grey picture at one size, by the kernel of four neighbours."""

    name = "sharpness"

    def __init__(self) -> None:
        self.provenance: dict[str, Any] = {}

    def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
        """Of values in 0 to 255, the picture brought to a short side of 256 px (bicubic)."""
        short = min(picture.size)
        width, height = (max(SHARP_SIDE, round(SHARP_SIDE * side / short)) for side in picture.size)
        grey = np.asarray(picture.convert("L").resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        inner = grey[1:-1, 1:-1]
        return Scored(float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).var()))


class Aesthetics:
    """Aesthetic Predictor V2.5."""

    name = "aesthetics"

    def __init__(self, siglip: str, head: str, device: torch.device, dtype: torch.dtype) -> None:
        self.scorer = SiglipAesthetic(siglip, Path(head), device, dtype)
        self.provenance: dict[str, Any] = asdict(self.scorer.provenance)

    def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
        """1 to 10."""
        return Scored(self.scorer.scores([picture])[0])


class PromptFit:
    """How well picture and prompt fit, by CLIP or SigLIP."""

    name = "prompt_fit"

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype) -> None:
        self.encoder = load_picture_text(model, "synthesis.prompt_fit", device, dtype)
        self.provenance: dict[str, Any] = asdict(self.encoder.provenance)

    def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
        """A CLIP's cosine, a SigLIP's probability."""
        return Scored(self.encoder.fit(picture, candidate.prompt.prompt))


class WrittenText:
    """How sure a detector is of text or watermarks."""

    name = "text"

    def __init__(self, detector: ScoringDetector, words: tuple[str, ...]) -> None:
        self.detector, self.words = detector, words
        self.provenance: dict[str, Any] = asdict(detector.provenance)

    def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
        """0 where it finds none; with what was found."""
        found = [(one.score, word) for word in self.words for one in self.detector.detections(picture, word)]
        return Scored(*max(found, key=lambda one: one[0])) if found else Scored(0.0)


def load_criteria(settings: SynthesisSettings, device: torch.device, dtype: torch.dtype) -> list[Criterion]:
    """All that the settings have models for, and those that need none.

    Raises:
        FileNotFoundError, ValueError: A model cannot be had, or is of another kind.
    """
    criteria: list[Criterion] = [Contrast(), Uniformity(), Sharpness()]
    if settings.siglip is not None and settings.aesthetic_head is not None:
        criteria.append(Aesthetics(settings.siglip, settings.aesthetic_head, device, dtype))
    if settings.prompt_fit is not None:
        criteria.append(PromptFit(settings.prompt_fit, device, dtype))
    if settings.text_detector is not None:
        detector = load_detector(settings.text_detector, "synthesis.text_detector", device, dtype)
        if not isinstance(detector, ScoringDetector):
            raise ValueError(
                f"synthesis.text_detector: {settings.text_detector} does not say how sure it is. Name a GroundingDINO or an OWLv2."
            )
        criteria.append(WrittenText(detector, settings.text_words))
    if settings.judge is not None:
        criteria.append(SubjectJudge(load_chat(settings.judge, device, dtype)))
    return criteria
