"""What a training run needs from its surroundings, looked at before anything heavy is loaded: weights, packages, disk, folders, data."""

import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from mosaic.config.loading import Config
from mosaic.data.cache.latents import cached_latent_bytes
from mosaic.data.cache.texts import cached_text_bytes
from mosaic.files import read_json
from mosaic.lora.files import LoraFile
from mosaic.lora.keys import find_modules
from mosaic.lora.zeros import ALL_ZERO, changes_nothing
from mosaic.model.costs import lora_parameter_count
from mosaic.planning.data_checks import DataFacts, look_at_data
from mosaic.planning.findings import NOTE, OK, STOP, Finding, Findings
from mosaic.planning.memory_model import FORMAT_BYTES, GIB, OPTIMIZER_BYTES
from mosaic.planning.model_shape import ENCODERS, ModelShape
from mosaic.rendering.cases.reading import load_cases
from mosaic.training.checkpoints.checkpoint import checkpoint_folders, find_checkpoint
from mosaic.training.distributed.environment import check_distribution, read_distribution, said_elsewhere, uses_deepspeed, uses_fsdp
from mosaic.training.optimizers import check_optimizer
from mosaic.training.starting import check_output, check_rank, open_adapter
from mosaic.weights.hub import require_model_name, resolve_lora_file
from mosaic.weights.quantization import check_quantization

HUB_TIMEOUT = 5.0  # seconds
OTHER_COMPONENTS = ("tokenizer", "tokenizer_2", "scheduler")


class Surroundings(NamedTuple):
    """Everything but the device.

    Attributes:
        facts: What is known of the data.
        findings: What was looked at.
    """

    facts: DataFacts
    findings: list[Finding]


def look_around(config: Config, shape: ModelShape, environ: Mapping[str, str], resume: str | None) -> Surroundings:
    """Look at everything but the device.

    Args:
        config: The run's settings.
        shape: The base model's shape.
        environ: Variables of one of the run's processes.
        resume: A checkpoint folder, or "auto" for the newest sound one of the run; None: a fresh start.

    Raises:
        ValueError: A size does not fit the tokens.
    """
    place = Findings()
    folder = Path(config.training.output_dir)
    checkpoint = place.step("training.output_dir", lambda: _find_checkpoint(folder, resume), partial(_describe_output, folder))
    facts, findings = look_at_data(config, shape, read_distribution(environ).processes, checkpoint)
    if uses_fsdp(environ) or uses_deepspeed(environ) or said_elsewhere(environ) is not None:
        findings.step("Accelerate config", lambda: check_distribution(config.optimizer, environ), lambda _: "as training takes it.")
    if config.validation.every is not None and config.validation.cases is not None:
        cases = partial(load_cases, config.validation.cases, config.data.reference_size)
        findings.step("validation.cases", cases, lambda found: f"{len(found)} cases.")
    findings.append(_check_model(config.model.pretrained, shape))
    adapter = config.lora.pretrained
    if adapter is not None and checkpoint is None:
        if _looks_like_hub_id(adapter):
            findings.append(Finding(NOTE, "lora.pretrained", f"{adapter}: looked for on the Hub when training starts."))
        else:
            findings.step("lora.pretrained", lambda: _adapter_header(config, shape), str)
    quantization, optimizer = config.model.quantization, config.optimizer
    findings.step("model.quantization", lambda: check_quantization(quantization), lambda _: f'"{quantization}" can be used.')
    findings.step("optimizer.name", lambda: check_optimizer(optimizer), lambda _: f'"{optimizer.name}" can be used.')
    return Surroundings(facts, [*findings, *place, *check_disk(config, shape, facts)])


def _find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that a run in this folder would continue."""
    check_output(folder)
    return find_checkpoint(resume, folder / "checkpoints")


def _describe_output(folder: Path, checkpoint: Path | None) -> str:
    return f"{folder}: " + ("a new run." if checkpoint is None else f"continues from {checkpoint.name}.")


def _adapter_header(config: Config, shape: ModelShape) -> str:
    """What the file of the adapter to start from says.

    Raises:
        FileNotFoundError, OSError, ValueError: There is no such file, or it does not fit.
    """
    lora = config.lora
    assert lora.pretrained is not None
    path = resolve_lora_file(lora.pretrained, lora.weight_name)
    file = open_adapter(config) if shape.is_local else LoraFile(path, "reference LoRA")  # of another model the shape is not known
    rank = max(max(file.shape(keys.down)[:1], default=0) for keys in find_modules(file, str(file.path)).values())
    check_rank(rank, lora, file.path)
    resized = "" if rank == lora.rank else f", to be resized to {lora.rank}"
    return f"{file.path}: rank {rank}{resized}." + (f" But {ALL_ZERO}." if changes_nothing(file.path) else "")


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists() and not name.endswith(".safetensors") and not name.startswith((".", "/"))


def _check_model(name: str, shape: ModelShape) -> Finding:
    """The base model: a folder's files, or whether the hub would give it. Downloads nothing."""
    subject = "model.pretrained"
    if shape.is_local:
        folder = Path(name)
        needed = [folder / "model_index.json", *(folder / part / "config.json" for part in ("transformer", *ENCODERS))]
        missing = [str(path) for path in needed if not path.is_file()]
        try:
            missing += [file for part in ("transformer", *ENCODERS) for file in _missing_weights(folder / part)]
        except (OSError, ValueError) as error:
            return Finding(STOP, subject, str(error))
        missing += [str(folder / part) for part in OTHER_COMPONENTS if not any((folder / part).glob("*"))]
        if missing:
            return Finding(STOP, subject, f"not a complete diffusers FLUX folder; missing: {', '.join(missing)}.")
        return Finding(OK, subject, f"{name}: a local folder, {shape.base_parameters:,} parameters.")
    try:
        require_model_name(name)
    except OSError as error:
        return Finding(STOP, subject, str(error))
    if isinstance(try_to_load_from_cache(name, "model_index.json"), str):
        return Finding(OK, subject, f"{name}: in the local cache.")
    licence = f"accept its licence at https://huggingface.co/{name} and log in with `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        return Finding(NOTE, subject, f"{name}: not in the local cache, and HF_HUB_OFFLINE is set. FLUX.1-dev's shape is assumed.")
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
        HfApi().auth_check(name)
    except GatedRepoError:
        return Finding(STOP, subject, f"{name}: gated, and this machine has no access: {licence}.")
    except RepositoryNotFoundError:
        return Finding(STOP, subject, f"{name}: there is no such repository, or it is private: check the spelling, or log in.")
    except Exception as error:  # no network, a proxy, a time-out: the client knows many errors, and none of them is the run's fault
        reason = type(error).__name__
        return Finding(NOTE, subject, f"{name}: the Hub cannot be reached from here ({reason}); if it is gated, {licence}.")
    return Finding(OK, subject, f"{name}: the Hub would give it; training downloads it first.")


