"""A limit to how hard the attention losses pull at the adapter, in comparison with flow matching."""

from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mosaic.config.sections import LossConfig
from mosaic.method.losses import MosaicLoss

MEMORY = 0.9  # share of the running means that a measurement leaves: single batches differ, also in their number of references


class PullLimit:
    """The pull |gradient of the weighted attention losses| / |gradient of flow matching|, measured now and then, and what it leaves.

    Attributes:
        squares: Running means of the squared norms of the two gradients, flow matching's first; None before the first measurement.
    """

    def __init__(self, loss: LossConfig, parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
        """Nothing is measured yet.

        Args:
            loss: Gives the limit and how often is measured.
            parameters: The adapter's, of which the gradients are.
            accelerator: Of this run.
        """
        self._loss, self._parameters, self._accelerator = loss, list(parameters), accelerator
        self.squares: list[float] | None = None

    def is_due(self, step: int) -> bool:
        """Whether the pull is to be measured before an optimizer step."""
        return self._loss.max_pull is not None and step % self._loss.pull_every == 0

    def measure(self, loss_of_batch: Callable[[], MosaicLoss], weights: Mapping[str, float]) -> None:
        """Measure the pull on one micro-batch of each process; gradients that training accumulates are not touched.

        Args:
            loss_of_batch: The terms on it, with a graph of its own at each call: attention that is computed again in a backward pass allows
                one of those only.
            weights: Of the attention losses, by name, without what the limit takes off.
        """
        flow_matching = self._squared_norm(loss_of_batch().flow_matching)
        terms = loss_of_batch()._asdict()
        attention = self._squared_norm(torch.stack([weight * terms[name] for name, weight in weights.items()]).sum())
        found = self._accelerator.reduce(torch.stack([flow_matching, attention]), reduction="mean")
        if not found.isfinite().all():
            return  # the step itself will stop the run, or leave its batch out
        now = found.tolist()
        before = now if self.squares is None else self.squares
        self.squares = [MEMORY * old + (1 - MEMORY) * new for old, new in zip(before, now, strict=True)]

    def _squared_norm(self, term: Tensor) -> Tensor:
        gradients = torch.autograd.grad(term, self._parameters, allow_unused=True)
        return torch.stack([gradient.float().square().sum() for gradient in gradients if gradient is not None]).sum()

    @property
    def pull(self) -> float:
        """The pull without the limit; 0 before the first measurement."""
        return (self.squares[1] / self.squares[0]) ** 0.5 if self.squares is not None and self.squares[0] else 0.0

    @property
    def scale(self) -> float:
        """Factor on the weights of all attention losses that holds their pull to `loss.max_pull`; 1 without a limit."""
        limit = self._loss.max_pull
        return 1.0 if limit is None or self.pull <= limit else limit / self.pull
