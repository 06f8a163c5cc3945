"""Where the references of a generated picture look: mean maps, entropy over the sampling steps, leakage between references, peaks.

The rows are those of Eq. 8: softmax over the target tokens, mean over heads and blocks. All shares and entropies are over the tokens that a
reference's subject covers, since its white surroundings have nothing to say about the picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.images import to_rgb
from mosaic.method.correspondence import make_disjoint
from mosaic.method.grids import Grid
from mosaic.method.metrics import leakage_matrix

NUM_LINES = 4  # strongest points per reference
DIGITS = 5  # of numbers in files
WHITE_FROM = 235  # of 255: a pixel whose channels all reach it is no part of a subject


class Line(NamedTuple):
    """From a reference token to the peak of its row in the picture, as in Fig. 6.

    Attributes:
        reference: k, from 0.
        u: Token of the reference.
        v: Token of the picture where its row is largest; the first of several.
        weight: The row's value there, a share of 1.
    """

    reference: int
    u: int
    v: int
    weight: float


@dataclass(frozen=True)
class PictureAttention:
    """Where the references of one picture look, on the CPU.

    Attributes:
        maps: float32 [K, N_ref, N_tgt], rows sum to 1; mean over heads, blocks and sampling steps.
        entropy: float32 [steps, K], nats: per sampling step the mean entropy of the rows of a reference's subject, from 0 (each row on one
            token) to `uniform_entropy`.
        subject: bool [K, N_ref], the tokens that a reference's subject covers; all tokens where the pipeline was given latents.
        reference_grid: Grid of N_ref.
        target_grid: Grid of N_tgt.
    """

    maps: Tensor
    entropy: Tensor
    subject: Tensor
    reference_grid: Grid
    target_grid: Grid

    @property
    def uniform_entropy(self) -> float:
        """log N_tgt, nats: the entropy of a row that is the same everywhere."""
        return math.log(self.target_grid.num_tokens)

    @property
    def distributions(self) -> Tensor:
        """float32 [K, N_tgt]: the mean row of each subject (Eq. 12 with all its tokens as points); rows sum to 1."""
        mean = torch.stack([rows[tokens].mean(dim=0) for rows, tokens in zip(self.maps, self.subject, strict=True)])
        return mean / mean.sum(dim=-1, keepdim=True)

    @property
    def points(self) -> list[Tensor]:
        """Per reference int64 [P_k, 2]: the subject's tokens u, each with the peak v of its row. Not yet disjoint."""
        found = []
        for rows, tokens in zip(self.maps, self.subject, strict=True):
            u = tokens.nonzero().squeeze(1)
            found.append(torch.stack([u, rows[u].argmax(dim=-1)], dim=1))
        return found

    @property
    def owners(self) -> Tensor:
        """int64 [N_tgt]: the reference that owns a token of the picture, or -1.

        A token is owned by the reference with most peaks on it, ties to the lowest (`make_disjoint`, Eq. 2); one without peaks by none.
        """
        owner = torch.full((self.target_grid.num_tokens,), -1)
        for k, pairs in enumerate(make_disjoint(self.points)):
            owner[pairs[:, 1]] = k
        return owner

    @property
    def owned(self) -> Tensor:
        """float32 [K]: the share of the picture's tokens that each reference owns. A uniform row would have that share on them."""
        owners = self.owners
        return torch.stack([(owners == k).float().mean() for k in range(len(self.maps))])

    @property
    def leakage(self) -> Tensor:
        """float32 [K, K], not symmetric: entry (i, j) is the share of reference i's attention on the tokens that reference j owns.

        Attention is the mean over all tokens of i's subject; ownership is `owners`. What lies off the diagonal leaks, as in
        `mosaic.method.metrics.attention_leakage`; what a row lacks to 1 lies on tokens that nobody owns.
        """
        rows = torch.cat([rows[tokens] for rows, tokens in zip(self.maps, self.subject, strict=True)])
        return leakage_matrix(rows, self.subject.nonzero()[:, 0], self.owners, len(self.maps))

    def line(self, reference: int, u: int) -> Line:
        """The line from a token u of a reference to its peak."""
        weight, v = self.maps[reference, u].max(dim=-1)
        return Line(reference, u, int(v), float(weight))

    def strongest(self, reference: int, num_lines: int = NUM_LINES) -> list[Line]:
        """Lines of the subject's tokens with the sharpest rows, sharpest first.

        Tokens near a sharper one (within a fifth of the grid's side, at least one token) come only where the others do not suffice.
        """
        near = max(1, max(self.reference_grid) // 5)
        weights = self.maps[reference].max(dim=-1).values.masked_fill(~self.subject[reference], -1)
        order = weights.argsort(descending=True, stable=True)[: int(self.subject[reference].sum())].tolist()
        apart: list[int] = []
        for u in order:
            if all(_distance(u, other, self.reference_grid) > near for other in apart):
                apart.append(u)
        chosen = (apart + [u for u in order if u not in apart])[:num_lines]
        return [self.line(reference, u) for u in order if u in chosen]


def attention_numbers(attention: PictureAttention, lines: Sequence[Line]) -> dict[str, Any]:
    """What the report says in numbers, ready for JSON.

    Returns:
        "reference_grid", "target_grid": [rows, columns]. "leakage": K x K, row i, column j: the share of reference i's attention on the
        tokens of reference j (`PictureAttention.leakage`). "owned": per reference its share of the picture's tokens. "entropy": per
        sampling step, per reference, nats. "uniform_entropy": nats. "lines": a list of {"reference": k, "point": [row, column],
        "peak": [row, column], "weight"}, tokens counted from 0.
    """
    reference_grid, target_grid = attention.reference_grid, attention.target_grid
    return {
        "reference_grid": list(reference_grid),
        "target_grid": list(target_grid),
        "leakage": _rounded(attention.leakage),
        "owned": _rounded(attention.owned),
        "entropy": _rounded(attention.entropy),
        "uniform_entropy": round(attention.uniform_entropy, DIGITS),
        "lines": [
            {
                "reference": line.reference,
                "point": list(divmod(line.u, reference_grid.columns)),
                "peak": list(divmod(line.v, target_grid.columns)),
                "weight": round(line.weight, DIGITS),
            }
            for line in lines
        ],
    }


class AttentionRecorder:
    """Collects the rows of the sampling steps of a batch: a running sum of the maps and the entropies; no step's map is kept."""

    def __init__(self, subjects: Sequence[Tensor]) -> None:
        """Begin with no step.

        Args:
            subjects: Per picture of the batch bool [K, N_ref], one or more True per reference.
        """
        self.subject = torch.stack(list(subjects))
        self._total: Tensor | None = None
        self._entropies: list[Tensor] = []

    def add(self, attention_rows: Tensor) -> None:
        """Add a step.

        Args:
            attention_rows: float32 [B, K * N_ref, N_tgt], the rows of all reference tokens.
        """
        rows = attention_rows.unflatten(1, self.subject.shape[1:])
        self._entropies.append(torch.stack([self._entropy(maps, subject) for maps, subject in zip(rows, self.subject, strict=True)]))
        self._total = rows.clone() if self._total is None else self._total.add_(rows)

    @staticmethod
    def _entropy(maps: Tensor, subject: Tensor) -> Tensor:
        """Mean entropy of a picture's rows per reference, [K]; reference by reference, since the terms p log p are as large as the rows."""
        weights = subject.to(maps) / subject.to(maps).sum(dim=-1, keepdim=True)
        return torch.stack([torch.special.entr(rows).sum(dim=-1) @ weight for rows, weight in zip(maps, weights, strict=True)])

    def results(self, reference_grid: Grid, target_grid: Grid) -> list[PictureAttention | None]:
        """What was collected, per picture of the batch; None each if the sampler was stopped before its first step."""
        if self._total is None:
            return [None] * len(self.subject)
        maps, entropy = (self._total / len(self._entropies)).cpu(), torch.stack(self._entropies, dim=1).cpu()
        parts = zip(maps, entropy, self.subject.cpu(), strict=True)
        return [PictureAttention(*part, reference_grid, target_grid) for part in parts]


def subject_tokens(reference: Image.Image, grid: Grid) -> Tensor:
    """The tokens that the subject of a reference prepared by `prepare_reference` covers.

    Returns:
        bool [N_ref], one or more True: tokens covered at least half; of a thin subject those touched; all of a white picture.
    """
    pixels = np.asarray(to_rgb(reference).resize((grid.columns * 4, grid.rows * 4), Image.Resampling.BOX)).min(axis=-1) < WHITE_FROM
    share = pixels.reshape(grid.rows, 4, grid.columns, 4).mean(axis=(1, 3)).reshape(-1)
    return torch.from_numpy(next(found for found in (share >= 0.5, share > 0, share >= 0) if found.any()))


def _rounded(values: Tensor) -> list[Any]:
    """A tensor as nested lists."""
    return (values.double() * 10**DIGITS).round().div(10**DIGITS).tolist()


def _distance(first: int, second: int, grid: Grid) -> int:
    """Between two tokens, the larger of the distances in rows and in columns."""
    return max(abs(first // grid.columns - second // grid.columns), abs(first % grid.columns - second % grid.columns))
