"""Predicted memory of one training process by part: the dry run, and what other number formats, optimizers and processes change in it."""

from collections.abc import Mapping

from mosaic.config.loading import Config
from mosaic.model.costs import base_parameter_count, lora_parameter_count, width
from mosaic.planning.dry_run import (
    ADAPTER,
    BASE,
    GRADIENTS,
    OPTIMIZER,
    ROWS,
    SAVED,
    TRANSIENT,
    dry_run,
    largest_batch,
    row_bytes,
)
from mosaic.planning.model_shape import ModelShape
from mosaic.training.distributed.environment import Distribution
from mosaic.training.distributed.zero import BUCKET_WEIGHTS

EMA, BUCKETS, ENCODERS, CONTEXT = "EMA", "gradient buckets", "text encoders and VAE", "CUDA context"
PARTS = (BASE, ADAPTER, GRADIENTS, BUCKETS, OPTIMIZER, EMA, SAVED, ROWS, TRANSIENT, ENCODERS, CONTEXT)

#: Bytes per frozen weight. nf4: half a byte and a float32 scale per 64 weights; the others: one byte (scales per row are negligible).
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0, "fp8_dynamic": 1.0}
#: Bytes per adapter weight of an optimizer's state. 8-bit: two bytes and two float32 scales per 256 weights; Prodigy: two moments, a sum
#: and the starting weights.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "prodigy": 16.0}
FORMAT_BYTES = {"bfloat16": 2, "float32": 4}
CONTEXT_BYTES = 2**30  # of a CUDA process before its first tensor, cuBLAS and cuDNN workspaces included; an assumption
GIB = 2**30


WHOLE = Distribution()


def predict_memory(
    config: Config,
    shape: ModelShape,
    num_references: int,
    device_type: str = "cuda",
    distribution: Distribution = WHOLE,
    dry: Mapping[str, int] | None = None,
    quantization: str | None = None,
) -> dict[str, int]:
    """Bytes by part at the fullest moment of a training step on the largest batch that the config allows.

    Args:
        config: The run's settings.
        shape: The base model's shape.
        num_references: K.
        device_type: "cuda" or "cpu".
        distribution: The processes, and what is shared out over them.
        dry: Result of `dry_parts` for these settings, where the caller has it already.
        quantization: Number format of the frozen weights; None: `model.quantization`.

    Returns:
        The parts of `PARTS`; tensors, and for CUDA the context. What an allocator loses to fragmentation is not in it.
    """
    parts = dict.fromkeys(PARTS, 0) | dict(dry or dry_parts(config, shape, num_references, device_type))
    adapter_weights = lora_parameter_count(shape.transformer, config.lora.rank)
    element = FORMAT_BYTES[config.model.dtype]
    quantization = quantization or config.model.quantization
    if quantization != "none":
        parts[BASE] = int(shape.base_parameters * QUANTIZED_BYTES[quantization])
        tokens = config.training.batch_size * sum(step_tokens(config, shape, num_references))
        parts[TRANSIENT] += unpacked_bytes(shape, quantization, element, tokens, trains=True)
    parts[OPTIMIZER] = int(adapter_weights * OPTIMIZER_BYTES[config.optimizer.name])
    if config.optimizer.ema_decay is not None:
        parts[EMA] = 4 * adapter_weights
    _share_out(parts, shape, adapter_weights, element, distribution)
    validates = config.validation.every is not None  # with encoders, cached or not
    if validates or config.data.latent_cache is None:
        parts[ENCODERS] += shape.encoders.get("vae", 0) * element
    if validates or config.data.text_cache is None:
        parts[ENCODERS] += (shape.encoders.get("text_encoder", 0) + shape.encoders.get("text_encoder_2", 0)) * element
    if device_type == "cuda":
        parts[CONTEXT] = CONTEXT_BYTES
    return parts


def unpacked_bytes(shape: ModelShape, quantization: str, element: int, tokens: int, trains: bool) -> int:
    """What a product with quantised weights needs beside its operands, at most.

    Args:
        shape: The base model's shape.
        quantization: Their number format, not "none".
        element: Bytes of a number of the model.
        tokens: That pass through the layer.
        trains: Whether there is a backward pass.
    """
    if quantization != "fp8_dynamic":
        return shape.largest_linear * element  # one layer is unpacked at a time
    # What comes into the single-stream blocks' exit, 5 d per token, as float32 quotients and 8 bits. Backward the gradient of their MLP's
    # entry, 4 d, times the weight's scales in float32 as well, and the weight transposed.
    d = width(shape.transformer)
    return max(5 * d * tokens * (4 + 1), trains * (4 * d * tokens * (4 + 4 + 1) + shape.largest_linear))


def _share_out(parts: dict[str, int], shape: ModelShape, adapter_weights: int, element: int, distribution: Distribution) -> None:
    """Change the parts from what the only process needs to what one of several needs.

    Replicas keep a copy of the gradients in buckets. A sharded base is gathered block by block, two at a time, and once what is outside of
    blocks. Shared optimizer state comes with a float32 copy of the adapter, and with room for the gradients that are being sent.
    """
    if distribution.base_shards > 1:
        parts[BASE] = -(-parts[BASE] // distribution.base_shards)
        outside = {**shape.transformer, "num_layers": 0, "num_single_layers": 0}
        block = base_parameter_count({**outside, "num_layers": 1}) - base_parameter_count(outside)
        parts[TRANSIENT] += (2 * block + base_parameter_count(outside)) * element
    elif distribution.optimizer_shards > 1:
        count = distribution.optimizer_shards
        parts[OPTIMIZER] = (parts[OPTIMIZER] + 4 * adapter_weights) // count
        parts[GRADIENTS] //= count
        parts[BUCKETS] = 4 * min(BUCKET_WEIGHTS, adapter_weights)
    elif distribution.processes > 1:
        parts[BUCKETS] = 4 * adapter_weights


def dry_parts(config: Config, shape: ModelShape, num_references: int, device_type: str = "cuda") -> dict[str, int]:
    """The parts that a dry run gives, captured rows apart from the other saved activations."""
    memory = dry_run(config, shape, num_references, device_type)
    rows = min(row_bytes(config, shape, num_references, device_type), memory.peak[SAVED])
    parts = {**memory.peak, ROWS: rows, SAVED: memory.peak[SAVED] - rows}
    if config.model.gradient_checkpointing == "keep_attention":
        parts[SAVED] += kept_attention_bytes(config, shape, num_references)
    return parts


def kept_attention_bytes(config: Config, shape: ModelShape, num_references: int) -> int:
    """Outputs of attention and their log-sum-exps in all blocks: what "keep_attention" keeps beside what "block" keeps."""
    tokens = step_tokens(config, shape, num_references)
    blocks = shape.transformer["num_layers"] + shape.transformer["num_single_layers"]
    element = 2 if config.training.mixed_precision == "bf16" else FORMAT_BYTES[config.model.dtype]
    per_token = width(shape.transformer) * element + 4 * shape.transformer["num_attention_heads"]
    return config.training.batch_size * sum(tokens) * per_token * blocks


def step_tokens(config: Config, shape: ModelShape, num_references: int) -> tuple[int, int, int]:
    """Tokens of text, target and all references of one sample of the largest size.

    Raises:
        ValueError: If a size does not fit the tokens.
    """
    batch, side = largest_batch(config, shape, num_references), shape.vae_scale_factor * 2
    target = (batch.targets.shape[-2] // side) * (batch.targets.shape[-1] // side)
    return config.model.text_length, target, num_references * (config.data.reference_size // side) ** 2
