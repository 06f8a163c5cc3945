"""A training step on the meta device: the real `train_step`, backward pass and optimizer, without memory and without arithmetic.

What is alive at its fullest moment is what the step needs, by part. The code itself is run, so that the prediction follows every change.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mosaic.config.loading import Config
from mosaic.data import MosaicBatch
from mosaic.lora.adapter import attach_reference_lora, reference_lora_parameters
from mosaic.method.grids import PATCH, token_grid
from mosaic.model.attention_rows import CaptureRequest, HeadWeights, resolve_capture_blocks
from mosaic.model.recomputation import set_gradient_checkpointing
from mosaic.model.transformer import MosaicFluxTransformer2DModel, MosaicTransformerOutput
from mosaic.pipeline.encoders import Encoders, PromptEmbeddings
from mosaic.pipeline.pipeline import DTYPES
from mosaic.planning.meta_kernels import kernels_of
from mosaic.planning.model_shape import ModelShape
from mosaic.planning.storage_meter import TEMPORARY, StorageMeter, storage_bytes
from mosaic.training.objective import Transformer, call_settings, draw_inputs, sample_generators, train_step
from mosaic.weights.quantization import quantize_base

BASE, ADAPTER, GRADIENTS, OPTIMIZER = "base weights", "adapter", "gradients", "optimizer state"
SAVED, ROWS, TRANSIENT = "saved activations", "captured rows", "transient"


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Attributes:
        peak: By part, at the moment when most is alive; the sum is the peak.
        saved: Activations alive between the forward and the backward pass, captured rows included.
        base: Frozen weights as they lie in memory here, in `model.dtype`.
    """

    peak: Counter[str]
    saved: int
    base: int


def dry_run(config: Config, shape: ModelShape, num_references: int, device_type: str = "cuda") -> StepMemory:
    """Run one optimizer step on the meta device, from the second one on, when the optimizer has its state.

    Args:
        config: The run's settings; sizes and batch are the largest that it allows.
        shape: The base model's shape.
        num_references: K.
        device_type: Whose kernels and autocast are followed: "cuda" or "cpu".

    Raises:
        ValueError: If a size does not fit the tokens.
    """
    transformer = build_transformer(config, shape)
    step = StandInStep(config, shape, num_references, transformer)
    parameters = reference_lora_parameters(transformer)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.optimizer.learning_rate)
    for parameter in parameters.values():  # the state that the first step would leave
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    # With accumulation the gradients of the micro-batch before are still alive while this one runs.
    if config.training.gradient_accumulation_steps == 1:
        optimizer.zero_grad(set_to_none=True)

    meter = StorageMeter()
    with meter, kernels_of(device_type, _autocast(config)):
        meter.mark(BASE, [p for p in transformer.parameters() if not p.requires_grad])
        meter.mark(ADAPTER, parameters.values())
        meter.mark(OPTIMIZER, [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)])
        meter.mark(GRADIENTS, [p.grad for p in parameters.values() if p.grad is not None])
        # Gradients come into being within the backward pass, and would count as temporary otherwise.
        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(lambda p: meter.mark(GRADIENTS, [p.grad]))
        meter.reset_peak()
        loss = step()
        # What is alive now, and was not marked, is what autograd has saved for the backward pass.
        saved, forward_peak = meter.live[TEMPORARY], meter.peak
        meter.relabel(TEMPORARY, SAVED)
        meter.reset_peak()
        loss.backward()
        backward_peak = meter.peak
        del loss
        meter.reset_peak()
        optimizer.step()
    # A peak inside the forward pass does not know yet what will be kept.
    forward_peak[SAVED] = min(saved, forward_peak[TEMPORARY])
    forward_peak[TEMPORARY] -= forward_peak[SAVED]
    peak = max(forward_peak, backward_peak, meter.peak, key=lambda parts: parts.total())
    peak[TRANSIENT] = peak.pop(TEMPORARY, 0)
    base = storage_bytes(p for p in transformer.parameters() if not p.requires_grad)
    return StepMemory(+peak, saved, base)


