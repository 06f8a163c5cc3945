"""The sections of a config: frozen models whose defaults are the paper's values (arXiv:2509.01977v1).

Every field is followed by its description. `mosaic.config.loading` puts the sections together and reads them from JSON.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.files import shown


def _in_64_bits(value: int) -> int:
    """The same integer; beyond 64 bits no library takes it."""
    if abs(value) >= 2**63:
        raise ValueError("beyond 64 bits")
    return value


Text = Annotated[str, Field(pattern=r"\S")]
Count = Annotated[int, Field(ge=1), AfterValidator(_in_64_bits)]
CountOrZero = Annotated[int, Field(ge=0), AfterValidator(_in_64_bits)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Probability = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Guidance = Annotated[float, Field(ge=0, le=100)]
Side = Annotated[int, Field(ge=1, le=8192)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Workers = Annotated[int, Field(ge=0, le=256)]
MAX_TEXT_LENGTH = 512  # the longest text that FLUX was trained with; diffusers refuses more
MAX_RANK = 3072  # the width of FLUX: beyond it a rank adds nothing
MAX_REFERENCES = 64  # of a sample in our format
MAX_BUCKETS = 256
MAX_BATCH = 4096  # samples or pictures at once
MAX_ACCUMULATION = 65_536
MAX_POINTS = 65_536
MAX_CASES = 1000
Blocks = Literal["all", "double"] | Annotated[tuple[CountOrZero, ...], Field(min_length=1)]
PRODIGY_MIN_RATE = 0.1
MAX_STRENGTH = 10  # of a reference, in a case or a call


class ModelConfig(Section):
    """The frozen base model and how references take part in its attention."""

    path: ClassVar[str] = "model"

    pretrained: Text = "black-forest-labs/FLUX.1-dev"
    """Folder of a diffusers FLUX pipeline, or its id on the Hugging Face hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the frozen weights. The adapter itself is always trained in float32."""
    reference_attention: Literal["target", "joint", "isolated"] = "target"
    """What a reference's tokens attend to. "target": text, target and that reference; "joint": everything (Eq. 7 as written);
    "isolated": that reference only."""
    reference_position: Literal["width", "index"] = "width"
    """Position ids of the references. "width": left of the target, one behind the other (paper; the published weights need it); "index": in
    the target's place, told apart on the first axis, whose id is 1, 2, ... for them and 0 for text and target."""
    quantization: Literal["none", "nf4", "int8", "fp8", "fp8_dynamic"] = "none"
    """Number format in which the frozen transformer's matrices are stored. "nf4" needs bitsandbytes; "int8" and "fp8" (weights only)
    need torchao: they save memory, not time. "fp8_dynamic" multiplies in 8 bits as well, forward and backward, for time: GPUs from compute
    capability 8.9 on; on a CPU it is emulated, for tests."""
    gradient_checkpointing: Literal["none", "block", "keep_attention"] = "block"
    """What the backward pass computes anew. "none": nothing; "keep_attention": the blocks but not their attention; "block": the whole
    blocks, the least memory. About 1.4 times the operations of "none"."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile: faster steps after slower first ones, on GPUs."""
    attention_backend: Text | None = None
    """Kernel of the attention in training by its name in diffusers, such as "_native_cudnn", "flash" or "_flash_3_hub"; inference has its
    own, `inference.attention_backend`. None: PyTorch's choice."""
    text_length: Annotated[int, Field(ge=1, le=MAX_TEXT_LENGTH)] = 512
    """Length in tokens to which prompts are padded or cut for the T5 encoder."""


class LoraConfig(Section):
    """The reference adapter, the only thing that learns. Its scale is 1: alpha equals the rank."""

    path: ClassVar[str] = "lora"

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 128
    """Rank of the adapter in every module."""
    pretrained: Text | None = None
    """Adapter to start training from: a safetensors file, a folder or a hub id. None: a fresh adapter (A gaussian, B zero)."""
    weight_name: Text | None = None
    """Name of the file inside `pretrained` where that is a folder or a hub id. None: lora.safetensors, or the released file of
    ByteDance-FanQie/MOSAIC."""
    resize: bool = False
    """Change the rank of `pretrained` to `rank`: a lower one by truncated SVD, a higher one exactly; false: another rank is refused."""


