"""Faces in pictures: found with five points, eyes, nose and corners of the mouth, and aligned by them."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from mosaic.evaluation.arcface import SIDE
from mosaic.evaluation.detection import Box
from mosaic.evaluation.encoders import Provenance

#: Where the five points of an aligned face lie, in px of 112 x 112, as [x, y].
TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
MARGIN = 1.3  # by which the box of a face grows before it is cut out
DETECTOR = "retinaface/resnet50"


class Face(NamedTuple):
    """A face.

    Attributes:
        box: Where.
        points: [5, 2], x and y in px: left eye, right eye, nose, left and right corner of the mouth.
    """

    box: Box
    points: np.ndarray


class FaceDetector(Protocol):
    """Finds faces."""

    provenance: Provenance

    def faces(self, picture: Image.Image) -> list[Face]:
        """The faces of an RGB picture, in the detector's order."""


def package_version(name: str) -> str:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


class RetinaFace:
    """RetinaFace of the package pyfacer, with its ResNet-50."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Load it; the package downloads its weights.

        Raises:
            ValueError: The package is not there, or cannot be loaded.
        """
        try:
            import facer  # needs torchvision and more; only ID-Sim needs it
        except ImportError as error:
            raise ValueError(
                "id_sim: the detector of faces is RetinaFace of the package pyfacer, which cannot be loaded "
                f'({error}). Install it with "pip install pyfacer==0.0.5", or measure without it: --metrics dpg ip_sim aes.'
            ) from error
        self.device = torch.device(device)
        self.model: Any = facer.face_detector(DETECTOR, device=self.device)
        self.provenance = Provenance(DETECTOR, f"pyfacer {package_version('pyfacer')}", "RGB, 0..255")

    @torch.inference_mode()
    def faces(self, picture: Image.Image) -> list[Face]:
        """Faces surer than the package's own threshold."""
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].to(self.device)
        found = self.model(pixels)
        boxes, points = found["rects"].cpu().numpy(), found["points"].cpu().numpy()
        return [Face(Box(*map(float, box)), five.astype(np.float64)) for box, five in zip(boxes, points, strict=True)]


def grown(box: Box, picture: Image.Image) -> Box:
    """A box 1.3 times as wide and high around its middle, in whole px, cut at the picture's sides."""
    across, down = ((box.right - box.left) * MARGIN / 2, (box.bottom - box.top) * MARGIN / 2)
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    return Box(max(int(x - across), 0), max(int(y - down), 0), min(int(x + across), picture.width), min(int(y + down), picture.height))


def similarity_transform(points: Sequence[Sequence[float]] | np.ndarray, targets: np.ndarray = TEMPLATE) -> np.ndarray:
    """The turning, scaling and shifting [2, 3] that brings points [N, 2] nearest to targets [N, 2], by least squares."""
    x, y = np.asarray(points, dtype=np.float64).T
    zero, one = np.zeros_like(x), np.ones_like(x)
    equations = np.concatenate([np.stack([x, -y, one, zero], axis=1), np.stack([y, x, zero, one], axis=1)])
    a, b, across, down = np.linalg.lstsq(equations, np.concatenate([targets[:, 0], targets[:, 1]]), rcond=None)[0]
    return np.array([[a, -b, across], [b, a, down]])


def aligned(picture: Image.Image, face: Face) -> Image.Image:
    """A face at 112 x 112 px, its points where the template has them, bilinear, black beyond the picture."""
    forward = np.vstack([similarity_transform(face.points), [0, 0, 1]])
    back = np.linalg.inv(forward)[:2]  # positions count pixels' middles; Pillow's count their corners
    back[:, 2] += 0.5 - back[:, :2] @ np.array([0.5, 0.5])
    return picture.transform((SIDE, SIDE), Image.Transform.AFFINE, tuple(back.flatten()), Image.Resampling.BILINEAR)
