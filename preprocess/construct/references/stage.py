"""Stage 4: references of the subjects, several tries for each, of which the limits choose one."""

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from preprocess.construct.candidates import Candidate, picture_name, read_stage_picture, seed_of
from preprocess.construct.chats import key_of, load_chat
from preprocess.construct.pipelines import means_of
from preprocess.construct.references.editors import Editor, fit, load_editor
from preprocess.construct.references.measures import border, contrast
from preprocess.construct.references.settings import ReferencesSettings
from preprocess.construct.rows import Edit, ReferencesRow, Subject
from preprocess.construct.segmentation.cutouts import cut_out
from preprocess.construct.stage import Stage

NAME = "references"
ARTICLE = re.compile(r"(?:a|an|the)\s+", re.IGNORECASE)
BANDS = ("min_similarity", "max_similarity")


class Job(NamedTuple):
    """A try: a subject's cut-out, and what is to be made of it."""

    candidate: Candidate
    subject: int
    number: int
    cut_out: Image.Image
    instruction: str
    seed: int


class ReferencesWorker:
    """Edits cut-outs and measures what came out."""

    def __init__(
        self,
        settings: ReferencesSettings,
        base_seed: int,
        editor: Editor,
        encoder: Any = None,
        detector: Any = None,
        judge: Any = None,
    ) -> None:
        """Take what is loaded.

        Args:
            settings: Of the stage.
            base_seed: Of the run.
            editor: What edits.
            encoder: An `ImageEncoder`; None: likeness is not measured.
            detector: A `ScoringDetector`; None: it is not asked.
            judge: An `EditJudge`; None: it is not asked.
        """
        self.settings, self.base_seed, self.editor = settings, base_seed, editor
        self.encoder, self.detector, self.judge = encoder, detector, judge
        self.provenance: dict[str, Any] = {"editor": editor.provenance}
        for name, model in (("encoder", encoder), ("detector", detector)):
            if model is not None:
                self.provenance[name] = vars(model.provenance)
        if judge is not None:
            self.provenance["judge"] = judge.provenance

    def __call__(self, candidates: Sequence[Candidate], folder: Path) -> Iterator[ReferencesRow]:
        """Pictures into the folder, then a row for each.

        Raises:
            OSError: An endpoint cannot be reached.
            ValueError: The pipeline makes pictures of another size than it was asked for.
        """
        cut_outs = {candidate.number: self._cut_outs(candidate) for candidate in candidates}
        jobs = [job for candidate in candidates for job in self._jobs(candidate, cut_outs[candidate.number])]
        for start in range(0, len(jobs), self.settings.batch_size):
            batch = jobs[start : start + self.settings.batch_size]
            edits = self.editor.edit([job.cut_out for job in batch], [job.instruction for job in batch], [job.seed for job in batch])
            for job, picture in zip(batch, edits, strict=True):
                picture.save(folder / picture_name(job.candidate.number, f"ref{job.subject}_{job.number}"))
        for candidate in candidates:
            own = [job for job in jobs if job.candidate is candidate]
            yield self._row(candidate, own, folder)

    def _cut_outs(self, candidate: Candidate) -> list[Image.Image | None]:
        """Of each subject that was found, in the size of a reference."""
        assert candidate.segmentation is not None
        picture = read_stage_picture(candidate, "synthesis").convert("RGB")
        found: list[Image.Image | None] = []
        for k, one in enumerate(candidate.segmentation.subjects):
            if one is None:
                found.append(None)
                continue
            mask = np.asarray(read_stage_picture(candidate, "segmentation", f"mask{k}").convert("L")) > 127
            found.append(fit(cut_out(picture, mask), self.settings.size))
        return found

    def _jobs(self, candidate: Candidate, cut_outs: Sequence[Image.Image | None]) -> Iterator[Job]:
        """All tries of a candidate."""
        tries = min(self.settings.tries, self.editor.tries or self.settings.tries)
        for k, (subject, one) in enumerate(zip(candidate.prompt.subjects, cut_outs, strict=True)):
            for j in range(tries if one is not None else 0):
                assert one is not None, "there are no tries without"
                seeds = [seed_of(self.base_seed, NAME, candidate.number, k, j, part) for part in range(2)]
                text = "" if self.settings.editor == "none" else instruction(self.settings, subject, seeds[1])
                yield Job(candidate, k, j, one, text, seeds[0])

    def _row(self, candidate: Candidate, jobs: Sequence[Job], folder: Path) -> ReferencesRow:
        """What is known of a candidate's tries, from the pictures as they were written."""
        edits = []
        for job in jobs:
            with Image.open(folder / picture_name(candidate.number, f"ref{job.subject}_{job.number}")) as file:
                edits.append(file.convert("RGB"))
        subjects: list[list[Edit]] = [[] for _ in candidate.prompt.subjects]
        for job, edit, likeness in zip(jobs, edits, self._likeness(jobs, edits), strict=True):
            scores, remarks = {"border": border(edit), "contrast": contrast(edit)}, dict[str, str]()
            subject = candidate.prompt.subjects[job.subject]
            if likeness is not None:
                scores["similarity"] = likeness if math.isfinite(likeness) else -1.0
            if self.detector is not None:
                scores["detector"] = max((found.score for found in self.detector.detections(edit, subject.name)), default=0.0)
            if self.judge is not None:
                scores["judge"], remark = self.judge.score(job.cut_out, edit, subject.phrase)
                remarks |= {"judge": remark} if remark else {}
            subjects[job.subject].append(Edit(seed=job.seed, instruction=job.instruction, scores=scores, remarks=remarks))
        return ReferencesRow(number=candidate.number, subjects=tuple(tuple(tries) for tries in subjects))

    def _likeness(self, jobs: Sequence[Job], edits: Sequence[Image.Image]) -> list[float | None]:
        """Cosine of each edit with its cut-out; the pictures of one candidate are encoded together, so that it depends on no other."""
        if self.encoder is None or not jobs:
            return [None] * len(jobs)
        shown = self.encoder.images([*edits, *(job.cut_out for job in jobs)])
        return [float(first @ second) for first, second in zip(*shown.chunk(2), strict=True)]


