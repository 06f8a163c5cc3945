"""What the judge says of rendered cases: is each subject in the picture, and does it look like its reference?

The truth is in the names of the reference pictures as `scripts/make_examples.py` writes them; cases with other references have no verdict.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from mosaic.pipeline.latents import images_to_tensor
from scripts.pocket.judge import JUDGE_SIZE, Judge, class_index, make_candidates
from scripts.pocket.places import find_places
from scripts.pocket.regimes import assign_places
from scripts.pocket.world import CLASSES, MARKINGS, PALETTES, PATTERNS, Identity

Likelihood = Callable[[Sequence[Identity]], Sequence[float]]  # log-likelihood of each individual's looks
MISSING, OTHER, RIGHT = "missing", "not recognised", "as its reference"


class SubjectVerdict(NamedTuple):
    """What the judge says of one reference's subject.

    Attributes:
        subject: Its class, such as "fish".
        verdict: `MISSING`, `OTHER` or `RIGHT`: among 8 individuals of its class it is taken for its reference.
        looks_of: Class of the other reference, which may be of its class too, whose looks it has rather than its own; "": none.
    """

    subject: str
    verdict: str
    looks_of: str = ""

    def __str__(self) -> str:
        """In words."""
        if self.verdict == MISSING:
            return f"the {self.subject} is missing"
        owner = f"another {self.subject}" if self.looks_of == self.subject else f"the {self.looks_of}"
        looks = f", it has the looks of {owner}'s reference" if self.looks_of else ""
        if self.verdict == OTHER:
            return f"the {self.subject} is there, but not recognised as its reference{looks}"
        return f"the {self.subject} is there and recognised as its reference"


def identity_of(file: str) -> Identity | None:
    """The identity that the name of a reference picture tells, such as "bird_honey_dots_scarf.png"; None where it tells none."""
    words = [word.replace("-", " ") for word in Path(file).stem.split("_")]
    known = (CLASSES, PALETTES, PATTERNS, MARKINGS)
    if len(words) != len(known) or not all(word in names for word, names in zip(words, known, strict=True)):
        return None
    return Identity(*words)


def judge_picture(judge: Judge, picture: Image.Image, identities: Sequence[Identity]) -> list[SubjectVerdict]:
    """Ask the judge about every subject of a picture, about several of one class place by place; it never sees where they should be.

    Args:
        judge: The identity judge.
        picture: Of any size.
        identities: Of the references.
    """
    seen = images_to_tensor([picture.convert("RGB").resize((JUDGE_SIZE, JUDGE_SIZE), Image.Resampling.LANCZOS)])
    wanted, present = Counter(identity.class_name for identity in identities), judge.presence_probability(seen)[0] > 0.5
    places = find_places(judge, [picture])[0] if max(wanted.values()) > 1 else []
    assigned = assign_places(places, identities)
    verdicts = []
    for index, identity in enumerate(identities):
        name = identity.class_name
        likelihood: Likelihood = partial(_likelihood, judge, seen, name)
        if wanted[name] > 1 and index in assigned:
            likelihood = places[assigned[index]].scores
        if not (index in assigned if wanted[name] > 1 else present[class_index(name)]):
            verdicts.append(SubjectVerdict(name, MISSING))
        elif _is_recognised(likelihood, identity):
            verdicts.append(SubjectVerdict(name, RIGHT))
        else:
            verdicts.append(SubjectVerdict(name, OTHER, _looks_of(likelihood, identity, identities)))
    return verdicts


def judge_rows(judge: Judge, folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[SubjectVerdict]]:
    """By name of the picture, the verdicts on the rows of a manifest whose references are of the pocket world.

    Args:
        judge: The identity judge.
        folder: Where the pictures are.
        rows: Of the manifest; those of a strange form, and those without their picture, are left out.
    """
    verdicts = {}
    for row in rows:
        try:
            identities = [identity_of(reference["file"]) for reference in row["references"]]
            known = [identity for identity in identities if identity is not None]
            if len(known) < len(identities) or not known:
                continue
            with Image.open(folder / Path(row["file"]).name) as picture:
                verdicts[row["name"]] = judge_picture(judge, picture, known)
        except (KeyError, TypeError, OSError):
            continue
    return verdicts


def _likelihood(judge: Judge, seen: Tensor, class_name: str, looks: Sequence[Identity]) -> list[float]:
    return judge.score(seen, class_name, looks)[0].tolist()


def _is_recognised(likelihood: Likelihood, identity: Identity) -> bool:
    """Whether the subject is taken for its reference among 8 individuals of its class, the same eight at every call."""
    seed = int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:4], "big")
    candidates = make_candidates(identity, np.random.default_rng([17, seed]))
    return candidates[int(np.argmax(likelihood(candidates)))] == identity


def _looks_of(likelihood: Likelihood, identity: Identity, identities: Sequence[Identity]) -> str:
    """The class of the reference whose looks the subject has rather than its own; "" for its own."""
    best = identities[int(np.argmax(likelihood(identities)))]
    return best.class_name if best != identity else ""
