"""Attention accuracy against a loop over all points, and the pictures made for people."""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from mosaic.method.correspondence import batch_points
from mosaic.method.grids import Grid
from mosaic.method.metrics import AttentionAccuracy, attention_accuracy, attention_leakage, attention_shape, pool_accuracies, pool_shapes
from mosaic.pipeline.attention_report import PictureAttention
from mosaic.reports import figures
from mosaic.reports.figures import (
    MARGIN,
    TILE,
    attention_panel,
    case_panel,
    contact_sheet,
    heat_map,
    save_picture,
    tensor_to_image,
    tile,
    token_centre,
    token_position,
)

# ---- attention accuracy


def accuracy_of(peaks: list[int], targets: list[int], grid: Grid) -> AttentionAccuracy:
    """One sample with one reference; point i has u = i."""
    rows = torch.rand(1, len(peaks), grid.num_tokens) * 0.5
    rows[0, torch.arange(len(peaks)), torch.tensor(peaks, dtype=torch.long)] = 1.0
    points = torch.tensor([[i, v] for i, v in enumerate(targets)], dtype=torch.long).reshape(-1, 2)
    return attention_accuracy(rows, batch_points([[points]], len(peaks), grid.num_tokens), grid)


@pytest.mark.parametrize("grid", [Grid(3, 5), Grid(5, 3), Grid(1, 4), Grid(2, 2), Grid(1, 1)])
def test_every_pair_of_peak_and_target_against_a_loop(grid: Grid) -> None:
    cells = [(r, c) for r in range(grid.rows) for c in range(grid.columns)]
    pairs = [(p, v) for p in range(grid.num_tokens) for v in range(grid.num_tokens)]
    found = accuracy_of([p for p, _ in pairs], [v for _, v in pairs], grid)

    def near(p: int, v: int) -> bool:
        return abs(cells[p][0] - cells[v][0]) <= 1 and abs(cells[p][1] - cells[v][1]) <= 1

    exact_share = sum(p == v for p, v in pairs) / len(pairs)
    near_share = sum(near(p, v) for p, v in pairs) / len(pairs)
    # Every peak stands once beside every target, so the shares are the chances.
    assert found.exact == pytest.approx(exact_share)
    assert found.exact_chance == pytest.approx(exact_share)
    assert found.near == pytest.approx(near_share)
    assert found.near_chance == pytest.approx(near_share)
    assert found.num_points == len(pairs)


def test_chance_at_corner_side_and_middle() -> None:
    grid = Grid(3, 4)
    for v, neighbours in ((0, 4), (3, 4), (11, 4), (1, 6), (4, 6), (5, 9)):
        assert accuracy_of([v], [v], grid).near_chance == pytest.approx(neighbours / 12)


def test_rows_do_not_wrap_around() -> None:
    found = accuracy_of([4], [3], Grid(3, 4))  # the first token of row 1 follows the last of row 0
    assert (found.exact, found.near) == (0, 0)
    assert accuracy_of([8], [5], Grid(3, 4)).near == 1  # a diagonal


def test_padding_is_not_counted() -> None:
    rows = torch.zeros(2, 3, 6)
    rows[0, :, 5] = 1
    rows[1, 0, 2] = 1
    samples = [[torch.tensor([[0, 5], [1, 0], [2, 5]])], [torch.tensor([[0, 2]])]]
    found = attention_accuracy(rows, batch_points(samples, 3, 6), Grid(2, 3))
    assert found.exact == pytest.approx(3 / 4)
    assert found.num_points == 4


def test_pooling_is_weighted_by_points() -> None:
    parts = [AttentionAccuracy(1.0, 1.0, 0.1, 0.4, 3), AttentionAccuracy(0.0, 0.5, 0.1, 0.8, 1), accuracy_of([], [], Grid(2, 2))]
    assert pool_accuracies(parts)[:5] == pytest.approx((0.75, 0.875, 0.1, 0.5, 4))


