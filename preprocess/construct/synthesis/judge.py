"""A model that looks: whether each subject is in the picture, once, whole, and told apart from the others."""

import hashlib
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mosaic.evaluation.chat import Chat, ask
from preprocess.construct.candidates import Candidate
from preprocess.construct.synthesis.scored import Scored

ATTEMPTS = 2
INSTRUCTION = (
    "You check a generated picture. It shall show these subjects, each exactly once: {subjects}. For each of them in this order: present: "
    "it is in the picture. single: there is exactly one of it. complete: all of it is seen, not cut by the frame and not mostly hidden. "
    "distinct: it is clearly another one than the other subjects and does not blend with them. remark: what is wrong, in at most 20 words, "
    'or "".'
)
AGAIN = "\nAn earlier answer to this was refused: {problem}"


class SubjectOpinion(BaseModel):
    """Of one subject."""

    model_config = ConfigDict(extra="forbid")

    present: bool
    single: bool
    complete: bool
    distinct: bool


class PictureOpinion(BaseModel):
    """Of a picture."""

    model_config = ConfigDict(extra="forbid")

    subjects: Annotated[list[SubjectOpinion], Field(min_length=1)]
    remark: str


class SubjectJudge:
    """The share of yes among four answers for each subject; 0 where no usable answer comes."""

    name = "judge"

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        made, version = chat.provenance, hashlib.sha256((INSTRUCTION + AGAIN).encode()).hexdigest()[:8]
        self.provenance: dict[str, Any] = {"model": made.model, "revision": made.revision, "instruction": version}

    def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
        """With the judge's remark, or why there is no answer.

        Raises:
            OSError: An endpoint cannot be reached.
        """
        subjects = candidate.prompt.subjects
        text = INSTRUCTION.format(subjects=", ".join(subject.phrase for subject in subjects))
        problem = ""
        for _ in range(ATTEMPTS):
            try:
                opinion = ask(self.chat, [picture, text + (AGAIN.format(problem=problem) if problem else "")], PictureOpinion)
            except ValueError as error:
                problem = str(error)
                continue
            if len(opinion.subjects) == len(subjects):
                answers = [answer for one in opinion.subjects for answer in one.model_dump().values()]
                return Scored(sum(answers) / len(answers), " ".join(opinion.remark.split()))
            problem = f"there must be {len(subjects)} subjects, got {len(opinion.subjects)}"
        return Scored(0.0, f"no answer: {problem}")
