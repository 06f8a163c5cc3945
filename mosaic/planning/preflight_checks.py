"""What a training run needs from its surroundings, looked at before anything heavy is loaded: data, weights, packages, disk, folders."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from mosaic.cases.reading import load_cases
from mosaic.config import Config, DataConfig
from mosaic.data.manifest import Manifest
from mosaic.hub import require_model_name
from mosaic.planning.costs import lora_parameter_count
from mosaic.planning.memory_model import GIB, OPTIMIZER_BYTES
from mosaic.planning.model_shape import ENCODERS, ModelShape
from mosaic.training.checkpoint import find_checkpoint

OK, NOTE, STOP = "ok", "note", "stop"
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao", "adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
HUB_TIMEOUT = 5.0  # seconds


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        level: "ok", "note" (worth knowing) or "stop" (training would fail).
        subject: What was looked at.
        message: What was found, and the cure.
    """

    level: str
    subject: str
    message: str


class DataFacts(NamedTuple):
    """What is known of the training data.

    Attributes:
        num_samples: Samples of the split; None: not known.
        max_references: Largest K among them, or what the config allows where that is not known.
    """

    num_samples: int | None
    max_references: int


def data_facts(config: Config) -> DataFacts:
    """Size of the training data, from its manifest where there is one that can be read."""
    unknown = DataFacts(None, config.data.max_references)
    if config.data.format != "multi_reference":
        return unknown
    try:
        manifest = Manifest(config.data.root, config.data.split)
    except (OSError, ValueError):
        return unknown
    return DataFacts(len(manifest), int(max(manifest.num_references)))


def check_surroundings(config: Config, shape: ModelShape, facts: DataFacts, resume: str | None = None) -> Iterator[Finding]:
    """Look at everything but the device."""
    yield _attempt("data.root", lambda: _check_data(config.data, config.data.split))
    if config.validation.every:
        yield _attempt("validation.split", lambda: _check_data(config.data, config.validation.split))
        if config.validation.cases is not None:
            yield _attempt("validation.cases", lambda: f"{len(load_cases(config.validation.cases, config.data.reference_size))} cases")
    yield _check_model(config.model.pretrained, shape)
    if config.lora.pretrained is not None and not _looks_like_hub_id(config.lora.pretrained):
        found = Path(config.lora.pretrained).exists()
        message = "is there" if found else "no such file or folder"
        yield Finding(OK if found else STOP, "lora.pretrained", f"{config.lora.pretrained}: {message}.")
    for name in (config.model.quantization, config.optimizer.name):
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            yield Finding(STOP, PACKAGES[name], f'"{name}" needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}.')
    yield _attempt("training.output_dir", lambda: _check_output(config, resume))
    yield from check_disk(config, shape, facts)


def _attempt(subject: str, check: Callable[[], str]) -> Finding:
    """The finding of a check that returns its good news and raises its bad ones."""
    try:
        return Finding(OK, subject, check())
    except (OSError, ValueError) as error:
        return Finding(STOP, subject, str(error))


def _check_data(data: DataConfig, split: str) -> str:
    if data.format == "multi_reference":
        manifest = Manifest(data.root, split)
        return f'{data.root}: {len(manifest):,} samples in the split "{split}", up to {max(manifest.num_references)} references.'
    for name, given in (("root", data.root), ("parquet", data.parquet), ("masks", data.masks), ("coordinates", data.coordinates)):
        if given is not None and not Path(given).exists():
            raise FileNotFoundError(f"data.{name}: no such file or folder: {given}.")
    if data.parquet is None and not (Path(data.root) / "data").is_dir():
        raise FileNotFoundError(f"data.root: {data.root} lacks the folder data with the Parquet files; or name them by data.parquet.")
    return f"{data.root}: the released layout."


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists() and not name.endswith(".safetensors") and not name.startswith((".", "/"))


def _check_model(name: str, shape: ModelShape) -> Finding:
    """The base model: a folder's files, or whether the hub would give it. Downloads nothing."""
    subject = "model.pretrained"
    if shape.is_local:
        folder = Path(name)
        needed = [folder / "model_index.json", *(folder / part / "config.json" for part in ("transformer", *ENCODERS))]
        missing = [str(path) for path in needed if not path.is_file()]
        if not any((folder / "transformer").glob("*.safetensors")):
            missing.append(str(folder / "transformer/*.safetensors"))
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


def _check_output(config: Config, resume: str | None) -> str:
    folder = Path(config.training.output_dir)
    parent = _existing(folder)
    if not parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"training.output_dir: must be a folder, but {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"training.output_dir: {parent} cannot be written to.")
    checkpoint = find_checkpoint(resume, folder / "checkpoints")
    return f"{folder}: " + ("a new run." if checkpoint is None else f"continues from {checkpoint.name}.")


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def check_disk(config: Config, shape: ModelShape, facts: DataFacts) -> Iterator[Finding]:
    """Room for the checkpoints and for caches that are still to be filled."""
    adapter = lora_parameter_count(shape.transformer, config.lora.rank)
    copies = 4 + OPTIMIZER_BYTES[config.optimizer.name] + (4 if config.optimizer.ema_decay is not None else 0)
    kept = (config.training.keep_checkpoints or 0) + 1  # one more while the newest is written
    unlimited = "" if config.training.keep_checkpoints else " and no limit to their number (training.keep_checkpoints)"
    yield _room("checkpoints", config.training.output_dir, adapter * copies, kept, unlimited)
    if facts.num_samples is not None:
        for name, size in cache_bytes(config, shape, facts.max_references).items():
            folder = getattr(config.data, name)
            if folder is not None and not Path(folder).is_dir():
                yield _room(f"data.{name}", folder, size, facts.num_samples, " at most, one per sample")


def cache_bytes(config: Config, shape: ModelShape, num_references: int) -> dict[str, int]:
    """Bytes of one sample in the caches: mean and log-variance of all latents in float32, embeddings in 16 bits."""
    cells = (
        sum(h * w for h, w in [config.data.image_size] + [(config.data.reference_size,) * 2] * num_references) // shape.vae_scale_factor**2
    )
    text = config.model.text_length * shape.transformer["joint_attention_dim"] + shape.transformer["pooled_projection_dim"]
    return {"latent_cache": 2 * 4 * cells * shape.transformer["in_channels"] // 4, "text_cache": 2 * text}


def _room(subject: str, folder: str, size: float, count: int, remark: str) -> Finding:
    needed, free = size * count, shutil.disk_usage(_existing(Path(folder))).free
    message = f"{count:,} x {size / GIB:.3f} GiB = {needed / GIB:.1f} GiB{remark}; {free / GIB:.0f} GiB are free at {folder}."
    return Finding(OK if needed <= free else STOP, f"disk for {subject}", message)
