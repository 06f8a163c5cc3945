"""The training objective: flow matching, SCAL, MDL and their weighted sum.

Every term is computed per sample, [B], in float32; the batch mean comes last, so that gradient accumulation and any number
of processes agree. A sample without points gives 0 and still counts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.method.correspondence import Points

EPSILON = 1e-8  # inside every logarithm


SHORT_NAMES = {  # of the terms, for a progress bar
    "flow_matching": "flow",
    "correspondence": "scal",
    "disentanglement": "mdl",
    "target_correspondence": "target",
    "own_reference": "own",
    "region": "region",
}


class MosaicLoss(NamedTuple):
    """The terms of the objective; scalars over a batch, each without its weight except `total`. Those that no setting asks for are 0.

    Attributes:
        total: Their weighted sum.
        flow_matching: L_diff.
        correspondence: L_SCA, nats.
        disentanglement: L_MD, nats, never positive.
        target_correspondence: As L_SCA, seen from the target: of its rows over the references, nats.
        own_reference: Minus the logarithm of the target rows' mass on their own reference, nats.
        region: Squared distance of the references' mean rows from their masks.
    """

    total: Tensor
    flow_matching: Tensor
    correspondence: Tensor
    disentanglement: Tensor
    target_correspondence: Tensor
    own_reference: Tensor
    region: Tensor


def flow_matching_loss(velocity: Tensor, noise: Tensor, latents: Tensor) -> Tensor:
    """Mean squared error to the velocity noise - latents over the target tokens.

    Args:
        velocity: [B, N, C], the prediction.
        noise: [B, N, C], packed.
        latents: [B, N, C], packed clean latents.

    Returns:
        [B] float32.
    """
    return (velocity.float() - (noise.float() - latents.float())).square().mean(dim=(1, 2))


def correspondence_loss(attention_rows: Tensor, points: Points, reduction: str = "reference") -> Tensor:
    """L_SCA, Eq. 10: mean of -log A[G(u), v].

    Args:
        attention_rows: float32 [B, P, N_tgt], the row of each point.
        points: The points; v picks the entry of the row.
        reduction: "reference" averages over the points of a reference, then over the references that have points (paper);
            "point" averages over all points pooled (release).

    Returns:
        [B] float32, nats; 0 for a sample without points.

    Raises:
        ValueError: If the reduction is unknown.
    """
    hit = attention_rows.float().gather(2, points.target_index[:, :, None]).squeeze(2)
    return cross_entropy(hit, points, reduction)


def cross_entropy(weights: Tensor, points: Points, reduction: str = "reference") -> Tensor:
    """Mean of -log of the attention weights at the points, as Eq. 10.

    Args:
        weights: float32 [B, P], of the head mean; or [B, H, P], of every head, over which the mean of the logarithms is taken.
        points: The points.
        reduction: "reference" or "point", see `correspondence_loss`.

    Returns:
        [B] float32, nats; 0 for a sample without points.

    Raises:
        ValueError: If the reduction is unknown.
    """
    if reduction not in ("reference", "point"):
        raise ValueError(f'loss.correspondence_reduction must be "reference" or "point", got {reduction!r}.')
    negative_log = -torch.log(weights + EPSILON)
    negative_log = (negative_log.mean(dim=1) if weights.ndim == 3 else negative_log) * points.mask  # (B, P)
    if reduction == "point":
        return negative_log.sum(dim=1) / points.mask.sum(dim=1).clamp(min=1)
    membership = _membership(points)  # (B, P, K)
    # Clamped counts make a mean over nothing 0, not 0 / 0: its gradient would be NaN even where the loss is masked.
    per_reference = torch.einsum("bp,bpk->bk", negative_log, membership) / membership.sum(dim=1).clamp(min=1)
    return per_reference.sum(dim=1) / points.reference_mask.sum(dim=1).clamp(min=1)


def target_correspondence_loss(target_rows: Tensor, points: Points, reduction: str = "reference") -> Tensor:
    """Eq. 10 seen from the target, which is not in the paper: mean of -log of the row of target token v at reference token G(u).

    Args:
        target_rows: float32 [B, P, K * N_ref], the row of each point.
        points: The points; G(u) picks the entry of the row.
        reduction: "reference" or "point", see `correspondence_loss`.

    Returns:
        [B] float32, nats; 0 for a sample without points.
    """
    return cross_entropy(target_rows.float().gather(2, points.global_index[:, :, None]).squeeze(2), points, reduction)


def own_reference_loss(target_rows: Tensor, points: Points, reduction: str = "reference") -> Tensor:
    """The coarser form: mean of -log of the mass that the row of target token v has on the tokens of the point's own reference.

    Args:
        target_rows: float32 [B, P, K * N_ref], the row of each point.
        points: The points.
        reduction: "reference" or "point", see `correspondence_loss`.

    Returns:
        [B] float32, nats; 0 for a sample without points.
    """
    mass = target_rows.float().unflatten(2, (points.num_references, -1)).sum(dim=3)  # (B, P, K)
    return cross_entropy(mass.gather(2, points.reference[:, :, None]).squeeze(2), points, reduction)


def region_loss(reference_rows: Tensor, masks: Tensor, has_references: Tensor) -> Tensor:
    """Where whole references look, after DreamO (arXiv:2504.16915), which is not in the paper: mean squared distance from their masks.

    Args:
        reference_rows: float32 [B, K, N_tgt], the mean over all tokens of a reference (Eq. 12 with all rows).
        masks: float32 [B, K, N_tgt], the share of each target token that shows the reference.
        has_references: bool [B], False for a sample that has lost them.

    Returns:
        [B] float32, the mean over target tokens, then over the references that are seen anywhere; 0 where none is.
    """
    counted = masks.any(dim=2) & has_references[:, None]
    squares = (reference_rows.float() - masks).square().mean(dim=2) * counted
    return squares.sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _membership(points: Points) -> Tensor:
    """float32 [B, P, K]: 1 where point p belongs to reference k."""
    one_hot = torch.nn.functional.one_hot(points.reference, points.num_references)
    return one_hot.float() * points.mask[..., None]


def reference_distributions(attention_rows: Tensor, points: Points) -> Tensor:
    """a^(k), Eq. 12: the mean of a reference's rows at its points, renormalised to sum 1.

    Args:
        attention_rows: float32 [B, P, N_tgt].
        points: The points.

    Returns:
        [B, K, N_tgt]; rows of references without points are 0.
    """
    membership = _membership(points)
    mean = torch.einsum("bpn,bpk->bkn", attention_rows.float(), membership) / membership.sum(dim=1).clamp(min=1)[..., None]
    # Rows sum to 1 but for rounding; a reference without points has the sum 0 and stays 0.
    return mean / mean.sum(dim=-1, keepdim=True).clamp(min=EPSILON)


def distribution_distance(p: Tensor, q: Tensor, divergence: str = "symmetric_kl") -> Tensor:
    """dist(p, q), Eq. 13: how far two references' distributions over the target tokens stand apart.

    Args:
        p: float32 [..., N_tgt].
        q: float32 [..., N_tgt], broadcast against p.
        divergence: "symmetric_kl", 1/2 KL(p, q) + 1/2 KL(q, p) (paper), or "jensen_shannon" (release).

    Returns:
        [...] float32, nats, >= 0.

    Raises:
        ValueError: If the divergence is unknown.
    """
    if divergence == "symmetric_kl":  # both divergences at once: the sum of p log(p / q) and q log(q / p)
        return 0.5 * ((p - q) * (torch.log(p + EPSILON) - torch.log(q + EPSILON))).sum(dim=-1)
    if divergence == "jensen_shannon":
        log_mean = torch.log((p + q) / 2 + EPSILON)
        return 0.5 * (p * (torch.log(p + EPSILON) - log_mean) + q * (torch.log(q + EPSILON) - log_mean)).sum(dim=-1)
    raise ValueError(f'loss.divergence must be "symmetric_kl" or "jensen_shannon", got {divergence!r}.')


def disentanglement_loss(
    distributions: Tensor, reference_mask: Tensor, divergence: str = "symmetric_kl", cap: float | None = None
) -> Tensor:
    """L_MD, Eq. 14: minus the mean divergence over ordered pairs of references.

    Args:
        distributions: float32 [B, K, N_tgt], one distribution over target tokens per reference.
        reference_mask: bool [B, K]; only pairs of True references count.
        divergence: "symmetric_kl" or "jensen_shannon", see `distribution_distance`.
        cap: Upper bound of a pair's divergence in nats; beyond it a pair has no gradient. None: no bound (the paper).

    Returns:
        [B] float32, nats, <= 0; 0 for fewer than two references.

    Raises:
        ValueError: If the divergence is unknown.
    """
    p, q = distributions.float()[:, :, None], distributions.float()[:, None]  # (B, K, 1, N), (B, 1, K, N)
    distance = distribution_distance(p, q, divergence)
    if cap is not None:
        distance = distance.clamp(max=cap)
    # A reference without points has a row of zeros, far from every other one: such pairs would be rewarded for nothing.
    pairs = reference_mask[:, :, None] & reference_mask[:, None]
    pairs = pairs & ~torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
    return -(distance * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def mosaic_loss(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> MosaicLoss:
    """L, Eq. 15: batch means of the terms, and flow matching plus the weighted sum of the others.

    Args:
        terms: [B] each, by the names of `MosaicLoss`; those that are not given are 0.
        weights: Of every term but flow matching, whose weight is 1: alpha of "correspondence", beta of "disentanglement".
    """
    assert weights.keys() == terms.keys() - {"flow_matching"}, (terms.keys(), weights.keys())
    means = {name: term.mean() for name, term in terms.items()}
    total = means["flow_matching"]
    for name, weight in weights.items():
        total = total + weight * means[name]
    nothing = dict.fromkeys(MosaicLoss._fields[1:], torch.zeros_like(total))
    return MosaicLoss(total, **nothing | means)