def test_no_points_have_no_accuracy() -> None:
    for nothing in (accuracy_of([], [], Grid(2, 2)), pool_accuracies([])):
        assert nothing.num_points == 0
        assert all(math.isnan(value) for value in (*nothing[:4], nothing.leakage, nothing.leakage_chance))


# ---- sharpness and overlap


def test_entropy_and_overlap_by_hand() -> None:
    points = batch_points(
        [[torch.tensor([[0, 0]]), torch.tensor([[0, 1], [1, 2]])], [torch.tensor([[1, 3]]), torch.zeros(0, 2).long()]], 2, 4
    )
    rows = torch.zeros(2, points.mask.shape[1], 4)
    rows[0, 0] = torch.tensor([0.5, 0.5, 0, 0])
    rows[0, 1] = torch.tensor([0, 1.0, 0, 0])
    rows[0, 2] = torch.tensor([0, 0, 1.0, 0])
    rows[1, 0] = 0.25
    found = attention_shape(rows, points)
    assert found.entropy == pytest.approx((math.log(2) + 0 + 0 + math.log(4)) / 4)
    assert (found.entropy_chance, found.num_points, found.num_pairs) == (pytest.approx(math.log(4)), 4, 1)
    assert found.overlap == pytest.approx(0.5)  # (.5, .5, 0, 0) and (0, .5, .5, 0); the second sample has one reference with points
    pooled = pool_shapes([found, found._replace(entropy=0.0, num_points=12, overlap=math.nan, num_pairs=0)])
    assert pooled.entropy == pytest.approx(found.entropy / 4)
    assert (pooled.overlap, pooled.num_points, pooled.num_pairs) == (pytest.approx(0.5), 16, 1)
    assert math.isnan(pool_shapes([]).entropy)


# ---- attention leakage


def test_leakage_of_constructed_rows() -> None:
    """Sample 0: reference 0 owns tokens 1 and 2, reference 1 owns 4; sample 1: one reference has points, so nothing counts."""
    points = batch_points(
        [[torch.tensor([[0, 1], [3, 2]]), torch.tensor([[2, 4]])], [torch.tensor([[1, 0]]), torch.empty(0, 2).long()]], 4, 6
    )
    rows = torch.zeros(2, 3, 6)
    rows[0, 0] = torch.tensor([0.1, 0.2, 0.0, 0.1, 0.5, 0.1])  # to token 4, of reference 1: 0.5
    rows[0, 1] = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0, 0.0])  # only to its own
    rows[0, 2] = torch.tensor([1.0, 0.5, 0.25, 0.0, 0.25, 0.0])  # to tokens 1 and 2: 0.75 of a mass of 2
    rows[1, 0, 5] = 1
    rows[1, 1:] = 1  # padding
    found = attention_leakage(rows, points)
    assert found == pytest.approx(((0.5 + 0 + 0.375) / 3, (1 / 6 + 1 / 6 + 2 / 6) / 3, 3))
    assert attention_accuracy(rows, points, Grid(2, 3))[5:] == found


def test_leakage_against_a_loop(generator: torch.Generator) -> None:
    grid, num_references = Grid(4, 5), 3
    samples = []
    for _ in range(4):
        owners = torch.randint(-1, num_references, (grid.num_tokens,), generator=generator)
        samples.append(
            [
                torch.tensor([[i, v] for i, v in enumerate((owners == k).nonzero()[:, 0].tolist())], dtype=torch.long).reshape(-1, 2)
                for k in range(num_references)
            ]
        )
    points = batch_points(samples, grid.num_tokens, grid.num_tokens)
    rows = torch.rand(*points.mask.shape, grid.num_tokens, generator=generator)
    leaked = []
    for b, sample in enumerate(samples):
        row = iter(rows[b])
        for k, own in enumerate(sample):
            foreign = [v for j, other in enumerate(sample) if j != k for v in other[:, 1].tolist()]
            for _ in range(len(own)):
                found = next(row)
                leaked.append(float(found[foreign].sum() / found.sum()))
    assert attention_leakage(rows, points).leakage == pytest.approx(sum(leaked) / len(leaked), rel=1e-5)


