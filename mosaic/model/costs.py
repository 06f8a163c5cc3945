"""FLOPs of a training step and of a sampling run: multiply-adds times two of every matrix product, in closed form.

Notation: d the transformer's width, L its blocks, T text tokens, N target tokens, K references of R tokens, r the LoRA rank. Both kinds of
block hold 12 d^2 weights per token (double-stream, per stream: q, k, v, out and an MLP of 8 d^2; single-stream: q, k, v, the MLP's entry
and the common exit). A (query, key) pair costs 4 d per block. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mosaic.files import shown

MLP_RATIO = 4  # of FLUX's blocks
TIMESTEP_CHANNELS = 256  # sinusoids under FLUX's timestep and guidance embedding
CHECKPOINTING_MODES = ("none", "block", "keep_attention")

#: `transformer/config.json` of black-forest-labs/FLUX.1-dev: known without the hub.
FLUX_DEV: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


@dataclass(frozen=True)
class Workload:
    """What passes through the transformer, and how.

    Attributes:
        batch_size: Samples, or pictures.
        num_references: K.
        target_tokens: N.
        reference_tokens: R, of one reference.
        text_tokens: T.
        lora_rank: r; 0 leaves the adapter out.
        reference_attention: "target", "joint" or "isolated".
    """

    batch_size: int
    num_references: int
    target_tokens: int
    reference_tokens: int
    text_tokens: int
    lora_rank: int
    reference_attention: str

    @property
    def main_tokens(self) -> int:
        """T + N, of one sample."""
        return self.text_tokens + self.target_tokens

    @property
    def all_reference_tokens(self) -> int:
        """K R, of one sample."""
        return self.num_references * self.reference_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.batch_size * (self.main_tokens + self.all_reference_tokens)


class ForwardFlops(NamedTuple):
    """FLOPs of one forward pass, by what their backward pass costs.

    Attributes:
        linear: Linear layers of the blocks and the exit, base weights; their backward is one product, for the input.
        attention: Q K^T and P V.
        lora: The reference adapter; its backward is two products, for input and weights.
        conditioning: Embedders and AdaLN, base weights; nothing before them is trained, so they have no backward.
    """

    linear: float
    attention: float
    lora: float
    conditioning: float

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(self))


def forward_flops(transformer_config: Mapping[str, Any], load: Workload) -> ForwardFlops:
    """FLOPs of one forward pass without captured rows, by `transformer/config.json` of a diffusers FLUX folder, or `FLUX_DEV`.

    Raises:
        ValueError: If the load's `reference_attention` is unknown.
    """
    d, double, single = width(transformer_config), transformer_config["num_layers"], transformer_config["num_single_layers"]
    channels, blocks = transformer_config["in_channels"], double + single
    exit_channels = transformer_config.get("out_channels") or channels
    references = load.all_reference_tokens
    everything = load.main_tokens + references

    linear = 2 * 12 * d * d * blocks * everything + 2 * d * exit_channels * load.target_tokens
    attention = 4 * d * blocks * attention_pairs(load)
    # Per adapted layer r (d_in + d_out) weights. Double-stream: q, k, v, out 2d each, the MLP's exit 5d, AdaLN 7d on one vector.
    # Single-stream: q, k, v 2d each, the MLP's entry 5d, the exit 6d, AdaLN 4d.
    per_token, per_vector = channels + d + d * (13 * double + 17 * single), d * (7 * double + 4 * single)
    lora = 2 * load.lora_rank * (per_token * references + per_vector * bool(load.num_references))

    branches = 2 if load.num_references else 1  # conditioning vectors: the main one, and one that all references share
    embedders = TIMESTEP_CHANNELS * (2 if transformer_config["guidance_embeds"] else 1) + transformer_config["pooled_projection_dim"]
    squares = 3 if transformer_config["guidance_embeds"] else 2
    adaln = (6 * double + 3 * single) * branches + 6 * double + 2  # both branches; the text stream's; the exit's
    tokens = d * (load.text_tokens * transformer_config["joint_attention_dim"] + (load.target_tokens + references) * channels)
    conditioning = 2 * (tokens + branches * (embedders * d + squares * d * d) + adaln * d * d)
    return ForwardFlops(*(float(load.batch_size * part) for part in (linear, attention, lora, conditioning)))


def training_step_flops(transformer_config: Mapping[str, Any], load: Workload, gradient_checkpointing: str) -> float:
    """FLOPs of forward and backward of one micro-batch, without the captured rows (`captured_row_flops`), encoders and optimizer.

    The backward pass of a frozen linear layer is one product (no weight gradient), of LoRA two, of attention 2.5 (five products for two,
    as flash attention's kernels do it). Checkpointing computes the blocks once more. For a model FLOPs utilisation (MFU) count with
    `gradient_checkpointing="none"`: what is computed twice is no progress.

    Args:
        transformer_config: See `forward_flops`.
        load: One micro-batch.
        gradient_checkpointing: "none", "block" (blocks are computed again) or "keep_attention" (all of them but their attention).

    Raises:
        ValueError: If a mode is unknown.
    """
    if gradient_checkpointing not in CHECKPOINTING_MODES:
        raise ValueError(f"gradient_checkpointing must be one of {', '.join(CHECKPOINTING_MODES)}, got {shown(gradient_checkpointing)}.")
    forward = forward_flops(transformer_config, load)
    backward = forward.linear + 2.5 * forward.attention + 2 * forward.lora
    again = {"none": 0.0, "block": forward.linear + forward.attention + forward.lora, "keep_attention": forward.linear + forward.lora}
    return forward.total + backward + again[gradient_checkpointing]


def sampling_flops(
    transformer_config: Mapping[str, Any],
    load: Workload,
    num_inference_steps: int,
    reference_steps: int | None = None,
    skipped_steps: int = 0,
) -> float:
    """FLOPs of the transformer in one sampling run; image guidance, which runs it twice a step, doubles them. Encoders are not in it.

    Args:
        transformer_config: See `forward_flops`.
        load: The pictures.
        num_inference_steps: Sampling steps.
        reference_steps: Steps in which the references run; in the others text and target use their kept keys and values. 1 with a
            reference cache, ceil(steps / N) where it is refreshed every N steps. None: every step, without a cache.
        skipped_steps: Steps in which a first-block cache runs only the first block; those without references come first.

    Raises:
        ValueError: If the mode is unknown, or there are more such steps than steps.
    """
    if reference_steps is None:
        reference_steps = num_inference_steps
    for name, count in (("reference_steps", reference_steps), ("skipped_steps", skipped_steps)):
        if not 0 <= count <= num_inference_steps:
            raise ValueError(f"{name} must be in 0..num_inference_steps ({num_inference_steps}), got {count}.")
    first_block = {**transformer_config, "num_layers": 1, "num_single_layers": 0}

    def step(config: Mapping[str, Any], with_references: bool) -> float:
        if with_references:
            return forward_flops(config, load).total
        # Kept references have no queries: only text and target attend to their keys.
        over_kept = 4.0 * width(config) * (config["num_layers"] + config["num_single_layers"]) * load.batch_size
        over_kept *= load.main_tokens * load.all_reference_tokens
        return forward_flops(config, replace(load, num_references=0)).total + over_kept

    skipped_without = min(skipped_steps, num_inference_steps - reference_steps)
    skipped_with = skipped_steps - skipped_without
    return (
        (reference_steps - skipped_with) * step(transformer_config, True)
        + (num_inference_steps - reference_steps - skipped_without) * step(transformer_config, False)
        + skipped_with * step(first_block, True)
        + skipped_without * step(first_block, False)
    )


def captured_row_flops(
    transformer_config: Mapping[str, Any],
    load: Workload,
    num_points: int,
    captured_blocks: int,
    all_tokens: bool,
    further_pairs: int = 0,
) -> float:
    """FLOPs of the supervised attention rows in forward and backward: one product, and three with the softmax computed anew.

    One product less where rows are tiny and saved (`mosaic.model.attention_rows.SAVED_BYTES`), which none of FLUX.1-dev's are.

    Args:
        transformer_config: See `forward_flops`.
        load: One micro-batch.
        num_points: P, points of a sample over all references.
        captured_blocks: Blocks whose attention is supervised.
        all_tokens: Whether the rows of all reference tokens are read as well.
        further_pairs: (query, key) pairs of a sample in other rows that are read: of target tokens, or a second time for single heads.
    """
    # Supervised rows are read from a product of their own, since fused attention never has the matrix in memory.
    rows = num_points + (load.all_reference_tokens if all_tokens else 0)
    pairs = rows * load.target_tokens + further_pairs
    return 4.0 * 2 * width(transformer_config) * load.batch_size * pairs * captured_blocks


def attention_pairs(load: Workload) -> int:
    """(query, key) pairs of one sample in one attention layer: text and target see everything, references what their mode says.

    Raises:
        ValueError: If the mode is unknown.
    """
    main, references = load.main_tokens, load.all_reference_tokens
    seen = {"joint": main + references, "target": main + load.reference_tokens, "isolated": load.reference_tokens}
    if load.reference_attention not in seen:
        raise ValueError(f"reference_attention must be one of {', '.join(seen)}, got {shown(load.reference_attention)}.")
    return main * (main + references) + references * seen[load.reference_attention]


def width(transformer_config: Mapping[str, Any]) -> int:
    """The transformer's d."""
    return transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]


