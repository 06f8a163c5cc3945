"""Training checkpoints: a folder of safetensors and JSON, written aside and renamed, so that it is complete or absent.

`step_00000250/` holds `lora.safetensors` (the adapter, loadable for inference), `optimizer.safetensors`, `ema.safetensors` if
there is an average, and `state.json`. The frozen base is never written.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mosaic.lora import read_reference_lora, write_reference_lora
from mosaic.schema import read_json, shown

STEP_FOLDER = re.compile(r"step_(\d{8})")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one parameter


def checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name) and (path / "state.json").is_file())


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None,
    config: Mapping,
    keep: int | None,
) -> Path:
    """Write `folder/step_<step>` and remove the oldest beyond `keep`; checkpoints of later steps are left alone.

    Args:
        folder: Where checkpoints live; made if missing.
        step: Optimizer steps done.
        parameters: The adapter by file key.
        optimizer: AdamW over those parameters.
        ema: Averaged adapter by file key, or None.
        config: Resolved config.
        keep: Number of newest checkpoints that stay; None: all.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_reference_lora({key: p.detach().cpu().contiguous() for key, p in parameters.items()}, partial / "lora.safetensors", config)
    save_file(_optimizer_tensors(parameters, optimizer), partial / "optimizer.safetensors")
    if ema is not None:
        write_reference_lora(dict(ema), partial / "ema.safetensors", config)
    (partial / "state.json").write_text(json.dumps({"step": step, "config": dict(config)}, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in [path for path in checkpoint_folders(folder) if path.name <= final.name][:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--resume` names.

    Args:
        resume: A path, "auto" for the newest complete checkpoint of the run (None if there is none), or None for a new run.
        folder: Where the run's checkpoints live.

    Raises:
        FileNotFoundError: If the path is no complete checkpoint.
        ValueError: If a new run would mix its checkpoints with those of an earlier one.
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
        return found[-1] if found else None
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise FileNotFoundError(
            f"--resume {resume}: no complete checkpoint there (state.json is missing). Give a step_... folder, or auto."
        )
    return path


def load_checkpoint(
    path: Path, transformer: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Tensor] | None]:
    """Read a checkpoint back into the adapter and the optimizer.

    Everything is checked before anything is changed.

    Returns:
        The step, and the averaged adapter if there was one.

    Raises:
        FileNotFoundError: If a file of the checkpoint is missing.
        ValueError: If a file is damaged, or the adapter does not fit: other keys, shapes, or another rank than the config's.
    """
    state = read_json(path / "state.json")
    step = state.get("step") if isinstance(state, dict) else None
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{path / 'state.json'}: step must be an integer of at least 0, got {shown(step)}.")
    own_rank = next(iter(parameters.values())).shape[0]
    adapters = {}
    for name in ("lora", "ema") if (path / "ema.safetensors").is_file() else ("lora",):
        adapters[name], rank = read_reference_lora(path / f"{name}.safetensors", transformer)
        if rank != own_rank:
            raise ValueError(
                f"{path}: holds an adapter of rank {rank}, but lora.rank is {own_rank}. Set lora.rank={rank}, or start a new run."
            )
    moments = _read_moments(path / "optimizer.safetensors", parameters)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(adapters["lora"][key])
    for key, parameter in parameters.items():
        entry = {name: moments[f"{key}.{name}"] for name in MOMENTS}
        optimizer.state[parameter] = {name: value.to(parameter.device if name != "step" else "cpu") for name, value in entry.items()}
    return step, adapters.get("ema")


def _read_moments(path: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state by `<file key>.<name>`, checked against the parameters."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found; the checkpoint is not complete. Resume from another one.")
    try:
        moments = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}).") from error
    expected = {f"{key}.{name}": () if name == "step" else tuple(p.shape) for key, p in parameters.items() for name in MOMENTS}
    if {key: tuple(value.shape) for key, value in moments.items()} != expected:
        raise ValueError(f"{path}: must hold {', '.join(MOMENTS)} for every tensor of the adapter. Resume from another checkpoint.")
    return moments


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for key, parameter in parameters.items()
        for name, value in optimizer.state.get(parameter, {}).items()
    }