def test_uniform_rows_leak_by_chance_and_pooling_weighs_by_points() -> None:
    def uniform(v: list[list[int]]) -> AttentionAccuracy:
        sample = [torch.tensor([[i, v] for i, v in enumerate(tokens)], dtype=torch.long).reshape(-1, 2) for tokens in v]
        points = batch_points([sample], 9, 6)
        return attention_accuracy(torch.ones(*points.mask.shape, 6), points, Grid(2, 3))

    parts = [uniform([[0, 1, 2], [4]]), uniform([[5], [1]]), uniform([[3, 4], []])]
    assert [part.leakage for part in parts[:2]] == pytest.approx([part.leakage_chance for part in parts[:2]])
    assert [part.num_leakage_points for part in parts] == [4, 2, 0]
    pooled = pool_accuracies(parts)
    assert (pooled.num_points, pooled.num_leakage_points) == (8, 6)
    assert pooled.leakage == pytest.approx((3 * 1 / 6 + 3 / 6 + 2 * 1 / 6) / 6)


# ---- figures


def solid(colour: str, width: int = 8, height: int = 8) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_tensor_to_image_ends() -> None:
    image = tensor_to_image(torch.tensor([-1.0, 0.0, 1.0, 3.0]).expand(3, 1, 4))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255, 255]


