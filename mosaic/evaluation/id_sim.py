"""ID-Sim: whether a human reference's face is in a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.evaluation.arcface import FaceEmbedder
from mosaic.evaluation.assignment import assigned, best
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.entries import Entry, Subject, subject_labels
from mosaic.evaluation.faces import FaceDetector, aligned, grown
from mosaic.evaluation.records import Key
from mosaic.images import load_image, to_rgb


class FaceSimilarity:
    """Cosine of a human reference's face with the face of the picture that is most like it, in percent; 0 where there is none.

    Beside it, as "id_sim_assigned", the same with no face for two references.
    """

    def __init__(self, detector: FaceDetector, embedder: FaceEmbedder) -> None:
        self.detector, self.embedder = detector, embedder
        self._references: dict[tuple[Path, ...], Tensor | None] = {}

    @property
    def provenance(self) -> Provenance:
        """Embedder and detector."""
        made, found = self.embedder.provenance, self.detector.provenance
        by = f"faces by {found.model} {found.revision}, box x 1.3, first face in it, five points, bilinear"
        return Provenance(made.model, made.revision, f"{by}; {made.preprocessing}")

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """Two per picture and human."""
        return [
            Key(metric, entry.case, entry.run, label)
            for entry in case
            for metric in ("id_sim", "id_sim_assigned")
            for label, subject in zip(subject_labels(entry.subjects), entry.subjects, strict=True)
            if subject.kind == "human"
        ]

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """Cosines times 100."""
        humans, values = [subject for subject in case[0].subjects if subject.kind == "human"], []
        for entry, picture in zip(case, pictures, strict=True):
            faces = self.faces(picture) if humans else []
            similarities = np.full((len(humans), len(faces)), np.nan)
            embeddings = self.embedder.images(faces).double() if faces else None
            for row, human in enumerate(humans):
                reference = self.reference(human)
                if embeddings is not None and reference is not None:
                    similarities[row] = (embeddings @ reference.double() * 100).numpy()
                    if not np.isfinite(similarities[row]).all():
                        raise ValueError(f"{entry.place}: a face in {entry.picture} has an embedding that is no number. Look at both.")
            values += [*best(similarities), *assigned(similarities)]
        return values

    def faces(self, picture: Image.Image) -> list[Image.Image]:
        """All faces of a picture, aligned: each is cut out, and the first face that is found in the cut is it."""
        found = []
        for face in self.detector.faces(picture):
            cut = picture.crop(grown(face.box, picture))  # whole px
            again = self.detector.faces(cut) if min(cut.size) else []
            found += [aligned(cut, one) for one in again[:1]]
        return found

    def reference(self, human: Subject) -> Tensor | None:
        """Embedding [D] of the first face of a reference, computed once; None where no face is found."""
        if human.references not in self._references:
            picture = to_rgb(load_image(human.references[0]))
            faces = [aligned(picture, face) for face in self.detector.faces(picture)[:1]]
            embedding = self.embedder.images(faces)[0] if faces else None
            if embedding is not None and not torch.isfinite(embedding).all():
                raise ValueError(f"{human.references[0]}: its face has an embedding that is no number. Look at the picture and the model.")
            self._references[human.references] = embedding
        return self._references[human.references]
