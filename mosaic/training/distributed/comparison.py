"""Comparing what every process must have alike: the frozen base before it is placed, and the adapter at the start and at checkpoints."""

from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from torch import Tensor, nn

from mosaic.training.distributed.waiting import LOADING_LIMIT, gather_words

SAMPLED = 1024  # values per tensor of the base that are looked at: enough to tell files apart, and no reading of 24 GB
FACTOR = 0x5851F42D4C957F2D  # odd: a change of any tensor changes the whole
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ProcessesDiffer(ValueError):
    """What all processes must have alike is not; nothing of any of them is to be kept."""


def fingerprint(tensors: Iterable[Tensor], most: int | None = None) -> int:
    """64 bits of the values of some tensors and of their order; a change of one value alone always changes them.

    Args:
        tensors: Of any types; moved nowhere.
        most: Values of each that are looked at, spread evenly; None: all.
    """
    total = 0
    for tensor in tensors:
        values = tensor.detach().flatten()
        if most is not None:
            values = values[:: max(1, len(values) // most)]
        bits = values.contiguous().view(BITS[values.element_size()]).long()
        places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        total = (total * FACTOR + len(bits) + int((bits * places).sum())) % 2**64
    return total


def check_base(modules: Iterable[nn.Module | None]) -> None:
    """Check that all processes have read the same frozen weights; to be called on all, before anything is placed.

    Quantised weights are left out: what differs between files also differs in the norms, biases and embeddings beside them.

    Raises:
        ProcessesDiffer: They do not.
        ProcessFailed: Another process could not read them.
    """
    if PartialState().num_processes == 1:
        return
    tensors = [tensor for module in modules if module is not None for tensor in module.parameters() if not tensor.requires_grad]
    plain = [tensor for tensor in tensors if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()]
    _require_alike("the base model's weights", fingerprint(plain, SAMPLED), "All machines must read the same model.pretrained.")


def check_adapter(parameters: Sequence[Tensor], step: int) -> None:
    """Check that all processes have the same adapter, bit for bit; to be called on all.

    Raises:
        ProcessesDiffer: They do not.
    """
    if PartialState().num_processes == 1:
        return
    cure = "Go back to an earlier checkpoint; at the start, see that all machines read the same adapter and run the same versions."
    _require_alike(f"the adapter's weights at step {step}", fingerprint(parameters), cure)


def _require_alike(what: str, found: int, cure: str) -> None:
    """Compare a fingerprint over all processes."""
    said = gather_words(f"{found:016x}", LOADING_LIMIT)
    if len(set(said)) > 1:
        listed = ", ".join(f"process {rank}: {word}" for rank, word in enumerate(said))
        raise ProcessesDiffer(f"{what} must be the same in all processes, but their fingerprints differ ({listed}). {cure}")
