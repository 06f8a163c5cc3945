"""Pictures for people: panels references | result, and attention maps with lines from reference points to their peaks."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from mosaic.files import replacing
from mosaic.images import to_rgb
from mosaic.method.grids import Grid

if TYPE_CHECKING:  # pictures are drawn without torch, and the check of the cases draws some
    from torch import Tensor

    from mosaic.pipeline.attention_report import Line, PictureAttention

TILE = 256  # px, side of a picture in a panel
TILE_SIDES = (TILE, TILE // 2)  # of a case's only reference, and of one of several
MARGIN = 12
CAPTION = 26
INK = (40, 40, 48)
HEAT = (150, 12, 28)  # darker than any part of the light grey below it, so that the map can be read without colour
LINE_COLOURS = ((230, 57, 70), (29, 120, 216), (46, 160, 67), (244, 148, 6), (142, 68, 173), (0, 160, 160))


def colour_name(k: int) -> str:
    """The colour of reference k, as HTML writes it."""
    return "#{:02x}{:02x}{:02x}".format(*LINE_COLOURS[k % len(LINE_COLOURS)])


def tensor_to_image(image: "Tensor") -> Image.Image:
    """float [3, H, W] in [-1, 1] -> RGB picture."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def save_picture(image: Image.Image, path: str | os.PathLike, text: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write a PNG with texts in its metadata; the folder is made."""
    path = Path(path)
    metadata = PngInfo()
    for key, value in text.items():
        metadata.add_itxt(key, value)
    with replacing(path) as aside, open(aside, "xb") as file:  # which follows no link that somebody puts there meanwhile
        image.save(file, format="PNG", pnginfo=metadata)
    return path


def placed(size: tuple[int, int], side: int = TILE) -> tuple[int, int, int, int]:
    """Where `tile` puts a picture of (width, height) px in its square: left, top, width, height."""
    scale = side / max(size)
    width, height = (max(1, round(length * scale)) for length in size)
    return (side - width) // 2, (side - height) // 2, width, height


def tile(image: Image.Image, side: int = TILE) -> Image.Image:
    """The picture as large as fits in a white square of `side` px; pictures that are enlarged twice or more keep hard pixels."""
    image = to_rgb(image)
    left, top, width, height = placed(image.size, side)
    method = Image.Resampling.NEAREST if side >= 2 * max(image.size) else Image.Resampling.LANCZOS
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image.resize((width, height), method), (left, top))
    return canvas


def case_panel(references: Sequence[Image.Image], result: Image.Image, caption: str = "") -> Image.Image:
    """References in a row, the result at the right, the caption below."""
    tiles = [tile(reference, reference_side(len(references))) for reference in references]
    rows = 2 if len(references) > 1 else 1
    columns = -(-len(tiles) // rows)
    side = TILE // rows
    width = MARGIN * 3 + columns * side + TILE
    canvas = Image.new("RGB", (width, TILE + 2 * MARGIN + (CAPTION if caption else 0)), "white")
    for index, picture in enumerate(tiles):
        canvas.paste(picture, (MARGIN + (index // rows) * side, MARGIN + (index % rows) * side))
    canvas.paste(tile(result), (width - MARGIN - TILE, MARGIN))
    if caption:
        _caption(canvas, caption, MARGIN, TILE + MARGIN + 4)
    return canvas


def reference_side(count: int) -> int:
    """Side in px of a reference in `case_panel`, one of `TILE_SIDES`, where there are `count` of them."""
    return TILE_SIDES[count > 1]


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Pictures in rows of `columns`, each at its own size, on white."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(min(columns, len(pictures)))]
    heights = [max(picture.height for picture in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            canvas.paste(picture, (sum(widths[:c]), sum(heights[:r])))
    return canvas


def attention_panel(
    references: Sequence[Image.Image], result: Image.Image, attention: "PictureAttention", lines: "Sequence[Line] | None" = None
) -> Image.Image:
    """One row per reference: its picture with points, lines to the rows' peaks in the result, and a heat map of its subject's mean row.

    Args:
        references: K prepared reference pictures (square).
        result: The generated picture.
        attention: Where the references look in it.
        lines: What to draw; None: the strongest lines of every reference.
    """
    if lines is None:
        lines = [line for k in range(len(references)) for line in attention.strongest(k)]
    width, height = 3 * TILE + 4 * MARGIN, len(references) * (TILE + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (reference, distribution) in enumerate(zip(references, attention.distributions, strict=True)):
        top = MARGIN + k * (TILE + MARGIN)
        corners = (MARGIN, top), (2 * MARGIN + TILE, top)
        canvas.paste(tile(reference), corners[0])
        canvas.paste(tile(result), corners[1])
        canvas.paste(heat_map(result, distribution, attention.target_grid), (3 * MARGIN + 2 * TILE, top))
        for line in lines:
            if line.reference == k:
                start = token_position(line.u, attention.reference_grid, reference.size, corners[0])
                end = token_position(line.v, attention.target_grid, result.size, corners[1])
                draw_line(draw, start, end, LINE_COLOURS[k % len(LINE_COLOURS)])
    return canvas


def token_centre(index: int, grid: Grid) -> tuple[float, float]:
    """(x, y) of a token's centre as shares of the picture's sides."""
    return ((index % grid.columns + 0.5) / grid.columns, (index // grid.columns + 0.5) / grid.rows)


def token_position(index: int, grid: Grid, size: tuple[int, int], corner: tuple[int, int]) -> tuple[float, float]:
    """(x, y) in px of a token's centre on a canvas where the tile of a picture of (width, height) has its upper left corner at `corner`."""
    left, top, width, height = placed(size)
    x, y = token_centre(index, grid)
    return corner[0] + left + x * width, corner[1] + top + y * height


def heat_map(image: Image.Image, row: "Tensor", grid: Grid, side: int = TILE) -> Image.Image:
    """A tile of the picture, in light grey, with a row of attention over it in red, the darker the more; the row's maximum is fully red."""
    weights = row.reshape(grid.rows, grid.columns).float().cpu().numpy()
    weights = weights / max(float(weights.max()), 1e-8)
    left, top, width, height = placed(image.size, side)
    mask = Image.new("L", (side, side), 0)  # the margins of a picture that is not square stay white
    mask.paste(Image.fromarray((255 * weights).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR), (left, top))
    grey = Image.blend(tile(image, side).convert("L").convert("RGB"), Image.new("RGB", (side, side), "white"), 0.55)
    return Image.composite(Image.blend(grey, Image.new("RGB", (side, side), HEAT), 0.85), grey, mask)


def draw_line(draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: tuple[int, int, int]) -> None:
    """A line with a dot at both ends, in px."""
    draw.line([start, end], fill=colour, width=3)
    for x, y in (start, end):
        draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=colour, outline="white", width=2)


def _caption(canvas: Image.Image, text: str, left: int, top: int) -> None:
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    text = shown = " ".join(text.split())
    while text and draw.textlength(shown, font=font) > canvas.width - 2 * left:
        text = text.rpartition(" ")[0] or text[:-1]  # word by word, then the first word letter by letter
        shown = f"{text} ..."
    draw.text((left, top), shown, fill=INK, font=font)
