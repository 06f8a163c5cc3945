"""The optimizer of the adapter's weights (`optimizer.name`). AdamW is PyTorch's; the packages of the others are optional."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mosaic.config.sections import OptimizerConfig
from mosaic.weights.quantization import require_package

PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def check_optimizer(config: OptimizerConfig) -> None:
    """Check that the package of an optimizer is installed.

    Raises:
        ValueError: If it is not.
    """
    if config.name in PACKAGES:
        require_package(PACKAGES[config.name], f'optimizer.name "{config.name}"')


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name, one group with decoupled weight decay.

    Args:
        config: Its settings; the learning rate is set anew in each step of a warm-up.
        parameters: float32, on the device they stay on.

    Raises:
        ValueError: If its package is not installed.
    """
    check_optimizer(config)
    parameters = list(parameters)
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    if config.name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, decouple=True, use_bias_correction=True, safeguard_warmup=True, **options)
    # One kernel for all tensors, on GPUs: on a CPU it rounds otherwise than the plain one, and is not the bottleneck.
    return torch.optim.AdamW(parameters, fused=all(parameter.is_cuda for parameter in parameters) or None, **options)
