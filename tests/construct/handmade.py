"""A construction made by hand: rows whose outcome is drawn from a small set of scores, and their pictures."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from mosaic.config.schema import Section
from mosaic.data import DatasetWriter, ReferenceRecord, SampleRecord
from preprocess.construct.candidates import Candidate, picture_name
from preprocess.construct.rows import (
    KINDS,
    Edit,
    Found,
    Matched,
    PointsRow,
    PromptRow,
    ReferencesRow,
    Row,
    SegmentationRow,
    Subject,
    SynthesisRow,
)
from preprocess.construct.stage import Stage

EVIL = "a <b>cat</b> & a \"dog\" of 'mine' </style><script>alert(1)</script>"


class Limits(Section):
    """Limits of a stage made by hand."""

    path: ClassVar[str] = "handmade.limits"

    min_aesthetics: float | None = 0.3
    """Least."""
    max_area: float | None = 0.8
    """Largest."""
    similarity: tuple[float, float] | None = (0.5, 0.95)
    """Band."""


class Settings(Section):
    """Settings of a stage made by hand."""

    path: ClassVar[str] = "handmade"

    limits: Limits = Limits()
    """What decides."""


def _stage(name: str, row: type[Row], reasons: Callable[[Candidate], list[str]]) -> Stage:
    def load(device: torch.device) -> None:
        raise AssertionError("the page loads no model")

    return Stage(name, row, Settings(), load, reasons)  # type: ignore[arg-type]


def _prompt_reasons(candidate: Candidate) -> list[str]:
    return ["invalid"] if candidate.prompt.problem else []


def _synthesis_reasons(candidate: Candidate) -> list[str]:
    scores = candidate.synthesis.scores
    return [name for name, bad in (("min_aesthetics", scores["aesthetics"] < 0.3), ("min_blur", scores["blur"] < 5)) if bad]


def _segmentation_reasons(candidate: Candidate) -> list[str]:
    found = candidate.segmentation.subjects
    return ["not_found"] if None in found else ["max_area"] if any(one.area > 0.8 for one in found) else []


def _references_reasons(candidate: Candidate) -> list[str]:
    best = [max(edit.scores["similarity"] for edit in tries) for tries in candidate.references.subjects]
    return ["similarity"] if min(best) < 0.5 else []


def _points_reasons(candidate: Candidate) -> list[str]:
    return [] if any(one is not None and one.number_of_points >= 2 for one in candidate.points.subjects) else ["min_points"]


STAGES = (
    _stage("prompts", PromptRow, _prompt_reasons),
    _stage("synthesis", SynthesisRow, _synthesis_reasons),
    _stage("segmentation", SegmentationRow, _segmentation_reasons),
    _stage("references", ReferencesRow, _references_reasons),
    _stage("points", PointsRow, _points_reasons),
)


def candidate(number: int, work: Path, words: str = "") -> Candidate:
    """Candidate of a number: what becomes of it is drawn; the last stages have not seen every one."""
    rng = np.random.default_rng(number)
    kinds = [KINDS[i] for i in rng.integers(0, 3, 1 + number % 3)]
    subjects = tuple(Subject(phrase=f"a {kind} {k}", name=kind, kind=kind) for k, kind in enumerate(kinds))
    text = words or f"{' and '.join(subject.phrase for subject in subjects)} in scene {number}"
    prompt = PromptRow(
        number=number, prompt=text, caption=text, subjects=subjects, seed=number, problem="no JSON" if number % 11 == 5 else ""
    )
    folders = {stage.name: work / stage.name / "000000" for stage in STAGES}
    found = Candidate(number, folders, prompt)
    scores = {"aesthetics": float(rng.random()), "blur": float(10 ** rng.uniform(0, 4)), "still": 1.0}
    synthesis = SynthesisRow(number=number, seed=number, height=32, width=48, scores=scores, remarks={"judge": EVIL} if words else {})
    areas = rng.random(len(subjects))
    masks = tuple(
        None if area < 0.03 else Found(box=(0, 0, 9, 9), score=0.5, number_found=1, area=float(area), truncated=0, overlap=0)
        for area in areas
    )
    edits = tuple(
        tuple(Edit(seed=j, instruction=f"turn {j}", scores={"similarity": float(rng.random())}) for j in range(2)) for _ in subjects
    )
    points = tuple(Matched(edit=1, number_of_points=int(rng.integers(0, 5)), scores={"cyclic": 0.5}) for _ in subjects)
    rows = {
        "synthesis": synthesis,
        "segmentation": SegmentationRow(number=number, subjects=masks),
        "references": ReferencesRow(number=number, subjects=edits),
        "points": PointsRow(number=number, subjects=points),
    }
    for name in list(rows)[: 2 if number % 13 == 7 else 4]:
        found = Candidate(**{**vars(found), name: rows[name]})
        draw_pictures(found, name)
    return found


def draw_pictures(of: Candidate, stage: str) -> None:
    """The files of a stage."""
    rng = np.random.default_rng([of.number, 1])

    def save(image: Image.Image, name: str = "") -> None:
        of.folders[stage].mkdir(parents=True, exist_ok=True)
        image.save(of.folders[stage] / picture_name(of.number, name))

    if stage == "synthesis":
        save(Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)))
    elif stage == "segmentation":
        for k, found in enumerate(of.segmentation.subjects):
            mask = np.zeros((32, 48), np.uint8)
            mask[4:28, 12 * k + 1 : 12 * k + 11] = 255
            save(Image.fromarray(mask), f"mask{k}") if found is not None else None
    elif stage == "references":
        for k, tries in enumerate(of.references.subjects):
            for j, _ in enumerate(tries):
                save(Image.new("RGB", (32, 32), (40 * k, 60 * j, of.number % 256)), f"ref{k}_{j}")


def many(count: int, work: Path) -> Callable[[], Iterator[Candidate]]:
    """The first candidates, as often as they are asked for."""
    made = [candidate(number, work) for number in range(count)]
    return lambda: iter(made)


def write_dataset(candidates: list[Candidate], root: Path) -> None:
    """Candidates as samples, with two points for each reference."""
    with DatasetWriter(root) as writer:
        for number, one in enumerate(candidates):
            references = [
                ReferenceRecord(
                    image=Image.new("RGB", (32, 32), "navy"),
                    phrase=subject.phrase,
                    points=np.array([[0, 2 * k], [3, 2 * k + 1]]),
                    kind=subject.kind,
                )
                for k, subject in enumerate(one.prompt.subjects)
            ]
            writer.add(
                SampleRecord(
                    id=f"s{one.number}",
                    split="test" if number % 4 == 3 else "train",
                    prompt=one.prompt.caption,
                    target=Image.new("RGB", (48, 32), "teal"),
                    references=references,
                    reference_grid=(2, 2),
                    target_grid=(2, 4),
                    metadata=json.loads(json.dumps({"candidate": one.number})),
                )
            )
