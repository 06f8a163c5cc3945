"""Training checkpoints: a folder of safetensors and JSON, written aside, flushed and renamed, so that it is complete or absent.

`step_00000250/` holds `lora.safetensors` (the adapter in float32, loadable for inference), `optimizer.safetensors`, `ema.safetensors` if
there is an average, `state.json` (counters, schedules, run) and `checksums.json` (SHA-256 of the others). The frozen base is never
written. Hidden folders beside are what a kill has left of writing or removing one; `clean_up` removes them.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mosaic.files import move, read_json, recover, remove_folder, replacing, save_tensors
from mosaic.lora.adapter import write_reference_lora
from mosaic.lora.loading import read_reference_lora
from mosaic.training.checkpoints.state_file import STATE, STEP_FOLDER, read_state
from mosaic.weights.digests import file_digest

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
REQUIRED = {"lora.safetensors", "optimizer.safetensors", STATE}
OPTIONAL = {"ema.safetensors"}


class CheckpointError(OSError):
    """A checkpoint cannot be written."""


@dataclass(frozen=True)
class Snapshot:
    """All of a run at the end of a step, copied to the host.

    Attributes:
        step: Optimizer steps done.
        adapter: float32 tensors by file key.
        optimizer: Tensors by name.
        ema: Averaged adapter by file key, or None.
        state: The rest, as JSON types; "config" in it also goes into the adapters' files.
    """

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    state: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        parts = (self.adapter, self.optimizer, self.ema or {})
        return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())


def folder_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step_{step:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first; whether they are sound is not looked at."""
    found = (path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: _step(path))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/step_<step>`; one that is there already is replaced only once the new one is complete.

    Raises:
        CheckpointError: It cannot be written; what was there is untouched.
    """
    final, config = folder_of(folder, snapshot.step), snapshot.state["config"]
    try:
        with replacing(final) as partial:
            partial.mkdir()
            _require_space(folder, snapshot.num_bytes)
            write_reference_lora(snapshot.adapter, partial / "lora.safetensors", config)
            save_tensors(snapshot.optimizer, partial / "optimizer.safetensors")
            if snapshot.ema is not None:
                write_reference_lora(snapshot.ema, partial / "ema.safetensors", config)
            _write_json(partial / STATE, {**snapshot.state, "step": snapshot.step})
            _write_json(partial / CHECKSUMS, {path.name: file_digest(path) for path in sorted(partial.iterdir())})
    except OSError as error:
        raise CheckpointError(
            f"{final}: the checkpoint cannot be written ({error}). Earlier checkpoints are as they were. "
            "Make room or mend the folder, then continue with --resume auto."
        ) from error
    return final


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(f"no space left: {num_bytes / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is what was written."""
    if not (path / CHECKSUMS).is_file():
        return f"{CHECKSUMS} is missing"
    try:
        expected = read_json(path / CHECKSUMS)
    except (OSError, ValueError) as error:
        return str(error).rstrip(".")
    if not isinstance(expected, dict) or not expected.keys() >= REQUIRED or any(Path(name).name != name for name in expected):
        return f"{CHECKSUMS} must name {', '.join(sorted(REQUIRED))}"
    for name in sorted(OPTIONAL - expected.keys()):
        if (path / name).exists():
            return f"{name} is not of this checkpoint ({CHECKSUMS} does not name it)"
    for name, wanted in expected.items():
        try:
            if (path / name).exists() and not (path / name).is_file():
                return f"{name} is no file"
            if file_digest(path / name) != wanted:
                return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    try:
        read_state(path)
    except (OSError, ValueError) as error:
        return str(error).rstrip(".")
    return None


def load_snapshot(path: Path, transformer: FluxTransformer2DModel) -> Snapshot:
    """Read a sound checkpoint (`find_damage`) back.

    Args:
        path: Folder of the checkpoint.
        transformer: Whose modules and widths the adapters must fit.

    Raises:
        FileNotFoundError, ValueError: A file is missing, or not what it must be.
    """
    state = read_state(path)
    adapter, _ = read_reference_lora(path / "lora.safetensors", transformer)
    ema = read_reference_lora(path / "ema.safetensors", transformer)[0] if (path / "ema.safetensors").is_file() else None
    try:
        optimizer = load_file(path / "optimizer.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{path / 'optimizer.safetensors'}: not a safetensors file ({error}).") from error
    taken = max((float(value) for name, value in optimizer.items() if name.endswith("/step") and value.numel() == 1), default=0.0)
    if taken > state["step"]:
        raise ValueError(f"{path / STATE}: contradicts optimizer.safetensors: step is {state['step']}, and the optimizer took {taken:g}.")
    return Snapshot(state["step"], adapter, optimizer, ema, state)


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--resume` names.

    Args:
        resume: A path, "auto" for the newest sound checkpoint of the run (None if there is none at all), or None for a new run.
        folder: Where the run's checkpoints live.

    Raises:
        FileNotFoundError: The path is no checkpoint.
        ValueError: The one at the path, or with "auto" every one, is damaged; or a new run would mix its checkpoints with those of an
            earlier one.
    """
    found = checkpoint_folders(folder)
    if resume is None:
        if found:
            raise ValueError(
                f"training.output_dir: {folder.parent} holds checkpoints of an earlier run, up to {found[-1].name}. "
                "Continue it with --resume auto, or choose another training.output_dir."
            )
        return None
    if resume == "auto":
        return _newest_sound(found)
    path = Path(resume)
    if not (path / STATE).is_file():
        raise FileNotFoundError(f"--resume {resume}: no complete checkpoint there ({STATE} is missing). Give a step_... folder, or auto.")
    if damage := find_damage(path):
        raise ValueError(f"--resume {resume}: the checkpoint is damaged: {damage}. Give another one, or auto for the newest sound one.")
    return path


def _newest_sound(found: list[Path]) -> Path | None:
    for path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("%s is damaged: %s. Falling back to an earlier checkpoint.", path, damage)
    if found:
        raise ValueError(
            f"{found[0].parent}: all {len(found)} checkpoints are damaged; nothing to resume from. "
            "Restore one from a backup, or choose another training.output_dir for a new run."
        )
    return None


def clean_up(folder: Path) -> None:
    """Remove what a killed run has left half written or half removed; a checkpoint whose replacement never came is put back."""
    recover(folder, "step_*")


def set_aside(folder: Path, continued: Path, logs: Iterable[Path]) -> None:
    """Move the checkpoints of the branch away that a run leaves where it is continued from another one of its checkpoints.

    Those are the later ones; where the continued one lies elsewhere, all. They go to a new folder `set_aside_<n>`, with copies of the
    logs, which the run cuts at its step; `--resume auto` and rotation do not look there.

    Args:
        folder: Where checkpoints live.
        continued: The checkpoint that is continued.
        logs: Files to keep a copy of.
    """
    is_own = continued.resolve().parent == folder.resolve()
    left = [path for path in checkpoint_folders(folder) if not is_own or _step(path) > _step(continued)]
    if not left:
        return
    number = 1
    while (aside := folder / f"set_aside_{number}").exists():
        number += 1
    aside.mkdir()
    for log in logs:
        if log.is_file():
            shutil.copyfile(log, aside / log.name)
    for path in reversed(left):  # the newest first: where this is cut short, what stays is the older part
        move(path, aside / path.name)
    logger.warning("%s: %d checkpoints are of a branch that is left for %s; they are in %s now", folder, len(left), continued, aside)


def rotate(folder: Path, newest: int, keep: int | None, milestone_every: int | None, best_of: Callable[[list[int]], int | None]) -> None:
    """Remove old checkpoints; those of later steps than `newest` are left alone.

    Args:
        folder: Where checkpoints live.
        newest: The step that was written last.
        keep: Number of newest checkpoints that stay; None: all.
        milestone_every: Checkpoints at multiples of this stay, too; None: none.
        best_of: The best of some steps, which stays, too; or None.
    """
    if keep is None:
        return
    steps = [_step(path) for path in checkpoint_folders(folder) if _step(path) <= newest]
    stay = {*steps[-keep:], best_of(steps)} | {step for step in steps if milestone_every and step % milestone_every == 0}
    for step in steps:
        if step not in stay:
            remove_folder(folder_of(folder, step))
