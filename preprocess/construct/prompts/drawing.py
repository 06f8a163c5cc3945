"""What is drawn for a candidate before anybody writes: how many subjects of which kinds and names, their looks, the scene and the sentence.

How many and which kinds comes from a sequence of low discrepancy: among the first n candidates, whatever n, each combination has its share
of them to within one or two. All else is drawn from the candidate's seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import sqrt
from typing import TypeVar

import numpy as np

from mosaic.config.schema import FieldError
from preprocess.construct.candidates import seed_of
from preprocess.construct.prompts.settings import LETTERS, PromptsSettings
from preprocess.construct.prompts.templates import Named, Templates

T = TypeVar("T")
STEP = (sqrt(5) - 1) / 2  # multiples of the golden ratio fill [0, 1) evenly


@dataclass(frozen=True)
class Assignment:
    """What a prompt shall say.

    Attributes:
        seed: Of all that was drawn.
        subjects: In the order of the prompt.
        looks: Of each; "": the prompt does not tell.
        scene: Where it is.
        form: Sentence with {subjects} and {scene}.
    """

    seed: int
    subjects: tuple[Named, ...]
    looks: tuple[str, ...]
    scene: str
    form: str

    def phrases(self, hide_looks: bool) -> list[str]:
        """What each subject is called in prompt and caption alike: with its looks, unless the caption hides them."""
        firsts = [
            subject.phrase if subject not in self.subjects[:k] else f"another {subject.name}" for k, subject in enumerate(self.subjects)
        ]
        return firsts if hide_looks else [f"{phrase} {look}".rstrip() for phrase, look in zip(firsts, self.looks, strict=True)]


class Drawer:
    """Draws assignments; of one number always the same."""

    def __init__(self, settings: PromptsSettings, templates: Templates, base_seed: int) -> None:
        """Check that the file has what the shares ask for.

        Raises:
            FieldError: No combination of kinds can be drawn for some number of subjects, or one that is named.
        """
        self.settings, self.templates, self.base_seed = settings, templates, base_seed
        self.cells = cells_of(settings, templates)
        self.ends = np.cumsum([share for _, share in self.cells])
        self.start = seed_of(base_seed, "prompts", 0, 1) / 2**63

    def __call__(self, number: int) -> Assignment:
        """The assignment of a candidate."""
        place = (self.start + number * STEP) % 1.0 * self.ends[-1]
        kinds, _ = self.cells[min(int(np.searchsorted(self.ends, place, side="right")), len(self.cells) - 1)]
        seed = seed_of(self.base_seed, "prompts", number)
        rng = np.random.default_rng(seed)
        drawn = self._subjects(rng, [kinds[k] for k in rng.permutation(len(kinds))])
        looks: list[str] = []
        for subject in drawn:
            looks.append(self._look(rng, subject, looks))
        forms = self.templates.forms + (self.templates.forms_of_several if len(drawn) > 1 else ())
        return Assignment(seed, tuple(drawn), tuple(looks), _one(rng, self.templates.scenes), _one(rng, forms))

    def _subjects(self, rng: np.random.Generator, kinds: Sequence[str]) -> list[Named]:
        """One of each kind, no two the same but for twins."""
        drawn: list[Named] = []
        for kind in kinds:
            names = [subject for subject in self.templates.of_kind(kind) if subject not in drawn]
            drawn.append(_one(rng, names))
        twins = rng.random() < self.settings.twins
        pairs = [(i, k) for k in range(len(kinds)) for i in range(k) if kinds[i] == kinds[k]]
        if twins and pairs:
            i, k = pairs[rng.integers(len(pairs))]
            drawn[k] = drawn[i]
        return drawn

    def _look(self, rng: np.random.Generator, subject: Named, others: Sequence[str]) -> str:
        """Another look than the others of the prompt, as long as there are any."""
        told, looks = rng.random() < self.settings.looks, self.templates.looks_of(subject)
        free = [look for look in looks if look not in others] or looks
        return _one(rng, free) if free and told else ""


def cells_of(settings: PromptsSettings, templates: Templates) -> list[tuple[list[str], float]]:
    """All combinations of kinds with their shares, which sum to 1, in a fixed order."""
    stock = {kind: len(templates.of_kind(kind)) for kind in LETTERS.values()}
    asked = {"".join(sorted(word, key="HAO".index)): share for word, share in (settings.kinds or {}).items()}
    cells: list[tuple[list[str], float]] = []
    total = sum(settings.num_subjects)
    for count, share in enumerate(settings.num_subjects, 1):
        if not share:
            continue
        words = ["".join(letters) for letters in combinations_with_replacement("HAO", count)]
        able = [word for word in words if all(word.count(letter) <= stock[kind] for letter, kind in LETTERS.items())]
        weights = {word: asked[word] for word in words if word in asked} or dict.fromkeys(able, 1.0)
        missing = next((word for word, weight in weights.items() if weight and word not in able), None)
        if missing is not None:
            raise FieldError("prompts.kinds", f"names {missing}, for which {settings.templates} has too few subjects: {stock}")
        if not sum(weights.values()) > 0:
            raise FieldError("prompts.num_subjects", f"asks for {count} subjects, for which {settings.templates} has too few: {stock}")
        cells += [
            ([LETTERS[letter] for letter in word], share / total * weight / sum(weights.values()))
            for word, weight in weights.items()
            if weight
        ]
    return cells


def _one(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of some values, evenly."""
    return values[int(rng.integers(len(values)))]
