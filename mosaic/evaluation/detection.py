"""Models that find what a phrase names in a picture."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    Florence2ForConditionalGeneration,
    GroundingDinoForObjectDetection,
    MMGroundingDinoForObjectDetection,
    Owlv2ForObjectDetection,
)

from mosaic.evaluation.encoders import Provenance, class_of, load_encoder, provenance_of
from mosaic.weights.frozen import call_loader

TASK = "<OPEN_VOCABULARY_DETECTION>"
BEAMS, MAX_TOKENS = 3, 768  # of Florence-2, as XVerse's script has them
BOX_THRESHOLD, TEXT_THRESHOLD = 0.3, 0.25  # of Grounding DINO, as LangSAM has them
OWL_PROMPT, OWL_THRESHOLD = "a photo of {}", 0.1  # of OWLv2, as transformers has them


class Box(NamedTuple):
    """A rectangle in px from the upper left; right and lower ends are excluded."""

    left: float
    top: float
    right: float
    bottom: float


class Detection(NamedTuple):
    """A box, and how sure the model is of it, 0 to 1."""

    box: Box
    score: float


class Detector(Protocol):
    """Finds things by their names."""

    provenance: Provenance

    def boxes(self, picture: Image.Image, phrase: str) -> list[Box]:
        """What a phrase names in an RGB picture, in the model's order."""


@runtime_checkable
class ScoringDetector(Detector, Protocol):
    """A detector that says how sure it is."""

    def detections(self, picture: Image.Image, phrase: str) -> list[Detection]:
        """The same boxes in the same order, the surest first."""


class FlorenceDetector:
    """Florence-2, which writes boxes; in the order in which it writes them."""

    def __init__(self, name: str, flag: str, device: torch.device | str, dtype: torch.dtype) -> None:
        self.model = load_encoder(Florence2ForConditionalGeneration, name, flag, device, dtype, "florence2")
        self.processor = call_loader(AutoProcessor, name, flag)
        self.provenance = provenance_of(self.model, name, f"{TASK} by name, {BEAMS} beams")

    @torch.inference_mode()
    def boxes(self, picture: Image.Image, phrase: str) -> list[Box]:
        """Boxes; polygons, which it may write instead, are none."""
        inputs = self.processor(images=picture, text=TASK + phrase, return_tensors="pt").to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, num_beams=BEAMS, do_sample=False)
        text = self.processor.batch_decode(tokens, skip_special_tokens=False)[0]
        if "<poly>" in text:
            return []
        found = self.processor.post_processor.parse_description_with_bboxes_from_text_and_spans(text, image_size=picture.size)
        return [Box(*one["bbox"]) for one in found]


class GroundingDetector:
    """Grounding DINO or MM Grounding DINO; the surest first."""

    def __init__(self, name: str, flag: str, device: torch.device | str, dtype: torch.dtype) -> None:
        kind = call_loader(AutoConfig, name, flag).model_type
        cls = MMGroundingDinoForObjectDetection if kind == "mm-grounding-dino" else GroundingDinoForObjectDetection
        self.model = load_encoder(cls, name, flag, device, dtype, "grounding-dino", "mm-grounding-dino")
        self.processor = call_loader(AutoProcessor, name, flag)
        self.provenance = provenance_of(self.model, name, f"by name, box threshold {BOX_THRESHOLD}, text threshold {TEXT_THRESHOLD}")

    def boxes(self, picture: Image.Image, phrase: str) -> list[Box]:
        """Boxes at least as sure as the threshold."""
        return [found.box for found in self.detections(picture, phrase)]

    @torch.inference_mode()
    def detections(self, picture: Image.Image, phrase: str) -> list[Detection]:
        """These with their scores: the largest over the phrase's words."""
        inputs = self.processor(images=picture, text=f"{phrase.lower()}.", return_tensors="pt").to(self.model.device, self.model.dtype)
        found = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            inputs["input_ids"],
            threshold=BOX_THRESHOLD,
            text_threshold=TEXT_THRESHOLD,
            target_sizes=[(picture.height, picture.width)],
        )[0]
        return _surest_first(found)


class Owlv2Detector:
    """OWLv2; the surest first. It may find one thing several times."""

    def __init__(self, name: str, flag: str, device: torch.device | str, dtype: torch.dtype) -> None:
        self.model = load_encoder(Owlv2ForObjectDetection, name, flag, device, dtype, "owlv2")
        self.processor = call_loader(AutoProcessor, name, flag)
        self.provenance = provenance_of(self.model, name, f"{OWL_PROMPT} by name, threshold {OWL_THRESHOLD}")

    def boxes(self, picture: Image.Image, phrase: str) -> list[Box]:
        """Boxes surer than the threshold."""
        return [found.box for found in self.detections(picture, phrase)]

    @torch.inference_mode()
    def detections(self, picture: Image.Image, phrase: str) -> list[Detection]:
        """These with their scores; a box may reach over the picture, which the model sees as the upper left of a square."""
        text = OWL_PROMPT.format(phrase)
        # A text that is too long is cut, which the processor says nothing of in its signature, but hands on to the tokenizer.
        asked = self.processor(images=picture, text=[[text]], return_tensors="pt", truncation=True).to(self.model.device, self.model.dtype)
        found = self.processor.post_process_grounded_object_detection(
            self.model(**asked), threshold=OWL_THRESHOLD, target_sizes=[(picture.height, picture.width)]
        )[0]
        return _surest_first(found)


def _surest_first(found: dict[str, Any]) -> list[Detection]:
    """What transformers found, ordered; of equally sure ones the first stays so."""
    order = found["scores"].argsort(descending=True, stable=True)
    return [Detection(Box(*found["boxes"][k].tolist()), found["scores"][k].item()) for k in order]


DETECTORS: dict[str, Any] = {
    "florence2": FlorenceDetector,
    "grounding-dino": GroundingDetector,
    "mm-grounding-dino": GroundingDetector,
    "owlv2": Owlv2Detector,
}  # by the type that a config states


def load_detector(name: str, flag: str = "--detector", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Detector:
    """Load a detector of a folder or a hub id.

    Raises:
        FileNotFoundError, ValueError: It cannot be had, or is none.
    """
    return class_of(DETECTORS, name, flag)(name, flag, device, dtype)