def instruction(settings: ReferencesSettings, subject: Subject, seed: int) -> str:
    """What the editor is told of a subject, with a view that the seed draws."""
    views = getattr(settings.views, subject.kind)
    phrase = ARTICLE.sub("", subject.phrase, count=1) if ARTICLE.match(subject.phrase) else subject.phrase
    return str(getattr(settings.instructions, subject.kind).format(phrase=phrase, name=subject.name, view=views[seed % len(views)]))


def missed(settings: ReferencesSettings, edit: Edit) -> list[str]:
    """The limits that a try misses, in the order of the settings."""
    found = []
    for limit, value in settings.limits:
        end, _, name = limit.partition("_")
        if value is None or limit == "min_references" or (limit in BANDS and settings.editor == "none"):
            continue
        score = edit.scores[name]
        if score < value if end == "min" else score > value:
            found.append(limit)
    return found


def chosen_edits(settings: ReferencesSettings, candidate: Candidate) -> tuple[int | None, ...]:
    """The try that is each subject's reference: within the limits, the most similar to its cut-out, of equal ones the first; None: no try
    is within the limits, and the subject has no reference.
    """
    assert candidate.references is not None
    chosen: list[int | None] = []
    for tries in candidate.references.subjects:
        good = [j for j, edit in enumerate(tries) if not missed(settings, edit)]
        chosen.append(max(good, key=lambda j: (tries[j].scores.get("similarity", 0.0), -j), default=None))
    return tuple(chosen)


def reasons(settings: ReferencesSettings, candidate: Candidate) -> list[str]:
    """Why a candidate is dropped: where too few subjects have a reference, what the best tries of the others miss."""
    assert candidate.references is not None
    chosen = chosen_edits(settings, candidate)
    if sum(one is not None for one in chosen) >= settings.limits.min_references:
        return []
    found = set()
    for one, tries in zip(chosen, candidate.references.subjects, strict=True):
        if one is None and tries:
            fewest: list[str] = min((missed(settings, edit) for edit in tries), key=len)
            found |= set(fewest)
    return [name for name in type(settings.limits).model_fields if name in found] or ["min_references"]


def references_stage(settings: ReferencesSettings, base_seed: int, dtype: torch.dtype = torch.float32) -> Stage:
    """Stage 4.

    Args:
        settings: Its section.
        base_seed: Of the run.
        dtype: Of all models.

    Raises:
        FieldError, ValueError: A package is missing, or a key's variable not set.
    """
    if settings.editor != "none":
        means_of(settings)
    if settings.judge is not None:
        key_of(settings.judge)

    def load(device: torch.device) -> ReferencesWorker:
        from mosaic.evaluation.encoders import load_image_encoder
        from preprocess.construct.references.judge import EditJudge

        return ReferencesWorker(
            settings,
            base_seed,
            load_editor(settings, device, dtype),
            settings.encoder and load_image_encoder(settings.encoder, "references.encoder", device, dtype),
            settings.detector and scoring_detector(settings.detector, device, dtype),
            settings.judge and EditJudge(load_chat(settings.judge, device, dtype)),
        )

    return Stage(NAME, ReferencesRow, settings, load, partial(reasons, settings))


def scoring_detector(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a detector that says how sure it is.

    Raises:
        FileNotFoundError, ValueError: It cannot be had, or gives no scores.
    """
    from mosaic.evaluation.detection import ScoringDetector, load_detector

    found = load_detector(name, "references.detector", device, dtype)
    if not isinstance(found, ScoringDetector):
        raise ValueError(f"references.detector: {name} must say how sure it is of a box, which {type(found).__name__} does not.")
    return found
