"""What an edit is measured by beside its likeness."""

import numpy as np
from PIL import Image

NEARLY_WHITE = 240  # of 255, in each channel
RIM = 32  # the rim is this part of a side wide, at least 1 px


def border(picture: Image.Image) -> float:
    """Share of an RGB picture's rim that is nearly white, 0 to 1."""
    white = np.asarray(picture).min(axis=2) >= NEARLY_WHITE
    rows, columns = (max(1, side // RIM) for side in white.shape)
    rim = np.ones_like(white)
    rim[rows:-rows, columns:-columns] = False
    return float(white[rim].mean())


def contrast(picture: Image.Image) -> float:
    """The largest standard deviation of a channel of an RGB picture, of values in 0 to 1: 0 for one colour, 0.5 at most."""
    return float((np.asarray(picture, dtype=np.float64) / 255).std(axis=(0, 1)).max())
