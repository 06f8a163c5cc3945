"""A model that looks at a cut-out and its edit: whether they show the same individual."""

import hashlib
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict

from mosaic.evaluation.chat import Chat, ask

ATTEMPTS = 2
QUESTION = (
    "The first picture shows {phrase}, cut out of a scene. The second one was made of it by an editor and shall show the same individual "
    "from another view. same: it is the same individual, with the same shape, colours, markings and texts. complete: all of it is seen, "
    "nothing is cut off or missing. single: there is exactly one of it, and nothing else. remark: what is wrong, in at most 20 words, or "
    '"".'
)


class EditOpinion(BaseModel):
    """Of an edit."""

    model_config = ConfigDict(extra="forbid")

    same: bool
    complete: bool
    single: bool
    remark: str


class EditJudge:
    """Asks about one edit after another."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        made, version = chat.provenance, hashlib.sha256(QUESTION.encode()).hexdigest()[:8]
        self.provenance: dict[str, Any] = {"model": made.model, "revision": made.revision, "question": version}

    def score(self, cut_out: Image.Image, edit: Image.Image, phrase: str) -> tuple[float, str]:
        """The share of yes among three answers, 0 where it is another individual or no usable answer comes; and what was said with it.

        Raises:
            OSError: An endpoint cannot be reached.
        """
        problem = ""
        for _ in range(ATTEMPTS):
            try:
                opinion = ask(self.chat, [cut_out, edit, QUESTION.format(phrase=phrase)], EditOpinion)
            except ValueError as error:
                problem = f"no answer: {error}"
                continue
            answers = (opinion.same, opinion.complete, opinion.single)
            return sum(answers) / len(answers) if opinion.same else 0.0, " ".join(opinion.remark.split())
        return 0.0, problem
