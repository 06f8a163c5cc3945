"""Models that answer questions on a picture: of transformers' classes for visual question answering, or any that turns pictures to text."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, BlipForQuestionAnswering, ViltForQuestionAnswering

from mosaic.evaluation.chat import LocalChat
from mosaic.evaluation.encoders import Provenance, load_encoder, provenance_of
from mosaic.weights.frozen import call_loader

MAX_ANSWER = 10  # new tokens
ASK = "{} Answer with one word, yes or no."


class VisualQuestionAnswerer(Protocol):
    """Answers questions on pictures in a word."""

    provenance: Provenance

    def answers(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        """The answer to each question on an RGB picture, in small letters, such as "yes"."""


class BlipAnswerer:
    """BLIP for visual question answering, which writes its answer."""

    def __init__(self, name: str, flag: str, device: torch.device | str, dtype: torch.dtype) -> None:
        self.model = load_encoder(BlipForQuestionAnswering, name, flag, device, dtype, "blip")
        self.processor = call_loader(AutoProcessor, name, flag)
        self.provenance = provenance_of(self.model, name, "its processor, question as it is, greedy")

    @torch.inference_mode()
    def answers(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        """One question at a time: the model looks at the padding of shorter ones."""
        found = []
        for question in questions:
            inputs = self.processor(images=picture, text=question, return_tensors="pt").to(self.model.device, self.model.dtype)
            tokens = self.model.generate(**inputs, max_new_tokens=MAX_ANSWER, num_beams=1, do_sample=False)
            found.append(plain(self.processor.decode(tokens[0], skip_special_tokens=True)))
        return found


class ViltAnswerer:
    """ViLT for visual question answering, which chooses among the answers that it knows."""

    def __init__(self, name: str, flag: str, device: torch.device | str, dtype: torch.dtype) -> None:
        self.model = load_encoder(ViltForQuestionAnswering, name, flag, device, dtype, "vilt")
        self.processor = call_loader(AutoProcessor, name, flag)
        self.provenance = provenance_of(self.model, name, "its processor, question as it is, likeliest answer")

    @torch.inference_mode()
    def answers(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        """One question at a time; texts longer than the model reads are cut."""
        found = []
        for question in questions:
            inputs = self.processor(
                images=picture, text=question, truncation=True, max_length=self.model.config.max_position_embeddings, return_tensors="pt"
            ).to(self.model.device, self.model.dtype)
            found.append(plain(self.model.config.id2label[int(self.model(**inputs).logits[0].argmax())]))
        return found


class ChatAnswerer:
    """Any model of pictures and texts, asked for one word."""

    def __init__(self, name: str, flag: str, device: torch.device | str, dtype: torch.dtype) -> None:
        self.chat = LocalChat(name, flag, device, dtype, MAX_ANSWER)
        made = self.chat.provenance
        self.provenance = Provenance(made.model, made.revision, f'{made.preprocessing}, "{ASK.format("QUESTION")}", greedy, first word')

    def answers(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        """The first word of what it writes."""
        written = [self.chat([picture, ASK.format(question)]).split() for question in questions]
        return [plain(words[0]) if words else "" for words in written]


def plain(answer: str) -> str:
    """In small letters, without blanks and full stops around it."""
    return answer.strip().strip(".,!").strip().lower()


ANSWERERS: dict[str, Any] = {"blip": BlipAnswerer, "vilt": ViltAnswerer}  # by the type that a config states


def load_answerer(
    name: str, flag: str = "--vqa", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VisualQuestionAnswerer:
    """Load a question answerer of a folder or a hub id; its config says of which class it is.

    Raises:
        FileNotFoundError, ValueError: It cannot be had, or is no such model.
    """
    kind = call_loader(AutoConfig, name, flag).model_type
    return ANSWERERS.get(kind, ChatAnswerer)(name, flag, device, dtype)
