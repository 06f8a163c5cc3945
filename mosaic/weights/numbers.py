"""Numbers that a CPU is slow with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_tiny_numbers() -> Iterator[None]:
    """Take numbers below 1e-38 for 0 in the calling thread, as GPUs do.

    Tails of softmax and GELU fall there, where a CPU takes a hundred times as long for a number: a quarter of a training step.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
