"""Which candidates become samples: a pure function of rows and limits, made anew at every start."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from preprocess.construct.candidates import Candidate, row_of
from preprocess.construct.chunks import Chunks
from preprocess.construct.prompts.validation import normalised
from preprocess.construct.stage import Stage

DUPLICATE, NOT_COMPUTED = "duplicate", "not computed"


class Dropped(NamedTuple):
    """Where a candidate ended, and why: the names of the limits, at least one."""

    stage: str
    reasons: list[str]


class Decisions:
    """Decides; knows which prompts have been there before."""

    def __init__(self, stages: Sequence[Stage], max_uses: int | None = 1) -> None:
        """Nothing is known yet.

        Args:
            stages: From the first one on.
            max_uses: How many candidates may have one prompt; None: any number.
        """
        self.stages, self.max_uses = stages, max_uses
        self.duplicates: set[int] = set()

    def find_duplicates(self, prompts: Iterable[tuple[int, str]]) -> None:
        """Note the candidates whose prompt, by its words alone, enough earlier ones have: numbers and prompts in order."""
        uses: Counter[bytes] = Counter()
        self.duplicates = set()
        if self.max_uses is None:
            return
        for number, prompt in prompts:
            digest = hashlib.sha256(normalised(prompt).encode()).digest()[:16]
            uses[digest] += 1
            if uses[digest] > self.max_uses:
                self.duplicates.add(number)

    def reasons(self, stage: Stage, candidate: Candidate) -> list[str]:
        """Why a stage drops a candidate whose row it has; empty: it goes on."""
        found = stage.reasons(candidate)
        return [*found, DUPLICATE] if stage is self.stages[0] and candidate.number in self.duplicates else found

    def dropped(self, candidate: Candidate, stages: Sequence[Stage] | None = None) -> Dropped | None:
        """The first stage (of all, or of some) that drops a candidate; None: none does.

        A stage whose row is missing drops it as "not computed", which happens only before the stage was there.
        """
        for stage in self.stages if stages is None else stages:
            if row_of(candidate, stage.name) is None:
                return Dropped(stage.name, [NOT_COMPUTED])
            if reasons := self.reasons(stage, candidate):
                return Dropped(stage.name, reasons)
        return None

    def passing(self, chunks: Chunks, count: int) -> Iterator[Candidate]:
        """Those of the first `count` chunks that no stage drops, in order."""
        for chunk in range(count):
            yield from (candidate for candidate in chunks.candidates(self.stages, chunk) if self.dropped(candidate) is None)
