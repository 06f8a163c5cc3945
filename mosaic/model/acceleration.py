"""Faster sampling by means of PyTorch and diffusers: attention kernels, compiled blocks, step caches. None of them changes a weight.

An attention kernel and compiled blocks change pictures by rounding. A step cache is an approximation: in steps that change little, it runs
the first block or none and repeats the last change that all blocks made. `python scripts/benchmark.py infer` measures gain and error.
"""

import warnings
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

from mosaic.config.sections import InferenceConfig
from mosaic.files import in_one_line
from mosaic.model.costs import FLUX_DEV
from mosaic.model.strength import CHANNELS
from mosaic.model.transformer import MosaicFluxTransformer2DModel

STEP_CACHES = ("none", "first_block", "mag")
# Graphs of a kind of block. In training a dozen: with one reference and with several, with text that needs no gradient (the first block)
# and that does, for pictures one at a time and for batches; in inference those of a cases file with its shapes and numbers of references.
# PyTorch's default of 8 would end in uncompiled blocks, or with `fullgraph` in an error.
RECOMPILE_LIMIT = 64


def accelerate(transformer: MosaicFluxTransformer2DModel, settings: InferenceConfig, device: torch.device) -> None:
    """Apply `inference.attention_backend` and `inference.compile`, once after loading. A step cache is set per call (`set_step_cache`).

    Args:
        transformer: With its adapters.
        settings: The settings.
        device: On which it will run.

    Raises:
        ValueError: The attention kernel does not exist or does not run here.
    """
    if settings.attention_backend is not None:
        set_attention_backend(transformer, settings.attention_backend, device)
    if settings.compile:
        compile_blocks(transformer)


def set_attention_backend(
    transformer: MosaicFluxTransformer2DModel,
    name: str,
    device: torch.device,
    setting: str = "inference.attention_backend",
    training: torch.dtype | None = None,
) -> None:
    """Use one of diffusers' attention kernels, after a trial of it, as plain and as with reference strengths. No kernel ever gets a mask.

    Args:
        transformer: Whose attention it becomes.
        name: The kernel's.
        device: On which it will run.
        setting: What has named it, for messages.
        training: Number format of attention in training, whose backward pass is then tried as well; None: for sampling only.

    Raises:
        ValueError: There is none of that name, its package is missing, or it does not run on this device with these numbers, or only
            without the wider heads of reference strengths.
    """
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise ValueError(f"{setting} must be one of {', '.join(known)}, got {name!r}.")
    try:
        _try_backend(transformer, name, device, training=training)
        _try_backend(transformer, name, device, CHANNELS)
    except Exception as error:  # packages of all kinds fail in ways of their own
        usable = [backend for backend in known if "native" in backend and _runs(transformer, backend, device, CHANNELS)]
        reason = in_one_line(error, 300, with_kind=True)
        head_dim = transformer.config.attention_head_dim
        also = f"It runs with heads of {head_dim}, but reference strengths need another kernel: theirs are of {head_dim + CHANNELS}. "
        raise ValueError(
            f"{setting}={name} does not run here ({device.type}, {training or transformer.dtype}). {reason} "
            f"{also if _runs(transformer, name, device, training=training) else ''}"
            f"What PyTorch itself has here: {', '.join(usable)}; null: its own choice."
        ) from error
    with attention_backend(AttentionBackendName.NATIVE):  # diffusers makes it every other model's kernel too; this gives them theirs back
        transformer.set_attention_backend(name)


def _try_backend(
    transformer: MosaicFluxTransformer2DModel, name: str, device: torch.device, channels: int = 0, training: torch.dtype | None = None
) -> None:
    """Attention of a few tokens with this kernel, in training with its gradient; `channels` are added to the heads, as strengths do it."""
    head_dim, dtype = transformer.config.attention_head_dim, training or transformer.dtype
    scale = {"scale": head_dim**-0.5} if channels else {}
    query, key = (
        torch.zeros(1, length, 2, head_dim + channels, device=device, dtype=dtype, requires_grad=training is not None)
        for length in (64, 128)
    )
    with torch.set_grad_enabled(training is not None), warnings.catch_warnings(), attention_backend(AttentionBackendName(name)):
        warnings.simplefilter("ignore")  # of kernels that refuse, why; the error says it too
        attended = dispatch_attention_fn(query, key, key, **scale)
        if training is not None:
            attended.sum().backward()


def _runs(
    transformer: MosaicFluxTransformer2DModel, name: str, device: torch.device, channels: int = 0, training: torch.dtype | None = None
) -> bool:
    try:
        _try_backend(transformer, name, device, channels, training)
    except Exception:
        return False
    return True


def compile_blocks(transformer: MosaicFluxTransformer2DModel, **options: Any) -> None:
    """Compile the two kinds of block, each once for all blocks of its kind; the first call with a new shape takes long.

    Args:
        transformer: Its blocks.
        options: Of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    transformer.compile_repeated_blocks(**options)


def set_step_cache(transformer: MosaicFluxTransformer2DModel, name: str, threshold: float | None, num_inference_steps: int) -> None:
    """Make this the transformer's step cache, or "none" of them.

    Args:
        transformer: The transformer.
        name: One of `STEP_CACHES`.
        threshold: How much change counts as little; None: diffusers' default.
        num_inference_steps: Of the pictures that follow.

    Raises:
        ValueError: There is none of that name; or "mag", whose table is FLUX.1-dev's, for a model of another shape.
    """
    if name not in STEP_CACHES:
        raise ValueError(f"step_cache must be one of {', '.join(STEP_CACHES)}, got {name!r}.")
    given = {} if threshold is None else {"threshold": threshold}
    wanted: FirstBlockCacheConfig | MagCacheConfig | None = None
    if name == "first_block":
        wanted = FirstBlockCacheConfig(**given)
    elif name == "mag":
        wanted = MagCacheConfig(**given, num_inference_steps=num_inference_steps, mag_ratios=flux_mag_ratios(transformer))
    if _same_cache(transformer._cache_config, wanted):
        return
    if transformer.is_cache_enabled:
        transformer.disable_cache()
    if wanted is not None:
        transformer.enable_cache(wanted)


def _same_cache(first: FirstBlockCacheConfig | MagCacheConfig | None, second: FirstBlockCacheConfig | MagCacheConfig | None) -> bool:
    """Whether two caches decide alike; new hooks would make compiled blocks compile anew."""
    if first is None or second is None:
        return first is second
    steps = [getattr(config, "num_inference_steps", None) for config in (first, second)]
    return type(first) is type(second) and first.threshold == second.threshold and steps[0] == steps[1]


def flux_mag_ratios(transformer: MosaicFluxTransformer2DModel) -> torch.Tensor:
    """How much larger a step's change is than that of the step before, for FLUX.1-dev, [28]; other numbers of steps take the nearest.

    Raises:
        ValueError: The model has another shape.
    """
    layers = tuple(FLUX_DEV[name] for name in ("num_layers", "num_single_layers"))
    found = (transformer.config.num_layers, transformer.config.num_single_layers)
    if found != layers:
        raise ValueError(
            f'step_cache "mag" goes by FLUX.1-dev\'s table, a model of {layers[0]} + {layers[1]} blocks; here are {found[0]} + {found[1]}. '
            'Use "first_block", or in Python enable_cache(MagCacheConfig(mag_ratios=...)) with a table of your own.'
        )
    return FLUX_MAG_RATIOS