class DataConfig(Section):
    """The training samples and what is left out of them at random."""

    path: ClassVar[str] = "data"

    format: Literal["multi_reference", "semalign"] = "multi_reference"
    """What `root` holds. "multi_reference": our format, version 1; "semalign": SemAlign-MS-Subjects200K in its released layout."""
    root: Text = "data/train"
    """Folder of the data set; for our format also a URL that fsspec knows, or "user/name" on the Hugging Face hub."""
    split: Text = "train"
    """Split of the data set to train on. semalign: "train", "heldout" or "all"."""
    downsample: Literal["vote", "release"] = "vote"
    """semalign: the way from the 64 x 64 grid of its points to the training grids; "release" is the released loader's."""
    heldout_share: Probability = 0.01
    """semalign: share of the samples in the split "heldout", chosen by their ids."""
    parquet: Text | None = None
    """semalign: the Parquet files, a folder or one file; None: the folder `data` in `root`."""
    masks: Text | None = None
    """semalign: folder or zip archive of the masks; None: `mask` or `mask.zip` in `root`."""
    coordinates: Text | None = None
    """semalign: folder or zip archive of the coordinates; None: `coord` or `coord.zip` in `root`."""
    id_index: Text | None = None
    """semalign: index file of the sample ids, made if it is not there; None: `semalign_ids.parquet` in `root`."""
    image_size: tuple[Side, Side] = (512, 512)
    """Height and width of the target in pixels; both must be multiples of the model's token size (16 for FLUX.1). semalign: square."""
    buckets: Annotated[tuple[tuple[Side, Side], ...], Field(max_length=MAX_BUCKETS)] = ()
    """Heights and widths of targets in pixels, multiples of the token size; each target goes to the nearest aspect, and a batch holds
    targets of one bucket. Empty: all targets become `image_size`, which in any case is the size of validation pictures. Our format only."""
    reference_size: Side = 512
    """Side of the square reference pictures in pixels, in training and inference; a multiple of the model's token size."""
    max_references: Annotated[int, Field(ge=1, le=MAX_REFERENCES)] = 6
    """Samples with more references than this are refused."""
    reference_order: Literal["stored", "left_to_right"] = "stored"
    """Order of a sample's references. "stored": that of the data; "left_to_right": that in which their subjects stand in the target, by the
    mean column of their points, those without points last, so that at inference the first reference is the leftmost subject's. Our format
    only."""
    min_point_coverage: Probability = 0.95
    """Training refuses data of which a smaller share of the references has correspondence points; 0 trains on any."""
    max_points_outside: Probability = 0.05
    """Training refuses data of which, as far as 32 samples show it, a larger share of the points lies outside the masks over the target, or
    on the white around the references' subjects; 1 trains on any."""
    skip_invalid: bool = False
    """Leave out samples that cannot be read, after a pass over all of them, and list them in the run's folder; false: stop at the first."""
    latent_cache: Text | None = None
    """Folder that `preprocess/cache.py` fills with what the VAE makes of the pictures, and that training reads; None: training encodes."""
    text_cache: Text | None = None
    """Folder that `preprocess/cache.py` fills with what the text encoders make of the prompts (4 MiB each with FLUX.1), and that training
    reads; None: training encodes."""
    num_workers: Workers = 4
    """Processes that load data, per training process. 0: load in the training process."""
    image_dropout: Probability = 0.05
    """Probability that a sample loses all its references (zero latents) and its points, and keeps its prompt."""
    text_dropout: Probability = 0.05
    """Probability that a sample loses its prompt only."""
    both_dropout: Probability = 0.05
    """Probability that a sample loses references, points and prompt."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """The three dropouts exclude one another, so they must add up to at most 1. SemAlign's pictures all are square."""
        total = self.image_dropout + self.text_dropout + self.both_dropout
        if total > 1:
            raise FieldError("data.image_dropout", f"+ text_dropout + both_dropout must be at most 1, got {total:g}")
        if self.format == "semalign" and self.image_size[0] != self.image_size[1]:
            raise FieldError("data.image_size", f'must be square where data.format is "semalign", got {shown(self.image_size)}')
        if self.format == "semalign" and self.buckets:
            raise FieldError("data.buckets", f'must be empty where data.format is "semalign" (all square), got {shown(self.buckets)}')
        if self.format == "semalign" and self.reference_order != "stored":
            raise FieldError("data.reference_order", f'must be "stored" where data.format is "semalign", got "{self.reference_order}"')
        return self


