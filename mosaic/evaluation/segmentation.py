"""Models that say which pixels of a box belong to the thing in it."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import Sam2Model

from mosaic.evaluation.detection import Box
from mosaic.evaluation.encoders import Provenance, load_encoder, provenance_of
from mosaic.evaluation.pixels import IMAGENET_MEAN, IMAGENET_STD, Squeeze


class Segmenter(Protocol):
    """Cuts things out."""

    provenance: Provenance

    def masks(self, picture: Image.Image, boxes: Sequence[Box]) -> np.ndarray:
        """Which pixels belong to what each box holds, bool [N, H, W]; at least one box."""


class Sam2Segmenter:
    """SAM 2, asked for one mask a box. Its own preparation of pictures, which transformers has with torchvision only."""

    def __init__(
        self, name: str, flag: str = "--segmenter", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the model.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, or is of another architecture.
        """
        # The checkpoints on the hub are those of the model for videos, which holds the one for pictures.
        self.model = load_encoder(Sam2Model, name, flag, device, dtype, "sam2", "sam2_video")
        side = self.model.config.prompt_encoder_config.image_size
        self.prepare = Squeeze(side, IMAGENET_MEAN, IMAGENET_STD, Image.Resampling.BILINEAR)
        self.provenance = provenance_of(self.model, name, self.prepare)

    def masks(self, picture: Image.Image, boxes: Sequence[Box]) -> np.ndarray:
        """Masks; logits are resized to the picture, bilinear, then those above 0 taken."""
        return self.logits(picture, boxes) > 0

    @torch.inference_mode()
    def logits(self, picture: Image.Image, boxes: Sequence[Box]) -> np.ndarray:
        """Logits of the pixels to belong to what each box holds, float32 [N, H, W]; at least one box."""
        scale = torch.tensor([self.prepare.side / side for side in picture.size * 2])
        found = self.model(
            pixel_values=self.prepare([picture]).to(self.model.device, self.model.dtype),
            input_boxes=(torch.tensor(boxes) * scale)[None].to(self.model.device, self.model.dtype),
            multimask_output=False,
        ).pred_masks[0]  # [boxes, 1, h, w]
        resized = F.interpolate(found.float(), (picture.height, picture.width), mode="bilinear", align_corners=False)
        return resized[:, 0].cpu().numpy()
