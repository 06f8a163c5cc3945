"""Token geometry against diffusers and against numbers written by hand."""

import pytest
import torch
from diffusers import FluxPipeline

from mosaic.method.grids import Grid, token_grid
from mosaic.method.tokens import pack_latents, position_ids, reference_position_ids, text_position_ids, unpack_latents


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 10), (8, 4)])
def test_pack_and_unpack_equal_diffusers(generator: torch.Generator, height: int, width: int) -> None:
    latents = torch.randn(3, 4, height, width, generator=generator)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 3, 4, height, width))
    grid = Grid(height // 2, width // 2)
    unpacked = unpack_latents(packed, grid)
    assert torch.equal(unpacked, latents)
    assert torch.equal(unpacked, FluxPipeline._unpack_latents(packed, height * 8, width * 8, vae_scale_factor=8))


def test_a_token_holds_channel_row_column() -> None:
    latents = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    assert pack_latents(latents)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # row 0, column 1 of a 2 x 2 grid
    assert pack_latents(latents)[0, 2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]  # row 1, column 0


def test_pixel_to_token_and_back() -> None:
    # One bright pixel of a 48 x 80 picture, at 8 px per latent, lands in the token row * columns + column.
    grid = token_grid(48, 80)
    assert grid == Grid(3, 5)
    for y, x in [(0, 0), (17, 40), (47, 79)]:
        latents = torch.zeros(1, 1, 6, 10)
        latents[0, 0, y // 8, x // 8] = 1
        token = int(pack_latents(latents).sum(-1).argmax())
        assert token == (y // 16) * grid.columns + x // 16
        assert unpack_latents(pack_latents(latents), grid)[0, 0, y // 8, x // 8] == 1


@pytest.mark.parametrize(
    ("height", "width", "factor", "grid"), [(512, 512, 8, (32, 32)), (1024, 768, 8, (64, 48)), (64, 64, 4, (8, 8)), (24, 32, 2, (6, 8))]
)
def test_token_grid(height: int, width: int, factor: int, grid: tuple[int, int]) -> None:
    assert token_grid(height, width, factor) == Grid(*grid)
    assert token_grid(height, width, factor).num_tokens == grid[0] * grid[1]


@pytest.mark.parametrize(
    ("height", "width", "nearest"), [(500, 512, "496 x 512"), (512, 0, "512 x 16"), (-16, 512, "16 x 512"), (8, 520, "16 x 512")]
)
def test_sizes_that_do_not_divide_are_refused(height: int, width: int, nearest: str) -> None:
    with pytest.raises(
        ValueError, match=rf"data\.image_size: height and width must be .* 16 px, got {height} x {width}\. Nearest: {nearest}\."
    ):
        token_grid(height, width, where="data.image_size")


def test_target_ids() -> None:
    ids = position_ids(Grid(2, 3))
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert torch.equal(ids, FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32))


def test_reference_ids_stand_left_of_the_target() -> None:
    ids = reference_position_ids(Grid(2, 2), 3)
    assert ids.dtype == torch.float32
    assert ids.tolist() == [
        *([0, 0, -2], [0, 0, -1], [0, 1, -2], [0, 1, -1]),
        *([0, 0, -4], [0, 0, -3], [0, 1, -4], [0, 1, -3]),
        *([0, 0, -6], [0, 0, -5], [0, 1, -6], [0, 1, -5]),
    ]
    assert reference_position_ids(Grid(1, 2), 2).tolist() == [[0, 0, -2], [0, 0, -1], [0, 0, -4], [0, 0, -3]]  # widths, not heights
    assert reference_position_ids(Grid(2, 2), 0).shape == (0, 3)
    assert not text_position_ids(4).any()
    assert text_position_ids(4).shape == (4, 3)


def test_reference_ids_by_index() -> None:
    ids = reference_position_ids(Grid(1, 3), 2, reference_position="index")
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [2, 0, 0], [2, 0, 1], [2, 0, 2]]
    assert torch.equal(ids[:, 1:], position_ids(Grid(1, 3))[:, 1:].repeat(2, 1))
    assert reference_position_ids(Grid(1, 3), 0, reference_position="index").shape == (0, 3)


def test_columns_beyond_256_stay_apart() -> None:
    wide = position_ids(Grid(1, 600))[:, 2]
    assert len(wide.unique()) == 600
    assert len(wide.bfloat16().unique()) < 600  # what the dtype of a model would do to them
    far = reference_position_ids(Grid(32, 32), 9)
    assert len(far.unique(dim=0)) == 9 * 32 * 32
    assert far[:, 2].min() == -288


def test_odd_latents_and_wrong_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"even height and width to be packed, got \(1, 4, 3, 4\)"):
        pack_latents(torch.zeros(1, 4, 3, 4))
    with pytest.raises(ValueError, match="hold 6 tokens, but the grid 2 x 2 has 4"):
        unpack_latents(torch.zeros(1, 6, 16), Grid(2, 2))
