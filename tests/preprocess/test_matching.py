"""Matching of feature maps: constructed maps with known answers, plain loops, and properties of filters and ownership."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mosaic.method.correspondence import make_disjoint, owned_by_similarity
from mosaic.method.grids import Grid
from preprocess.matching import matching
from preprocess.matching.affine import follows_affine
from preprocess.matching.matching import Match, match_features, soft_argmax
from preprocess.matching.samples import FoundPoints, _carried, accepted, match_scores
from preprocess.matching.settings import MatchingSettings

GRIDS = [Grid(6, 6), Grid(5, 9), Grid(9, 4), Grid(1, 7)]


def features(grid: Grid, seed: int = 0, channels: int = 32) -> Tensor:
    """Random cells, far apart in direction, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.1 + 3 * torch.rand(1, *grid, generator=generator)
    return torch.randn(channels, *grid, generator=generator) * lengths


def cells(grid: Grid) -> Tensor:
    return torch.arange(grid.num_tokens).reshape(grid)


def naive_match(target: Tensor, reference: Tensor, score: str, target_mask: Tensor, reference_mask: Tensor) -> list[tuple]:
    """Per target cell (index, cosine, margin) by loops over cells."""
    columns = reference.shape[2]
    ours, theirs = target.flatten(1).T.double(), reference.flatten(1).T.double()
    result = []
    for v, cell in enumerate(ours):
        scored = []
        for u, other in enumerate(theirs):
            if target_mask[v] and reference_mask[u]:
                dot, cosine = float(cell @ other), float(cell @ other / (cell.norm() * other.norm()))
                scored.append((dot if score == "dot" else cosine, -u, cosine))
        if not scored:
            result.append((-1, -float("inf"), -float("inf")))
            continue
        _, u, cosine = max(scored)
        far = [s for s in scored if max(abs(-s[1] // columns - -u // columns), abs(-s[1] % columns - -u % columns)) > 1]
        result.append((-u, cosine, cosine - max(far)[2] if far else float("inf")))
    return result


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_map_matches_itself_by_cosine_but_not_by_dot_product(grid: Grid) -> None:
    own = features(grid)
    match = match_features(own, own)
    assert match.index.tolist() == match.backward.tolist() == list(range(grid.num_tokens))
    torch.testing.assert_close(match.similarity, torch.ones(grid.num_tokens))
    if grid.num_tokens > 30:
        assert match_features(own, own, score="dot").index.tolist() != list(range(grid.num_tokens))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_flips_shifts_rotations_transposes_and_permutations(grid: Grid) -> None:
    """The cell numbers, transformed like the features, say where each cell of the target came from."""
    own, number = features(grid), cells(grid)
    order = torch.randperm(grid.num_tokens, generator=torch.Generator().manual_seed(1))
    transforms = {
        "flip columns": lambda x: x.flip(-1),
        "flip rows": lambda x: x.flip(-2),
        "shift": lambda x: x.roll((2, 3), (-2, -1)),
        "quarter turn": lambda x: x.rot90(1, (-2, -1)),
        "three quarter turns": lambda x: x.rot90(3, (-2, -1)),
        "transpose": lambda x: x.transpose(-2, -1),
        "permutation": lambda x: x.flatten(-2)[..., order].reshape(x.shape),
    }
    for name, transform in transforms.items():
        target, origin = transform(own), transform(number).reshape(-1)
        match = match_features(target, own)
        assert match.index.tolist() == origin.tolist(), name
        assert match.backward.tolist() == origin.argsort().tolist(), name  # the inverse permutation
        swapped = match_features(own, target)
        assert swapped.index.tolist() == match.backward.tolist(), name
        assert matching.is_cyclic(match, Grid(*target.shape[1:]), 0).all(), name


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_plain_loops(score: str, masked: bool) -> None:
    target, reference = features(Grid(4, 5), 1, 8), features(Grid(3, 6), 2, 8)
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(n, generator=generator) < 0.6 if masked else torch.ones(n, dtype=torch.bool) for n in (20, 18)]
    match = match_features(target, reference, target_mask=masks[0], reference_mask=masks[1].reshape(3, 6), score=score)
    expected = naive_match(target, reference, score, *masks)
    assert match.index.tolist() == [index for index, _, _ in expected]
    torch.testing.assert_close(match.similarity, torch.tensor([s for _, s, _ in expected]))
    torch.testing.assert_close(match.margin, torch.tensor([m for _, _, m in expected]))
    back = naive_match(reference, target, score, masks[1], masks[0])
    assert match.backward.tolist() == [index for index, _, _ in back]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 20, 1000])
