"""Pictures of the pocket world: scenes with masks, references on white, and exact correspondences between the two.

Correspondences come from the affine maps that place the subjects, never from image matching.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from scripts.pocket import art, backgrounds, creatures
from scripts.pocket.scenes import Identity, Placement, Scene, cell_centres, front_index, to_canonical

REFERENCE_SCALE = 0.9  # long side of the bounding box / side of the picture
REFERENCE_SIZE = 128  # px, reference pictures on disk


@dataclass(frozen=True)
class RenderedScene:
    """A picture and what is where.

    Attributes:
        image: RGB.
        masks: uint8 `[K, size, size]`, 1 where subject k is the one seen at the pixel centre.
        visible_fraction: float64 `[K]`, visible area / whole area of the subject.
    """

    image: Image.Image
    masks: np.ndarray
    visible_fraction: np.ndarray


def paste_subject(canvas: Image.Image, placement: Placement) -> None:
    """Draw a subject on a square canvas, in place."""
    side = canvas.width
    matrix = placement.matrix() * side
    reach = np.abs(matrix[:, :2]).sum(axis=1) * art.CANVAS_REACH
    x0, y0 = np.floor(matrix[:, 2] - reach).astype(int)
    x1, y1 = np.ceil(matrix[:, 2] + reach).astype(int)
    needed = placement.scale * side * art.CANVAS_REACH
    resolution = next((s for s in creatures.SPRITE_SIDES if s >= 0.95 * needed), creatures.SPRITE_SIDES[-1])
    i = placement.identity
    sprite = creatures.sprite(i.class_name, i.palette, i.pattern, i.marking, resolution)
    # PIL wants output px -> sprite px; both count continuous coordinates from the upper left corner.
    inverse = np.linalg.inv(matrix[:, :2])
    to_sprite = resolution / (2 * art.CANVAS_REACH)
    offset = to_sprite * (inverse @ (np.array([x0, y0]) - matrix[:, 2]) + art.CANVAS_REACH)
    inverse = inverse * to_sprite
    data = (*inverse[0], offset[0], *inverse[1], offset[1])
    turned = sprite.transform((int(x1 - x0), int(y1 - y0)), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    canvas.paste(turned, (int(x0), int(y0)), turned)


def oversampling(size: int) -> int:
    """How many times finer than the picture things are drawn, per side."""
    return 3 if size <= 128 else 2


def render_scene(scene: Scene, size: int) -> RenderedScene:
    """Draw a scene at `size` px per side."""
    factor = oversampling(size)
    canvas = backgrounds.draw_background(scene.background, scene.seed, size * factor)
    for placement in scene.placements:
        paste_subject(canvas, placement)
    front, areas = front_index(scene, size)
    masks = (front.reshape(size, size)[None] == np.arange(len(areas))[:, None, None]).astype(np.uint8)
    return RenderedScene(canvas.reduce(factor), masks, masks.sum(axis=(1, 2)) / np.maximum(areas, 1))


def _reference_box(identity: Identity, size: int) -> tuple[int, int, int, int]:
    """Bounding box of the subject in its reference picture, px (x0, y0, x1, y1)."""
    wide, tall = creatures.half_extents(identity.class_name, identity.marking)
    long_side = int(REFERENCE_SCALE * size)
    width, height = (max(1, int(long_side * extent / max(wide, tall) + 1e-9)) for extent in (wide, tall))
    x0, y0 = (size - width) // 2, (size - height) // 2
    return x0, y0, x0 + width, y0 + height


def render_reference(identity: Identity, size: int) -> Image.Image:
    """Draw a subject alone on pure white in its canonical pose, its bounding box centred and 0.9 `size` long."""
    i = identity
    resolution = next((s for s in creatures.SPRITE_SIDES if s >= 2 * size), creatures.SPRITE_SIDES[-1])
    sprite = creatures.sprite(i.class_name, i.palette, i.pattern, i.marking, resolution)
    extents = np.array(creatures.half_extents(i.class_name, i.marking))
    middle = resolution / 2
    reach = extents / (2 * art.CANVAS_REACH) * resolution
    x0, y0, x1, y1 = _reference_box(i, size)
    box = (*(middle - reach), *(middle + reach))
    picture = sprite.resize((x1 - x0, y1 - y0), Image.Resampling.BOX, box=box)
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    canvas.paste(picture, (x0, y0), picture)
    return canvas


def correspondences(
    scene: Scene,
    k: int,
    reference_grid: int,
    target_grid: int,
    reference_size: int = REFERENCE_SIZE,
) -> np.ndarray:
    """Points between the reference picture and the scene where subject k is seen.

    For the centre of every target cell that shows subject k: the reference cell that shows the same canonical point.

    Args:
        scene: the scene.
        k: index of the subject.
        reference_grid: cells per side of the reference picture.
        target_grid: cells per side of the scene.
        reference_size: px, the size at which `render_reference` drew the picture (its frame is rounded to px).

    Returns:
        int64 `[P, 2]` of (u, v), row-major cell indices, ascending v; v is unique, u may repeat.
    """
    front, _ = front_index(scene, target_grid)
    v = np.nonzero(front == k)[0]
    placement = scene.placements[k]
    canonical = to_canonical(placement, cell_centres(target_grid)[v])
    extents = np.array(creatures.half_extents(placement.identity.class_name, placement.identity.marking))
    box = np.array(_reference_box(placement.identity, reference_size)).reshape(2, 2)
    pixels = box[0] + (canonical / extents + 1) / 2 * (box[1] - box[0])
    cells = np.floor(pixels / reference_size * reference_grid).astype(np.int64).clip(0, reference_grid - 1)
    return np.stack([cells[:, 1] * reference_grid + cells[:, 0], v], axis=1)
