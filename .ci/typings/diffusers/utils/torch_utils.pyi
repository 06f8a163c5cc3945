from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

def randn_tensor(
    shape: Sequence[int], generator: Any = None, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor: ...
def fourier_filter(x_in: Tensor, threshold: int, scale: float) -> Tensor: ...
