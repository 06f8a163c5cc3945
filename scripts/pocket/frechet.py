"""Frechet distance between two sets of pictures in a feature space, each taken as a normal distribution."""

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), m and C the means and covariances of the features.

    The inner matrix is symmetric, so that its square root is taken through its eigenvalues, in float64; the product C1 C2 of the usual
    form is not, and its square root gets complex by rounding. With n pictures the distance has a bias that falls with n: compare only
    distances of equal n, and beside that between two sets of real pictures.

    Args:
        first: [n, d] features, n >= 2.
        second: [m, d] features, m >= 2.

    Raises:
        ValueError: The shapes do not fit.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"features must be [n, d] and [m, d] with n, m >= 2, got {list(first.shape)} and {list(second.shape)}.")
    first, second = first.double(), second.double()
    covariances = torch.cov(first.T).reshape(first.shape[1], -1), torch.cov(second.T).reshape(first.shape[1], -1)
    return distance_of_normals(first.mean(dim=0), covariances[0], second.mean(dim=0), covariances[1])


def distance_of_normals(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Frechet distance of two normal distributions of means [d] and covariances [d, d], float64; never negative."""
    root = symmetric_root(covariance)
    joint = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * joint
    return max(distance.item(), 0.0)


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix [d, d]; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