LOSS_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "correspondence_weight": 0.4,
        "disentanglement_weight": 0.6,
        "correspondence_reduction": "reference",
        "disentanglement_rows": "points",
        "divergence": "symmetric_kl",
        "disentanglement_start_step": 0,
        "disentanglement_warmup_steps": 0,
        "disentanglement_cap": None,
        "capture_blocks": "all",
    },
    "release": {
        "correspondence_weight": 0.1,
        "disentanglement_weight": 1.0,
        "correspondence_reduction": "point",
        "disentanglement_rows": "all",
        "divergence": "jensen_shannon",
        "disentanglement_start_step": 10_000,
        "disentanglement_warmup_steps": 1_000,
        "disentanglement_cap": None,
        "capture_blocks": "double",
    },
}
LOSS_PRESETS["light"] = LOSS_PRESETS["paper"] | {
    "correspondence_weight": 0.04,
    "disentanglement_weight": 0.06,
    "disentanglement_cap": 1.0,
}
"""What each preset sets: the losses as the paper states them, as the released training code computes them, and the paper's at a tenth of
their weights and with a cap (docs/ablation.md)."""


def _from_preset(name: str) -> Any:
    """Default of a loss field that takes its value from the preset when it is not given; a None that is given stays None."""
    return Field(default_factory=lambda given: LOSS_PRESETS[given["preset"]][name])


