"""A candidate for the eye: its picture with the masks' outlines, its subjects, and what was tried for their references."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mosaic.data.masks import read_mask
from mosaic.images import to_rgb
from mosaic.reports.figures import LINE_COLOURS, placed, tile
from preprocess.construct.candidates import Candidate, read_stage_picture
from preprocess.construct.rows import Subject

PICTURE, TRY = 224, 96  # px, sides of the target and of a reference's try
REMARK = 240  # letters of a judge's words

Chosen = Callable[[Candidate], Sequence[int | None]]


@dataclass(frozen=True)
class Try:
    """A reference that was tried.

    Attributes:
        picture: Its thumbnail; None: it cannot be read.
        words: Its scores.
        instruction: What the model was told.
        remarks: What a judge said.
        chosen: Whether it became the reference.
    """

    picture: Image.Image | None
    words: str
    instruction: str
    remarks: list[str]
    chosen: bool


@dataclass(frozen=True)
class Shown:
    """A subject of a candidate.

    Attributes:
        subject: As the prompt has it.
        words: What was found of it, in numbers.
        tries: Of its reference.
    """

    subject: Subject
    words: str
    tries: list[Try]


@dataclass(frozen=True)
class Card:
    """A candidate.

    Attributes:
        number: Of the candidate.
        prompt: What the picture was made from.
        caption: What training reads; "": the prompt.
        reasons: Why it was dropped.
        picture: Thumbnail with outlines; None: there is none, or it cannot be read.
        words: Its scores.
        remarks: What a judge said.
        subjects: Of the prompt.
        problem: Why no picture is shown.
        panel: References and target with lines between corresponding cells; None: it is not in the data set.
    """

    number: int
    prompt: str
    caption: str
    reasons: list[str]
    picture: Image.Image | None
    words: str
    remarks: list[str]
    subjects: list[Shown]
    problem: str
    panel: Image.Image | None = None


def chosen_by_points(candidate: Candidate) -> tuple[int | None, ...]:
    """For each subject the try in which points were looked for; None where there were none."""
    if candidate.points is None:
        return (None,) * len(candidate.prompt.subjects)
    return tuple(None if matched is None else matched.edit for matched in candidate.points.subjects)


def make_card(
    candidate: Candidate, reasons: Sequence[str] = (), chosen: Chosen = chosen_by_points, panel: Image.Image | None = None
) -> Card:
    """Read what is shown of a candidate. A picture that is gone or damaged is said to be so, and the rest is shown."""
    prompt = candidate.prompt
    picture, problem = None, prompt.problem
    if candidate.synthesis is not None:
        try:
            picture = outlined(candidate)
        except (FileNotFoundError, ValueError):
            problem = "the picture, or a mask, is gone or damaged"
    synthesis = candidate.synthesis
    picks = chosen(candidate) if candidate.references is not None else ()
    return Card(
        number=candidate.number,
        prompt=prompt.prompt,
        caption=prompt.caption if prompt.caption != prompt.prompt else "",
        reasons=list(reasons),
        picture=picture,
        words="" if synthesis is None else _numbers(synthesis.scores),
        remarks=[] if synthesis is None else _remarks(synthesis.remarks),
        subjects=[
            Shown(subject, _found(candidate, k), _tries(candidate, k, picks[k] if k < len(picks) else None))
            for k, subject in enumerate(prompt.subjects)
        ],
        problem=problem,
        panel=panel,
    )


def outlined(candidate: Candidate, side: int = PICTURE) -> Image.Image:
    """The candidate's picture as a tile, with the outline of each subject's mask in the subject's colour, and the subject's number.

    Raises:
        FileNotFoundError, ValueError: A picture is gone or damaged.
    """
    picture = to_rgb(read_stage_picture(candidate, "synthesis"))
    shown = tile(picture, side)
    left, top, width, height = placed(picture.size, side)
    subjects: Sequence[object] = () if candidate.segmentation is None else candidate.segmentation.subjects
    for k, found in enumerate(subjects):
        if found is None:
            continue
        mask = Image.fromarray(read_mask(read_stage_picture(candidate, "segmentation", f"mask{k}"))).convert("L")
        small = Image.new("L", (side, side))
        small.paste(mask.resize((width, height), Image.Resampling.BOX).point(lambda value: 255 * (value > 127)), (left, top))
        _draw_outline(shown, small, k)
    return shown


def _draw_outline(shown: Image.Image, mask: Image.Image, k: int) -> None:
    """Draw the rim of a mask of the picture's size, with a light line beside it, and number the mask at its middle."""
    grown, shrunk = mask.filter(ImageFilter.MaxFilter(3)), mask.filter(ImageFilter.MinFilter(3))
    inner = np.asarray(mask) > np.asarray(shrunk)
    outer = np.asarray(grown) > np.asarray(mask)
    colour = LINE_COLOURS[k % len(LINE_COLOURS)]
    shown.paste("white", mask=Image.fromarray(outer))
    shown.paste(colour, mask=Image.fromarray(inner))
    rows, columns = np.nonzero(np.asarray(mask))
    if not len(rows):
        return
    middle = int(np.argmin(abs(rows - rows.mean()) + abs(columns - columns.mean())))  # a pixel of the mask, whatever its shape
    x, y = int(columns[middle]), int(rows[middle])
    draw = ImageDraw.Draw(shown)
    draw.ellipse([x - 8, y - 8, x + 8, y + 8], fill="white", outline=colour, width=2)
    draw.text((x, y), str(k + 1), fill=(34, 36, 42), font=ImageFont.load_default(size=11), anchor="mm")


def _found(candidate: Candidate, k: int) -> str:
    """What stages 3 and 5 say of a subject."""
    parts = []
    if candidate.segmentation is not None:
        found = candidate.segmentation.subjects[k]
        parts.append("not found" if found is None else _numbers(found.model_dump(exclude={"box"})))
    if candidate.points is not None and (matched := candidate.points.subjects[k]) is not None:
        parts.append(_numbers({"points": matched.number_of_points, **matched.scores}))
    return "; ".join(parts)


def _tries(candidate: Candidate, k: int, pick: int | None) -> list[Try]:
    if candidate.references is None:
        return []
    tries = []
    for j, edit in enumerate(candidate.references.subjects[k]):
        try:
            picture = tile(to_rgb(read_stage_picture(candidate, "references", f"ref{k}_{j}")), TRY)
        except (FileNotFoundError, ValueError):
            picture = None
        tries.append(Try(picture, _numbers(edit.scores), edit.instruction, _remarks(edit.remarks), j == pick))
    return tries


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in values.items())


def _remarks(remarks: dict[str, str]) -> list[str]:
    return [f"{name}: {text if len(text) <= REMARK else text[:REMARK] + '…'}" for name, text in remarks.items()]
