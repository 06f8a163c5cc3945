"""The losses: numbers by hand, the naive loops, invariances, gradients in float64."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mosaic.method.correspondence import Points, batch_points
from mosaic.method.losses import (
    SHORT_NAMES,
    MosaicLoss,
    correspondence_loss,
    disentanglement_loss,
    flow_matching_loss,
    mosaic_loss,
    reference_distributions,
)
from tests import naive, tiny

NUM_REFERENCE_TOKENS, NUM_TARGET_TOKENS = 9, 24


def pairs(*points: tuple[int, int]) -> Tensor:
    return torch.tensor(points, dtype=torch.long).reshape(-1, 2)


def random_case(num_references: int, seed: int, batch: int = 3) -> tuple[Tensor, list[list[Tensor]], Points]:
    """A full map [B, K * N_ref, N_tgt] with peaked rows, and ragged points, one sample without any."""
    generator = torch.Generator().manual_seed(seed)
    maps = (torch.randn(batch, num_references * NUM_REFERENCE_TOKENS, NUM_TARGET_TOKENS, generator=generator) * 2).softmax(dim=-1)
    samples = []
    for b in range(batch):
        counts = [int(c) for c in torch.randint(0, 5, (num_references,), generator=generator)] if b else [0] * num_references
        samples.append(tiny.random_points(num_references, counts, NUM_REFERENCE_TOKENS, NUM_TARGET_TOKENS, seed + b))
    return maps, samples, batch_points(samples, NUM_REFERENCE_TOKENS, NUM_TARGET_TOKENS)


def rows_of(maps: Tensor, points: Points) -> Tensor:
    """[B, P, N_tgt]."""
    return maps.gather(1, points.global_index[..., None].expand(-1, -1, maps.shape[-1]))


# ---- flow matching


def test_flow_matching_by_hand() -> None:
    noise, latents = torch.tensor([[[3.0, 1.0]], [[0.0, 0.0]]]), torch.tensor([[[1.0, 2.0]], [[5.0, -1.0]]])
    assert flow_matching_loss(noise - latents, noise, latents).tolist() == [0, 0]
    assert flow_matching_loss(torch.zeros(2, 1, 2), noise, latents).tolist() == [2.5, 13]  # (4 + 1) / 2, (25 + 1) / 2
    assert flow_matching_loss((noise - latents).bfloat16(), noise, latents).dtype == torch.float32


# ---- SCAL


def test_correspondence_by_hand() -> None:
    # Reference 0 has three points with A = 1/2, 1/4, 1/8, reference 1 none, reference 2 one with A = 1/16.
    samples = [[pairs((0, 0), (1, 1), (2, 2)), pairs(), pairs((0, 3))]]
    points = batch_points(samples, 4, 4)
    rows = torch.tensor([[[0.5, 0.5, 0, 0], [0.75, 0.25, 0, 0], [0.875, 0, 0.125, 0], [0.9375, 0, 0, 0.0625]]])
    bits = math.log(2)
    assert correspondence_loss(rows, points, "reference").item() == pytest.approx((2 + 4) / 2 * bits, rel=1e-5)
    assert correspondence_loss(rows, points, "point").item() == pytest.approx((1 + 2 + 3 + 4) / 4 * bits, rel=1e-5)


def test_correspondence_falls_when_mass_moves_to_v() -> None:
    points = batch_points([[pairs((0, 1))]], 4, 3)
    losses = [correspondence_loss(torch.tensor([[[1 - a, a, 0.0]]]), points).item() for a in (0.1, 0.5, 0.9)]
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize("num_references", [1, 2, 4, 6])
@pytest.mark.parametrize("reduction", ["reference", "point"])
def test_correspondence_equals_the_loops(reduction: str, num_references: int) -> None:
    maps, samples, points = random_case(num_references, seed=num_references)
    want = naive.correspondence(maps.double(), samples, NUM_REFERENCE_TOKENS, reduction)
    loss = correspondence_loss(rows_of(maps, points), points, reduction)
    torch.testing.assert_close(loss.double(), torch.stack(want), atol=1e-5, rtol=1e-5)
    assert loss[0] == 0  # a sample without points


# ---- MDL


def test_symmetric_kl_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.125, 0.125, 0.75]
    # KL(p, q) = 0.5 ln 4 + 0.25 ln 2 - 0.25 ln 3, KL(q, p) = -0.125 ln 4 - 0.125 ln 2 + 0.75 ln 3
    forward = 1.25 * math.log(2) - 0.25 * math.log(3)
    backward = -0.375 * math.log(2) + 0.75 * math.log(3)
    loss = disentanglement_loss(torch.tensor([[p, q]]), torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(-(forward + backward) / 2, rel=1e-5)


def test_jensen_shannon_by_hand() -> None:
    both = torch.ones(1, 2, dtype=torch.bool)
    apart = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert disentanglement_loss(apart, both, "jensen_shannon").item() == pytest.approx(-math.log(2), rel=1e-5)
    near = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])  # mean (3/4, 1/4)
    want = 0.5 * math.log(4 / 3) + 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert disentanglement_loss(near, both, "jensen_shannon").item() == pytest.approx(-want, rel=1e-5)


def test_pairs_are_averaged() -> None:
    # Three references, the first two equal: of the 6 ordered pairs 2 have divergence 0 and 4 that of (p, q).
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    one = disentanglement_loss(torch.stack([p, q])[None], torch.ones(1, 2, dtype=torch.bool))
    three = disentanglement_loss(torch.stack([p, p, q])[None], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(three, one * 4 / 6)
    masked = disentanglement_loss(torch.stack([p, p, q])[None], torch.tensor([[True, False, True]]))
    torch.testing.assert_close(masked, one)


@pytest.mark.parametrize("num_references", [1, 2, 4, 6])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "jensen_shannon"])
@pytest.mark.parametrize("rows", ["points", "all"])
@pytest.mark.parametrize("cap", [None, 0.8])
def test_disentanglement_equals_the_loops(rows: str, divergence: str, num_references: int, cap: float | None) -> None:
    maps, samples, points = random_case(num_references, seed=10 + num_references)
    want = naive.disentanglement(maps.double(), samples, NUM_REFERENCE_TOKENS, divergence, rows, cap)
    if rows == "points":
        distributions, mask = reference_distributions(rows_of(maps, points), points), points.reference_mask
    else:
        distributions = maps.unflatten(1, (num_references, -1)).mean(dim=2)
        mask = torch.ones(len(maps), num_references, dtype=torch.bool)
    loss = disentanglement_loss(distributions, mask, divergence, cap)
    torch.testing.assert_close(loss.double(), torch.stack(want), atol=1e-5, rtol=1e-4)
    assert (loss <= 0).all()


def test_distributions_are_the_mean_of_the_rows_and_sum_to_one() -> None:
    points = batch_points([[pairs((0, 0), (1, 1)), pairs(), pairs((3, 2))]], 4, 3)
    rows = torch.tensor([[[0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]])
    distributions = reference_distributions(rows, points)
    torch.testing.assert_close(distributions, torch.tensor([[[0.5, 0.2, 0.3], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))
    halved = reference_distributions(rows / 2, points)  # rows that lost mass are renormalised (Eq. 12)
    torch.testing.assert_close(halved, distributions)


@pytest.mark.parametrize("divergence", ["symmetric_kl", "jensen_shannon"])
def test_identical_or_single_references_give_zero(generator: torch.Generator, divergence: str) -> None:
    one = torch.rand(2, 1, 5, generator=generator).softmax(dim=-1)
    every = torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(disentanglement_loss(one.expand(-1, 4, -1), every, divergence), torch.zeros(2), atol=1e-6, rtol=0)
    assert disentanglement_loss(one, every[:, :1], divergence).tolist() == [0, 0]
    different = torch.randn(2, 4, 5, generator=generator).softmax(dim=-1)
    only_one = torch.tensor([[True, False, False, False], [False] * 4])
    assert disentanglement_loss(different, only_one, divergence).tolist() == [0, 0]


def test_the_cap_stops_the_gradient_of_a_pair() -> None:
    distributions = torch.tensor([[[0.99, 0.01], [0.01, 0.99], [0.02, 0.98]]], requires_grad=True)
    both = torch.tensor([[True, True, False]])
    loss = disentanglement_loss(distributions, both, cap=1.0)
    assert loss.item() == -1.0
    assert not torch.autograd.grad(loss.sum(), distributions)[0].any()
    loss = disentanglement_loss(distributions, torch.tensor([[False, True, True]]), cap=1.0)  # a close pair is free
    assert -1 < loss.item() < 0
    assert torch.autograd.grad(loss.sum(), distributions)[0][0, 1:].all()


# ---- invariances and the sum


@pytest.mark.parametrize("seed", range(3))
def test_padding_and_orders_do_not_matter(seed: int) -> None:
    maps, samples, points = random_case(4, seed)
    rows = rows_of(maps, points)
    order = [2, 0, 3, 1]
    moved_maps = maps.unflatten(1, (4, -1))[:, order].flatten(1, 2)
    moved = batch_points([[sample[k] for k in order] for sample in samples], NUM_REFERENCE_TOKENS, NUM_TARGET_TOKENS)
    longer = Points(
        *(torch.cat([x, x[:, :1].expand(-1, 3)], 1) for x in (points.global_index, points.target_index, points.reference)),
        torch.cat([points.mask, points.mask.new_zeros(3, 3)], 1),
        4,
    )
    garbage = torch.cat([rows, torch.rand(3, 3, NUM_TARGET_TOKENS)], dim=1)
    flipped = Points(*(x.flip(0) for x in (points.global_index, points.target_index, points.reference, points.mask)), 4)

    def terms(r: Tensor, p: Points) -> Tensor:
        return torch.stack(
            [
                correspondence_loss(r, p, "reference"),
                correspondence_loss(r, p, "point"),
                disentanglement_loss(reference_distributions(r, p), p.reference_mask),
            ]
        )

    want = terms(rows, points)
    torch.testing.assert_close(terms(garbage, longer), want)
    torch.testing.assert_close(terms(rows.flip(0), flipped).flip(1), want)
    torch.testing.assert_close(terms(rows_of(moved_maps, moved), moved), want)


def test_a_sample_without_points_counts_in_the_mean() -> None:
    maps, samples, points = random_case(2, seed=5, batch=2)
    single = batch_points(samples[1:], NUM_REFERENCE_TOKENS, NUM_TARGET_TOKENS)
    rows = rows_of(maps, points)
    alone = correspondence_loss(rows[1:, : single.mask.shape[1]], single)
    terms = {"flow_matching": torch.zeros(2), "correspondence": correspondence_loss(rows, points), "disentanglement": torch.zeros(2)}
    both = mosaic_loss(terms, {"correspondence": 1.0, "disentanglement": 0.0})
    assert alone.item() > 0
    torch.testing.assert_close(both.correspondence, alone[0] / 2)
    torch.testing.assert_close(both.total, alone[0] / 2)


def test_no_points_at_all_give_zero_and_a_gradient() -> None:
    points = batch_points([[pairs(), pairs()]] * 2, 4, 4)
    rows = torch.zeros(2, 0, 4, requires_grad=True)
    loss = correspondence_loss(rows, points) + disentanglement_loss(reference_distributions(rows, points), points.reference_mask)
    assert loss.tolist() == [0, 0]
    loss.sum().backward()


def test_weighted_sum() -> None:
    values = {"flow_matching": [1.0, 3.0], "correspondence": [4.0, 6.0], "disentanglement": [-1.0, -2.0]}
    terms = {name: torch.tensor(value) for name, value in values.items()}
    loss = mosaic_loss(terms, {"correspondence": 0.4, "disentanglement": 0.6})
    assert loss.flow_matching.item() == 2
    assert loss.correspondence.item() == 5
    assert loss.disentanglement.item() == -1.5
    assert loss.total.item() == pytest.approx(2 + 0.4 * 5 - 0.6 * 1.5)
    with pytest.raises(AssertionError):
        mosaic_loss(terms, {"correspondence": 0.4})  # a term without a weight would not be trained


def test_every_term_has_a_short_name() -> None:
    assert ("total", *SHORT_NAMES) == MosaicLoss._fields


@pytest.mark.parametrize("term", ["reference", "point", "symmetric_kl", "jensen_shannon"])
def test_gradients_agree_with_the_loops_and_move_the_right_way(term: str) -> None:
    maps, samples, points = random_case(3, seed=8)
    logits = torch.log(maps).requires_grad_()
    exact = torch.log(maps.double()).requires_grad_()
    soft, exact_soft = logits.softmax(dim=-1), exact.softmax(dim=-1)
    if term in ("reference", "point"):
        loss = correspondence_loss(rows_of(soft, points), points, term).sum()
        want = sum(naive.correspondence(exact_soft, samples, NUM_REFERENCE_TOKENS, term))
    else:
        loss = disentanglement_loss(reference_distributions(rows_of(soft, points), points), points.reference_mask, term).sum()
        want = sum(naive.disentanglement(exact_soft, samples, NUM_REFERENCE_TOKENS, term))
    gradient, exact_gradient = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(want, exact)[0]
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=1e-5, rtol=1e-3)
    assert gradient.abs().max() > 1e-3


@pytest.fixture
def everything_in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The losses compute in float32 by contract; finite differences need `.float()` and new tensors to be float64."""
    monkeypatch.setattr(Tensor, "float", lambda self: self.double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("everything_in_float64")
@pytest.mark.parametrize("term", ["flow", "reference", "point", "symmetric_kl", "jensen_shannon"])
def test_gradcheck(term: str, generator: torch.Generator) -> None:
    points = batch_points([[pairs((0, 0), (2, 1)), pairs((1, 2))], [pairs((1, 1)), pairs((3, 0))]], 4, 3)
    logits, noise, latents = (torch.randn(2, 3, 3, generator=generator) for _ in range(3))

    def loss(x: Tensor) -> Tensor:
        rows = x.softmax(dim=-1)
        if term == "flow":
            return flow_matching_loss(x, noise, latents)
        if term in ("reference", "point"):
            return correspondence_loss(rows, points, term)
        return disentanglement_loss(reference_distributions(rows, points), points.reference_mask, term)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


def test_unknown_settings_are_refused() -> None:
    points = batch_points([[pairs((0, 0))]], 4, 3)
    with pytest.raises(ValueError, match='loss.correspondence_reduction must be "reference" or "point", got \'mean\''):
        correspondence_loss(torch.ones(1, 1, 3), points, "mean")
    with pytest.raises(ValueError, match='loss.divergence must be "symmetric_kl" or "jensen_shannon", got \'kl\''):
        disentanglement_loss(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), "kl")
