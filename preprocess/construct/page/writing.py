"""The page: counts, charts and cards into one file that needs nothing else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mosaic.files import write_text
from mosaic.reports.html import page
from preprocess.construct.candidates import Candidate
from preprocess.construct.licences import licences_in
from preprocess.construct.page.cards import Card, Chosen, chosen_by_points, make_card
from preprocess.construct.page.counting import Cast, Reasons
from preprocess.construct.page.looking import Candidates, Found, look
from preprocess.construct.page.samples import Samples
from preprocess.construct.rows import KINDS
from preprocess.construct.stage import Stage

FOLDER = Path(__file__).resolve().parent
NUM_SAMPLES = 50  # from which somebody knows whether to trust the rest
NUM_DROPPED = 6  # for each reason


def stage_reasons(stage: Stage, candidate: Candidate) -> list[str]:
    """What a stage by itself says."""
    return stage.reasons(candidate)


def write_page(
    path: Path,
    stages: Sequence[Stage],
    candidates: Candidates,
    dataset: Path | None = None,
    *,
    title: str = "How this data was made",
    reasons: Reasons = stage_reasons,
    chosen: Chosen = chosen_by_points,
    provenance: Mapping[str, Any] | None = None,
    num_samples: int = NUM_SAMPLES,
    num_dropped: int = NUM_DROPPED,
) -> Found:
    """Write the page of a construction. The same rows and pictures give the same bytes.

    The candidates are gone through twice; of their pictures only those that are shown are read, one candidate after the other.

    Args:
        path: The page; its folder is made.
        stages: Those that the run has, in order, at least one.
        candidates: Makes an iterator over all candidates with the rows they have, in order, each time it is called.
        dataset: Folder of the finished data set; None: there is none yet.
        title: Of the page.
        reasons: Why a stage drops a candidate whose row it has.
        chosen: For each subject of a candidate that has been through stage 4 the try that is its reference.
        provenance: What computed each stage, as JSON values.
        num_samples: Samples shown.
        num_dropped: Candidates shown for each reason of dropping.

    Returns:
        What was counted.

    Raises:
        FileNotFoundError, ValueError: The data set is missing or damaged.
    """
    samples = None if dataset is None else Samples(dataset)
    rows = {} if samples is None else samples.chosen(num_samples)
    found = look(stages, candidates, reasons, num_dropped, 0 if rows else num_samples, list(rows))
    values = {
        "title": title,
        "found": found,
        "num_samples": None if samples is None else len(samples.manifest),
        "splits": {} if samples is None else samples.splits,
        "casts": _casts(found, samples),
        "kinds": KINDS,
        "cards": _sample_cards(found, samples, rows, chosen),
        "dropped": {
            stage: {reason: (make_card(candidate, why, chosen) for candidate, why in shown) for reason, shown in own.items()}
            for stage, own in found.dropped.items()
        },
        "charts": {
            name: {score: one.chart(score.replace("_", " ")) for score, one in own.items()} for name, own in found.histograms.items()
        },
        "spread": {name: {score: one.words() for score, one in own.items()} for name, own in found.histograms.items()},
        "limits": {stage.name: _limits(stage) for stage in stages},
        "licences": licences_in(provenance or {}),
        "provenance": {name: json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) for name, value in (provenance or {}).items()},
    }
    write_text(path, page("construction.html.jinja", FOLDER, **values))
    return found


def _sample_cards(found: Found, samples: Samples | None, rows: Mapping[int, int], chosen: Chosen) -> Iterator[Card]:
    """Samples of the data set; where there is none, candidates that passed."""
    if samples is None:
        yield from (make_card(candidate, chosen=chosen) for candidate in found.passing)
        return
    for number, row in rows.items():
        if number in found.named:
            yield make_card(found.named[number], chosen=chosen, panel=samples.panel(row))


def _casts(found: Found, samples: Samples | None) -> list[tuple[str, Cast]]:
    casts = [("asked for", found.asked), ("passed", found.kept)]
    return casts if samples is None else [*casts, ("in the data set", samples.cast)]


def _limits(stage: Stage) -> str:
    limits = getattr(stage.settings, "limits", None)
    return "" if limits is None else json.dumps(limits.model_dump(mode="json"), ensure_ascii=False)
