"""A reference LoRA of another rank: the best approximation by SVD, or the same function with room to learn."""

from collections.abc import Mapping

import torch
from torch import Tensor


def resize_reference_lora(tensors: Mapping[str, Tensor], rank: int, seed: int = 0) -> tuple[dict[str, Tensor], float]:
    """Change the rank of a reference LoRA.

    A lower rank takes, for each module, the nearest matrix to B A of that rank in the Frobenius norm: its truncated singular value
    decomposition (Eckart and Young), from the QR decompositions of B and A^T, so that B A itself is never formed. A higher rank keeps
    A and B and adds rows to A as a fresh adapter has them (gaussian, standard deviation 1 / rank) and columns of zeros to B: B A stays.

    Args:
        tensors: By file key `<module>.lora_A.weight` [r, d_in] and `<module>.lora_B.weight` [d_out, r].
        rank: The rank wanted.
        seed: Seed of the rows that a higher rank adds.

    Returns:
        float32 tensors by file key, and the share of the squared Frobenius norm of all B A that is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    resized, kept, whole = {}, 0.0, 0.0
    for key in sorted(key for key in tensors if ".lora_A." in key):  # the drawn rows do not depend on the file's order
        partner = key.replace(".lora_A.", ".lora_B.")
        a, b = tensors[key].double(), tensors[partner].double()
        if rank < len(a):
            q_b, r_b = torch.linalg.qr(b)
            q_a, r_a = torch.linalg.qr(a.T)
            u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            kept, whole = kept + float(values[:rank].square().sum()), whole + float(values.square().sum())
            root = values[:rank].sqrt()
            a, b = root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
            if len(a) < rank:  # the product has fewer dimensions than the rank wanted
                a, b = _widened(a, b, rank, generator)
        else:
            a, b = _widened(a, b, rank, generator)
        resized[key], resized[partner] = a.float().contiguous(), b.float().contiguous()
    return resized, kept / whole if whole else 1.0


def _widened(a: Tensor, b: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randn(rank - len(a), a.shape[1], generator=generator, dtype=a.dtype) / rank
    return torch.cat([a, rows]), torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], dim=1)
