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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mosaic.lora import check_reference_lora, write_reference_lora

STEP_FOLDER = re.compile(r"step_(\d{8})")


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
    """Write `folder/step_<step>` and remove the oldest beyond `keep`.

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
    for old in checkpoint_folders(folder)[: -keep or None] if keep else []:
        shutil.rmtree(old)
    return final


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` names: a path, or "auto" for the newest complete one (None if there is none).

    Raises:
        FileNotFoundError: If the path is no complete checkpoint.
    """
    if resume == "auto":
        found = checkpoint_folders(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise FileNotFoundError(f"--resume {resume}: no complete checkpoint there (state.json is missing). Give a step_... folder, or auto.")
    return path


def load_checkpoint(
    path: Path, transformer: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Tensor] | None]:
    """Read a checkpoint back into the adapter and the optimizer.

    Returns:
        The step, and the averaged adapter if there was one.

    Raises:
        ValueError: If the adapter does not fit: other keys, shapes, or another rank than the config's.
    """
    state = json.loads((path / "state.json").read_text())
    tensors = load_file(path / "lora.safetensors")
    rank = check_reference_lora(tensors, transformer, str(path / "lora.safetensors"))
    own_rank = next(iter(parameters.values())).shape[0]
    if rank != own_rank:
        raise ValueError(f"{path}: holds an adapter of rank {rank}, but lora.rank is {own_rank}. Set lora.rank={rank}, or start a new run.")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    moments = load_file(path / "optimizer.safetensors")
    for key, parameter in parameters.items():
        entry = {name: moments[f"{key}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in moments}
        if entry:
            optimizer.state[parameter] = {name: value.to(parameter.device if name != "step" else "cpu") for name, value in entry.items()}
    ema_file = path / "ema.safetensors"
    return state["step"], load_file(ema_file) if ema_file.is_file() else None


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for key, parameter in parameters.items()
        for name, value in optimizer.state.get(parameter, {}).items()
    }
