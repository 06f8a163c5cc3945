"""Placing the models on their devices: replicated (DDP, the default; DeepSpeed), or the frozen base sharded over processes (FSDP2, HSDP).

A sharded base is frozen, so nothing of it is ever reduced or saved. The adapter stays whole in every process, outside of the shards:
optimizer, average, checkpoints and export are those of a replicated run, and only its gradients are averaged, after the backward pass.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, convert_to_fp32
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training.distributed.environment import mesh_sizes, uses_deepspeed, uses_fsdp

BUCKET_BYTES = 64 * 2**20  # of gradients that travel at once; as much memory is taken for them


def place_models(accelerator: Accelerator, pipeline: MosaicFluxPipeline) -> nn.Module:
    """Move the pipeline to this process's device, sharded where the Accelerate config asks for it.

    Args:
        accelerator: Of this run.
        pipeline: Frozen, with the adapter attached.

    Returns:
        The transformer to call in training; `pipeline.transformer` keeps working for validation.
    """
    if not uses_fsdp() or accelerator.num_processes == 1:
        pipeline.to(accelerator.device)
        if not uses_deepspeed():
            _leave_to_each_process(pipeline.transformer)
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


def _leave_to_each_process(transformer: nn.Module) -> None:
    """Have DDP pass over all but the adapter: each process has read the frozen base itself, and nothing of it ever changes."""
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in transformer.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, [*frozen, *buffers])


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
    average(gradients)


def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over all processes; many travel at once, since each operation costs a round trip.

    Args:
        tensors: Of one type, alike in number and shapes on all processes.
    """
    buckets, room = list[list[Tensor]](), 0
    for tensor in tensors:
        if tensor.nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    for bucket in buckets:
        joined = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(joined)
        joined /= dist.get_world_size()
        for tensor, part in zip(bucket, joined.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def is_sharded(transformer: nn.Module) -> bool:
    """Whether its forward pass needs all processes, in validation too."""
    return isinstance(transformer, FSDPModule)


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    """All processes in one row of shards; with hybrid sharding, replicas x shards."""
    device, (replicas, shards) = accelerator.device.type, mesh_sizes(accelerator.num_processes)
    if replicas == 1:
        return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))
