"""DeepSpeed ZeRO-2: gradients and optimizer state of the adapter shared out over the processes, in checkpoints of the same format.

DeepSpeed sees the adapter only. The base stays where it is, in the precision or quantisation it has. DeepSpeed joins and clips the gradient
and takes the step; the number of micro-batches, the learning rate and what is not finite stay the trainer's.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mosaic.training.checkpoints.optimizer_state import pack_state, unpack_state
from mosaic.training.updates import Updates

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_WEIGHTS = 50_000_000  # whose gradients are sent at once; DeepSpeed keeps room for them, by default more than the whole adapter needs


class ZeroUpdates(Updates):
    """Updates whose gradient and optimizer state are shared out: each process has a part of them, and all have the whole adapter."""

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.AdamW,
        max_grad_norm: float | None,
    ) -> None:
        """Hand the adapter and its optimizer to DeepSpeed; `optimizer` is then over this process's part as one vector."""
        # DeepSpeed takes a GPU where there is one, even if this run is on the CPU.
        os.environ.setdefault("DS_ACCELERATOR", accelerator.device.type)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)  # compiled on a CPU at every first start, and of no use here
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own reports only
            "gradient_accumulation_steps": 1,  # the trainer divides the loss itself
            "gradient_clipping": max_grad_norm or 0.0,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET_WEIGHTS},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": float("inf"),
        }
        adapter = _Adapter(transformer, parameters.values())
        self.engine, *_ = deepspeed.initialize(model=adapter, optimizer=optimizer, config=settings)
        super().__init__(accelerator, self.engine, parameters, optimizer, max_grad_norm)

    @contextlib.contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Context of a forward and backward pass; every micro-batch's gradient is joined and shared out at once."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss."""
        self.engine.backward(loss)

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient over all micro-batches and processes, alike on each; infinite where the gradient is not finite."""
        self._norm = self.engine.optimizer.scaled_global_norm()  # nothing is scaled in float32
        return self._norm

    def apply(self, finite: Tensor) -> None:
        """Clip the gradient, take the step, gather the adapter and forget the gradient; where `finite` is False, only forget it."""
        if not finite:
            self._discard()
            return
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed has left out a step whose gradient was finite.")

    def _discard(self) -> None:
        """Forget the gradient: DeepSpeed leaves out a step that is not finite, and forgets its gradient."""
        from deepspeed.utils import safe_set_full_grad

        for parameter in self.parameters.values():
            safe_set_full_grad(parameter, torch.full_like(parameter, torch.nan))
        self.engine.step()
        if self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed has taken a step whose gradient was not finite.")

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state put together on the main process as that of a plain AdamW, None on the others; to be called on all."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = {}
        for key, parameter in self.parameters.items() if self._own_state else ():
            moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            if self.accelerator.is_main_process:
                states[key] = {"step": self._own_state["step"], **{name: moment.cpu() for name, moment in moments.items()}}
        return pack_state(states, self.optimizer.param_groups) if self.accelerator.is_main_process else None

    def restore(self, adapter: Mapping[str, Tensor], tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Give each process its part of the optimizer's state, and adapter and masters the values of a checkpoint.

        Raises:
            ValueError: The optimizer's state does not fit; nothing is changed then.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        states, groups = unpack_state(tensors, values, self.parameters, len(self.optimizer.param_groups))
        steps = {float(state["step"]) for state in states.values()}
        if len(steps) > 1:
            raise ValueError(
                f"the optimizer's state is of weights that took different numbers of steps, {sorted(steps)}: DeepSpeed has one"
            )
        if states:
            self._make_state()
            self._own_state["step"].fill_(steps.pop())
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                for name in MOMENTS if states else ():
                    safe_set_full_optimizer_state(parameter, states[key][name], name)
                parameter.copy_(adapter[key])
                safe_set_full_fp32_param(parameter, adapter[key])
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(saved)

    @property
    def _own_state(self) -> dict[str, Tensor]:
        """State of this process's part; empty before the first step."""
        (group,) = self.optimizer.param_groups
        (part,) = group["params"]
        return self.optimizer.state.get(part, {})

    def _make_state(self) -> None:
        """Have DeepSpeed make the state, by a step of a gradient of zero at a learning rate of zero, which changes no weight."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        with self.micro_batch(is_last=True):
            self.backward(self.engine())
        self.apply(torch.tensor(True))


class _Adapter(nn.Module):
    """The transformer with the adapter's weights as its only parameters, so that DeepSpeed casts, moves and sends nothing of the base."""

    transformer: nn.Module

    def __init__(self, transformer: nn.Module, weights: Any) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.__dict__["transformer"] = transformer  # not registered

    def forward(self, **inputs: Any) -> Any:
        """The transformer's output; without inputs a zero that depends on all weights."""
        return self.transformer(**inputs) if inputs else sum(weight.sum() for weight in self.weights) * 0.0
