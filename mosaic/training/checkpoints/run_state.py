"""What a run is, as far as continuing it exactly goes: the settings that matter, the data, the versions; told apart from its outputs."""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from mosaic.config.loading import Config, from_dict, resolved_dict
from mosaic.files import shown

logger = logging.getLogger(__name__)

FREE_SECTIONS = ("validation", "inference")
FREE_SETTINGS = frozenset({
    # how long, and what is written where
    "training.max_steps",
    "training.max_epochs",
    "training.output_dir",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.milestone_every",
    "training.best_metric",
    "training.non_finite",
    "training.peak_tflops",
    "training.trackers",
    # the samples of a step are those of the global batch, however it is shared
    "training.batch_size",
    "training.gradient_accumulation_steps",
    # the start, which is behind
    "lora.pretrained",
    "lora.weight_name",
    "lora.resize",
    # where the data are and how they are read; what they are is in the data's digest
    "data.root",
    "data.parquet",
    "data.masks",
    "data.coordinates",
    "data.id_index",
    "data.min_point_coverage",
    "data.max_points_outside",
    "data.skip_invalid",
    "data.num_workers",
    "data.latent_cache",
    "data.text_cache",
    # other ways to the same numbers, up to rounding
    "model.gradient_checkpointing",
    "model.compile",
    "model.attention_backend",
})  # fmt: skip
"""Settings that a run may change when it is continued. Every other one, also one that is added later, must stay."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


class Samples(Protocol):
    """What tells a data set from others without reading a picture."""

    @property
    def batch_keys(self) -> np.ndarray:
        """[N, 2], number of references and bucket of each."""

    def sample_ids(self) -> list[str | None]:
        """Names of all samples in order, None where one cannot be read."""

    def prompts(self) -> list[str]:
        """Prompts of all samples."""


def describe_run(config: Config, global_batch: int, processes: int, dataset: Samples) -> dict[str, Any]:
    """What `state.json` of a checkpoint says about its run, as JSON types.

    Args:
        config: The run's settings.
        global_batch: Samples per optimizer step over all processes.
        processes: Number of processes.
        dataset: The samples to train on.
    """
    keys = np.ascontiguousarray(dataset.batch_keys, dtype=np.int64)
    data = {"samples": len(keys), "digest": hashlib.sha256(keys.tobytes()).hexdigest(), "texts": text_digest(dataset)}
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    run = {"global_batch": global_batch, "processes": processes, "data": data, "versions": versions, "config": resolved_dict(config)}
    return {"digest": _digest(run), **run}


def text_digest(dataset: Samples) -> str:
    """SHA-256 over the samples' ids and prompts, in order. Pictures and points are not read for it."""
    digest = hashlib.sha256()
    for texts in (dataset.sample_ids(), dataset.prompts()):
        for text in texts:
            digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def require_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], place: str) -> None:
    """Check that a checkpoint is of this run; other versions of libraries are only warned of.

    Args:
        saved: `describe_run` of the checkpoint.
        current: `describe_run` of now.
        place: The checkpoint, for the message.

    Raises:
        ValueError: They differ in something that matters; all differences are listed.
    """
    changed = [name for name, version in current["versions"].items() if saved.get("versions", {}).get(name) != version]
    if changed:
        logger.warning("%s was written with other versions of %s: continuing may differ in rounding", place, ", ".join(changed))
    differences = list_differences(saved, current)
    if differences and saved.get("digest") == current["digest"]:
        raise ValueError(
            f"{place}: contradicts itself: its digest is that of this run, but not what it says of it: {'; '.join(differences)}. "
            "The checkpoint has been changed since it was written."
        )
    if differences:
        raise ValueError(
            f"{place}: is a checkpoint of another config; it differs in what matters: {'; '.join(differences)}. Set these back to continue "
            f"the run, or start a new one from its weights: another training.output_dir and lora.pretrained={place}/lora.safetensors."
        )


def list_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The differences that matter, in words; a setting that the checkpoint does not know counts with its default."""
    old, new, defaults = (_relevant(values) for values in (saved.get("config", {}), current["config"], resolved_dict(from_dict({}))))
    found = []
    for key, value in new.items():
        before = old.get(key, defaults.get(key))
        if before != value and not (key == "optimizer.ema_decay" and before is None):  # an average may start at any time
            found.append(f"{key} was {shown(before)}, is {shown(value)}")
    if saved.get("global_batch") != current["global_batch"]:
        found.append(
            f"training.batch_size x training.gradient_accumulation_steps x processes was {saved.get('global_batch')}, "
            f"is {current['global_batch']}"
        )
    data = saved.get("data", {})
    if any(data.get(name) != value for name, value in current["data"].items() if name in data or name != "texts"):  # once there was none
        before, now = data.get("samples"), current["data"]["samples"]
        same_size = f"has other ids, prompts, sizes or another order of its {now} samples"
        found.append(f"the data set {same_size if before == now else f'had {before} samples, has {now}'}")
    return found


def _digest(run: Mapping[str, Any]) -> str:
    """SHA-256 of everything that matters."""
    what = {"global_batch": run["global_batch"], "data": run["data"], "settings": _relevant(run["config"])}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that matter by dotted name."""
    pairs = {
        f"{section}.{field}": value for section, fields in config.items() if section not in FREE_SECTIONS for field, value in fields.items()
    }
    return {key: value for key, value in pairs.items() if key not in FREE_SETTINGS}