def test_tile_keeps_the_ratio_and_hard_pixels() -> None:
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))  # 2 x 1 px, width x height
    found = np.asarray(tile(image))
    assert found.shape == (TILE, TILE, 3)
    assert (found[: TILE // 4] == 255).all()
    assert (found[-TILE // 4 :] == 255).all()
    assert (found[TILE // 4 : 3 * TILE // 4, : TILE // 2] == (255, 0, 0)).all()
    assert (found[TILE // 4 : 3 * TILE // 4, TILE // 2 :] == (0, 0, 255)).all()


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)])
def test_case_panel(count: int, columns: int) -> None:
    colours = ["red", "lime", "blue", "cyan", "magenta", "yellow"][:count]
    panel = case_panel([solid(colour) for colour in colours], solid("black"))
    side = TILE if count == 1 else TILE // 2
    assert panel.size == (3 * MARGIN + columns * side + TILE, TILE + 2 * MARGIN)
    for index, colour in enumerate(colours):
        rows = 1 if count == 1 else 2
        centre = (MARGIN + (index // rows) * side + side // 2, MARGIN + (index % rows) * side + side // 2)
        assert panel.getpixel(centre) == Image.new("RGB", (1, 1), colour).getpixel((0, 0)), index
    assert panel.getpixel((panel.width - MARGIN - TILE // 2, MARGIN + TILE // 2)) == (0, 0, 0)


@pytest.mark.parametrize("caption", ["a cat", "a very long caption " * 20, "letters" * 60, "a cat and " + "x" * 400, "  a \n b  "])
def test_captions_of_any_length_fit(caption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = figures.ImageDraw.ImageDraw
    text = draw.text
    monkeypatch.setattr(
        draw, "text", lambda self, xy, shown, **kwargs: (drawn.append((self, shown, kwargs["font"])), text(self, xy, shown, **kwargs))
    )
    panel = case_panel([solid("red")], solid("black"), caption)
    canvas, shown, font = drawn[0]
    assert panel.height > TILE + 2 * MARGIN
    assert canvas.textlength(shown, font=font) <= panel.width - 2 * MARGIN
    plain = " ".join(caption.split())
    assert shown == plain or (shown.endswith(" ...") and plain.startswith(shown.removesuffix(" ...")))


def test_contact_sheet() -> None:
    sheet = contact_sheet([solid("red", 10, 4), solid("lime", 6, 8), solid("blue", 12, 5)])
    assert sheet.size == (18, 13)
    assert [sheet.getpixel(xy) for xy in ((0, 0), (12, 7), (0, 8))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert sheet.getpixel((0, 5)) == (255, 255, 255)


def test_token_centre_is_row_major() -> None:
    assert token_centre(0, Grid(2, 4)) == (0.125, 0.25)
    assert token_centre(5, Grid(2, 4)) == (0.375, 0.75)


def test_token_position_in_a_picture_that_is_not_square() -> None:
    # 40 x 20 px: the tile shows it 256 x 128, from 64 px below the tile's top.
    assert token_position(5, Grid(2, 4), (40, 20), (10, 100)) == (10 + 0.375 * TILE, 100 + 64 + 0.75 * 128)
    assert token_position(5, Grid(4, 2), (20, 40), (10, 100)) == (10 + 64 + 0.75 * 128, 100 + 0.625 * TILE)


def test_heat_map_is_red_at_the_peak_and_white_beside_the_picture() -> None:
    row = torch.zeros(8)
    row[6] = 0.3  # row 1, column 2 of 2 x 4
    found = np.asarray(heat_map(solid("black", 40, 20), row, Grid(2, 4))).astype(int)
    red = found[..., 0] - found[..., 1]
    y, x = np.unravel_index(red.argmax(), red.shape)
    assert abs(x - 0.625 * TILE) < TILE / 8
    assert y > TILE / 2
    assert red[70, 20] == 0
    assert (found[:60] == 255).all()


def test_attention_panel_lines_end_at_points_and_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    draw_line = figures.draw_line
    monkeypatch.setattr(
        figures, "draw_line", lambda draw, start, end, colour: (lines.append((start, end, colour)), draw_line(draw, start, end, colour))
    )
    reference_grid, target_grid = Grid(2, 4), Grid(2, 4)
    maps = torch.full((2, 8, 8), 0.01)
    maps[0, 0, 5], maps[0, 6, 2], maps[1, 7, 7] = 0.5, 0.9, 0.8
    maps[0, 3, 0] = maps[1, 0, 0] = 1.0  # no tokens of a subject
    subject = torch.zeros(2, 8, dtype=torch.bool)
    subject[0, [0, 6]] = subject[1, 7] = True
    attention = PictureAttention(maps, torch.zeros(1, 2), subject, reference_grid, target_grid)
    pictures, result = [solid("white", 20, 20)] * 2, solid("grey", 40, 20)
    panel = attention_panel(pictures, result, attention)
    assert panel.size == (3 * TILE + 4 * MARGIN, 2 * (TILE + MARGIN) + MARGIN)
    left, right, tops = MARGIN, 2 * MARGIN + TILE, (MARGIN, 2 * MARGIN + TILE)

    def reference_xy(u: int, k: int) -> tuple[float, float]:
        return left + (u % 4 + 0.5) * TILE / 4, tops[k] + (u // 4 + 0.5) * TILE / 2

    def target_xy(v: int, k: int) -> tuple[float, float]:
        return right + (v % 4 + 0.5) * TILE / 4, tops[k] + TILE / 4 + (v // 4 + 0.5) * TILE / 4  # 256 x 128 inside the tile

    assert [line[:2] for line in lines] == [
        (reference_xy(6, 0), target_xy(2, 0)),  # the sharpest row first
        (reference_xy(0, 0), target_xy(5, 0)),
        (reference_xy(7, 1), target_xy(7, 1)),
    ]
    assert lines[0][2] == lines[1][2] != lines[2][2]
    x, y = (round(value) for value in lines[0][1])
    assert panel.getpixel((x, y)) == lines[0][2]
    lines.clear()
    attention_panel(pictures, result, attention, [attention.line(1, 0)])
    assert [line[:2] for line in lines] == [(reference_xy(0, 1), target_xy(0, 1))]


def test_save_picture(tmp_path: Path) -> None:
    path = save_picture(solid("red"), tmp_path / "a/b/picture.png")
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    save_picture(solid("blue"), path)
    assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def test_a_failed_save_leaves_the_old_picture_and_no_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_picture(solid("red"), tmp_path / "picture.png")

    def fail(self: Image.Image, file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_picture(solid("blue"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
