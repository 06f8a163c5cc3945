"""The adapter's moving average in the adapter's place, for a while."""

import contextlib
from collections.abc import Iterator

from diffusers.training_utils import EMAModel
from torch import nn


@contextlib.contextmanager
def averaged(ema: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Context in which the adapter holds its moving average, if there is one; the trained weights come back after it."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