def saved_bytes(config: Config, shape: ModelShape, num_references: int, device_type: str, supervised: bool) -> int:
    """`StepMemory.saved` of a step, which ends here after its forward pass.

    Args:
        config: As in `dry_run`.
        shape: As in `dry_run`.
        num_references: As in `dry_run`.
        device_type: As in `dry_run`.
        supervised: False leaves out the captured rows and the losses on them.
    """
    transformer = build_transformer(config, shape)
    step = StandInStep(config, shape, num_references, transformer, supervised)
    with StorageMeter() as meter, kernels_of(device_type, _autocast(config)):
        meter.mark(BASE, transformer.parameters())
        loss = step()
        saved = meter.live[TEMPORARY]
        del loss
    return saved


def _autocast(config: Config) -> torch.dtype | None:
    return torch.bfloat16 if config.training.mixed_precision == "bf16" else None


def row_bytes(config: Config, shape: ModelShape, num_references: int, device_type: str = "cuda") -> int:
    """Bytes that the captured rows, and the losses on them, add to what is alive between forward and backward pass.

    Counted on one and on two blocks of each kind, since every further captured block adds the same.
    """
    # The few blocks here may not have the numbers that the config names.
    every = config.replace(loss=config.loss.replace(capture_blocks="all"))

    def added(count: int) -> int:
        shallow = replace(shape, transformer={**shape.transformer, "num_layers": count, "num_single_layers": count})
        with_rows, without = (saved_bytes(every, shallow, num_references, device_type, supervised) for supervised in (True, False))
        return with_rows - without

    double, single = shape.transformer["num_layers"], shape.transformer["num_single_layers"]
    captured = len(resolve_capture_blocks(config.loss.capture_blocks, double, single))
    # The first block of each kind also pays what is there once, such as the losses; the difference is a block's own share.
    two, four = added(1), added(2)
    return max(two + (captured - 2) * (four - two) // 2, 0)


def build_transformer(config: Config, shape: ModelShape, device: str = "meta") -> MosaicFluxTransformer2DModel:
    """The transformer with its adapter as training has them, with memory only if the device has it.

    One block of each kind is built and copied: they are all alike, and adapting 57 of them one by one takes half a minute.
    """
    values = {**shape.transformer}
    blocks = {name: values[name] for name in ("num_layers", "num_single_layers")}
    with torch.device(device):
        transformer = MosaicFluxTransformer2DModel(**{**values, **dict.fromkeys(blocks, 1)})
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(DTYPES[config.model.dtype])
        if device != "meta":  # without memory a format is counted by the memory model
            quantize_base(transformer, config.model.quantization, torch.device(device))
        attach_reference_lora(transformer, config.lora.rank)
    for parameter in reference_lora_parameters(transformer).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for stack, count in zip((transformer.transformer_blocks, transformer.single_transformer_blocks), blocks.values(), strict=True):
        stack.extend(copy.deepcopy(stack[0]) for _ in range(count - 1))
    transformer.register_to_config(**blocks)
    recomputed = config.model.gradient_checkpointing != "none"  # what "keep_attention" keeps beside is added by the memory model
    set_gradient_checkpointing(transformer, "block" if recomputed else "none")
    return transformer


class StandInStep:
    """Forward pass and losses of `train_step` on the largest batch that a config allows; latents and embeddings are noise."""

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        num_references: int,
        transformer: MosaicFluxTransformer2DModel,
        supervised: bool = True,
        forward: Transformer | None = None,
    ) -> None:
        """The batch is drawn once.

        Args:
            config: As in `dry_run`.
            shape: As in `dry_run`.
            num_references: As in `dry_run`.
            transformer: Whose device and number format the batch has.
            supervised: False leaves out the captured rows and the losses on them.
            forward: What is called in the transformer's place; None: itself.
        """
        data = config.data.replace(image_dropout=0.0, text_dropout=0.0, both_dropout=0.0)
        self.config, self.supervised = config.replace(data=data), supervised
        self.encoders, self.device = NoiseEncoders(shape, transformer.device, transformer.dtype), transformer.device
        self.call = call_settings(config, transformer)
        self.batch = largest_batch(config, shape, num_references)
        self.forward = (forward or transformer) if supervised else _without_capture(transformer)
        self.autocast = config.training.mixed_precision == "bf16" and transformer.device.type != "meta"

    def __call__(self) -> Tensor:
        """The loss: all terms, or flow matching alone where nothing is supervised."""
        generators = sample_generators(0, 0, len(self.batch.ids))
        inputs = draw_inputs(self.encoders, self.batch, self.config, generators, self.device)
        loss = train_step(self._transformer, *inputs, self.config.loss, 0, self.call)
        return loss.total if self.supervised else loss.flow_matching

    def _transformer(self, **inputs: Any) -> Any:
        """The forward pass under autocast, as accelerate has it: the losses are outside."""
        with torch.autocast(inputs["hidden_states"].device.type, torch.bfloat16) if self.autocast else nullcontext():
            return self.forward(**inputs)


