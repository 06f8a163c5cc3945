"""SAM 3, which finds all things that a phrase names, with their masks."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, Sam3Model

from mosaic.evaluation.encoders import Provenance, load_encoder, provenance_of
from mosaic.evaluation.pixels import HALF, Squeeze
from mosaic.weights.frozen import call_loader
from preprocess.construct.segmentation.protocol import Instance, confident

THRESHOLD = 0.3  # of scores, as transformers has it


class Sam3Segmenter:
    """SAM 3 with its own preparation of pictures, which transformers has with torchvision only."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, mask_threshold: float) -> None:
        """Load the model.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, or is of another architecture.
        """
        flag = "segmentation.model"
        # The checkpoint on the hub is that of the model for videos, which holds the one for pictures.
        self.model = load_encoder(Sam3Model, name, flag, device, dtype, "sam3", "sam3_video")
        self.tokenizer = call_loader(AutoTokenizer, name, flag)
        self.prepare = Squeeze(self.model.config.image_size, HALF, HALF, Image.Resampling.BILINEAR)
        self.mask_threshold = mask_threshold
        self.provenance: dict[str, Provenance] = {"segmenter": provenance_of(self.model, name, f"{self.prepare}, threshold {THRESHOLD}")}

    @torch.inference_mode()
    def find(self, picture: Image.Image, phrases: Sequence[str]) -> list[list[Instance]]:
        """Instances surer than the threshold; the score is that of the thing times that of the phrase to be there at all."""
        seen = self.model.get_vision_features(pixel_values=self.prepare([picture]).to(self.model.device, self.model.dtype))
        length = self.model.config.text_config.max_position_embeddings
        found: list[list[Instance]] = []
        for phrase in phrases:
            tokens = self.tokenizer(phrase, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            ids, attended = (tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
            given = self.model(vision_embeds=seen, input_ids=ids, attention_mask=attended)
            scores = (given.pred_logits[0].float().sigmoid() * given.presence_logits[0].float().sigmoid()).cpu()
            sure = scores > THRESHOLD
            if not sure.any():
                found.append([])
                continue
            shares = given.pred_masks[:, sure.to(given.pred_masks.device)].float().sigmoid()
            resized = F.interpolate(shares, (picture.height, picture.width), mode="bilinear", align_corners=False)[0].cpu().numpy()
            found.append(
                [Instance(confident(one, self.mask_threshold), score) for one, score in zip(resized, scores[sure].tolist(), strict=True)]
            )
        return found
