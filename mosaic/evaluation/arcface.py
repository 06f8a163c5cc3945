"""ArcFace with the backbone IR-SE50, which tells faces apart: `model_ir_se50.pth` of github.com/TreB1eN/InsightFace_Pytorch (MIT)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from mosaic.evaluation.encoders import Provenance, unit
from mosaic.evaluation.pixels import HALF, normalised
from mosaic.weights.frozen import load_into, read_state_dict, short_digest

SIDE = 112  # px of an aligned face
EMBEDDING = 512
STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))  # width and blocks
SQUEEZE = 16


class FaceEmbedder(Protocol):
    """Aligned faces as vectors whose cosine says how alike they are."""

    provenance: Provenance

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings [N, D] of length 1, float32, on the CPU, of RGB pictures of `SIDE` x `SIDE` px."""


class SqueezeExcitation(nn.Module):
    """Channels weighed by what they are on average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // SQUEEZE, 1, bias=False)
        self.fc2 = nn.Conv2d(width // SQUEEZE, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return x * self.fc2(self.fc1(x.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if width_in != width:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(width_in),
            nn.Conv2d(width_in, width, 3, 1, 1, bias=False),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            SqueezeExcitation(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        return self.res_layer(x) + self.shortcut_layer(x)


class IrSe(nn.Module):
    """The backbone, with the names of InsightFace_Pytorch's Backbone(50, 0.6, "ir_se")."""

    def __init__(self, stages: Sequence[tuple[int, int]] = STAGES, embedding: int = EMBEDDING) -> None:
        """Stages as (width, number of blocks); the first block of each halves height and width."""
        super().__init__()
        first, last = stages[0][0], stages[-1][0]
        self.input_layer = nn.Sequential(nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first))
        blocks, width_in = [], first
        for width, count in stages:
            blocks += [Block(width_in, width, 2), *(Block(width, width, 1) for _ in range(count - 1))]
            width_in = width
        self.body = nn.Sequential(*blocks)
        side = SIDE // 2 ** len(stages)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last), nn.Dropout(0.6), nn.Flatten(), nn.Linear(last * side**2, embedding), nn.BatchNorm1d(embedding)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, 112, 112] to vectors [N, D], of any length."""
        return self.output_layer(self.body(self.input_layer(x)))


class ArcFace:
    """Embeds aligned faces."""

    def __init__(
        self, path: Path, flag: str = "--arcface", device: torch.device | str = "cpu", stages: Sequence[tuple[int, int]] = STAGES
    ) -> None:
        """Load the weights.

        Raises:
            FileNotFoundError, ValueError: They are missing, damaged, or of another model.
        """
        with torch.device("meta"):  # random weights of 44 million parameters take longer than the file's
            model = IrSe(stages)
        self.model = model.to_empty(device="cpu")
        load_into(self.model, _with_counts(read_state_dict(str(path), flag), self.model), f"{flag} {path}")
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.device = device
        self.provenance = Provenance(f"ArcFace IR-SE50 ({path.name})", short_digest(str(path)), f"RGB, {SIDE} x {SIDE}, mean 0.5, std 0.5")

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of aligned faces."""
        pixels = torch.stack([normalised(picture, HALF, HALF) for picture in pictures])
        return unit(self.model(pixels.to(self.device)))


def _with_counts(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with the counts of batches that old files lack; nothing reads them."""
    counts = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return counts | state