def lora_parameter_count(transformer_config: Mapping[str, Any], rank: int) -> int:
    """Parameters of the reference LoRA: r (d_in + d_out) in each adapted layer; 463,609,856 for FLUX.1-dev at rank 128."""
    d, channels = width(transformer_config), transformer_config["in_channels"]
    return rank * (channels + d + d * (20 * transformer_config["num_layers"] + 21 * transformer_config["num_single_layers"]))


def base_parameter_count(transformer_config: Mapping[str, Any]) -> int:
    """Parameters of the frozen transformer; 11,901,408,320 for FLUX.1-dev."""
    d, head = width(transformer_config), transformer_config["attention_head_dim"]
    channels, double, single = transformer_config["in_channels"], transformer_config["num_layers"], transformer_config["num_single_layers"]
    inner = MLP_RATIO * d

    def linear(fan_in: int, fan_out: int) -> int:
        return fan_in * fan_out + fan_out

    stream = linear(d, 6 * d) + 4 * linear(d, d) + 2 * head + linear(d, inner) + linear(inner, d)
    single_block = linear(d, 3 * d) + 3 * linear(d, d) + 2 * head + linear(d, inner) + linear(d + inner, d)
    sinusoids = (2 if transformer_config["guidance_embeds"] else 1) * (linear(TIMESTEP_CHANNELS, d) + linear(d, d))
    text = linear(transformer_config["pooled_projection_dim"], d) + linear(d, d)
    entry = linear(channels, d) + linear(transformer_config["joint_attention_dim"], d)
    leave = linear(d, 2 * d) + linear(d, transformer_config.get("out_channels") or channels)
    return double * 2 * stream + single * single_block + sinusoids + text + entry + leave
