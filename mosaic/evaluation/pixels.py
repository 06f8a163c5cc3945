"""Pictures as the pixels that a model reads, prepared as protocols fix it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # brings [0, 1] to [-1, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preparation:
    """Short side resized (bicubic), the middle cropped, values normalised: what torchvision's transforms do to a PIL picture.

    Attributes:
        short_side: In px.
        side: Of the square in px.
        mean, std: Of red, green and blue in [0, 1].
    """

    short_side: int
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pixels [N, 3, side, side], float32."""
        return torch.stack([self._pixels(picture) for picture in pictures])

    def _pixels(self, picture: Image.Image) -> Tensor:
        short = min(picture.size)
        width, height = (self.short_side if side == short else int(self.short_side * side / short) for side in picture.size)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.side) / 2), round((height - self.side) / 2)
        return normalised(resized.crop((left, top, left + self.side, top + self.side)), self.mean, self.std)

    def __str__(self) -> str:
        """In words."""
        return f"PIL, RGB, short side {self.short_side} bicubic, centre {self.side}, mean {self.mean[0]}, std {self.std[0]}"


@dataclass(frozen=True)
class Squeeze:
    """Resized to a square, whatever the shape, values normalised.

    Attributes:
        side: Of the square in px.
        mean, std: Of red, green and blue in [0, 1].
        resample: How pixels are weighed.
    """

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pixels [N, 3, side, side], float32."""
        sides = (self.side, self.side)
        return torch.stack([normalised(picture.convert("RGB").resize(sides, self.resample), self.mean, self.std) for picture in pictures])

    def __str__(self) -> str:
        """In words."""
        return f"PIL, RGB, {self.side} x {self.side} {self.resample.name.lower()}, mean {self.mean[0]}, std {self.std[0]}"


def normalised(picture: Image.Image, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Pixels [3, H, W], float32, of an RGB picture: values in [0, 1], less the mean, by the standard deviation."""
    values = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy((values - np.array(mean, np.float32)) / np.array(std, np.float32)).permute(2, 0, 1)
