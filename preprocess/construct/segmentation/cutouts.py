"""Cut-outs: a subject alone, on white, in the middle of a square."""

import numpy as np
from PIL import Image

from mosaic.evaluation.instances import cut_out as in_a_square
from mosaic.images import WHITE
from preprocess.construct.segmentation.masks import mask_box


def cut_out(picture: Image.Image, mask: np.ndarray, margin: float = 0.05, side: int | None = None) -> Image.Image:
    """Cut a subject out.

    Args:
        picture: RGB.
        mask: bool `[H, W]`, the subject's pixels; everything else becomes white.
        margin: White at either end of the subject's longer side, as a share of the square.
        side: Of the square in px, to which it is resized (Lanczos); None: the subject keeps its size.

    Raises:
        ValueError: The mask is empty or of another size than the picture.
    """
    if mask.shape != (picture.height, picture.width):
        raise ValueError(
            f"The mask must be as large as the picture, {picture.width} x {picture.height} px, got {mask.shape[1]} x {mask.shape[0]}."
        )
    if not mask.any():
        raise ValueError("The mask must not be empty: there is nothing to cut out.")
    subject = in_a_square(np.asarray(picture), mask, mask_box(mask))
    whole = max(subject.width, round(subject.width / (1 - 2 * margin)))
    square = Image.new("RGB", (whole, whole), WHITE)
    square.paste(subject, ((whole - subject.width) // 2,) * 2)
    return square if side is None or side == whole else square.resize((side, side), Image.Resampling.LANCZOS)
