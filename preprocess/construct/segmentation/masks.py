"""Geometry of masks: their boxes, their pieces, what of their outline the picture's frame cuts off, which of several has a pixel."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from mosaic.evaluation.detection import Box
from preprocess.construct.segmentation.protocol import Instance


def mask_box(mask: np.ndarray) -> Box:
    """The smallest box in whole px around a mask bool `[H, W]` that is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return Box(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask bool `[H, W]`, by sides and not by corners, the largest first, of equal ones the upper left."""
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [labels == number + 1 for number in np.argsort(-sizes, kind="stable")]


def truncated(mask: np.ndarray) -> float:
    """Share of the outline of a mask bool `[H, W]` that lies on the picture's frame; the outline are pixels with a side to others."""
    outline = mask & ~ndimage.binary_erosion(mask)  # outside of the picture is not it
    on_frame = outline.copy()
    on_frame[1:-1, 1:-1] = False
    return float(on_frame.sum() / max(outline.sum(), 1))


def overlap_of_masks(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks bool `[H, W]`; 0 where both are empty."""
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 0.0


def exclusive(instances: Sequence[Instance]) -> list[np.ndarray]:
    """Masks bool `[H, W]` of which no two share a pixel: it belongs to the one that is surest of it, among equals to the surer thing."""
    if not instances:
        return []
    order = sorted(range(len(instances)), key=lambda k: -instances[k].score)
    confidence = np.stack([instances[k].confidence for k in order])
    owner = np.array(order)[confidence.argmax(axis=0)]
    return [(owner == k) & instance.mask for k, instance in enumerate(instances)]
