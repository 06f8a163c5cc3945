"""The findings in words, for the screen and the page."""

from collections.abc import Iterator, Sequence
from typing import Any

from mosaic.data.quality import FEWEST_POINTS
from scripts.doctor.matches import FEW_POINTS, UNFIT_COHERENCE

LOOK = (
    "No figure proves that points are right: a part may be matched to another one in good order. Somebody must look at the contact sheet: "
    "do the lines join the same parts?"
)
_SHOWN = 5  # examples in a line


def rows(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each finding: its name and what was found.

    Args:
        summary: Of `scripts.doctor.findings.summarise`, with what the data set says of itself as "data_set".
    """
    coverage, points, matches, captions = (summary[name] for name in ("coverage", "points_per_reference", "matches", "captions"))
    unreadable, duplicates, shared = (summary[name] for name in ("unreadable", "near_duplicates", "disjointness_violations"))
    yield "samples looked at", str(summary["samples"])
    yield "unreadable samples", _counted(unreadable["count"], [f"sample {index}: {message}" for index, message in unreadable["examples"]])
    yield "references per sample", _numbers([(f"{k}", number) for k, number in summary["references_per_sample"].items()], "samples")
    yield "references with points", _with_examples(f"{coverage['points']:.1%}", coverage["examples_without_points"], "none in")
    yield "references with masks", f"{coverage['masks']:.1%}"
    for kind in ("empty", "full"):
        yield f"{kind} masks", _counted(summary[f"{kind}_masks"]["count"], summary[f"{kind}_masks"]["examples"])
    yield "missing parts", _numbers([*coverage["missing"].items()], "samples") or "none"
    yield "points per reference", f"median {points['median']:g}, mean {points['mean']:.1f}, {points['min']} to {points['max']}"
    yield f"fewer than {FEW_POINTS} points", f"{points[f'below_{FEW_POINTS}']} references"
    outside = summary["points_outside_masks"]
    yield (
        "outside masks",
        "no masks, so not known"
        if outside["share"] is None
        else _with_examples(f"{outside['share']:.1%} of points", outside["examples"], "in"),
    )
    yield "on white", f"{_share(summary['points_on_white']['share'])} of points, beside the subject of a reference"
    yield "two owners", _counted(shared["count"], shared["examples"], "samples with a target cell in two references")
    yield "matched by", ", ".join(matches["extractors"]) or "not known"
    if matches["coherence"] is None:
        yield "coherence", f"cannot be told, no reference has {FEWEST_POINTS} points"
    else:
        worst = [f"{name} {value:.2f}" for name, value in matches["least_coherent"]]
        yield "coherence", _with_examples(f"{matches['coherence']:.2f} of 1", worst, "least")
        yield f"coherence below {UNFIT_COHERENCE}", f"{matches['incoherent_references']} references"
        yield "coherence not told", f"{matches['too_few_points_to_tell']} references with fewer than {FEWEST_POINTS} points"
    yield "subjects covered", f"{_share(matches['coverage'])} of their parts have points"
    yield "cyclic matches", f"{_share(matches['cyclic'])} of cells"
    yield "extractors agree", f"on {_share(matches['agreement'])} of cells"
    yield "near-duplicates", _counted(duplicates["pairs"], [f"{a} and {b}" for a, b in duplicates["examples"]], "pairs of targets")
    for name, sizes in (("target sizes", summary["target_sizes"]), ("reference sizes", summary["reference_sizes"])):
        yield f"{name} (px)", _numbers([(size, number) for size, _, number in sizes[:_SHOWN]], "pictures")
    yield "captions", f"{captions['distinct']} different, median {captions['median_words']:g} words, at most {captions['max_words']}"
    yield "captions cut", _counted(captions["cut"], captions["cut_examples"])
    yield "repeated captions", "; ".join(f'"{caption}" {number} times' for caption, number in captions["most_repeated"]) or "none"
    yield "empty captions", _counted(len(captions["empty"]), captions["empty"])
    yield "tokens per sample", f"{summary['tokens_per_sample']:.0f}"
    for name, value in summary["data_set"].items():
        yield f"data set: {name.replace('_', ' ')}", str(value)


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.1%}"


def _numbers(counts: Sequence[tuple[str, int]], what: str) -> str:
    """Like "2: 5 samples, 3: 7 samples"."""
    return ", ".join(f"{name}: {number} {what}" for name, number in counts)


def _counted(number: int, examples: Sequence[str], what: str = "") -> str:
    return _with_examples(f"{number} {what}".rstrip(), examples, "first") if number else "none"


def _with_examples(text: str, examples: Sequence[str], word: str) -> str:
    more = ", ..." if len(examples) > _SHOWN else ""
    return f"{text}; {word}: {', '.join(examples[:_SHOWN])}{more}" if examples else text
