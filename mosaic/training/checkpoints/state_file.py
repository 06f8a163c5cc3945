"""`state.json` of a checkpoint, read back: whether it is whole, and whether it agrees with the other files of its folder."""

import re
from pathlib import Path
from typing import Any

from mosaic.files import first_difference, read_json, shown
from mosaic.lora.files import LoraFile, reference_metadata

STATE = "state.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")
KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "samples_seen": (int,),
    "global_batch": (int,),
    "processes": (int,),
    "digest": (str,),
    "data": (dict,),
    "versions": (dict,),
    "config": (dict,),
    "schedule": (dict,),
    "optimizer": (dict,),
    "ema_step": (int, type(None)),
}
WORDS = {int: "an integer of at least 0", str: "a string", dict: "an object", type(None): "null"}


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state of a checkpoint.

    Args:
        folder: Of the checkpoint; where its name gives a step, that is held against the state's.

    Raises:
        FileNotFoundError: There is no state.
        ValueError: A key is missing or has a wrong type, or the state contradicts itself, the folder's name, or the other files.
    """
    file = folder / STATE
    state = read_json(file)
    if not isinstance(state, dict):
        raise ValueError(f"{file}: must be a JSON object, got {shown(state)}.")
    for key, kinds in KINDS.items():
        if key not in state:
            raise ValueError(f"{file}: {key} is missing.")
        value = state[key]
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{file}: {key} must be {' or '.join(WORDS[kind] for kind in kinds)}, got {shown(value)}.")
    section = next((name for name, fields in state["config"].items() if not isinstance(fields, dict)), None)
    if section is not None:
        raise ValueError(f"{file}: config.{section} must be an object, got {shown(state['config'][section])}.")
    contradiction = _contradiction(folder, state)
    if contradiction:
        raise ValueError(f"{file}: contradicts {contradiction}. The checkpoint has been changed since it was written.")
    return state


def _contradiction(folder: Path, state: dict[str, Any]) -> str:
    """What a state contradicts, in words; "" if nothing."""
    step, ema_step = state["step"], state["ema_step"]
    name = STEP_FOLDER.fullmatch(folder.name)
    if name and int(name[1]) != step:
        return f"the name of its folder: step is {step}"
    if state["samples_seen"] != step * state["global_batch"]:
        return f"itself: samples_seen is {state['samples_seen']} after {step} steps of {state['global_batch']} samples"
    if ema_step is not None and ema_step > step:
        return f"itself: ema_step is {ema_step} after {step} steps"
    if (folder / "ema.safetensors").is_file() != (ema_step is not None):
        return f"the folder: ema_step is {ema_step}, and ema.safetensors is {'there' if ema_step is None else 'missing'}"
    for adapter in ("lora.safetensors", "ema.safetensors"):
        if (folder / adapter).is_file():
            known = reference_metadata(LoraFile(folder / adapter).metadata, str(folder / adapter)).get("config", state["config"])
            if known != state["config"]:
                return f"{adapter}: {first_difference(known, state['config'])}"
    return ""
