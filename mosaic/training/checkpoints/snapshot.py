"""A run's weights, optimizer and average to a snapshot on the host, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mosaic.training.checkpoints.checkpoint import Snapshot
from mosaic.training.updates import Updates


def take_snapshot(
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: tuple[Mapping[str, Tensor], Mapping[str, Any]],
    ema: EMAModel | None,
    state: Mapping[str, Any],
) -> Snapshot:
    """Copy everything to memory of the host that training does not change.

    Args:
        step: Optimizer steps done.
        parameters: The adapter by file key.
        optimizer: `Updates.optimizer_state` of now.
        ema: The moving average of the adapter's weights, by file key; None: there is none.
        state: What else the checkpoint says, as JSON types.
    """
    tensors, hyperparameters = optimizer
    average = _on_host(dict(zip(parameters, ema.shadow_params, strict=True))) if ema is not None else None
    counters = {"ema_step": ema.optimization_step if ema is not None else None, "optimizer": hyperparameters}
    return Snapshot(step, _on_host(parameters), tensors, average, {**state, **counters})


def restore_snapshot(saved: Snapshot, updates: Updates, ema: EMAModel | None) -> None:
    """Give weights, optimizer and average the values of a snapshot; without an average in it, one starts from its weights.

    Raises:
        ValueError: The optimizer's state does not fit; nothing is changed then.
    """
    updates.restore(saved.adapter, saved.optimizer, saved.state["optimizer"])
    if ema is not None:
        average = saved.adapter if saved.ema is None else saved.ema
        ema.shadow_params = [average[key].to(parameter, copy=True) for key, parameter in updates.parameters.items()]
        ema.optimization_step = saved.state["ema_step"] if saved.ema is not None else 0


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for key, tensor in tensors.items()}
