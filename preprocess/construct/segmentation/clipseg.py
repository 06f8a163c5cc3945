"""CLIPSeg, which says of every pixel how well it answers to a phrase; things are the connected pieces of what does."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoProcessor, CLIPSegForImageSegmentation

from mosaic.evaluation.encoders import Provenance, load_encoder, provenance_of
from mosaic.weights.frozen import call_loader
from preprocess.construct.segmentation.masks import pieces
from preprocess.construct.segmentation.protocol import Instance, confident

SMALLEST = 0.002  # share of the picture; smaller pieces are noise


class ClipSegSegmenter:
    """CLIPSeg with the preparation of pictures that its folder states."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, mask_threshold: float) -> None:
        """Load the model.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, or is of another architecture.
        """
        self.model = load_encoder(CLIPSegForImageSegmentation, name, "segmentation.model", device, dtype, "clipseg")
        self.processor = call_loader(AutoProcessor, name, "segmentation.model")
        self.mask_threshold = mask_threshold
        self.provenance: dict[str, Provenance] = {"segmenter": provenance_of(self.model, name, "as its preprocessor_config.json says")}

    @torch.inference_mode()
    def find(self, picture: Image.Image, phrases: Sequence[str]) -> list[list[Instance]]:
        """The pieces for each phrase, the largest first; see `things`."""
        pixels = self.processor(images=picture, return_tensors="pt").pixel_values.to(self.model.device, self.model.dtype)
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(list(phrases), padding=True, truncation=True, max_length=length, return_tensors="pt")
        logits = self.model(pixel_values=pixels.expand(len(phrases), -1, -1, -1), **tokens.to(self.model.device)).logits
        resized = F.interpolate(logits[None].float(), (picture.height, picture.width), mode="bilinear", align_corners=False)[0]
        return [things(shares, self.mask_threshold) for shares in resized.sigmoid().cpu().numpy()]


def things(shares: np.ndarray, threshold: float) -> list[Instance]:
    """The connected pieces of a heat map `[H, W]` above a threshold, the largest first.

    CLIPSeg does not count. A piece's score is the mean over its pixels times its area over that of the largest piece: of m subjects of one
    name the m largest pieces are the surest, and a crumb is hardly a thing.
    """
    confidence = confident(shares, threshold)
    found = [piece for piece in pieces(confidence > 0) if piece.sum() >= SMALLEST * piece.size]
    return [Instance(np.where(piece, confidence, 0), float(confidence[piece].mean() * piece.sum() / found[0].sum())) for piece in found]
