"""Two passes over the candidates: the first counts, the second fills the histograms and picks what is shown."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from preprocess.construct.candidates import Candidate, row_of
from preprocess.construct.page.counting import Cast, Funnel, Outcome, Reasons, outcome
from preprocess.construct.page.histograms import Histogram, Range
from preprocess.construct.page.scores import limits_of, measured
from preprocess.construct.stage import Stage

Candidates = Callable[[], Iterator[Candidate]]


@dataclass
class Found:
    """What the two passes found.

    Attributes:
        funnel: Of all stages.
        asked: Who is in the prompts that passed the first stage.
        kept: Who is in what passed all stages.
        histograms: By stage and score.
        dropped: By stage and reason, some candidates with all their reasons.
        passing: Some candidates that passed all stages.
        named: Candidates that were asked for by number.
    """

    funnel: Funnel
    asked: Cast = field(default_factory=Cast)
    kept: Cast = field(default_factory=Cast)
    histograms: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    dropped: dict[str, dict[str, list[tuple[Candidate, list[str]]]]] = field(default_factory=dict)
    passing: list[Candidate] = field(default_factory=list)
    named: dict[int, Candidate] = field(default_factory=dict)


def look(
    stages: Sequence[Stage], candidates: Candidates, reasons: Reasons, num_dropped: int, num_passing: int, numbers: Sequence[int] = ()
) -> Found:
    """Go twice through all candidates; only what is shown stays in memory.

    Args:
        stages: In order.
        candidates: Makes the iterator anew, of the same candidates.
        reasons: What decides.
        num_dropped: Candidates shown for each reason, at even distances among those that have it.
        num_passing: Candidates shown of those that passed, in the same way.
        numbers: Candidates that are shown in any case.
    """
    found = Found(Funnel(stages))
    ranges: dict[str, dict[str, Range]] = {stage.name: {} for stage in stages}
    for candidate, end, rows in _followed(stages, candidates(), reasons):
        found.funnel.add(end)
        kinds = [subject.kind for subject in candidate.prompt.subjects]
        if end.passed > 0:
            found.asked.add(kinds)
        if end.passed == len(stages):
            found.kept.add(kinds)
        for stage in stages[:rows]:
            for name, value in _measured(stage, candidate):
                ranges[stage.name].setdefault(name, Range()).add(value)

    for stage in stages:
        limits = limits_of(stage.settings)
        own = {
            name: Histogram(values, limits[name]) if name in limits else Histogram(values) for name, values in ranges[stage.name].items()
        }
        found.histograms[stage.name] = {name: one for name, one in own.items() if values_differ(one)}
    passages = {passage.name: passage for passage in found.funnel.passages}
    wanted = {
        (name, reason): set(even(cost.all, num_dropped)) for name, passage in passages.items() for reason, cost in passage.costs.items()
    }
    wanted_passing, asked_for = set(even(found.funnel.passed, num_passing)), set(numbers)
    met: Counter[tuple[str, str]] = Counter()
    passing = 0
    for candidate, end, rows in _followed(stages, candidates(), reasons):
        for place, stage in enumerate(stages[:rows]):
            for name, value in _measured(stage, candidate):
                if name in found.histograms[stage.name]:
                    found.histograms[stage.name][name].add(value, place < end.passed)
        for reason in dict.fromkeys(end.reasons):
            key = stages[end.passed].name, reason
            if met[key] in wanted[key]:
                found.dropped.setdefault(key[0], {}).setdefault(reason, []).append((candidate, end.reasons))
            met[key] += 1
        if end.passed == len(stages):
            if passing in wanted_passing:
                found.passing.append(candidate)
            passing += 1
        if candidate.number in asked_for:
            found.named[candidate.number] = candidate
    return found


def even(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the places 0 to count - 1, in the middles of equal parts."""
    number = min(count, wanted)
    return [(2 * place + 1) * count // (2 * number) for place in range(number)]


def values_differ(histogram: Histogram) -> bool:
    """Whether there is something to draw: not where all values are one and no limit is asked for."""
    return histogram.range.low < histogram.range.high or any(end is not None for end in histogram.limit)


def _followed(stages: Sequence[Stage], candidates: Iterator[Candidate], reasons: Reasons) -> Iterator[tuple[Candidate, Outcome, int]]:
    """Each candidate, where its way ended, and how many stages have looked at it on its way."""
    for candidate in candidates:
        end = outcome(candidate, stages, reasons)
        yield candidate, end, end.passed + bool(end.reasons)


def _measured(stage: Stage, candidate: Candidate) -> Iterator[tuple[str, float]]:
    row = row_of(candidate, stage.name)
    assert row is not None, "a stage that a candidate has been through has its row"
    return measured(row)
