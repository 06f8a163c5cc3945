"""Placing the models on their devices: replicated (DDP, the default; DeepSpeed), or the frozen base sharded over processes (FSDP2, HSDP).

A sharded base is frozen, so nothing of it is ever reduced or saved. The adapter stays whole in every process, outside of the shards:
optimizer, average, checkpoints and export are those of a replicated run, and only its gradients are averaged, after the backward pass.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, convert_to_fp32
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mosaic.config.sections import OptimizerConfig
from mosaic.pipeline.pipeline import MosaicFluxPipeline
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
    if processes > 1 and _asked("ACCELERATE_USE_FSDP", environ):
        return Distribution(processes, base_shards=_mesh_sizes(processes, environ)[1])
    return Distribution(processes, optimizer_shards=processes if _asked("ACCELERATE_USE_DEEPSPEED", environ) else 1)


def check_distribution(optimizer: OptimizerConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Check what the Accelerate config asks for, before any model is loaded.

    Args:
        optimizer: The run's settings.
        environ: Variables of one of the run's processes.

    Raises:
        ValueError: FSDP 1, parameter offload, or loading on one process only; with DeepSpeed what `_check_deepspeed` says.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED", environ):
        _check_deepspeed(optimizer, environ)
    if not _asked("ACCELERATE_USE_FSDP", environ):
        return
    needed = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    for name, value in needed.items():
        if environ.get(name, value).lower() != value:
            raise ValueError(f"{name.lower()} must be {value} in the Accelerate config, got {environ[name]}; see fsdp2.yaml.")


def _check_deepspeed(config: OptimizerConfig, environ: Mapping[str, str]) -> None:
    """Check what an Accelerate config with DeepSpeed asks for.

    Raises:
        ValueError: The package is missing, the stage is not 2, something is set that the training config says, or it is not AdamW.
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
    ours = {
        "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "optimizer.max_grad_norm"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "training.gradient_accumulation_steps"),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("deepspeed_config_file", "the training config"),
    }
    for name, (shown, instead) in ours.items():
        if name in environ:
            raise ValueError(f"{shown} must not be set in the Accelerate config, got {environ[name]}: {instead} says it.")
    if "LOCAL_RANK" not in environ:
        raise ValueError("DeepSpeed needs processes that train.sh or accelerate launch has started (LOCAL_RANK is not set).")
    if config.name != "adamw":
        raise ValueError(
            f'optimizer.name must be "adamw" with DeepSpeed, got "{config.name}": the state of others is not one number per weight, '
            "so it cannot be shared out and put together again. Use configs/accelerate/ddp.yaml."
        )


def place_models(accelerator: Accelerator, pipeline: MosaicFluxPipeline) -> nn.Module:
    """Move the pipeline to this process's device, sharded where the Accelerate config asks for it.

    Args:
        accelerator: Of this run.
        pipeline: Frozen, with the adapter attached.

    Returns:
        The transformer to call in training; `pipeline.transformer` keeps working for validation.
    """
    if not _asked("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        pipeline.to(accelerator.device)
        if not uses_deepspeed():
            return accelerator.prepare(pipeline.transformer)
        _autocast(pipeline.transformer, accelerator)
        return pipeline.transformer
    transformer, device = pipeline.transformer, accelerator.device
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        if module is not None:  # its outputs may be cached
            module.to(device)
    adapter = {parameter for parameter in transformer.parameters() if parameter.requires_grad}
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    _autocast(transformer, accelerator)
    options = {
        "mesh": _mesh(accelerator),
        "reshard_after_forward": FullyShardedDataParallelPlugin().reshard_after_forward,
        "ignored_params": adapter,
    }
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        fully_shard(block, **options)  # moves one block at a time to the device
    fully_shard(transformer, **options)  # in place
    return transformer


def _autocast(transformer: nn.Module, accelerator: Accelerator) -> None:
    """Mixed precision as Accelerate has it for replicated models; the casts of FSDP and DeepSpeed would round positions or weights."""
    if accelerator.mixed_precision != "bf16":
        return
    contexts: list[torch.autocast] = []

    def begin(*_: object) -> None:
        contexts.append(torch.autocast(accelerator.device.type, torch.bfloat16))
        contexts[-1].__enter__()

    def end(_: nn.Module, __: object, output: object) -> object:
        contexts.pop().__exit__(None, None, None)
        return convert_to_fp32(output)

    transformer.register_forward_pre_hook(begin)
    transformer.register_forward_hook(end, always_call=True)  # after an error too


def average_gradients(transformer: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Average the adapter's gradients over all processes, where its transformer is sharded; else DDP has done so already."""
    if not is_sharded(transformer):
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(gradients, dist.get_world_size())


def uses_deepspeed() -> bool:
    """Whether the Accelerate config asks for DeepSpeed."""
    return _asked("ACCELERATE_USE_DEEPSPEED")


def is_sharded(transformer: nn.Module) -> bool:
    """Whether its forward pass needs all processes, in validation too."""
    return isinstance(transformer, FSDPModule)


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    """All processes in one row of shards; with hybrid sharding, replicas x shards."""
    device, (replicas, shards) = accelerator.device.type, _mesh_sizes(accelerator.num_processes, os.environ)
    if replicas == 1:
        return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def _mesh_sizes(processes: int, environ: Mapping[str, str]) -> tuple[int, int]:
    """Replicas and shards.

    Raises:
        ValueError: They are not those of so many processes.
    """
    replicas = int(environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    shards = int(environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", str(processes)))
    if replicas * shards != processes:
        raise ValueError(f"dp_replicate_size {replicas} x dp_shard_size {shards} must be the number of processes, {processes}.")
    return replicas, shards


def _asked(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    return environ.get(name, "false").lower() == "true"
