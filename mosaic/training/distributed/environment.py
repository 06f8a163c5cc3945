"""What the variables of a launched process say of sharing a run out, and which of them a run does not take."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from mosaic.config.sections import OptimizerConfig
from mosaic.weights.quantization import require_package


class Distribution(NamedTuple):
    """How a run is shared out over processes.

    Attributes:
        processes: Their number.
        base_shards: Parts into which the frozen base is cut; 1: it is whole in each process.
        optimizer_shards: Parts into which the adapter's gradient and optimizer state are cut; 1: each process holds them whole.
    """

    processes: int = 1
    base_shards: int = 1
    optimizer_shards: int = 1


def read_distribution(environ: Mapping[str, str]) -> Distribution:
    """What the variables of a launched process say; one process shares nothing out."""
    processes = int(environ.get("WORLD_SIZE", "1"))
    if processes > 1 and uses_fsdp(environ):
        return Distribution(processes, base_shards=mesh_sizes(processes, environ)[1])
    return Distribution(processes, optimizer_shards=processes if uses_deepspeed(environ) else 1)


#: Variables that would change numbers beside the training config, or would be passed over: the value that does nothing (None: there is
#: none), the name in an Accelerate config, and what says it instead. `ACCELERATE_MIXED_PRECISION` is not among them: it is always written
#: by `accelerate launch`, and `training.mixed_precision` replaces it.
SAID_ELSEWHERE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "gradient_accumulation_steps", "training.gradient_accumulation_steps says it"),
    "ACCELERATE_GRADIENT_CLIPPING": (None, "gradient_clipping", "optimizer.max_grad_norm says it"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (None, "deepspeed_config_file", "the training config says it"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "dynamo_backend", "model.compile says it"),
    "ACCELERATE_FP8_BACKEND": ("no", "fp8_config", "training.mixed_precision says it, and there is no fp8"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "distributed_type MEGATRON_LM", "a run is replicated, or sharded by FSDP2 or DeepSpeed"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "fsdp_activation_checkpointing", "model.gradient_checkpointing says it"),
    "PARALLELISM_CONFIG_TP_SIZE": ("1", "parallelism_config_tp_size", "weights are shared out by FSDP2 only"),
    "PARALLELISM_CONFIG_CP_SIZE": ("1", "parallelism_config_cp_size", "a sample stays in one process"),
    "PARALLELISM_CONFIG_SP_SIZE": ("1", "parallelism_config_sp_size", "a sample stays in one process"),
    "DIFFUSERS_ATTN_BACKEND": ("native", "", "training has one attention kernel, PyTorch's"),
}


def said_elsewhere(environ: Mapping[str, str]) -> str | None:
    """The message on a variable of `SAID_ELSEWHERE` that would do something; None: there is none."""
    for name, (nothing, shown, instead) in SAID_ELSEWHERE.items():
        if name in environ and environ[name].lower() != nothing:
            place = f"{shown} must not be set in the Accelerate config or as {name}" if shown else f"{name} must not be set"
            return f"{place}, got {environ[name]}: {instead}."
    return None


def check_distribution(optimizer: OptimizerConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Check what the Accelerate config and the variables ask for, before any model is loaded.

    Args:
        optimizer: The run's settings.
        environ: Variables of one of the run's processes.

    Raises:
        ValueError: Something of `SAID_ELSEWHERE`, FSDP 1, parameter offload, or loading on one process only; with DeepSpeed what
            `_check_deepspeed` says.
    """
    found = said_elsewhere(environ)
    if found is not None:
        raise ValueError(found)
    if uses_deepspeed(environ):
        _check_deepspeed(optimizer, environ)
    if not uses_fsdp(environ):
        return
    needed = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    for name, value in needed.items():
        if environ.get(name, value).lower() != value:
            raise ValueError(f"{name.lower()} must be {value} in the Accelerate config, got {environ[name]}; see fsdp2.yaml.")


def _check_deepspeed(config: OptimizerConfig, environ: Mapping[str, str]) -> None:
    """Check what an Accelerate config with DeepSpeed asks for.

    Raises:
        ValueError: The package is missing, the stage is not 2, something is offloaded, or it is not AdamW.
    """
    require_package("deepspeed", "distributed_type DEEPSPEED of the Accelerate config")
    needed = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("2", "zero_stage"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", "offload_optimizer_device"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", "offload_param_device"),
    }
    for name, (value, shown) in needed.items():
        if environ.get(name, value) != value:
            raise ValueError(f"{shown} must be {value} in the Accelerate config, got {environ[name]}; see deepspeed_zero2.yaml.")
    if "LOCAL_RANK" not in environ:
        raise ValueError("DeepSpeed needs processes that train.sh or accelerate launch has started (LOCAL_RANK is not set).")
    if config.name != "adamw":
        raise ValueError(
            f'optimizer.name must be "adamw" with DeepSpeed, got "{config.name}": the state of others is not one number per weight, '
            "so it cannot be shared out and put together again. Use configs/accelerate/ddp.yaml."
        )


def uses_fsdp(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the Accelerate config asks for FSDP."""
    return environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def uses_deepspeed(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the Accelerate config asks for DeepSpeed."""
    return environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def mesh_sizes(processes: int, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Replicas and shards.

    Raises:
        ValueError: They are not those of so many processes.
    """
    replicas = int(environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    shards = int(environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", str(processes)))
    if replicas * shards != processes:
        raise ValueError(f"dp_replicate_size {replicas} x dp_shard_size {shards} must be the number of processes, {processes}.")
    return replicas, shards
