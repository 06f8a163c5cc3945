"""The state of any `torch.optim.Optimizer` as named tensors and JSON, and back; for checkpoints without pickle."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable", "maximize")  # switches of the device at hand
GROUP = "param_groups"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of the shape of their weights


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy an optimizer's state to the host.

    Args:
        optimizer: Over `parameters`.
        parameters: By file key.

    Returns:
        Tensors by `<file key>/<name>`, and what is no tensor: a dict of the same names, and the hyperparameters of the groups.

    Raises:
        TypeError: A state is neither a tensor nor a number, string or list.
    """
    names = {id(parameter): key for key, parameter in parameters.items()}
    return pack_state({names[id(parameter)]: state for parameter, state in optimizer.state.items()}, optimizer.param_groups)


def pack_state(states: Mapping[str, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `optimizer_tensors`, for the states by file key and the parameter groups of an optimizer.

    Raises:
        TypeError: A state is neither a tensor nor a number, string or list.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, state in states.items():
        for name, value in state.items():
            _put(f"{key}/{name}", value, tensors, values)
    for index, group in enumerate(groups):
        for name, value in group.items():
            if name != "params" and name not in IMPLEMENTATION:
                _put(f"{GROUP}/{index}/{name}", value, tensors, values)
    return tensors, values


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Give an optimizer the state that `optimizer_tensors` has taken.

    Raises:
        ValueError: The state is not that of these parameters; nothing is changed then.
    """
    state, groups = unpack_state(tensors, values, parameters, len(optimizer.param_groups))
    packed = optimizer.state_dict()
    numbers = {id(parameter): key for key, parameter in parameters.items()}
    order = [numbers[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {index: state[key] for index, key in enumerate(order) if key in state}
    for group, saved in zip(packed["param_groups"], groups, strict=True):
        for name, value in saved.items():
            _require_like(name, value, group.get(name))
        group.update(saved)
    for full_name, value in tensors.items():
        key, _, name = full_name.rpartition("/")
        if name in MOMENTS and value.shape != parameters[key].shape:
            raise ValueError(f"the optimizer's {full_name} must have the shape {list(parameters[key].shape)}, got {list(value.shape)}")
    optimizer.load_state_dict(packed)


def unpack_state(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], keys: Collection[str], num_groups: int
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The states by file key and the hyperparameters of each group that `pack_state` has packed; no states before the first step.

    Raises:
        ValueError: The states are not those of these file keys.
    """
    state: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = [{} for _ in range(num_groups)]
    for full_name, value in [*tensors.items(), *values.items()]:
        key, _, name = full_name.rpartition("/")
        if key.startswith(f"{GROUP}/") and key.removeprefix(f"{GROUP}/") in map(str, range(num_groups)):
            groups[int(key.removeprefix(f"{GROUP}/"))][name] = tuple(value) if isinstance(value, list) else value
        else:
            state.setdefault(key, {})[name] = value
    if state and state.keys() != set(keys):
        raise ValueError(f"the optimizer's state is of {len(state)} tensors, the adapter has {len(keys)}, or their names differ")
    return state, groups


def _require_like(name: str, value: Any, current: Any) -> None:
    """Raise ValueError where a hyperparameter of a checkpoint is of another kind than the optimizer's own: a text for a number, or so."""

    def kind(one: Any) -> Any:
        if isinstance(one, tuple):
            return tuple(map(kind, one))
        return "a number" if isinstance(one, int | float) else type(one).__name__

    if value is not None and current is not None and kind(value) != kind(current):
        raise ValueError(f"the optimizer's {name} must be of the kind of {current!r}, got {value!r}")


def _put(name: str, value: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    elif value is None or isinstance(value, (bool, int, float, str)):
        values[name] = value
    elif isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in value):
        values[name] = list(value)
    else:
        raise TypeError(f"optimizer state {name}: cannot be written to a checkpoint: {type(value).__name__}.")
