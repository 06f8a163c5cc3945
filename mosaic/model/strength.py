"""Reference strength: a number added to the logits of some keys, without a mask.

Attention back ends take no mask or become slow with one. So the number travels as channels of the keys that meet ones in the queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Attend = Callable[..., Tensor]  # (query, key, value), all [B, S, H, D], and `scale` by keyword

ABSENT = -1000.0  # log of strength 0: the softmax makes 0 of it, and float16 still holds it times sqrt(D)
CHANNELS = 8  # that are added; kernels want a multiple of 8


def log_strength(strength: Tensor) -> Tensor:
    """What strengths [B, K] of at least 0 add to the logits of each reference's keys, float32."""
    return strength.float().log().clamp(min=ABSENT)


def attend_with_bias(attend: Attend, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention with a number added to the logits of the last keys.

    The number is split into what the keys' dtype holds of it and the rest, because bfloat16 alone would round it to 8 bits.

    Args:
        attend: Plain attention on [B, S, H, D] tensors.
        query: [B, R, H, D].
        key: [B, S, H, D].
        value: [B, S, H, D].
        bias: float32 [B, n], for the last n keys; None: plain attention.

    Returns:
        [B, R, H, D].
    """
    if bias is None:
        return attend(query, key, value)
    # A query channel of 1 against a key channel of b * sqrt(D) adds b to the scaled logit; values get channels of 0, cut off afterwards.
    width = query.shape[-1]
    exact = bias * width**0.5
    rounded = exact.to(key.dtype)
    halves = torch.stack([rounded, (exact - rounded.float()).to(key.dtype)], dim=-1)  # (B, n, 2)
    halves = functional.pad(halves, (0, CHANNELS - 2, key.shape[1] - bias.shape[1], 0))  # (B, S, CHANNELS)
    ones = functional.pad(query.new_ones(*query.shape[:-1], 2), (0, CHANNELS - 2))
    key = torch.cat([key, halves[:, :, None].expand(-1, -1, key.shape[2], -1)], dim=-1)
    attended = attend(torch.cat([query, ones], dim=-1), key, functional.pad(value, (0, CHANNELS)), scale=width**-0.5)
    return attended[..., :width]
