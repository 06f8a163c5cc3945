"""Velocity and sampling of the pocket base on any layout, with the schedule of FLUX."""

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor

from scripts.pocket.base_data import Layout, caption_ids, decode_samples, position_ids

#: FLUX.1's resolution shift: mu is linear in the number of image tokens through these two points.
_SHIFT_POINTS = ((256, 0.5), (4096, 1.15))


def shift_exponent(tokens: int) -> float:
    """mu of the resolution shift for a number of image tokens, extrapolated below 256 as FLUX's pipeline does."""
    (low, start), (high, end) = _SHIFT_POINTS
    return start + (end - start) * (tokens - low) / (high - low)


def time_shift(time: Tensor, tokens: int) -> Tensor:
    """t' = e^mu / (e^mu + 1 / t - 1) (FLUX's resolution shift); 0 and 1 stay where they are."""
    factor = math.exp(shift_exponent(tokens))
    return factor * time / (1.0 + (factor - 1.0) * time)


def fast_attention(device: torch.device | str) -> AbstractContextManager[None]:
    """What is fastest for the base: on a CPU `explicit_attention`, on a GPU the fused kernels that diffusers takes."""
    return explicit_attention() if torch.device(device).type == "cpu" else nullcontext()


@contextmanager
def explicit_attention() -> Iterator[None]:
    """Attention of diffusers' models by two matmuls, in their own dtype, and a softmax, while active.

    At these tiny sizes and in bfloat16 on a CPU, the fused kernel's backward takes longer than this, and so do float32 matmuls.
    """
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of the CPU too, in spite of its name
    try:
        with attention_backend(AttentionBackendName._NATIVE_MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def predict_velocity(
    components: dict[str, Any],
    layout: Layout,
    noisy: Tensor,
    time: Tensor,
    ids: tuple[Tensor, Tensor],
    guidance: Tensor | None = None,
) -> Tensor:
    """Velocity of noisy tokens.

    Args:
        components: see `scripts.pocket.model.build_pocket_flux`.
        layout: gives the position ids.
        noisy: [batch, tokens, channels].
        time: [batch], 1 = pure noise.
        ids: caption ids of the CLIP and the T5 encoder, each [batch, text length].
        guidance: [batch], embedded guidance, for a transformer that has it.

    Returns:
        [batch, tokens, channels], float32.
    """
    pooled = components["text_encoder"](ids[0]).pooler_output
    text = components["text_encoder_2"](ids[1])[0]
    transformer = components["transformer"]
    # Under autocast the transformer would round the time to bfloat16 before its sines and cosines are taken, which
    # resolves 1000 t in steps of 4: the embedding gets the exact time instead, as in a float32 model.
    exact = transformer.time_text_embed.register_forward_pre_hook(lambda _, given: (1000.0 * time.float(), *given[1:]))
    try:
        output = transformer(
            hidden_states=noisy,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time,
            guidance=guidance,
            img_ids=position_ids(layout).to(noisy.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
        )
    finally:
        exact.remove()
    return output.sample.float()


@torch.no_grad()
def sample_pictures(
    components: dict[str, Any], layout: Layout, captions: list[str], seed: int, steps: int = 20, guidance: float | None = None
) -> np.ndarray:
    """Euler sampling over FLUX's sigmas: whole pictures of a layout, uint8 [n, height, width, 3]."""
    device, channels = components["transformer"].device, components["transformer"].config.in_channels
    scale = None if guidance is None else torch.full([len(captions)], guidance, device=device)
    ids = (caption_ids(components["tokenizer"], captions).to(device), caption_ids(components["tokenizer_2"], captions).to(device))
    tokens = torch.randn((len(captions), layout.tokens, channels), generator=torch.Generator().manual_seed(seed)).to(device)
    times = torch.cat([time_shift(torch.linspace(1.0, 1.0 / steps, steps), layout.tokens), torch.zeros(1)]).to(device)
    for now, after in itertools.pairwise(times):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            velocity = predict_velocity(components, layout, tokens, now.expand(len(captions)), ids, scale)
        tokens = tokens + (after - now) * velocity
    return decode_samples(components["vae"], layout, tokens)
