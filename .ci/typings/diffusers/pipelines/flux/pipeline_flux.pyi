from typing import Any

import torch
from torch import Tensor

def calculate_shift(
    image_seq_len: int, base_seq_len: int = 256, max_seq_len: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float: ...
def retrieve_timesteps(
    scheduler: Any, num_inference_steps: int, device: torch.device | None = None, **kwargs: Any
) -> tuple[Tensor, int]: ...
