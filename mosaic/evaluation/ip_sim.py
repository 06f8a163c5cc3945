"""IP-Sim: how alike a subject's instances in a picture and its reference are, of all subjects but humans."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mosaic.evaluation.assignment import assigned, best
from mosaic.evaluation.encoders import ImageEncoder, Provenance
from mosaic.evaluation.entries import Entry, subject_labels
from mosaic.evaluation.instances import InstanceFinder, places
from mosaic.evaluation.measures import ReferenceSimilarity
from mosaic.evaluation.records import Key


class InstanceSimilarity:
    """Cosine of a subject's reference, as it is, with the instance of its name that is most like it, in percent; 0 where there is none.

    Beside it, as "..._assigned", the same with no instance for two references: boxes at one place are one instance, whatever names
    found them.
    """

    def __init__(self, metric: str, encoder: ImageEncoder, finder: InstanceFinder) -> None:
        self.metric, self.encoder, self.finder = metric, encoder, finder
        self.references = ReferenceSimilarity(metric, encoder).references

    @property
    def provenance(self) -> Provenance:
        """Encoder, detector and segmenter."""
        return self.finder.describe(self.encoder.provenance)

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """Two per picture and subject that is no human."""
        return [
            Key(metric, entry.case, entry.run, label)
            for entry in case
            for metric in (self.metric, f"{self.metric}_assigned")
            for label, subject in zip(subject_labels(entry.subjects), entry.subjects, strict=True)
            if subject.kind != "human"
        ]

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """Cosines times 100."""
        values = []
        for number, picture in enumerate(pictures):
            similarities = self._similarities(case, number, picture)
            values += [*best(similarities), *assigned(similarities)]
        return values

    def _similarities(self, case: Sequence[Entry], number: int, picture: Image.Image) -> np.ndarray:
        """Of the subjects that are no humans with the places of instances, [subjects, places]; NaN where its name found nothing."""
        subjects = [subject for subject in case[0].subjects if subject.kind != "human"]
        found = [self.finder.find(case, number, picture, subject.name) for subject in subjects]
        place = places([instance.box for instances in found for instance in instances])
        similarities = np.full((len(subjects), max(place, default=-1) + 1), np.nan)
        for row, (subject, instances) in enumerate(zip(subjects, found, strict=True)):
            if not instances:
                continue
            embeddings = self.encoder.images([instance.picture for instance in instances])
            cosines = (embeddings.double() @ self.references(subject).double().mean(dim=0) * 100).numpy()
            if not np.isfinite(cosines).all():
                entry = case[number]
                raise ValueError(f"{entry.place}: an instance in {entry.picture} has an embedding that is no number. Look at both.")
            start = sum(len(others) for others in found[:row])
            for column, cosine in zip(place[start:], cosines, strict=False):
                similarities[row, column] = np.nanmax([similarities[row, column], cosine])
        return similarities
