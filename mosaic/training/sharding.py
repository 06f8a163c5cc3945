"""Placing the models on their devices: replicated (DDP, the default), or the frozen base sharded over processes (FSDP2, HSDP).

A sharded base is frozen, so nothing of it is ever reduced or saved. The adapter stays whole in every process, outside of the shards:
optimizer, average, checkpoints and export are those of a replicated run, and only its gradients are averaged, after the backward pass.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mosaic.pipeline import MosaicFluxPipeline


def check_distribution() -> None:
    """Check what the Accelerate config asks for, before any model is loaded.

    Raises:
        ValueError: DeepSpeed, FSDP 1, parameter offload, or loading on one process only.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported: it takes the optimizer step and its state into its own hands, which exact resume needs. "
            "Use configs/accelerate/ddp.yaml; where memory is short, model.quantization, then configs/accelerate/fsdp2.yaml."
        )
    if not _asked("ACCELERATE_USE_FSDP"):
        return
    needed = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    for name, value in needed.items():
        if os.environ.get(name, value).lower() != value:
            raise ValueError(f"{name.lower()} must be {value} in the Accelerate config, got {os.environ[name]}; see fsdp2.yaml.")


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
        return accelerator.prepare(pipeline.transformer)
    transformer, device = pipeline.transformer, accelerator.device
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        if module is not None:  # its outputs may be cached
            module.to(device)
    adapter = {parameter for parameter in transformer.parameters() if parameter.requires_grad}
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    if accelerator.mixed_precision == "bf16":  # as Accelerate does for replicated models; FSDP's own casts would round positions
        forward = torch.autocast(device.type, torch.bfloat16)(transformer.forward)
        transformer.forward = convert_outputs_to_fp32(forward)
    options = {
        "mesh": _mesh(accelerator),
        "reshard_after_forward": FullyShardedDataParallelPlugin().reshard_after_forward,
        "ignored_params": adapter,
    }
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        fully_shard(block, **options)  # moves one block at a time to the device
    return fully_shard(transformer, **options)


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


def is_sharded(transformer: nn.Module) -> bool:
    """Whether its forward pass needs all processes, in validation too."""
    return isinstance(transformer, FSDPModule)


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    """All processes in one row of shards; with hybrid sharding, replicas x shards."""
    device, count = accelerator.device.type, accelerator.num_processes
    replicas = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    shards = int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", str(count)))
    if replicas * shards != count:
        raise ValueError(f"dp_replicate_size {replicas} x dp_shard_size {shards} must be the number of processes, {count}.")
    if replicas == 1:
        return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
