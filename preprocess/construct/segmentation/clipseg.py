"""CLIPSeg, which says of every pixel how well it answers to a phrase; things are the connected pieces of what does."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, BatchEncoding, CLIPSegForImageSegmentation

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
        everywhere = torch.zeros(len(phrases), dtype=torch.int64, device=self.model.device)
        logits = answers(self.model, read_pictures(self.model, pixels), tokens.to(self.model.device), everywhere)
        resized = F.interpolate(logits[None].float(), (picture.height, picture.width), mode="bilinear", align_corners=False)[0]
        return [things(shares, self.mask_threshold) for shares in resized.sigmoid().cpu().numpy()]


def read_pictures(model: CLIPSegForImageSegmentation, pixels: Tensor) -> tuple[Tensor, ...]:
    """What the layers of CLIPSeg's picture tower say of prepared pictures `[N, 3, H, W]`: `[N, 1 + patches, width]`, with gradients."""
    return model.clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states


def answers(model: CLIPSegForImageSegmentation, states: Sequence[Tensor], tokens: BatchEncoding, pictures: Tensor) -> Tensor:
    """Logits of pixels to answer to phrases, as the model's `forward` gives them, but each picture is read once, and with gradients.

    Args:
        model: CLIPSeg.
        states: Of `read_pictures`.
        tokens: Of Q phrases.
        pictures: int64 `[Q]`, the picture in which each phrase is looked for.

    Returns:
        `[Q, H, W]`.
    """
    condition = model.clip.get_text_features(**tokens).pooler_output
    return model.decoder([states[layer + 1][pictures] for layer in model.extract_layers], condition).logits


def things(shares: np.ndarray, threshold: float) -> list[Instance]:
    """The connected pieces of a heat map `[H, W]` above a threshold, the largest first.

    CLIPSeg does not count. A piece's score is the mean over its pixels times its area over that of the largest piece: of m subjects of one
    name the m largest pieces are the surest, and a crumb is hardly a thing.
    """
    confidence = confident(shares, threshold)
    found = [piece for piece in pieces(confidence > 0) if piece.sum() >= SMALLEST * piece.size]
    return [Instance(np.where(piece, confidence, 0), float(confidence[piece].mean() * piece.sum() / found[0].sum())) for piece in found]