def _missing_weights(folder: Path) -> list[str]:
    """The weights of a component that its index names and that are not there; without an index, any.

    Raises:
        ValueError: The index is damaged.
    """
    for index in folder.glob("*.safetensors.index.json"):
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f'{index}: must name the file of each tensor under "weight_map".')
        return [str(folder / name) for name in sorted(set(shards.values())) if not (folder / name).is_file()]
    found = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return [] if found else [str(folder / "*.safetensors")]


def check_disk(config: Config, shape: ModelShape, facts: DataFacts) -> Iterator[Finding]:
    """Room for the checkpoints and for caches that are still to be filled."""
    adapter = lora_parameter_count(shape.transformer, config.lora.rank)
    copies = 4 + OPTIMIZER_BYTES[config.optimizer.name] + (4 if config.optimizer.ema_decay is not None else 0)
    num_checkpoints, remark = _num_checkpoints(config, facts)
    there = len(checkpoint_folders(Path(config.training.output_dir) / "checkpoints"))
    remark = f"{remark}, beside {there} that are there" if there else remark
    yield _room("checkpoints", config.training.output_dir, adapter * copies, max(num_checkpoints - there, 1), remark)
    for name, (size, count) in cache_bytes(config, shape, facts).items():
        folder = getattr(config.data, name)
        if folder is not None and count is not None and not Path(folder).is_dir():
            yield _room(f"data.{name}", folder, size, count, " at most" if name == "latent_cache" else "")


def _num_checkpoints(config: Config, facts: DataFacts) -> tuple[int, str]:
    """How many checkpoints lie on the disk at a time, and what goes beyond that number."""
    training = config.training
    ends = [training.max_steps, training.max_epochs and facts.steps_per_epoch and training.max_epochs * facts.steps_per_epoch]
    steps = min((end for end in ends if end is not None), default=None)
    if training.keep_checkpoints is None:
        if steps is None:
            return 1, " each, and no limit to their number (training.keep_checkpoints)"
        return -(-steps // training.checkpoint_every), ", all that the run writes (training.keep_checkpoints)"
    count = training.keep_checkpoints + 1  # one more while the newest is written
    if training.best_metric is not None and config.validation.every is not None:
        count += 1
    if training.milestone_every is None:
        return count, ""
    if steps is None:
        return count, " and every milestone (training.milestone_every)"
    return count + steps // math.lcm(training.milestone_every, training.checkpoint_every), ""


def cache_bytes(config: Config, shape: ModelShape, facts: DataFacts) -> dict[str, tuple[int, int | None]]:
    """Bytes of an entry of each cache, and the number of entries; of pictures as for the largest bucket and the most references."""
    data, element, transformer = config.data, FORMAT_BYTES[config.model.dtype], shape.transformer
    target = max(data.buckets or (data.image_size,), key=math.prod)
    channels = transformer["in_channels"] // 4
    latents = cached_latent_bytes(target, data.reference_size, facts.max_references, shape.vae_scale_factor, channels, element)
    widths = (transformer["joint_attention_dim"], transformer["pooled_projection_dim"])
    text = cached_text_bytes(config.model.text_length, *widths, element)
    return {"latent_cache": (latents, facts.num_samples), "text_cache": (text, facts.num_prompts)}


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _room(subject: str, folder: str, size: float, count: int, remark: str) -> Finding:
    needed, free = size * count, shutil.disk_usage(_existing(Path(folder))).free
    message = f"{count:,} x {size / GIB:.3f} GiB = {needed / GIB:.1f} GiB{remark}; {free / GIB:.0f} GiB are free at {folder}."
    return Finding(OK if needed <= free else STOP, f"disk for {subject}", message)
