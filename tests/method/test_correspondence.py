"""Points: batches, bounds, disjointness, change of grid and drawing, against brute force in plain Python."""

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from mosaic.method.correspondence import batch_points, draw_points, global_index, make_disjoint, reduce_points, validate_points
from mosaic.method.grids import Grid
from tests import tiny


def pairs(*points: tuple[int, int]) -> Tensor:
    return torch.tensor(points, dtype=torch.long).reshape(-1, 2)


def brute_reduce(points: Tensor, reference: Grid, target: Grid, to_reference: Grid, to_target: Grid) -> list[list[int]]:
    """Majority vote by dictionaries."""

    def cell(index: int, grid: Grid, to_grid: Grid) -> int:
        row, column = divmod(index, grid.columns)
        return (row * to_grid.rows // grid.rows) * to_grid.columns + column * to_grid.columns // grid.columns

    votes = Counter((cell(u, reference, to_reference), cell(v, target, to_target)) for u, v in points.tolist())
    best_u: dict[int, int] = {}
    for v in {v for _, v in votes}:
        best_u[v] = min((u for u, w in votes if w == v), key=lambda u: (-votes[u, v], u))
    best_v: dict[int, int] = {}
    for u in set(best_u.values()):
        best_v[u] = min((v for v, w in best_u.items() if w == u), key=lambda v: (-votes[u, v], v))
    return [[u, v] for u, v in sorted(best_v.items())]


def brute_disjoint(points: list[Tensor]) -> list[list[list[int]]]:
    """Each v to the reference with most points on it."""
    counts = Counter((v, k) for k, own in enumerate(points) for _, v in own.tolist())
    owner = {v: min((k for w, k in counts if w == v), key=lambda k: (-counts[v, k], k)) for v, _ in counts}
    return [[[u, v] for u, v in own.tolist() if owner[v] == k] for k, own in enumerate(points)]


def test_global_index() -> None:
    assert global_index(torch.tensor([0, 5]), 0, 16).tolist() == [0, 5]
    assert global_index(torch.tensor([0, 5]), torch.tensor([1, 2]), 16).tolist() == [16, 37]


def test_batch_points() -> None:
    samples = [[pairs((3, 7), (1, 7)), pairs(), pairs((0, 2))], [pairs(), pairs(), pairs()]]
    points = batch_points(samples, 4, 8)
    assert points.global_index.tolist() == [[3, 1, 8], [0, 0, 0]]
    assert points.target_index.tolist() == [[7, 7, 2], [0, 0, 0]]
    assert points.reference.tolist() == [[0, 0, 2], [0, 0, 0]]
    assert points.mask.tolist() == [[True] * 3, [False] * 3]
    assert points.reference_mask.tolist() == [[True, False, True], [False] * 3]
    assert points.num_references == 3


def test_batch_points_takes_any_integers_and_no_points_at_all() -> None:
    samples = [[pairs((1, 2)).to(torch.int32)], [pairs((0, 1)).to(torch.int32)]]
    assert batch_points(samples, 4, 4).global_index.dtype == torch.int64
    empty = batch_points([[pairs(), pairs()]] * 2, 4, 4)
    assert empty.mask.shape == (2, 0)
    assert empty.reference_mask.tolist() == [[False, False]] * 2


def test_a_batch_has_one_number_of_references() -> None:
    with pytest.raises(ValueError, match=r"one number of references K, got \[1, 2\]\. Group samples by K"):
        batch_points([[pairs((0, 0))], [pairs((0, 0)), pairs()]], 4, 4)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([pairs((0, 0)), pairs((4, 1))], r"points\[1\]: u must lie in \[0, 4\), got 4 in point \[4, 1\]"),
        ([pairs((-1, 0))], r"points\[0\]: u must lie in \[0, 4\), got -1"),
        ([pairs((0, 6))], r"points\[0\]: v must lie in \[0, 6\), got 6 in point \[0, 6\]"),
        ([pairs((0, -2))], r"points\[0\]: v must lie in \[0, 6\), got -2"),
        ([pairs((0, 1), (0, 2))], r"points\[0\]: a reference token u may carry one point only.*reduce_points"),
        ([pairs((0, 1)), pairs(), pairs((2, 1))], r"points: target token v = 1 belongs to references 0 and 2; .*Eq\. 2.*make_disjoint"),
        ([torch.zeros(2, 3, dtype=torch.long)], r"points\[0\]: must be an integer tensor of shape \[P, 2\], got torch.int64 \(2, 3\)"),
        ([torch.zeros(2, 2)], r"points\[0\]: must be an integer tensor of shape \[P, 2\], got torch.float32"),
    ],
)
def test_bad_points_are_named(points: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_points(points, 4, 6)
    with pytest.raises(ValueError, match=r"^points\[1\]"):
        batch_points([[pairs()] * len(points), points], 4, 6)


def test_v_may_repeat_within_a_reference() -> None:
    validate_points([pairs((0, 1), (2, 1)), pairs((0, 0))], 4, 6)


@pytest.mark.parametrize("seed", range(20))
def test_reduce_equals_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    reference, target = Grid(4, 8), Grid(6, 12)
    to_reference, to_target = rng.choice([Grid(2, 2), Grid(4, 4), reference]), rng.choice([Grid(3, 4), Grid(2, 3), target])
    points = torch.tensor([[rng.randrange(32), rng.randrange(72)] for _ in range(rng.randrange(1, 90))])
    reduced = reduce_points(points, reference, target, to_reference, to_target)
    assert reduced.tolist() == brute_reduce(points, reference, target, to_reference, to_target)
    validate_points([reduced], to_reference.num_tokens, to_target.num_tokens)


def test_reduce_ties_go_to_the_lowest_and_nothing_is_averaged() -> None:
    same = Grid(2, 2)
    # Two u claim v = 3 with one vote each: the lower u stays. Then u = 0 holds v = 1 and v = 3 with one vote each: the lower v.
    assert reduce_points(pairs((2, 3), (0, 3), (0, 1)), same, same, same, same).tolist() == [[0, 1]]
    # Fine points on both sides of a coarse border keep a pair that was voted for; the mean would be a cell nobody voted for.
    fine, coarse = Grid(2, 6), Grid(1, 3)
    assert reduce_points(pairs((0, 0), (1, 1), (6, 5)), fine, fine, coarse, coarse).tolist() == [[0, 0]]
    assert reduce_points(pairs(), fine, fine, coarse, coarse).shape == (0, 2)


def test_reduce_to_the_same_grid_is_the_identity() -> None:
    grid = Grid(3, 5)
    points = pairs((4, 14), (7, 0), (9, 3))
    assert torch.equal(reduce_points(points, grid, grid, grid, grid), points)


@pytest.mark.parametrize(("name", "index"), [("reference grid", 0), ("target grid", 1)])
def test_grids_must_divide(name: str, index: int) -> None:
    grids = [Grid(4, 6), Grid(4, 6), Grid(2, 3), Grid(2, 3)]
    grids[2 + index] = Grid(4, 4)
    with pytest.raises(ValueError, match=rf"{name} 4 x 6 must be a whole multiple of 4 x 4 in both sides"):
        reduce_points(pairs((0, 0)), *grids)


@pytest.mark.parametrize("seed", range(20))
def test_make_disjoint_equals_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    points = [pairs(*((u, rng.randrange(7)) for u in range(rng.randrange(9)))) for _ in range(rng.randrange(1, 5))]
    disjoint = make_disjoint(points)
    assert [own.tolist() for own in disjoint] == brute_disjoint(points)
    validate_points(disjoint, 9, 7)


def test_make_disjoint_of_nothing() -> None:
    assert make_disjoint([]) == []
    assert [len(own) for own in make_disjoint([pairs(), pairs()])] == [0, 0]


def test_rescaled_points_are_disjoint_again() -> None:
    fine, coarse = Grid(8, 8), Grid(4, 4)
    points = tiny.random_points(3, [20, 20, 20], 64, 64, seed=4)
    reduced = [reduce_points(own, fine, fine, coarse, coarse) for own in points]
    with pytest.raises(ValueError, match="disjoint"):  # coarse cells hold fine cells of several references
        validate_points(reduced, 16, 16)
    validate_points(make_disjoint(reduced), 16, 16)


def test_draw_points(generator: torch.Generator) -> None:
    samples = [tiny.random_points(3, [5, 0, 7], 16, 36, seed=1), tiny.random_points(3, [1, 2, 0], 16, 36, seed=2)]
    assert all(torch.equal(a, b) for a, b in zip(draw_points(samples, 12)[0], samples[0], strict=True))
    seen: Counter[tuple[int, int, int]] = Counter()
    for _ in range(300):
        drawn = draw_points(samples, 4, generator)
        assert sum(len(own) for own in drawn[0]) == 4
        assert [len(own) for own in drawn[1]] == [1, 2, 0]
        for k, own in enumerate(drawn[0]):
            kept = {tuple(point) for point in own.tolist()}
            assert kept <= {tuple(point) for point in samples[0][k].tolist()}
            seen.update((k, *point) for point in kept)
    assert len(seen) == 12  # every point has its turn, about 300 * 4 / 12 = 100 times
    assert 60 < min(seen.values()) <= max(seen.values()) < 140
    first = draw_points(samples, 4, torch.Generator().manual_seed(9))[0]
    again = draw_points(samples, 4, torch.Generator().manual_seed(9))[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_points_move() -> None:
    points = batch_points([[pairs((1, 2))]], 4, 4, device="meta")
    assert points.mask.device.type == points.global_index.device.type == "meta"
