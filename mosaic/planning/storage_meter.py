"""Counts the bytes of all tensors that are alive, on any device, the meta device included."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TEMPORARY = "temporary"


class StorageMeter(TorchDispatchMode):
    """Context in which every new storage is counted, under a label, from its allocation until it is freed.

    Storages are held weakly, so that counting frees nothing later than without it; two tensors on one storage count once. What a kernel
    allocates and frees inside itself is not seen. Do not combine with `torch.utils.flop_counter.FlopCounterMode`, which keeps tensors.

    Attributes:
        label: Under which new storages are counted.
        live: Bytes by label now.
        peak: Bytes by label at the moment when most bytes were alive since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = TEMPORARY
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._records: dict[int, list[Any]] = {}  # address of a storage -> [label, bytes, its finalizer]
        self._total = self._peak_total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, self.label)
        return result

    def mark(self, label: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors under a label, whether they are counted already or not."""
        for tensor in tensors:
            self._count(tensor, label)
            record = self._records[tensor.untyped_storage()._cdata]
            self.live[record[0]] -= record[1]
            self.live[label] += record[1]
            record[0] = label

    def relabel(self, label: str, new_label: str) -> None:
        """Count what is alive under one label under another from now on."""
        for record in self._records.values():
            if record[0] == label:
                record[0] = new_label
        self.live[new_label] += self.live.pop(label, 0)

    def reset_peak(self) -> None:
        """Forget the peak; the next one is looked for from here on."""
        self._peak_total, self.peak = self._total, Counter(self.live)

    def _count(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._records:
            return
        size = storage.nbytes()
        self._records[address] = [label, size, weakref.finalize(storage, self._freed, address)]
        self._records[address][2].atexit = False
        self.live[label] += size
        self._total += size
        if self._total > self._peak_total:
            self._peak_total, self.peak = self._total, Counter(self.live)

    def _freed(self, address: int) -> None:
        label, size, _ = self._records.pop(address)
        self.live[label] -= size
        self._total -= size


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
    return sum(storage.nbytes() for storage in storages.values())
