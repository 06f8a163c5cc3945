"""What is measured of the pictures of a case. A measure knows its models; it gives values by metric, picture and subject."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from mosaic.evaluation.encoders import ClipEncoder, ImageEncoder, Provenance
from mosaic.evaluation.entries import Entry, Subject
from mosaic.evaluation.records import Key
from mosaic.images import load_image, to_rgb


class Measure(Protocol):
    """Something that is measured of a case's pictures with a model.

    Attributes:
        provenance: The model.
    """

    @property
    def provenance(self) -> Provenance:
        """What the values are measured with."""

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """What `__call__` will measure of a case, in order."""

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """The values of `keys`, of a case's pictures in RGB.

        Raises:
            ValueError: A value is no number; the message names the picture.
        """


class ReferenceSimilarity:
    """Cosine of a picture with all reference pictures of a subject, their mean, in percent: CLIP-I and DINO of DreamBench.

    The mean over a block's matrix of pictures and references is the mean of these values, since all rows have as many references.
    """

    def __init__(self, metric: str, encoder: ImageEncoder) -> None:
        self.metric, self.encoder = metric, encoder
        self._references: dict[tuple[Path, ...], Tensor] = {}
        self.num_encoded = 0  # reference pictures

    @property
    def provenance(self) -> Provenance:
        """The encoder."""
        return self.encoder.provenance

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """One per picture and subject."""
        return [Key(self.metric, entry.case, entry.run, subject.name) for entry in case for subject in entry.subjects]

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """Mean cosines times 100."""
        return self.of(finite(self.encoder.images(pictures), case), case)

    def of(self, embeddings: Tensor, case: Sequence[Entry]) -> list[float]:
        """The same of the pictures' embeddings [N, D]."""
        by_subject = [(embeddings.double() @ self.references(subject).double().T).mean(dim=1) * 100 for subject in case[0].subjects]
        return torch.stack(by_subject, dim=1).flatten().tolist()

    def references(self, subject: Subject) -> Tensor:
        """Embeddings [R, D] of a subject's references, computed once."""
        if subject.references not in self._references:
            pictures = [to_rgb(load_image(path)) for path in subject.references]
            embeddings = self.encoder.images(pictures)
            for path, embedding in zip(subject.references, embeddings, strict=True):
                if not embedding.isfinite().all():
                    raise ValueError(f"{path}: its embedding by {self.provenance.model} is no number. Look at the picture and the model.")
            self._references[subject.references] = embeddings
            self.num_encoded += len(pictures)
        return self._references[subject.references]


class ClipSimilarity:
    """CLIP-I, a `ReferenceSimilarity`, and CLIP-T: the cosine with the whole prompt, at least 0, in percent, without CLIPScore's 2.5."""

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder, self.similarity = encoder, ReferenceSimilarity("clip_i", encoder)

    @property
    def provenance(self) -> Provenance:
        """The encoder."""
        return self.encoder.provenance

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """CLIP-I per picture and subject, then CLIP-T per picture."""
        return [*self.similarity.keys(case), *(Key("clip_t", entry.case, entry.run) for entry in case)]

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """Cosines times 100; CLIP-T below 0 as 0."""
        embeddings, text = finite(self.encoder.images(pictures), case), self.encoder.texts([case[0].prompt])
        if not text.isfinite().all():
            raise ValueError(f"{case[0].place}: the embedding of its prompt by {self.provenance.model} is no number. Look at the model.")
        fit = (embeddings.double() @ text.double().T).squeeze(1).clamp_min(0) * 100
        return [*self.similarity.of(embeddings, case), *fit.tolist()]


def finite(embeddings: Tensor, case: Sequence[Entry]) -> Tensor:
    """Embeddings [N, D] of a case's pictures, checked.

    Raises:
        ValueError: One is no number.
    """
    for entry, embedding in zip(case, embeddings, strict=True):
        if not embedding.isfinite().all():
            raise ValueError(f"{entry.place}: the embedding of {entry.picture} is no number. Look at the picture and the model.")
    return embeddings
