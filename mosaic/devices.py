"""Between host and device without waiting: a host that waits for its GPU at every step leaves it idle until the next step has begun."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device. A copy from the host is put into the device's queue, and the host goes on."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory the host would have to wait for what is in the queue
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A copy of a few numbers that is on its way to the host, for which nothing waits until they are asked for."""

    def __init__(self, tensor: Tensor) -> None:
        """Put the copy into the device's queue.

        Args:
            tensor: [n], on any device.
        """
        self._copy, self._arrived = tensor.detach().to("cpu", non_blocking=True), None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[float]:
        """The numbers. Waits for what stood in the queue before the copy, not for what came after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()
