"""The identity judge asked place by place, so that subjects of one class are told apart: which looks does each of them have?

The judge looks for a class on a map of scores. Peaks of that map are places; with its attention restricted to the cells around a peak it
says which looks are there. It never sees a layout, a mask or a caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mosaic.pipeline.latents import images_to_tensor
from scripts.pocket.judge import ATTRIBUTES, GRID, JUDGE_SIZE, Judge
from scripts.pocket.scenes import cell_centres
from scripts.pocket.world import CLASSES, MAX_SUBJECTS, Identity

APART = 3.5  # cells: nearer than this there is one place only of a class
SAME_PLACE = 2.5  # cells: nearer than this there is one place only, of whatever class
REACH = 5.0  # cells: how far from its peak a place goes
#: Score of a peak from which it is a place. Of 150 real renderings per regime and K at most 1 % of the subjects are then missed, and as
#: many found twice; -2 misses more of a crowd, -4 doubles more.
THRESHOLD = -3.0


@dataclass(frozen=True)
class Place:
    """A subject that is seen in a picture.

    Attributes:
        class_name: What it is.
        x, y: Where the judge looks for it, as a fraction of the picture.
        log_looks: By attribute the log-probability of each of its values.
    """

    class_name: str
    x: float
    y: float
    log_looks: dict[str, dict[str, float]]

    def score(self, identity: Identity) -> float:
        """Log-likelihood of an identity's looks; its class is not compared."""
        return sum(values[getattr(identity, attribute)] for attribute, values in self.log_looks.items())

    def scores(self, identities: Sequence[Identity]) -> list[float]:
        """`score` of each."""
        return [self.score(identity) for identity in identities]

    def likeliest(self, attribute: str) -> str:
        """The likeliest value of an attribute."""
        return max(self.log_looks[attribute], key=self.log_looks[attribute].__getitem__)


def find_places(judge: Judge, pictures: Sequence[Image.Image]) -> list[list[Place]]:
    """The places of each picture, of any size: class by class, in each the highest peak first."""
    found: list[list[Place]] = []
    resized = [picture.convert("RGB").resize((JUDGE_SIZE, JUDGE_SIZE), Image.Resampling.LANCZOS) for picture in pictures]
    for part in images_to_tensor(resized).split(64) if resized else ():
        features, scores = judge.maps(part)
        for picture, maps in enumerate(scores):
            places = []
            for class_index, centres in enumerate(find_peaks(maps)):
                for centre, region in zip(centres, regions(centres), strict=True):
                    attention = maps[class_index].masked_fill(~region, float("-inf")).softmax(dim=-1)
                    looks = judge.looks_at(features[picture], attention, class_index)
                    log_looks = {
                        attribute: dict(zip(names, logits.log_softmax(dim=-1).tolist(), strict=True))
                        for (attribute, names), logits in zip(ATTRIBUTES.items(), looks, strict=True)
                    }
                    x, y = CELLS[centre].tolist()
                    places.append(Place(CLASSES[class_index], x, y, log_looks))
            found.append(places)
    return found


def find_peaks(maps: Tensor) -> list[list[int]]:
    """Cells of the places of each class on maps [C, 256], the highest first.

    Of one class no two are nearer to each other than `APART`. Where two classes are found in one place, the higher peak counts.
    """
    found = []
    for scores in maps:
        left, peaks = scores.clone(), list[int]()
        while len(peaks) < 2 * MAX_SUBJECTS and float(left.max()) > THRESHOLD:
            peaks.append(int(left.argmax()))
            left[DISTANCES[peaks[-1]] < APART] = float("-inf")
        found.append(peaks)
    everywhere = [(float(maps[index, peak]), peak) for index, peaks in enumerate(found) for peak in peaks]

    def outdone(index: int, peak: int) -> bool:
        return any(score > maps[index, peak] and DISTANCES[peak, other] < SAME_PLACE for score, other in everywhere)

    return [[peak for peak in peaks if not outdone(index, peak)] for index, peaks in enumerate(found)]


def regions(peaks: list[int]) -> Tensor:
    """The cells of each of P places of one class, bool [P, 256]: those to which no other peak is nearer, within `REACH`."""
    distances = DISTANCES[peaks]
    nearest = distances.amin(dim=0) if peaks else torch.empty(GRID * GRID)
    first = (distances == nearest).cumsum(dim=0) == 1  # of equally near peaks the higher
    return first & (distances == nearest) & (distances <= REACH)


CELLS = torch.from_numpy(cell_centres(GRID))  # (x, y) as fractions of the picture
DISTANCES = torch.cdist(CELLS, CELLS) * GRID
