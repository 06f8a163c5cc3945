"""One update of the adapter: backward passes, the joined gradient and its norm, clipping, the optimizer's step and its state."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mosaic.training.checkpoints.optimizer_state import optimizer_tensors, restore_optimizer
from mosaic.training.distributed.sharding import average_gradients


class Updates:
    """Updates of an adapter and an optimizer that are whole in every process; the base may be replicated (DDP) or sharded (FSDP2).

    Attributes:
        transformer: To be called in the forward pass.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
    ) -> None:
        """Name what belongs together.

        Args:
            accelerator: Of this run.
            transformer: From `place_models`.
            parameters: The adapter by file key.
            optimizer: Over those parameters.
            max_grad_norm: Norm to clip the gradient to, or None.
        """
        self.accelerator, self.transformer, self.parameters = accelerator, transformer, parameters
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self._norm: Tensor | None = None

    @contextlib.contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Context of a forward and backward pass; gradients of the processes are joined once, at the last micro-batch."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.transformer):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss."""
        self.accelerator.backward(loss)

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient over all micro-batches and processes, alike on each; not finite where the gradient is not."""
        trainable = list(self.parameters.values())
        average_gradients(self.transformer, trainable)
        self._norm = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
        return self._norm

    def apply(self, finite: Tensor) -> None:
        """Clip the gradient, take the optimizer's step where that is to be, and forget the gradient; after `gradient_norm`.

        Args:
            finite: bool, on the device, alike on all processes: False leaves adapter and optimizer as they are, bit for bit. A fused
                optimizer reads it on the device, by what PyTorch has for gradient scalers (`found_inf`); for others the host waits for it.
        """
        optimizer: Any = self.optimizer
        is_fused = all(group.get("fused") for group in optimizer.param_groups)
        if is_fused:
            optimizer.found_inf = (~finite).float()
        if is_fused or bool(finite):
            if self.max_grad_norm is not None:
                assert self._norm is not None  # that of this gradient
                nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, self._norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """`optimizer_tensors` on the main process, None on the others; to be called on all."""
        return optimizer_tensors(self.optimizer, self.parameters) if self.accelerator.is_main_process else None

    def restore(self, adapter: Mapping[str, Tensor], tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Give adapter and optimizer the values of a checkpoint.

        Args:
            adapter: float32 tensors by file key.
            tensors: Of `optimizer_tensors`.
            values: Of `optimizer_tensors`.

        Raises:
            ValueError: The optimizer's state does not fit; nothing is changed then.
        """
        restore_optimizer(self.optimizer, self.parameters, tensors, values)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(adapter[key])
