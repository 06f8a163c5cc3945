"""DPG: of a prompt's questions the share that a picture answers with "yes", where one counts only with those that it depends on."""

from collections.abc import Sequence

from PIL import Image

from mosaic.evaluation.answering import VisualQuestionAnswerer
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.entries import Entry, Question
from mosaic.evaluation.records import Key

YES = "yes"


class DpgScore:
    """DPG as XVerse's script has it, with zeros that cascade beside it, and the answers themselves; in percent."""

    def __init__(self, answerer: VisualQuestionAnswerer) -> None:
        self.answerer = answerer

    @property
    def provenance(self) -> Provenance:
        """The judge."""
        return self.answerer.provenance

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """Per picture DPG, DPG with cascading zeros, and every answer by the question's number, from 1, and words."""
        return [
            key
            for entry in case
            for key in (
                Key("dpg", entry.case, entry.run),
                Key("dpg_cascading", entry.case, entry.run),
                *(Key("dpg_answer", entry.case, entry.run, f"{number}. {one.text}") for number, one in enumerate(entry.questions, 1)),
            )
        ]

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """Shares times 100; an answer is 100 where it is "yes", else 0."""
        questions, values = case[0].questions, []
        for picture in pictures:
            answers = [answer == YES for answer in self.answerer.answers(picture, [question.text for question in questions])]
            values += [share(one_step(answers, questions)), share(cascading(answers, questions)), *(100.0 * answer for answer in answers)]
        return values


def one_step(answers: Sequence[bool], questions: Sequence[Question]) -> list[bool]:
    """Which questions count: those answered with "yes" whose parents were, whatever became of these parents. XVerse's script."""
    return [answer and all(answers[parent] for parent in question.parents) for answer, question in zip(answers, questions, strict=True)]


def cascading(answers: Sequence[bool], questions: Sequence[Question]) -> list[bool]:
    """Which questions count: those answered with "yes" whose parents count. What ELLA's DPG-Bench does by zeros written in place."""
    counts = list(answers)
    while (found := one_step(counts, questions)) != counts:
        counts = found
    return counts


def share(counts: Sequence[bool]) -> float:
    """In percent."""
    return 100 * sum(counts) / len(counts)