class LossConfig(Section):
    """The attention losses beside flow matching. `preset` fills every field that is not given; each can also be set by itself."""

    path: ClassVar[str] = "loss"

    preset: Literal["paper", "release", "light"] = "paper"
    """Source of the fields that are not given (`LOSS_PRESETS`)."""
    correspondence_weight: NotNegative = _from_preset("correspondence_weight")
    """Weight of the correspondence loss (alpha of Eq. 15), on each side that `supervised_queries` names. paper 0.4, release 0.1,
    light 0.04."""
    disentanglement_weight: NotNegative = _from_preset("disentanglement_weight")
    """Weight of the disentanglement loss after its warm-up (beta of Eq. 15). paper 0.6, release 1.0, light 0.06."""
    correspondence_reduction: Literal["reference", "point"] = _from_preset("correspondence_reduction")
    """The mean of Eq. 10. "reference": over the points of a reference, then over the references (paper); "point": over all points
    pooled (release)."""
    disentanglement_rows: Literal["points", "all"] = _from_preset("disentanglement_rows")
    """Rows averaged per reference (Eq. 11). "points": those at its points, renormalised (paper); "all": those of all its tokens, as
    they are (release)."""
    divergence: Literal["symmetric_kl", "jensen_shannon"] = _from_preset("divergence")
    """Divergence between two references' mean rows (Eq. 13). paper "symmetric_kl", release "jensen_shannon"."""
    disentanglement_start_step: CountOrZero = _from_preset("disentanglement_start_step")
    """Optimizer step until which the disentanglement weight is 0. paper 0, release 10000."""
    disentanglement_warmup_steps: CountOrZero = _from_preset("disentanglement_warmup_steps")
    """Optimizer steps over which that weight then rises linearly to its full value. paper 0, release 1000."""
    disentanglement_cap: Positive | None = _from_preset("disentanglement_cap")
    """Largest divergence that is still rewarded, in nats; None: no cap. Symmetric KL has no upper bound of its own. paper and release None,
    light 1."""
    capture_blocks: Blocks = _from_preset("capture_blocks")
    """Blocks whose attention is supervised. "all" (paper), "double" (release): the double-stream ones; or block numbers from 0,
    double-stream blocks first."""
    supervised_timesteps: tuple[Probability, Probability] = (0.0, 1.0)
    """Lowest and highest timestep t (0: clean, 1: pure noise) at which the attention losses count; a sample outside gives 0. Flow matching
    counts at every t."""
    max_points: Annotated[int, Field(ge=1, le=MAX_POINTS)] = 1024
    """Correspondence points per sample that are supervised in a step; a larger number is subsampled anew each step."""
    supervised_queries: Literal["reference", "target", "both"] = "reference"
    """Whose queries the correspondence loss pulls at. "reference": a reference's tokens, which look at the target (paper); "target": the
    target's tokens at the points, which look at the references; "both": each with `correspondence_weight`."""
    target_keys: Literal["all", "references"] = "all"
    """What the softmax of the target's rows runs over. "all": text, target and references, as the target attends; "references": these
    alone, so that only how attention is shared out among their tokens counts, not how much they get."""
    own_reference_weight: NotNegative = 0.0
    """Weight of the coarser form: minus the logarithm of the mass that the target's row at a point has on all tokens of the point's own
    reference."""
    region_weight: NotNegative = 0.0
    """Weight of the squared distance between a reference's mean row over the target, of all its tokens, and its mask in the target; 0: off.
    Data without masks give 0."""
    heads: Literal["mean", "each"] = "mean"
    """Where the cross-entropies take the mean over attention heads. "mean": of the rows, over heads and blocks (paper); "each": of the
    cross-entropies that every head of every block has by itself. The disentanglement loss always takes the mean of the rows."""
    decay_start_step: CountOrZero = 0
    """Optimizer step from which the weights of all attention losses fall linearly to 0 at `until_step`. Equal to it: they end at once."""
    until_step: Count | None = None
    """Optimizer step from which on flow matching trains alone; None: the attention losses keep their weights."""
    max_pull: Positive | None = None
    """Largest norm of the adapter's gradient by all weighted attention losses, as a share of that by flow matching; beyond it their weights
    are scaled down together. None: no limit."""
    pull_every: Count = 20
    """Optimizer steps between two measurements of that share, each of which costs two forward and backward passes of a micro-batch."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Intervals have two ends in order, and a block is supervised once."""
        low, high = self.supervised_timesteps
        if low >= high:
            raise FieldError("loss.supervised_timesteps", f"must be a lower and a higher timestep, got {shown(self.supervised_timesteps)}")
        if not isinstance(self.capture_blocks, str) and len(set(self.capture_blocks)) != len(self.capture_blocks):
            raise FieldError("loss.capture_blocks", f"must name each block once, got {shown(self.capture_blocks)}")
        if self.decay_start_step and self.until_step is None:
            raise FieldError("loss.decay_start_step", f"must be 0 where loss.until_step is null, got {self.decay_start_step}")
        if self.until_step is not None and self.decay_start_step > self.until_step:
            problem = f"must be at most loss.until_step, {self.until_step}, got {self.decay_start_step}"
            raise FieldError("loss.decay_start_step", problem)
        return self

    @property
    def supervises_target(self) -> bool:
        """Whether a term is read from the target's rows."""
        return self.supervised_queries != "reference" or self.own_reference_weight > 0


