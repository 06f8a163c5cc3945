"""The state of any `torch.optim.Optimizer` as named tensors and JSON, and back; for checkpoints without pickle."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable", "maximize")  # switches of the device at hand
GROUP = "param_groups"


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
    tensors, values = {}, {}
    names = {id(parameter): key for key, parameter in parameters.items()}
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            _put(f"{names[id(parameter)]}/{name}", value, tensors, values)
    for index, group in enumerate(optimizer.param_groups):
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
    state: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
    for full_name, value in [*tensors.items(), *values.items()]:
        key, _, name = full_name.rpartition("/")
        if key.startswith(f"{GROUP}/") and key.removeprefix(f"{GROUP}/") in map(str, range(len(groups))):
            groups[int(key.removeprefix(f"{GROUP}/"))][name] = value
        else:
            state.setdefault(key, {})[name] = value
    if state and state.keys() != parameters.keys():
        raise ValueError(f"the optimizer's state is of {len(state)} tensors, the adapter has {len(parameters)}, or their names differ")
    packed = optimizer.state_dict()
    numbers = {id(parameter): key for key, parameter in parameters.items()}
    order = [numbers[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {index: state[key] for index, key in enumerate(order) if key in state}
    for group, saved in zip(packed["param_groups"], groups, strict=True):
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    optimizer.load_state_dict(packed)


def _put(name: str, value: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    elif value is None or isinstance(value, (bool, int, float, str)):
        values[name] = value
    elif isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in value):
        values[name] = list(value)
    else:
        raise TypeError(f"optimizer state {name}: cannot be written to a checkpoint: {type(value).__name__}.")
