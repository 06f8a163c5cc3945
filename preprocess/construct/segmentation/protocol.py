"""What a model must do that finds what phrases name: one call for a picture, all things that answer to each phrase."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from mosaic.evaluation.encoders import Provenance


@dataclass(frozen=True)
class Instance:
    """A thing that answers to a phrase.

    Attributes:
        confidence: How sure the model is of each pixel, float32 `[H, W]`, 0 to 1; 0 outside of the thing.
        score: How sure it is of the thing, 0 to 1.
    """

    confidence: np.ndarray
    score: float

    @property
    def mask(self) -> np.ndarray:
        """Its pixels, bool `[H, W]`."""
        return self.confidence > 0


class PhraseSegmenter(Protocol):
    """Finds and cuts out what phrases name.

    Attributes:
        provenance: Its models, by what each does.
    """

    provenance: dict[str, Provenance]

    def find(self, picture: Image.Image, phrases: Sequence[str]) -> list[list[Instance]]:
        """All things in an RGB picture that answer to each of some phrases, in the phrases' order, each phrase asked for by itself.

        A thing may be found for several phrases, and several times for one.
        """


def confident(shares: np.ndarray, threshold: float) -> np.ndarray:
    """Probabilities [..., H, W] of pixels, float32, 0 where they are not above a threshold."""
    return np.where(shares > threshold, shares, 0).astype(np.float32)
