"""What each stage knows of a candidate: one row of numbers and words, from which every decision can be made again.

A candidate is a sample that may become one. Rows hold what was computed; whether it is good enough is said by the limits of the config.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["human", "animal", "object"]
KINDS: tuple[Kind, ...] = ("human", "animal", "object")


STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # numbers that are none fit no limit and no JSON


class Row(BaseModel):
    """Base of all rows.

    Attributes:
        number: Of the candidate, from 0.
    """

    model_config = STRICT

    number: int


class Subject(BaseModel):
    """Somebody or something that the picture shall show.

    Attributes:
        phrase: What the prompt calls it, letter by letter, such as "a red cat".
        name: Its class in a word or two, such as "cat": what detectors are asked for where the phrase hides looks or is too long.
        kind: What it is.
    """

    model_config = STRICT

    phrase: str
    name: str
    kind: Kind


class PromptRow(Row):
    """Stage 1.

    Attributes:
        prompt: What the picture is made from.
        caption: What training reads: without looks where the source hides them, else the prompt; it holds the subjects' phrases, too.
        subjects: In the order of the prompt, one to six.
        seed: Of all that was drawn.
        attempts: How often a model was asked.
        problem: Why no valid prompt came out in the end; "": one did.
    """

    prompt: str
    caption: str
    subjects: tuple[Subject, ...]
    seed: int
    attempts: int = 1
    problem: str = ""


class SynthesisRow(Row):
    """Stage 2; its picture is `picture_path(candidate, "synthesis")`.

    Attributes:
        seed: Of its noise.
        height: px.
        width: px.
        scores: A number for each criterion that was measured.
        remarks: What a judge said in words, for each criterion with words.
    """

    seed: int
    height: int
    width: int
    scores: dict[str, float]
    remarks: dict[str, str] = {}


class Found(BaseModel):
    """A subject in the picture; its mask is `picture_path(candidate, "segmentation", f"mask{k}")`.

    Attributes:
        box: Left, top, right, bottom in px around the mask.
        score: How sure the model is, 0 to 1.
        number_found: How many things in the picture answer to its phrase.
        area: Share of the picture that the mask covers.
        truncated: Share of the mask's outline that lies on the picture's frame.
        overlap: Largest IoU of its box with that of another subject.
        rival: Score of the surest thing that answers to its phrase and that no subject was given; 0: there is none.
    """

    model_config = STRICT

    box: tuple[float, float, float, float]
    score: float
    number_found: int
    area: float
    truncated: float
    overlap: float
    rival: float = 0.0


class SegmentationRow(Row):
    """Stage 3.

    Attributes:
        subjects: One for each of the prompt's, None where nothing was found.
    """

    subjects: tuple[Found | None, ...]


class Edit(BaseModel):
    """A reference that was made of a cut-out; its picture is `picture_path(candidate, "references", f"ref{k}_{j}")`.

    Attributes:
        seed: Of its noise.
        instruction: What the model was told; "": the cut-out itself.
        scores: "similarity": cosine with the cut-out; others as they were measured.
        remarks: What a judge said in words.
    """

    model_config = STRICT

    seed: int
    instruction: str
    scores: dict[str, float]
    remarks: dict[str, str] = {}


class ReferencesRow(Row):
    """Stage 4.

    Attributes:
        subjects: One for each of the prompt's: all tries.
    """

    subjects: tuple[tuple[Edit, ...], ...]


class Matched(BaseModel):
    """The points of one reference.

    Attributes:
        edit: Which try they were found in.
        number_of_points: P_k.
        scores: Mean similarity, shares that are cyclic and that follow one affine map, agreement of the extractors, spatial order
            ("coherence"), as far as they are known.
    """

    model_config = STRICT

    edit: int
    number_of_points: int
    scores: dict[str, float]


class PointsRow(Row):
    """Stage 5; the points are in the file `points_path(candidate)`.

    Attributes:
        subjects: One for each of the prompt's; None: it had no reference to be matched.
    """

    subjects: tuple[Matched | None, ...]
