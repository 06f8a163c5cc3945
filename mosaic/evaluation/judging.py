"""A judge that looks: how well a picture follows its prompt and shows each subject, by a model of pictures and texts.

Its values are opinions of one model. They are scores of their own, with the model's name, and no part of a published protocol.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mosaic.evaluation.chat import Chat, ask
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.entries import Entry
from mosaic.evaluation.records import Key
from mosaic.images import load_image, to_rgb

METRICS = ("judge_prompt", "judge_fidelity", "judge_present")
Points = Annotated[int, Field(ge=0, le=10)]

INSTRUCTION = (
    "You judge a generated picture. The first pictures are references, one per subject, in this order: {subjects}. The last picture was "
    "generated for the prompt: {prompt}\n"
    "prompt_following: 0 to 10, how much of what the prompt says is in the last picture, whoever the subjects are. "
    "subjects: for each reference in order whether that subject is in the last picture (present), and 0 to 10 how well it keeps the "
    "reference's identity: shape, colours, pattern, text, face (fidelity; 0 where it is not present). Pose, view, light and background "
    "may differ. A subject that shares its looks with another one, or of which there are two, gets at most 5."
)


class SubjectOpinion(BaseModel):
    """Of one subject."""

    model_config = ConfigDict(extra="forbid")

    present: bool
    fidelity: Points


class Opinion(BaseModel):
    """Of a picture."""

    model_config = ConfigDict(extra="forbid")

    prompt_following: Points
    subjects: Annotated[list[SubjectOpinion], Field(min_length=1)]


class Judge:
    """Prompt following, and per subject fidelity and presence, in percent."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        made, version = chat.provenance, hashlib.sha256(INSTRUCTION.encode()).hexdigest()[:8]
        self.provenance = Provenance(made.model, made.revision, f"{made.preprocessing}, instruction {version}")

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """Per picture one, then two per subject."""
        found = []
        for entry in case:
            found.append(Key("judge_prompt", entry.case, entry.run))
            for subject in entry.subjects:
                found += [Key(metric, entry.case, entry.run, subject.name) for metric in ("judge_fidelity", "judge_present")]
        return found

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """The judge's points times 10; presence as 100 or 0.

        Raises:
            ValueError: It does not answer as it is asked to, or about another number of subjects.
            OSError: Its endpoint cannot be reached.
        """
        subjects = case[0].subjects
        references = [to_rgb(load_image(subject.references[0])) for subject in subjects]
        names = ", ".join(f"{number}: {subject.name}" for number, subject in enumerate(subjects, 1))
        values: list[float] = []
        for entry, picture in zip(case, pictures, strict=True):
            opinion = ask(self.chat, [INSTRUCTION.format(subjects=names, prompt=entry.prompt), *references, picture], Opinion)
            if len(opinion.subjects) != len(subjects):
                found = len(opinion.subjects)
                raise ValueError(
                    f"{entry.place}: {self.provenance.model} was asked about {len(subjects)} subjects and answers about {found}."
                )
            values.append(10.0 * opinion.prompt_following)
            for one in opinion.subjects:
                values += [10.0 * one.fidelity, 100.0 * one.present]
        return values
