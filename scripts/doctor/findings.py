"""What the doctor counts: inspections of samples in, findings out. Nothing here reads a file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mosaic.data.inspection import Coverage, Inspection, fingerprint
from mosaic.data.placement import Placement
from mosaic.data.readable import Unreadable
from mosaic.pipeline.prompt_lengths import LostWords, TextWindow
from scripts.doctor.matches import FEW_POINTS, Matches

NEAR_BITS = 3  # fingerprints that differ in at most so many of 64 bits are near-duplicates
_BANDS = NEAR_BITS + 1
EXAMPLES = 20  # ids listed per finding
FIT, LOOK_FIRST, NOT_FIT = "fit for training", "look first", "not fit for training"


@dataclass(frozen=True)
class Training:
    """What the findings are judged by: sizes of the training that is planned.

    Attributes:
        token_pixels: Pixels per token side.
        image_size: Height and width of the target in pixels.
        reference_size: Side of a reference in pixels.
        text_length: Text tokens.
        min_coverage: Share of references that must have points.
        max_outside: Largest share of points that may lie outside their subjects.
    """

    token_pixels: int = 16
    image_size: tuple[int, int] = (512, 512)
    reference_size: int = 512
    text_length: int = 512
    min_coverage: float = 0.95
    max_outside: float = 0.05


@dataclass
class Findings:
    """Collects inspections one by one; memory grows by a few numbers per sample.

    Attributes:
        training: What they are judged by.
        looked: Whether somebody has looked at the matches, so that doubts do not count.
        window: Tells which captions the model will cut; None: by their words alone.
    """

    training: Training = field(default_factory=Training)
    looked: bool = False
    samples: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    masks: Coverage = field(default_factory=Coverage)
    empty_masks: list[str] = field(default_factory=list)
    full_masks: list[str] = field(default_factory=list)
    without_chance: int = 0
    missing: Counter = field(default_factory=Counter)
    references: Counter = field(default_factory=Counter)
    counts: list[int] = field(default_factory=list)
    disjointness: list[str] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)
    reference_sizes: Counter = field(default_factory=Counter)
    captions: Counter = field(default_factory=Counter)
    empty_captions: list[str] = field(default_factory=list)
    cut_captions: list[tuple[str, LostWords]] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    fingerprints: list[tuple[int, str]] = field(default_factory=list)
    matches: Matches = field(default_factory=Matches)
    window: TextWindow | None = None
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        self.window = self.window or TextWindow.of_words(self.training.text_length)
        self.placement = Placement(self.training.max_outside)

    def add(self, found: Inspection | Unreadable) -> None:
        """Count one sample."""
        self.samples += 1
        if isinstance(found, Unreadable):
            self.unreadable.append(found)
            return
        self.coverage.add(found.id, found.points)
        self.masks.add(found.id, [mask if mask is not None else () for mask in found.masks])
        self.empty_masks += [found.id for problem in found.mask_problems if problem == "empty"]
        self.full_masks += [found.id for problem in found.mask_problems if problem == "full"]
        self.without_chance += sum(p == "empty" and not len(pairs) for p, pairs in zip(found.mask_problems, found.points, strict=False))
        self.missing.update(found.missing)
        self.references[len(found.references)] += 1
        self.counts += [len(pairs) for pairs in found.points]
        if shared_cells(found.points):
            self.disjointness.append(found.id)
        self.placement.add(found)
        self.matches.add(found)
        self.sizes[found.target.size] += 1
        self.reference_sizes.update(reference.size for reference in found.references)
        self.captions[found.prompt] += 1
        self.words.append(len(found.prompt.split()))
        if not found.prompt.strip():
            self.empty_captions.append(found.id)
        assert self.window is not None
        if (lost := self.window.lost(found.prompt)) is not None:
            self.cut_captions.append((found.id, lost))
        self.fingerprints.append((fingerprint(found.target), found.id))

    def reasons(self) -> list[str]:
        """Why training should not start on this data; empty where it may."""
        reasons = []
        if self.coverage.share < self.training.min_coverage:
            cure = "find them with preprocess/match.py, or put the missing files in place"
            if self.without_chance:
                cure = (
                    f"{self.without_chance} of those without have an empty mask (samples {', '.join(self.empty_masks[:3])}), where "
                    "matching can find none: mend these masks or leave them out first, then match"
                )
            reasons.append(
                f"{self.coverage.with_points} of {self.coverage.references} references ({self.coverage.share:.1%}) have points, "
                f"{self.training.min_coverage:.0%} are wanted: {cure}"
            )
        if self.unreadable:
            reasons.append(f"{len(self.unreadable)} of {self.samples} samples cannot be read")
        if self.disjointness:
            reasons.append(f"{len(self.disjointness)} samples have a target cell in two references (Eq. 2)")
        return reasons + self.placement.reasons() + self.matches.reasons()


def shared_cells(points: Sequence[Tensor]) -> int:
    """Number of target cells v that stand in two references or more (Eq. 2 allows none)."""
    owners = Counter(v for pairs in points for v in set(pairs[:, 1].tolist()))
    return sum(count > 1 for count in owners.values())


def near_duplicates(fingerprints: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    """Pairs of ids whose fingerprints differ in at most `NEAR_BITS` bits.

    Two such fingerprints agree in at least one of `NEAR_BITS` + 1 bands of bits, so only those that share a band are compared.
    """
    pairs: dict[tuple[str, str], None] = {}
    width = 64 // _BANDS
    for band in range(_BANDS):
        groups: dict[int, list[tuple[int, str]]] = {}
        for value, name in fingerprints:
            groups.setdefault(value >> (band * width) & ((1 << width) - 1), []).append((value, name))
        for group in groups.values():
            values = np.array([value for value, _ in group], dtype=np.uint64)
            for i in range(len(group) - 1):
                distance = np.bitwise_count(values[i + 1 :] ^ values[i])
                for j in np.flatnonzero(distance <= NEAR_BITS).tolist():
                    pairs[group[i][1], group[i + 1 + j][1]] = None
    return list(pairs)


def tokens_per_sample(training: Training, num_references: int) -> int:
    """Length of the joint sequence: text, target and K references."""
    height, width = (side // training.token_pixels for side in training.image_size)
    return training.text_length + height * width + num_references * (training.reference_size // training.token_pixels) ** 2


def summarise(findings: Findings) -> dict[str, Any]:
    """The findings as JSON types."""
    counts = np.array(findings.counts or [0])
    pairs = near_duplicates(findings.fingerprints)
    references = dict(sorted(findings.references.items()))
    readable = sum(references.values())
    tokens = sum(number * tokens_per_sample(findings.training, k) for k, number in references.items()) / max(1, readable)
    repeated = [(caption, number) for caption, number in findings.captions.most_common(EXAMPLES) if number > 1]
    reasons, placement = findings.reasons(), findings.placement
    doubts = findings.matches.doubts()
    return {
        "healthy": not reasons and (findings.looked or not doubts),
        "verdict": NOT_FIT if reasons else LOOK_FIRST if doubts and not findings.looked else FIT,
        "reasons": reasons,
        "doubts": doubts,
        "samples": findings.samples,
        "unreadable": {"count": len(findings.unreadable), "examples": [[bad.index, bad.message] for bad in findings.unreadable[:EXAMPLES]]},
        "coverage": {
            "points": findings.coverage.share,
            "masks": findings.masks.share,
            "references": findings.coverage.references,
            "references_with_points": findings.coverage.with_points,
            "missing": dict(findings.missing),
            "examples_without_points": findings.coverage.examples[:EXAMPLES],
        },
        "empty_masks": {"count": len(findings.empty_masks), "examples": findings.empty_masks[:EXAMPLES]},
        "full_masks": {"count": len(findings.full_masks), "examples": findings.full_masks[:EXAMPLES]},
        "references_per_sample": {str(k): number for k, number in references.items()},
        "points_per_reference": {
            "min": int(counts.min()),
            "median": float(np.median(counts)),
            "mean": float(counts.mean()),
            "max": int(counts.max()),
            f"below_{FEW_POINTS}": int((counts < FEW_POINTS).sum()),
        },
        "disjointness_violations": {"count": len(findings.disjointness), "examples": findings.disjointness[:EXAMPLES]},
        "points_outside_masks": {
            "share": float(np.mean(placement.target)) if placement.target else None,
            "examples": placement.examples[:EXAMPLES],
        },
        "points_on_white": {"share": float(np.mean(placement.reference)) if placement.reference else None},
        "matches": findings.matches.summary(),
        "near_duplicates": {"pairs": len(pairs), "examples": [list(pair) for pair in pairs[:EXAMPLES]]},
        "target_sizes": _histogram(findings.sizes),
        "reference_sizes": _histogram(findings.reference_sizes),
        "captions": {
            "empty": findings.empty_captions[:EXAMPLES],
            "cut": len(findings.cut_captions),
            "cut_examples": [f"{name} {lost}" for name, lost in findings.cut_captions[:EXAMPLES]],
            "distinct": len(findings.captions),
            "most_repeated": [list(pair) for pair in repeated[:5]],
            "median_words": float(np.median(findings.words or [0])),
            "max_words": max(findings.words, default=0),
        },
        "tokens_per_sample": tokens,
    }


def _histogram(sizes: Counter) -> list[list[Any]]:
    """The most frequent sizes: "width x height", aspect ratio, number."""
    return [[f"{width} x {height}", round(width / height, 3), number] for (width, height), number in sizes.most_common(EXAMPLES)]
