"""A LoRA of another rank: the best approximation by SVD, or the same function with room to learn."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.lora.files import narrowed


class ReducedModule(NamedTuple):
    """What a module lost with its rank.

    Attributes:
        rank_before: Its rank.
        rank: Its rank now.
        norm: Frobenius norm of B A.
        error: Frobenius norm of what is missing, measured on the factors as they are stored.
        energy: Share of the squares of the singular values that is left.
    """

    rank_before: int
    rank: int
    norm: float
    error: float
    energy: float

    @property
    def relative_error(self) -> float:
        """The error as a share of the norm."""
        return self.error / self.norm if self.norm else 0.0


def resize_reference_lora(tensors: Mapping[str, Tensor], rank: int, seed: int = 0) -> tuple[dict[str, Tensor], float]:
    """Change the rank of a reference LoRA.

    A lower rank takes, for each module, the nearest matrix to B A of that rank (`truncate`). A higher rank keeps A and B and adds rows to A
    as a fresh adapter has them (gaussian, standard deviation 1 / rank) and columns of zeros to B: B A stays.

    Args:
        tensors: By file key `<module>.lora_A.weight` [r, d_in] and `<module>.lora_B.weight` [d_out, r].
        rank: The rank wanted.
        seed: Seed of the rows that a higher rank adds.

    Returns:
        float32 tensors by file key, and the share of the squared Frobenius norm of all B A that is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    resized, energy, whole = {}, 0.0, 0.0
    for key in sorted(key for key in tensors if ".lora_A." in key):  # the drawn rows do not depend on the file's order
        partner = key.replace(".lora_A.", ".lora_B.")
        a, b = tensors[key].double(), tensors[partner].double()
        if rank < len(a):
            a, b, values = truncate(a, b, rank)
            energy, whole = energy + float(values[:rank].square().sum()), whole + float(values.square().sum())
        if len(a) < rank:  # also where the product has fewer dimensions than the rank wanted
            a, b = _widened(a, b, rank, generator)
        resized[key], resized[partner] = a.float().contiguous(), b.float().contiguous()
    return resized, energy / whole if whole else 1.0


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest matrix to B A of a rank in the Frobenius norm: its truncated singular value decomposition (Eckart and Young).

    It comes from the QR decompositions of B and A^T; B A itself is never formed.

    Args:
        a: float64 [r, d_in].
        b: float64 [d_out, r].
        rank: The rank wanted; the result has less where B A has fewer dimensions.

    Returns:
        A' [rank, d_in] and B' [d_out, rank], which share each singular value equally; all singular values of B A, falling.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root, values


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Singular values of B A, falling, for float64 A [r, d_in] and B [d_out, r]."""
    return torch.linalg.svdvals(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T)


def rank_for_energy(spectra: Iterable[Tensor], energy: float) -> int:
    """The lowest rank, one for all modules, that keeps a share of the squared Frobenius norm of all B A.

    Args:
        spectra: Singular values of each module, falling.
        energy: The share, more than 0 and at most 1.
    """
    squares = [values.square() for values in spectra]
    by_rank = torch.zeros(max(map(len, squares)), dtype=torch.float64)
    for values in squares:
        by_rank[: len(values)] += values
    summed = by_rank.cumsum(0)
    return int((summed < energy * (1 - 1e-12) * summed[-1]).sum()) + 1  # the last sum can be a rounding below the whole


def reduce_module(a: Tensor, b: Tensor, scale: float, rank: int) -> tuple[Tensor, Tensor, ReducedModule]:
    """A' and B' of at most a rank, with B' A' next to s B A.

    Args:
        a: [r, d_in].
        b: [d_out, r].
        scale: s.
        rank: The most rank wanted. A module that has no more keeps its factors, but for the scale.

    Returns:
        A' and B' in the number formats of A and B where these hold them (`narrowed`), and what is lost.
    """
    wide_a, wide_b = a.double(), b.double() * scale
    if rank < len(a):
        new_a, new_b, values = truncate(wide_a, wide_b, rank)
        new_a, new_b = narrowed(new_a, a.dtype).contiguous(), narrowed(new_b, b.dtype).contiguous()
    else:
        new_a, new_b, values = a, narrowed(wide_b, b.dtype), singular_values(wide_a, wide_b)
    squares = values.square()
    whole, rest = float(squares.sum()), float(squares[rank:].sum())
    error = _product_norm(torch.cat([wide_a, new_a.double()]), torch.cat([wide_b, -new_b.double()], dim=1))
    return new_a, new_b, ReducedModule(len(a), len(new_a), whole**0.5, error, 1 - rest / whole if whole else 1.0)


def _product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of B A, never formed; where terms cancel, to about 1e-15 of them."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T))


def _widened(a: Tensor, b: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randn(rank - len(a), a.shape[1], generator=generator, dtype=a.dtype) / rank
    return torch.cat([a, rows]), torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], dim=1)