class OptimizerConfig(Section):
    """The optimizer of the adapter's weights, with a constant learning rate after an optional warm-up."""

    path: ClassVar[str] = "optimizer"

    name: Literal["adamw", "adamw_8bit", "prodigy"] = "adamw"
    """AdamW is "adamw"; "adamw_8bit": the same with 8-bit running means, a quarter of their memory, needs bitsandbytes; "prodigy" finds
    its step size by itself, needs prodigyopt."""
    learning_rate: Positive = 1e-4
    """Learning rate after the warm-up. prodigy: a factor on the step size it finds; use 1."""
    weight_decay: NotNegative = 1e-2
    """Decoupled weight decay."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decay rates of the two running means."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    max_grad_norm: Positive | None = 1.0
    """Norm to which the gradient is clipped; None: no clipping."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    ema_decay: Momentum | None = None
    """Decay of an exponential moving average of the adapter, which is then what is validated and exported; None: no average."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """A learning rate meant for AdamW would leave Prodigy standing still."""
        if self.name == "prodigy" and self.learning_rate < PRODIGY_MIN_RATE:
            raise FieldError(
                "optimizer.learning_rate",
                f'must be at least {PRODIGY_MIN_RATE} where optimizer.name is "prodigy" (a factor, usually 1), got {self.learning_rate:g}',
            )
        return self


class TrainingConfig(Section):
    """Length, batch, precision and outputs of a training run."""

    path: ClassVar[str] = "training"

    max_steps: Count | None = 100_000
    """Optimizer steps after which training ends; None: `max_epochs` alone decides."""
    max_epochs: Count | None = None
    """Passes over the data after which training ends, if `max_steps` has not ended it before; None: no such limit."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 1
    """Samples per process and micro-batch."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=MAX_ACCUMULATION)] = 1
    """Micro-batches per optimizer step."""
    seed: Seed = 42
    """Seed of the adapter's start, the order of the data, noise, timesteps and dropout."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Number format of the matrix products; losses, softmax rows and position ids stay float32."""
    output_dir: Text = "outputs/training"
    """Folder of the run: resolved config, logs, validation panels, checkpoints."""
    log_every: Count = 10
    """Optimizer steps between two log entries."""
    checkpoint_every: Count = 1000
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: Count | None = 3
    """Number of newest checkpoints that are kept; None: all."""
    milestone_every: Count | None = None
    """Checkpoints at multiples of this many steps are kept beside the newest; None: none."""
    best_metric: Literal["attention/exact", "attention/near"] | None = "attention/exact"
    """Validation result whose largest value so far marks a checkpoint that is kept beside the newest; None: none."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What happens where the loss or the gradient is not finite. "stop": save the batch's ids and a checkpoint of the steps before, then
    end; "skip": leave the batch out, with a note in the log."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where numbers are shown beside the run's own files. "wandb" must be installed; a tracker that fails never ends a run."""
    peak_tflops: Positive | None = None
    """Peak of one device in TFLOP/s, for the utilisation (MFU) that is logged; None: that of the data sheet for bf16 where the device is
    known, else none is logged."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """A run must have an end."""
        if self.max_steps is None and self.max_epochs is None:
            raise FieldError("training.max_steps", "must be an integer of at least 1 where max_epochs is null, got null")
        return self


class ValidationConfig(Section):
    """Pictures and attention accuracy of cases the training has not seen."""

    path: ClassVar[str] = "validation"

    every: Count | None = 1000
    """Optimizer steps between two validations; None: never."""
    split: Text = "heldout"
    """Split of `data.root` that gives the cases where `cases` is None, and the samples on which attention accuracy is measured."""
    cases: Text | None = None
    """Cases file for the panels; None: samples of `split`, evenly spread."""
    num_cases: Annotated[int, Field(ge=1, le=MAX_CASES)] = 4
    """Number of cases per validation."""
    num_inference_steps: Steps = 28
    """Sampling steps."""
    guidance_scale: Guidance = 3.5
    """Embedded guidance of the text and target branch; without effect on a model that has no guidance embedding."""
    image_guidance_scale: Guidance = 1.0
    """How far the velocity goes from that without references to that with them and beyond; 1: not beyond, and one pass per step."""
    seed: Seed = 42
    """Seed of the start noise."""


class InferenceConfig(Section):
    """Rendering of a cases file. The size of the references is `data.reference_size`."""

    path: ClassVar[str] = "inference"

    cases: Text = "example_cases.json"
    """Cases file, JSON or JSONL; its forms are in configs/cases.schema.json."""
    output_dir: Text = "outputs/inference"
    """Folder for the pictures and panels."""
    lora: Text | None = None
    """Reference adapter: a safetensors file, a folder or a hub id. None: the bare base model, which sees no references."""
    lora_weight_name: Text | None = None
    """Name of the file inside `lora` where that is a folder or a hub id. None: lora.safetensors, or the released file of
    ByteDance-FanQie/MOSAIC."""
    style_lora: Text | None = None
    """LoRA that acts on text and target, never on references: a safetensors file (keys of diffusers, kohya or ComfyUI), a folder or a hub
    id. None: no such LoRA."""
    style_lora_weight_name: Text | None = None
    """Name of the file inside `style_lora`. None: pytorch_lora_weights.safetensors."""
    style_lora_scale: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """Factor on `style_lora`; 0: no effect."""
    height: Side = 512
    """Height of the picture in pixels; a multiple of the model's token size."""
    width: Side = 512
    """Width of the picture in pixels; a multiple of the model's token size."""
    num_inference_steps: Steps = 28
    """Sampling steps."""
    guidance_scale: Guidance = 3.5
    """Embedded guidance of the text and target branch; without effect on a model that has no guidance embedding."""
    image_guidance_scale: Guidance = 1.0
    """How far the velocity goes from that without references (zero latents, 0) to that with them (1) and beyond. Other values than 1
    double the time of sampling."""
    reference_cache: bool = False
    """Compute the references at the first sampling step only, and keep their keys and values for the others. Exact; only where
    `model.reference_attention` is "isolated"."""
    refresh_references: Count | None = None
    """The same for the other modes: compute the references every so many sampling steps, an approximation. None, 1: at every step."""
    seed: Seed = 42
    """Seed of the start noise; the case with index i starts from seed + i, whatever the other cases are."""
    reference_scale: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Long side of the subject in a prepared reference, as a share of the picture's side."""
    report: bool = False
    """Also write a page per picture that shows where each reference looks, an overview page, and the numbers in the manifest."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 1
    """Pictures of equal size, settings and number of references that are made at once. Faster on GPUs, with more memory; in another batch
    size a picture differs by rounding."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile: faster pictures after a slower first one of every shape, on GPUs."""
    attention_backend: Text | None = None
    """Kernel of the attention by its name in diffusers, such as "_native_cudnn", "flash" or "_flash_3_hub". None: PyTorch's choice."""
    step_cache: Literal["none", "first_block", "mag"] = "none"
    """Leave most of the transformer out in steps that change little and repeat its last change: faster, an approximation. "first_block":
    the change of the first block decides; "mag": a table of FLUX.1-dev's changes decides, for models of its shape."""
    step_cache_threshold: Positive | None = None
    """How much change counts as little; higher is faster and less exact. None: diffusers' default, 0.05 for "first_block" and 0.06 for
    "mag"."""
    memory: Literal["none", "auto", "80gb", "48gb", "24gb", "16gb", "12gb"] = "none"
    """What is done to fit a device. "none" and "80gb": everything stays on it in `model.dtype`; "48gb": all prompts are encoded first, then
    the text encoders leave; "24gb": so, with the transformer in int8 (torchao); "16gb": so, in nf4 (bitsandbytes); "12gb": int8, block by
    block from CPU memory, T5 in int8; "auto": the first of them that is predicted to fit the free memory."""
    quantization: Literal["none", "nf4", "int8", "fp8", "fp8_dynamic"] | None = None
    """Number format of the frozen transformer's matrices; None: that of `memory`."""
    gguf: Text | None = None
    """GGUF file with the transformer's weights, in place of those of `model.pretrained`. Needs the package gguf."""
    quantized_cache: Text | None = "outputs/quantized"
    """Folder in which quantised weights are kept, so that they are quantised once; None: they are not kept."""
    num_threads: Annotated[int, Field(ge=1, le=4096)] = 1
    """CPU threads of a process. Pictures are equal bit for bit only at equal numbers, so the machine does not choose it."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Some settings exclude one another."""
        if self.step_cache == "none" and self.step_cache_threshold is not None:
            given = f'must be null where inference.step_cache is "none", got {self.step_cache_threshold:g}'
            raise FieldError("inference.step_cache_threshold", given)
        if self.step_cache == "mag" and self.compile:
            problem = 'must be false where inference.step_cache is "mag", which runs every block uncompiled, got true'
            raise FieldError("inference.compile", problem)
        if self.step_cache != "none" and self.report:
            problem = f'must be "none" where a report is written, which reads every block of every step, got {shown(self.step_cache)}'
            raise FieldError("inference.step_cache", problem)
        return self