def test_chunks_do_not_change_the_result(chunk_size: int) -> None:
    target, reference = features(Grid(4, 5), 1, 8), features(Grid(3, 6), 2, 8)
    mask = torch.arange(20) % 3 != 0
    whole = match_features(target, reference, target_mask=mask, chunk_size=20)
    parts = match_features(target, reference, target_mask=mask, chunk_size=chunk_size)
    assert torch.equal(whole.index, parts.index)
    assert torch.equal(whole.backward, parts.backward)
    torch.testing.assert_close(whole.similarity, parts.similarity)
    torch.testing.assert_close(whole.margin, parts.margin)
    positions = soft_argmax(target, reference, whole.index, chunk_size=20)
    torch.testing.assert_close(
        positions, soft_argmax(target, reference, whole.index, chunk_size=chunk_size), atol=1e-4, rtol=0, equal_nan=True
    )


def test_ties_go_to_the_lowest_cell_in_both_directions_and_over_chunks() -> None:
    same = torch.ones(3, 2, 4)
    for chunk_size in (1, 3, 8):
        match = match_features(same, same, chunk_size=chunk_size)
        assert match.index.tolist() == match.backward.tolist() == [0] * 8


def test_empty_masks_and_zero_cells() -> None:
    own = features(Grid(2, 3))
    nothing = torch.zeros(6, dtype=torch.bool)
    for masks in ({"target_mask": nothing}, {"reference_mask": nothing}):
        match = match_features(own, own, **masks)
        assert match.index.tolist() == match.backward.tolist() == [-1] * 6
        assert match.similarity.isneginf().all()
        assert match.margin.isneginf().all()
        assert not matching.is_cyclic(match, Grid(2, 3), 5).any()
        assert soft_argmax(own, own, match.index).isnan().all()
    for score in ("cosine", "dot"):
        zero = match_features(torch.zeros(4, 2, 3), torch.zeros(4, 2, 3), score=score)
        assert zero.similarity.tolist() == [0] * 6


