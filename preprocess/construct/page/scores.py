"""The numbers that the stages measured, by name, and the limits that decide about them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mosaic.config.schema import Section
from preprocess.construct.rows import PointsRow, PromptRow, ReferencesRow, Row, SegmentationRow, SynthesisRow


class Limit(NamedTuple):
    """What a score must be; an end that is None is not asked for.

    Attributes:
        low: Least value that passes.
        high: Largest value that passes.
    """

    low: float | None = None
    high: float | None = None


def measured(row: Row) -> Iterator[tuple[str, float]]:
    """Yield every number of a row by its name: one for each subject or try, where the row has several."""
    if isinstance(row, PromptRow):
        yield "attempts", row.attempts
    elif isinstance(row, SynthesisRow):
        yield from row.scores.items()
    elif isinstance(row, SegmentationRow):
        for found in row.subjects:
            if found is not None:
                yield from found.model_dump(exclude={"box"}).items()
    elif isinstance(row, ReferencesRow):
        for tries in row.subjects:
            for edit in tries:
                yield from edit.scores.items()
    elif isinstance(row, PointsRow):
        for matched in row.subjects:
            if matched is not None:
                yield "points", matched.number_of_points
                yield from matched.scores.items()


def limits_of(settings: Section) -> dict[str, Limit]:
    """The limits of a stage by the score that they decide about.

    A limit "min_NAME" or "max_NAME" is an end of NAME's, a pair its both ends; what stands under a name of its own is read the same way.
    Limits that are no number of a score, such as whether something is wanted at all, are left out.
    """
    found: dict[str, Limit] = {}
    for name, value in _values(getattr(settings, "limits", None)):
        end, _, score = name.partition("_")
        if isinstance(value, tuple | list):
            low, high = value if len(value) == 2 else (None, None)
            found[name] = Limit(_number(low), _number(high))
        elif _number(value) is not None and end in ("min", "max") and score:
            before = found.get(score, Limit())
            found[score] = before._replace(**{"low" if end == "min" else "high": float(value)})
    return {name: limit for name, limit in found.items() if limit != Limit()}


def _values(limits: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a section or mapping; those of one within it by its name, such as min_NAME for the field "min" of NAME."""
    for name, value in dict(limits or {}).items():
        if isinstance(value, Section | Mapping):
            yield from ((f"{end}_{name}", inner) for end, inner in dict(value).items())
        else:
            yield name, value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
