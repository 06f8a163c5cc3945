"""AES: Aesthetic Predictor V2.5, SigLIP's pooled embedding at length 1 through five affine layers, of XVerse's grids and of pictures.

The head's weights are the user's file (github.com/discus0434/aesthetic-predictor-v2-5, AGPL-3.0); nothing of it is here.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionModel

from mosaic.evaluation.encoders import Provenance, load_encoder, provenance_of, unit
from mosaic.evaluation.entries import TILES, Entry
from mosaic.evaluation.pixels import HALF, Squeeze
from mosaic.evaluation.records import Key
from mosaic.weights.frozen import load_into, read_state_dict, short_digest

LAYERS = (0, 2, 4, 6, 8)  # of the head's sequence; dropout, which does nothing here, stands between them


class AestheticScorer(Protocol):
    """Says how pleasing pictures are."""

    provenance: Provenance

    def scores(self, pictures: Sequence[Image.Image]) -> list[float]:
        """From 1 to 10, of RGB pictures."""


class AestheticHead(nn.Module):
    """Five affine layers, no activations: one affine map of a vector [N, D] to [N]."""

    def __init__(self, widths: Sequence[int]) -> None:
        """Widths of the input and of the outputs of the layers."""
        super().__init__()
        self.scoring_head = nn.ModuleDict(
            {str(place): nn.Linear(*sides) for place, sides in zip(LAYERS, itertools.pairwise(widths), strict=True)}
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores."""
        for layer in self.scoring_head.values():
            embeddings = layer(embeddings)
        return embeddings.squeeze(1)


def load_head(path: Path, width: int, flag: str = "--aesthetic") -> AestheticHead:
    """Load the head from its file.

    Args:
        path: safetensors, or a `torch.save` file of tensors.
        width: Of the embeddings it is to take.
        flag: What names the file, for messages.

    Raises:
        FileNotFoundError, ValueError: It is missing, damaged, or of another model.
    """
    state = read_state_dict(str(path), flag)
    weights = [state.get(f"scoring_head.{place}.weight") for place in LAYERS]
    if any(weight is None or weight.ndim != 2 for weight in weights):
        raise ValueError(f"{flag}: {path} must hold scoring_head.{{0,2,4,6,8}}.weight and .bias, got {', '.join(sorted(state)[:3])}, ...")
    widths = [width, *(len(weight) for weight in weights if weight is not None)]
    if widths[-1] != 1:
        raise ValueError(f"{flag}: {path} must give one number a picture, got {widths[-1]}.")
    head = AestheticHead(widths)
    load_into(head, {name: tensor.float() for name, tensor in state.items()}, f"{flag} {path}, with --siglip of the width {width}")
    return head.eval().requires_grad_(False)


class SiglipAesthetic:
    """SigLIP with the head."""

    def __init__(self, siglip: str, head: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load both.

        Raises:
            FileNotFoundError, ValueError: One cannot be had, or they do not fit.
        """
        self.model = load_encoder(SiglipVisionModel, siglip, "--siglip", device, dtype, "siglip", "siglip_vision_model")
        self.head = load_head(head, self.model.config.hidden_size)
        self.prepare = Squeeze(self.model.config.image_size, HALF, HALF)
        made = provenance_of(self.model, siglip, self.prepare)
        self.provenance = Provenance(f"{made.model} + {head.name}", f"{made.revision} + {short_digest(str(head))}", made.preprocessing)

    @torch.inference_mode()
    def scores(self, pictures: Sequence[Image.Image]) -> list[float]:
        """Scores, one picture after the other: grids and pictures do not depend on what they are scored with."""
        return [self._score(picture) for picture in pictures]

    def _score(self, picture: Image.Image) -> float:
        pixels = self.prepare([picture]).to(self.model.device, self.model.dtype)
        return float(self.head(unit(self.model(pixel_values=pixels).pooler_output))[0])


class AestheticMeasure:
    """AES as XVerse's script has it, of the grid of a case's four pictures, and of each picture; ten times the score.

    A case with another number of pictures has no grid, so none of the first.
    """

    def __init__(self, scorer: AestheticScorer) -> None:
        self.scorer = scorer

    @property
    def provenance(self) -> Provenance:
        """The scorer."""
        return self.scorer.provenance

    def keys(self, case: Sequence[Entry]) -> list[Key]:
        """One of the grid, then one per picture."""
        of_grid = [Key("aes", case[0].case)] if len(case) == TILES else []
        return [*of_grid, *(Key("aes_picture", entry.case, entry.run) for entry in case)]

    def __call__(self, case: Sequence[Entry], pictures: Sequence[Image.Image]) -> list[float]:
        """Scores times 10."""
        shown = [grid_of(case, pictures), *pictures] if len(case) == TILES else pictures
        scores = self.scorer.scores(shown)
        for entry, score in zip(case, scores[-len(case) :], strict=True):
            if not torch.tensor(score).isfinite():
                raise ValueError(f"{entry.place}: the aesthetic score of {entry.picture} is no number. Look at the picture and the model.")
        return [10 * score for score in scores]


def grid_of(case: Sequence[Entry], pictures: Sequence[Image.Image]) -> Image.Image:
    """Four pictures two by two, row by row.

    Raises:
        ValueError: They are not of one size.
    """
    width, height = pictures[0].size
    for entry, picture in zip(case, pictures, strict=True):
        if picture.size != (width, height):
            raise ValueError(
                f"{entry.place}: {entry.picture} must have the size of {case[0].picture}, {width} x {height} px, for AES looks at the four "
                f"pictures of a case as one grid, got {picture.width} x {picture.height}. Scale it, or measure without aes (--metrics)."
            )
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % 2 * width, number // 2 * height))
    return grid