def _without_capture(transformer: nn.Module) -> Any:
    """The transformer as a function that reads no rows; it returns zero rows, which cost nothing to keep."""

    def forward(capture: CaptureRequest, **inputs: Any) -> MosaicTransformerOutput:
        output = transformer(**inputs)
        batch, num_target, _ = output.sample.shape
        zero = torch.zeros((), device=output.sample.device)
        if capture.global_index is not None:
            output["attention_rows"] = zero.expand(batch, capture.global_index.shape[1], num_target)
        num_references, num_reference_tokens = inputs["reference_hidden_states"].shape[1:3]
        if capture.all_tokens:
            output["reference_rows"] = zero.expand(batch, num_references, num_target)
        if capture.target_index is not None:
            num_points = capture.target_index.shape[1]
            if capture.each_head:
                of_target = zero.expand(batch, 1, num_points) if capture.target_keys is not None else None
                output["head_weights"] = HeadWeights(zero.expand(batch, 1, num_points), of_target, of_target)
            else:
                output["target_rows"] = zero.expand(batch, num_points, num_references * num_reference_tokens)
        return output

    return forward


class NoiseEncoders(Encoders):
    """Noise of the right shapes in place of embeddings and latents."""

    def __init__(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> None:
        self._shape, self._device, self._dtype = shape, device, dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell."""
        return self._shape.vae_scale_factor

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> PromptEmbeddings:
        """Noise [B, T, d] and [B, d_pooled]."""
        model = self._shape.transformer
        return PromptEmbeddings(
            self._noise(len(prompts), max_sequence_length, model["joint_attention_dim"]),
            self._noise(len(prompts), model["pooled_projection_dim"]),
        )

    def encode_images(self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Noise [B, C, h, w]."""
        scale = self._shape.vae_scale_factor
        return self._noise(len(images), self._shape.transformer["in_channels"] // PATCH**2, *(side // scale for side in images.shape[-2:]))

    def _noise(self, *size: int) -> Tensor:
        return torch.randn(size, device=self._device, dtype=self._dtype)


def largest_batch(config: Config, shape: ModelShape, num_references: int) -> MosaicBatch:
    """Pictures of the largest size that a config allows, with as many points as it supervises."""
    data, batch = config.data, config.training.batch_size
    height, width = max(data.buckets or [data.image_size], key=lambda size: size[0] * size[1])
    target = token_grid(height, width, shape.vae_scale_factor, where="data.image_size or data.buckets")
    reference = token_grid(data.reference_size, data.reference_size, shape.vae_scale_factor, where="data.reference_size")
    if num_references < 1:
        raise ValueError(f"the number of references must be at least 1, got {num_references}.")
    points = []
    for k in range(num_references):
        count = min(-(-config.loss.max_points // num_references), reference.num_tokens)
        u = torch.arange(count)
        # All points of a reference share a v, which no other reference has while K is at most N_tgt: disjoint (Eq. 2).
        points.append(torch.stack([u, torch.full_like(u, k % target.num_tokens)], dim=1))
    return MosaicBatch(
        [str(index) for index in range(batch)],
        [""] * batch,
        torch.zeros(()).expand(batch, 3, height, width),
        torch.zeros(()).expand(batch, num_references, 3, data.reference_size, data.reference_size),
        [points] * batch,
        masks=torch.zeros(()).expand(batch, num_references, target.num_tokens) if config.loss.region_weight > 0 else None,
    )
