"""What happens to subjects when there are several: lost, drawn twice, or with the looks of another reference.

No part of a published protocol. The share of subjects whose reference no part of the picture resembles is the instance-level form of what
arXiv 2603.26078 takes of the whole picture, whose cosine falls with the number of subjects by construction; that stands beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mosaic.evaluation.encoders import ImageEncoder, Provenance
from mosaic.evaluation.entries import Entry, Subject, subject_labels
from mosaic.evaluation.instances import InstanceFinder, places
from mosaic.evaluation.measures import ReferenceSimilarity, finite
from mosaic.evaluation.records import Key

THRESHOLDS = (40, 50, 60)  # percent of cosine below which a subject has collapsed
METRICS = ("instance", "whole", "leakage", "missing", "doubled")


class Collapse:
    """Of every subject of a picture, by an encoder and what a detector and a segmenter find of the subjects' names.

    - instance: cosine of the reference with the instance that is given to it, in percent. Instances of all names are pooled by place, and
      no two references are given one place; 0 where nothing is left.
    - whole: cosine of the reference with the whole picture, in percent.
    - leakage: 100 where the given instance looks more like another reference than like its own, else 0; where no instance is given there is
      none, and with a single subject it is 0.
    - missing: 100 where there are fewer places with the subject's name than subjects of it, and none was left for it, else 0.
    - doubled: 100 where there are more places with the subject's name than subjects of it, else 0.
    """

    def __init__(self, encoder: ImageEncoder, finder: InstanceFinder) -> None:
        self.encoder, self.finder = encoder, finder
        self.references = ReferenceSimilarity("whole", encoder).references

    @property
    def provenance(self) -> Provenance:
        """Encoder, detector and segmenter."""
        return self.finder.describe(self.encoder.provenance)

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """Five per picture and subject."""
        return [
            Key(metric, entry.case, entry.run, label) for entry in case for metric in METRICS for label in subject_labels(entry.subjects)
        ]

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """The values."""
        whole = finite(self.encoder.images(pictures), case).double().numpy()
        references = np.stack([self.references(subject).double().mean(dim=0).numpy() for subject in case[0].subjects])
        values: list[float] = []
        for number, picture in enumerate(pictures):
            phrases = [phrase_of(subject) for subject in case[0].subjects]
            found = [self.finder.find(case, number, picture, phrase) for phrase in phrases]
            place = places([instance.box for instances in found for instance in instances])
            shown = [instance.picture for instances in found for instance in instances]
            embeddings = self._embeddings(shown, case[number])
            of_subject = np.split(np.array(place, dtype=int), np.cumsum([len(instances) for instances in found])[:-1])
            values += judge_places(references, whole[number], embeddings, place, of_subject, phrases)
        return values

    def _embeddings(self, shown: Sequence[Image.Image], entry: Entry) -> np.ndarray:
        """Embeddings [instances, D]."""
        if not shown:
            return np.zeros((0, 1))
        embeddings: Tensor = self.encoder.images(shown)
        if not embeddings.isfinite().all():
            raise ValueError(f"{entry.place}: an instance in {entry.picture} has an embedding that is no number. Look at both.")
        return embeddings.double().numpy()


def phrase_of(subject: Subject) -> str:
    """What a subject is looked for by: its name in words, so of DreamBench's folder "colorful_sneaker" two, and of "dog6" one."""
    return subject.name.rstrip("0123456789").replace("_", " ").strip() or subject.name


def judge_places(
    references: np.ndarray,
    whole: np.ndarray,
    embeddings: np.ndarray,
    place: Sequence[int],
    of_subject: Sequence[np.ndarray],
    names: Sequence[str],
) -> list[float]:
    """The values of a picture, metric by metric in the order of `METRICS`, each for all subjects.

    Args:
        references: Embeddings [K, D] of length at most 1.
        whole: Of the picture, [D].
        embeddings: Of all instances, [I, D].
        place: Of each instance.
        of_subject: By subject the places of the instances of its name.
        names: What the subjects are looked for by.
    """
    count, num_places = len(references), max(place, default=-1) + 1
    cosines = np.full((count, num_places), -1.0)  # the largest of the instances at a place
    for embedding, at in zip(embeddings, place, strict=True):
        cosines[:, at] = np.maximum(cosines[:, at], references @ embedding)
    instance, leakage = [0.0] * count, [0.0] * count
    for subject, at in zip(*linear_sum_assignment(cosines, maximize=True), strict=True):
        instance[subject] = 100 * float(cosines[subject, at])
        leakage[subject] = 100.0 * bool(cosines[:, at].argmax() != subject)
    missing, doubled = [], []
    for subject, name in enumerate(names):
        there, wanted = len(set(of_subject[subject].tolist())), names.count(name)
        before = names[:subject].count(name)  # subjects of one name are missing from the last on
        missing.append(100.0 * (before >= there))
        doubled.append(100.0 * (there > wanted))
    return [*instance, *(references @ whole * 100).tolist(), *leakage, *missing, *doubled]


def collapsed(values: Mapping[str, Mapping[Key, float]]) -> dict[str, Any]:
    """Shares of subjects that have collapsed, in percent.

    Args:
        values: By metric, with "instance" and "whole".

    Returns:
        By metric and number of subjects in the picture, by threshold the share with a cosine below it.
    """
    found: dict[str, Any] = {}
    for metric in ("instance", "whole"):
        subjects: dict[tuple[str, int | None], int] = {}
        for key in values[metric]:
            subjects[key.case, key.run] = subjects.get((key.case, key.run), 0) + 1
        by_count: dict[int, list[float]] = {}
        for key, value in values[metric].items():
            by_count.setdefault(subjects[key.case, key.run], []).append(value)
        found[metric] = {
            str(count): {str(threshold): 100 * float(np.mean(np.array(of_count) < threshold)) for threshold in THRESHOLDS}
            for count, of_count in sorted(by_count.items())
        }
    return found