@pytest.mark.parametrize(
    ("target", "reference", "options", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 2, 2), {}, "C, rows, columns"),
        (torch.zeros(3, 2, 2), torch.zeros(4, 2, 2), {}, "same number of channels, got 3 and 4"),
        (torch.full((3, 2, 2), torch.nan), torch.zeros(3, 2, 2), {}, "target: .* finite, but 12"),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), {"score": "l2"}, 'got "l2"'),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), {"chunk_size": 0}, "chunk_size"),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), {"target_mask": torch.ones(5, dtype=torch.bool)}, "target_mask"),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), {"reference_mask": torch.ones(4)}, "reference_mask"),
    ],
)
def test_bad_arguments(target: Tensor, reference: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_features(target, reference, **options)


# --- sub-cell positions


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_soft_argmax_of_distinct_cells_is_the_argmax(grid: Grid) -> None:
    own = features(grid, channels=256)
    index = match_features(own, own).index
    expected = torch.stack([index // grid.columns, index % grid.columns], dim=1).double()
    torch.testing.assert_close(soft_argmax(own, own, index, temperature=0.01), expected, atol=1e-6, rtol=0)
    assert matching.rounded_cells(expected, grid).tolist() == index.tolist()


def test_soft_argmax_by_hand_and_at_the_border() -> None:
    """Two equal candidates in a row of four: the expectation is half way, whatever lies outside the window."""
    reference = torch.tensor([[[0.0, 1.0, 1.0, 0.0]], [[1.0, 0.0, 0.0, 1.0]]])
    target = torch.tensor([[[1.0]], [[0.0]]])
    index = torch.tensor([1])
    assert soft_argmax(target, reference, index, window=1, temperature=0.01)[0].tolist() == pytest.approx([0, 1.5])
    assert soft_argmax(target, reference, index, window=0)[0].tolist() == [0, 1]
    mask = torch.tensor([False, True, False, True])
    assert soft_argmax(target, reference, index, window=2, temperature=0.01, reference_mask=mask)[0].tolist() == pytest.approx([0, 1])
    # At a high temperature every cell in the window weighs the same: columns 0, 1, 2, cut at the border for column 0.
    flat = soft_argmax(target, reference, index, window=1, temperature=1e6)
    assert flat[0].tolist() == pytest.approx([0, 1], abs=1e-5)
    border = soft_argmax(target, reference, torch.tensor([0]), window=1, temperature=1e6)
    assert border[0].tolist() == pytest.approx([0, 0.5], abs=1e-5)
    with pytest.raises(ValueError, match="temperature"):
        soft_argmax(target, reference, index, temperature=0)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), window=st.integers(0, 3), seed=st.integers(0, 99), warm=st.floats(0.01, 10))
def test_soft_argmax_stays_in_its_window(rows: int, columns: int, window: int, seed: int, warm: float) -> None:
    grid = Grid(rows, columns)
    target, reference = features(Grid(3, 3), seed, 6), features(grid, seed + 1, 6)
    index = match_features(target, reference).index
    positions = soft_argmax(target, reference, index, window=window, temperature=warm)
    hard = torch.stack([index // columns, index % columns], dim=1)
    assert ((positions - hard).abs() <= window + 1e-9).all()
    assert (positions >= -1e-9).all()
    assert (positions - torch.tensor([rows - 1, columns - 1]) <= 1e-9).all()


# --- filters


@st.composite
def matches(draw: st.DrawFn) -> tuple[Match, Grid, Grid]:
    """Any match: indices at random, some of them missing."""
    target, reference = (Grid(draw(st.integers(1, 5)), draw(st.integers(1, 5))) for _ in range(2))
    index = draw(st.lists(st.integers(-1, reference.num_tokens - 1), min_size=target.num_tokens, max_size=target.num_tokens))
    backward = draw(st.lists(st.integers(0, target.num_tokens - 1), min_size=reference.num_tokens, max_size=reference.num_tokens))
    values = torch.zeros(target.num_tokens)
    return Match(torch.tensor(index), values, values, torch.tensor(backward)), target, reference


@settings(max_examples=60, deadline=None)
@given(matches(), st.integers(0, 5))
def test_cycle_filter(drawn: tuple[Match, Grid, Grid], radius: int) -> None:
    match, grid, _ = drawn
    kept = matching.is_cyclic(match, grid, radius)
    for v, u in enumerate(match.index.tolist()):
        w = int(match.backward[u])
        near = max(abs(w // grid.columns - v // grid.columns), abs(w % grid.columns - v % grid.columns)) <= radius
        assert bool(kept[v]) == (u >= 0 and near)
    assert not (kept & ~matching.is_cyclic(match, grid, radius + 1)).any()
    mutual = match.index[matching.is_cyclic(match, grid, 0)].tolist()
    assert len(set(mutual)) == len(mutual)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_consensus(data: st.DataObject, rows: int, columns: int, tolerance: int) -> None:
    grid = Grid(rows, columns)
    index = st.lists(st.integers(-1, grid.num_tokens - 1), min_size=5, max_size=5).map(torch.tensor)
    a, b, c = data.draw(index), data.draw(index), data.draw(index)
    kept = matching.agree([a, b, c], grid, tolerance)
    assert torch.equal(kept, matching.agree([c, a, b], grid, tolerance))
    assert torch.equal(matching.agree([a, a], grid, tolerance), a >= 0)
    assert torch.equal(matching.agree([a], grid, 0), a >= 0)
    assert torch.equal(matching.agree([a, b], grid, 0), (a == b) & (a >= 0))
    assert not (kept & ~matching.agree([a, b], grid, tolerance)).any()
    assert not (kept & ~matching.agree([a, b, c], grid, tolerance + 1)).any()


def test_chebyshev_knows_rows_from_columns() -> None:
    grid = Grid(2, 5)
    assert int(matching.chebyshev(torch.tensor(4), torch.tensor(5), grid)) == 4  # the end of a row and the start of the next
    assert int(matching.chebyshev(torch.tensor(1), torch.tensor(6), grid)) == 1
    assert int(matching.chebyshev(torch.tensor(0), torch.tensor(0), grid)) == 0


# --- disjointness


@st.composite
def claimed_points(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    """Points of 0 to 6 references and similarities with many ties; within a reference v is unique, as matching gives it."""
    points, similarities = [], []
    for _ in range(draw(st.integers(0, 6))):
        v = draw(st.lists(st.integers(0, 9), unique=True, max_size=8))
        u = draw(st.lists(st.integers(0, 5), min_size=len(v), max_size=len(v)))
        similarity = draw(st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5]), min_size=len(v), max_size=len(v)))
        points.append(torch.tensor([u, v]).T.reshape(-1, 2).long())
        similarities.append(torch.tensor(similarity))
    return points, similarities


@settings(max_examples=100, deadline=None)
@given(claimed_points())
def test_owner_of_a_target_cell_is_the_most_similar_reference(drawn: tuple[list[Tensor], list[Tensor]]) -> None:
    points, similarities = drawn
    kept = owned_by_similarity(points, similarities)
    best: dict[int, tuple[float, int]] = {}
    for k, (own, values) in enumerate(zip(points, similarities, strict=True)):
        for v, value in zip(own[:, 1].tolist(), values.tolist(), strict=True):
            best[v] = max(best.get(v, (-9.0, 0)), (value, -k))
    for k, (own, keep) in enumerate(zip(points, kept, strict=True)):
        assert keep.tolist() == [best[v][1] == -k for v in own[:, 1].tolist()]
    left = [own[keep] for own, keep in zip(points, kept, strict=True)]
    taken = [v for own in left for v in own[:, 1].tolist()]
    assert len(set(taken)) == len(taken) == len(best)
    assert all(torch.equal(a, b) for a, b in zip(make_disjoint(left), left, strict=True))
    again = owned_by_similarity(left, [values[keep] for values, keep in zip(similarities, kept, strict=True)])
    assert all(keep.all() for keep in again)


@settings(max_examples=100, deadline=None)
@given(claimed_points())
def test_best_per_reference_cell(drawn: tuple[list[Tensor], list[Tensor]]) -> None:
    for points, similarity in zip(*drawn, strict=True):
        keep = matching.best_per_reference_cell(points, similarity)
        best: dict[int, tuple[float, int]] = {}
        for (u, v), value in zip(points.tolist(), similarity.tolist(), strict=True):
            best[u] = max(best.get(u, (-9.0, 0)), (value, -v))
        assert keep.tolist() == [best[u] == (value, -v) for (u, v), value in zip(points.tolist(), similarity.tolist(), strict=True)]


# --- affine


def sent(index: Tensor, num_reference: int) -> Match:
    """Matches of which only the cells are known; every reference cell takes part."""
    return Match(index, torch.zeros(len(index)), torch.zeros(len(index)), torch.zeros(num_reference, dtype=torch.long))


@pytest.mark.parametrize("matrix", [((0, 1), (1, 0)), ((0.5, 0), (0, -0.5)), ((0.6, 0.35), (-0.35, 0.6))])
def test_affine_keeps_what_one_map_explains(matrix: tuple[tuple[float, float], ...]) -> None:
    """Two of three matches go astray; of an exchanged, a shrunk and mirrored, and a turned subject the rest is found, with its tolerance."""
    target, reference, rng = Grid(20, 24), Grid(22, 18), np.random.default_rng(1)
    index = torch.full((target.num_tokens,), matching.NO_MATCH)
    right = torch.zeros(target.num_tokens, dtype=torch.bool)
    for v in range(target.num_tokens):
        position = np.array(divmod(v, target.columns), dtype=float) - (10, 12)
        if np.abs(position).max() > 7:
            continue
        row, column = np.rint(np.array(matrix) @ position + (11, 9)).astype(int)
        row, column = row + int(rng.integers(-1, 2)), column
        right[v] = rng.random() < 1 / 3
        u = row * reference.columns + column if right[v] else rng.integers(reference.num_tokens)
        index[v] = int(np.clip(u, 0, reference.num_tokens - 1))
    found = follows_affine(sent(index, reference.num_tokens), target, reference, 2)
    assert (found & right).sum() > 0.9 * right.sum()
    assert (found & ~right).sum() < 0.3 * right.sum()
    assert torch.equal(found, follows_affine(sent(index, reference.num_tokens), target, reference, 2))
    assert follows_affine(sent(index, reference.num_tokens), target, reference, 1).sum() < found.sum()


def test_affine_is_not_led_by_one_cell_that_attracts_many_nor_by_few() -> None:
    grid = Grid(12, 12)
    index = torch.arange(144)
    index[torch.randperm(144, generator=torch.Generator().manual_seed(0))[:90]] = 77
    found = follows_affine(sent(index, 144), grid, grid, 1)
    assert torch.equal(found & (index != 77), index != 77)
    assert (found & (index == 77)).sum() <= 9  # those around it
    assert not follows_affine(sent(torch.full((144,), 77), 144), grid, grid, 1).any()
    few = torch.where(torch.arange(144) < 11, torch.arange(144), matching.NO_MATCH)
    assert not follows_affine(sent(few, 144), grid, grid, 1).any()


def test_affine_score_is_the_share_that_follows() -> None:
    grid = Grid(12, 12)
    index = torch.arange(144)
    index[::2] = torch.randint(144, (72,), generator=torch.Generator().manual_seed(0))
    scores = match_scores([sent(index, 144)], grid, grid, MatchingSettings(affine=1))
    assert 0.5 <= scores["affine"] < 0.6
    keep = accepted([sent(index, 144)], grid, grid, MatchingSettings(affine=1))
    assert keep.float().mean().item() == pytest.approx(scores["affine"])
    assert "affine" not in match_scores([sent(index, 144)], grid, grid, MatchingSettings())


# --- grids


def test_scores_by_hand() -> None:
    """A row of 8 target cells against one of 8: two extractors that agree within 1 on half of the cells, and what comes back."""
    grid, nothing = Grid(1, 8), torch.zeros(8)
    first = Match(torch.tensor([0, 1, 2, 3, -1, -1, -1, -1]), nothing, nothing, torch.tensor([0, 1, 7, 0, 4, 5, 6, 7]))
    second = Match(torch.tensor([1, 3, 2, 7, -1, -1, -1, -1]), nothing, nothing, torch.tensor([5, 5, 5, 5, 5, 5, 5, 1]))
    # First: cells 0 and 1 come back to themselves, 2 to 7, 3 to 0: 1/2. Second: 0 to 5, 1 to 5, 2 to 5, 3 to 1, within 2: 1/4.
    assert match_scores([first], grid, grid, MatchingSettings()) == {"cyclic": 0.5}
    assert match_scores([first, second], grid, grid, MatchingSettings()) == {"cyclic": 0.375, "agreement": 0.5}  # 0 and 1, 2 and 2
    assert match_scores([first, second], grid, grid, MatchingSettings(consensus=2)) == {"cyclic": 0.375, "agreement": 0.75}
    assert match_scores([Match(torch.full((8,), -1), nothing, nothing, torch.full((8,), -1))], grid, grid, MatchingSettings()) == {}


def test_points_are_sorted_by_v_with_u_first() -> None:
    points = matching.points_from_index(torch.tensor([7, -1, 5, 2]), torch.tensor([True, False, True, False]))
    assert points.tolist() == [[7, 0], [5, 2]]


def test_resized_features_keep_their_axes() -> None:
    """A ramp along the columns stays one, and does not become one along the rows."""
    ramp = torch.arange(8.0).expand(1, 4, 8)
    assert torch.equal(matching.resize_features(ramp, Grid(4, 8)), ramp)
    half = matching.resize_features(ramp, Grid(2, 4))
    assert half.shape == (1, 2, 4)
    assert (half[0, 0].diff() > 1.5).all()
    assert half[0].diff(dim=0).abs().max() < 1e-5


def test_carrying_to_coarser_grids_votes_and_averages() -> None:
    found = FoundPoints(torch.tensor([[0, 0], [1, 1], [9, 4], [15, 15]]), torch.tensor([0.2, 0.4, 0.9, 0.5]))
    carried = _carried(found, Grid(2, 2), Grid(2, 2), (4, 4))
    assert carried.pairs.tolist() == [[0, 0], [3, 3]]  # (9, 4) loses its target cell 0 to two votes
    torch.testing.assert_close(carried.similarity, torch.tensor([0.3, 0.5]))
    assert _carried(found, Grid(2, 2), Grid(2, 2), None) is found
    empty = _carried(FoundPoints(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0)), Grid(2, 2), Grid(2, 2), (4, 4))
    assert empty.pairs.shape == (0, 2)
    assert empty.similarity.shape == (0,)
