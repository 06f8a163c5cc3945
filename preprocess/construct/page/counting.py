"""What became of the candidates, counted: the funnel, and who is in the samples."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from preprocess.construct.candidates import Candidate, row_of
from preprocess.construct.rows import KINDS
from preprocess.construct.stage import Stage

Reasons = Callable[[Stage, Candidate], list[str]]


class Outcome(NamedTuple):
    """Where a candidate's way ended.

    Attributes:
        passed: How many stages it passed, from the first on.
        reasons: Why the next stage dropped it; empty: it passed all, or the next stage has not been there.
    """

    passed: int
    reasons: list[str]


def outcome(candidate: Candidate, stages: Sequence[Stage], reasons: Reasons) -> Outcome:
    """Follow a candidate until a stage drops it, or knows nothing of it."""
    for passed, stage in enumerate(stages):
        if row_of(candidate, stage.name) is None:
            return Outcome(passed, [])
        if found := reasons(stage, candidate):
            return Outcome(passed, found)
    return Outcome(len(stages), [])


@dataclass
class Cost:
    """How many candidates a reason cost.

    Attributes:
        first: It is the first of their reasons; these add up to what the stage dropped.
        all: It is one of their reasons.
        alone: It is their only reason: they would pass the stage without it.
    """

    first: int = 0
    all: int = 0
    alone: int = 0


@dataclass
class Passage:
    """A stage's part of the funnel.

    Attributes:
        name: Of the stage.
        came: Candidates that all earlier stages let through.
        waiting: Those of them that the stage has not looked at.
        passed: Those that it let through.
        costs: By reason, as they were met.
    """

    name: str
    came: int = 0
    waiting: int = 0
    passed: int = 0
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Candidates that ended here."""
        return self.came - self.waiting - self.passed

    @property
    def seen(self) -> int:
        """Candidates that the stage has looked at."""
        return self.came - self.waiting

    def add(self, reasons: Sequence[str]) -> None:
        """Count a candidate that it dropped."""
        for place, reason in enumerate(dict.fromkeys(reasons)):
            cost = self.costs.setdefault(reason, Cost())
            cost.first += place == 0
            cost.all += 1
            cost.alone += len(set(reasons)) == 1


class Funnel:
    """All stages, candidate by candidate."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.passages = [Passage(stage.name) for stage in stages]

    def add(self, found: Outcome) -> None:
        """Count a candidate."""
        for passage in self.passages[: found.passed]:
            passage.came += 1
            passage.passed += 1
        if found.passed < len(self.passages):
            last = self.passages[found.passed]
            last.came += 1
            last.waiting += not found.reasons
            last.add(found.reasons)

    @property
    def candidates(self) -> int:
        """All that were counted."""
        return self.passages[0].came

    @property
    def passed(self) -> int:
        """Those that passed all stages."""
        return self.passages[-1].passed

    def yields(self) -> dict[str, float]:
        """By stage, the share that passed of what it has looked at; a stage that has seen nothing is left out."""
        return {passage.name: passage.passed / passage.seen for passage in self.passages if passage.seen}


def measured_yields(stages: Sequence[Stage], candidates: Iterable[Candidate], reasons: Reasons) -> dict[str, float]:
    """What each stage has let through so far, as `Funnel.yields`."""
    funnel = Funnel(stages)
    for candidate in candidates:
        funnel.add(outcome(candidate, stages, reasons))
    return funnel.yields()


@dataclass
class Cast:
    """Who is in the samples.

    Attributes:
        subjects: Samples by their number of subjects.
        kinds: Subjects by kind.
        pairs: Pairs of subjects of one sample by their kinds, such as "animal + object".
    """

    subjects: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)

    def add(self, kinds: Iterable[str | None]) -> None:
        """Count a sample by the kinds of its subjects."""
        own = sorted((kind or "unknown" for kind in kinds), key=lambda kind: (*KINDS, kind).index(kind))
        self.subjects[len(own)] += 1
        self.kinds.update(own)
        self.pairs.update(f"{one} + {other}" for one, other in combinations(own, 2))
