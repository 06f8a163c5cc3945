"""Where pictures and the cells of their grids come to lie in the training frame."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mosaic.data.multi_reference.framing import cover, fit, nearest_bucket
from mosaic.method.correspondence import majority_points, reduce_points
from mosaic.method.grids import Grid

SIDES = st.integers(1, 400)
GRIDS = st.builds(Grid, st.integers(1, 12), st.integers(1, 12))
FAST = settings(max_examples=60, deadline=None)


def naive_token(cell: int, cells: int, start: Fraction, length: Fraction, side: int, tokens: int) -> int:
    """One axis: the centre in pixels, then the token."""
    centre = start + (cell + Fraction(1, 2)) * length / cells
    return floor(centre * tokens / side)


@FAST
@given(SIDES, SIDES, GRIDS, GRIDS, st.integers(1, 64))
def test_a_fitted_reference(height: int, width: int, grid: Grid, tokens: Grid, side: int) -> None:
    frame = fit((height, width), side)
    long, short = max(height, width), min(height, width)
    lengths = (frame.rows.length, frame.columns.length)
    assert max(lengths) == side
    assert abs(min(lengths) - Fraction(short * side, long)) <= Fraction(1, 2) or min(lengths) == 1
    for span in (frame.rows, frame.columns):
        assert span.start >= 0
        assert 0 <= side - span.length - 2 * span.start <= 1  # in the middle, to the pixel
    found = frame.carry(torch.arange(grid.num_tokens), grid, tokens)
    assert 0 <= int(found.min()) <= int(found.max()) < tokens.num_tokens  # nothing of a reference is cut off
    for cell in range(grid.num_tokens):
        row = naive_token(cell // grid.columns, grid.rows, *frame.rows, side, tokens.rows)
        column = naive_token(cell % grid.columns, grid.columns, *frame.columns, side, tokens.columns)
        assert found[cell] == row * tokens.columns + column


@FAST
@given(SIDES, SIDES, st.integers(1, 64), st.integers(1, 64), GRIDS, GRIDS)
def test_a_covering_target(height: int, width: int, high: int, wide: int, grid: Grid, tokens: Grid) -> None:
    frame = cover((height, width), (high, wide))
    assert (frame.rows.length / height) == (frame.columns.length / width)
    assert min(frame.rows.length - high, frame.columns.length - wide) == 0
    found = frame.carry(torch.arange(grid.num_tokens), grid, tokens)
    for cell in range(grid.num_tokens):
        row = naive_token(cell // grid.columns, grid.rows, (high - frame.rows.length) / 2, frame.rows.length, high, tokens.rows)
        column = naive_token(
            cell % grid.columns, grid.columns, (wide - frame.columns.length) / 2, frame.columns.length, wide, tokens.columns
        )
        inside = 0 <= row < tokens.rows and 0 <= column < tokens.columns
        assert found[cell] == (row * tokens.columns + column if inside else -1)


@FAST
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_equal_aspects_reduce_as_whole_cells_do(rows: int, columns: int, times_rows: int, times_columns: int, seed: int) -> None:
    """The centre rule is `reduce_points` wherever that is defined."""
    fine, coarse = Grid(rows * times_rows, columns * times_columns), Grid(rows, columns)
    points = torch.randint(fine.num_tokens, (40, 2), generator=torch.Generator().manual_seed(seed))
    frame = cover((rows * 30, columns * 30), (rows * 16, columns * 16))
    u, v = (frame.carry(points[:, axis], fine, coarse) for axis in (0, 1))
    assert torch.equal(majority_points(u, v, coarse.num_tokens, coarse.num_tokens), reduce_points(points, fine, fine, coarse, coarse))


@pytest.mark.parametrize("size", [(24, 48), (48, 24), (30, 30), (17, 48), (96, 40)])
@pytest.mark.parametrize("kind", ["fit", "cover"])
def test_cells_lie_where_their_colours_are(size: tuple[int, int], kind: str) -> None:
    """Paint one cell of the stored picture, put it into the frame, and look which token got the colour."""
    grid, tokens = Grid(6, 6), Grid(4, 4)
    frame = fit(size, 48) if kind == "fit" else cover(size, (48, 48))
    for cell in range(grid.num_tokens):
        picture = np.full((*size, 3), 255, np.uint8)
        row, column = divmod(cell, grid.columns)
        edges = [[round(i * side / 6) for i in range(7)] for side in size]
        picture[edges[0][row] : edges[0][row + 1], edges[1][column] : edges[1][column + 1]] = 0
        framed = np.asarray(frame.apply(Image.fromarray(picture)))
        assert framed.shape == (48, 48, 3)
        darkness = 255 - framed[..., 0].astype(float)
        token = int(frame.carry(torch.tensor([cell]), grid, tokens))
        if token < 0:
            continue
        if darkness.sum() > 0:
            y, x = (np.average(index, weights=darkness) + 0.5 for index in np.indices((48, 48)))
            assert abs(y / 12 - (token // 4 + 0.5)) <= 0.51 + 1 / 12
            assert abs(x / 12 - (token % 4 + 0.5)) <= 0.51 + 1 / 12


def test_pictures_that_need_no_change_get_none() -> None:
    picture = Image.new("RGB", (32, 16), "red")
    assert cover((16, 32), (16, 32)).apply(picture) is picture
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    assert fit((40, 40), 24).apply(square).tobytes() == square.resize((24, 24), Image.Resampling.LANCZOS).tobytes()
    fitted = np.asarray(fit((16, 32), 32).apply(picture))
    assert (fitted[8:24] == (255, 0, 0)).all()
    assert (fitted[:8] == 255).all()
    assert (fitted[24:] == 255).all()


def test_extreme_pictures_stay_small() -> None:
    for size in ((1, 60_000), (60_000, 1)):
        picture = Image.new("RGB", size[::-1])
        assert cover(size, (64, 64)).apply(picture).size == (64, 64)
        assert fit(size, 64).apply(picture).size == (64, 64)


def test_nearest_bucket() -> None:
    buckets = [(512, 512), (384, 640), (640, 384)]
    heights, widths = np.array([100, 60, 100, 400, 77]), np.array([100, 100, 60, 100, 100])
    assert nearest_bucket(heights, widths, buckets).tolist() == [0, 1, 2, 2, 0 if 77 / 100 > (384 / 640) ** 0.5 else 1]
    assert nearest_bucket(np.array([1]), np.array([1]), [(2, 1), (1, 2)]).tolist() == [0]  # a tie
