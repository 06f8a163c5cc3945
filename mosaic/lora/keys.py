"""Which LoRA of which of FLUX's linear layers the keys of a file give, in the key styles of diffusers and of other programs.

What the other programs' names stand for is diffusers' knowledge: one module at a time goes through `FluxLoraLoaderMixin.lora_state_dict`,
because for whole files it passes over what it does not know (keys of ComfyUI that end in lora_A, biases, scales, alphas of the last layer).
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor, nn

from mosaic.lora.adapter import PREFIX, reference_module_names, shorten

Style = Literal["diffusers", "kohya", "comfyui", "fal", "xlabs"]

#: Beginnings of keys -> their style, and the beginning by which diffusers' converter of the original code's names knows them.
_STYLES: dict[str, tuple[Style, str]] = {
    "transformer.": ("diffusers", ""),
    "lora_transformer_": ("diffusers", ""),
    "lora_unet_": ("kohya", "lora_unet_"),
    "diffusion_model.": ("comfyui", "diffusion_model."),
    "base_model.model.": ("fal", "diffusion_model."),
}
_KEY = re.compile(rf"({'|'.join(map(re.escape, _STYLES))})(.+)\.(lora_A|lora_B|lora_down|lora_up|alpha)(.*)")
_XLABS_KEY = re.compile(
    r"((?:diffusion_model\.)?(?:double_blocks\.\d{1,4}\.processor\.(?:qkv|proj)_lora[12]|single_blocks\.\d{1,4}\.processor\.(?:qkv|proj)_lora))"
    r"\.(down|up)\.weight"
)
_BARE_KEY = re.compile(r"([\w.]+)\.(lora_A|lora_B|lora_down|lora_up|alpha)(.*)")  # of diffusers' save_lora_adapter
_PEFT_PREFIX = "base_model.model."  # of PEFT's save_pretrained, where a module of diffusers follows
_SIDES = {"lora_A": "down", "lora_down": "down", "down": "down", "lora_B": "up", "lora_up": "up", "up": "up", "alpha": "alpha"}
_TEXT_ENCODERS = ("lora_te", "text_encoder")
_BLOCK = re.compile(r"((?:single_)?transformer_blocks)[._](\d{1,4})[._](.+)")
LINEAR1_WIDTH = 3072  # of FLUX.1: diffusers splits the rows of linear1 where they part at this width, and at no other
_ROWS = 7 * LINEAR1_WIDTH  # those of linear1, and a multiple of what other matrices are divided into


class LoraKeys(NamedTuple):
    """The keys of one module in a file.

    Attributes:
        style: The key style.
        stem: The module's name for diffusers' converter.
        parts: Modules of diffusers whose outputs the module stacks; one, or three or four.
        down: Key of A [r, d_in].
        up: Key of B [d_out, r].
        alpha: Key of the number that gives the scale alpha / r; None: the scale is 1, but for what the file's metadata say.
    """

    style: Style
    stem: str
    parts: tuple[str, ...]
    down: str
    up: str
    alpha: str | None


def convert_module(style: Style, stem: str, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What diffusers makes of the LoRA of one module.

    Args:
        style: The key style.
        stem: The module's name, see `LoraKeys`.
        a: A [r, d_in].
        b: B [d_out, r].

    Returns:
        A and B by module of diffusers; empty if FLUX has no such module.
    """
    if style == "diffusers":
        converted = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    else:
        down, up = ("down", "up") if style == "xlabs" else ("lora_down", "lora_up")
        try:
            converted = FluxLoraLoaderMixin.lora_state_dict({f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b})
        except ValueError:  # "Incompatible keys"
            return {}
    matrices = {key.removeprefix(PREFIX).removesuffix(".weight"): value for key, value in converted.items()}
    found = {}
    for key, value in matrices.items():
        name, _, side = key.rpartition(".")
        layer = _linear_layer(name)
        if layer is None:
            return {}
        if side == "lora_A":
            found[layer] = value, matrices[f"{name}.lora_B"]
    return found


def _linear_layer(name: str) -> str | None:
    """The name in diffusers of a linear layer of FLUX, given with "." or "_" between the words; None if there is none."""
    block = _BLOCK.fullmatch(name)
    layer = _linear_layers().get((f"{block[1]}.0.{block[3]}" if block else name).replace(".", "_"))
    return layer.replace(".0.", f".{block[2]}.", 1) if layer and block else layer


@functools.cache
def _linear_layers() -> dict[str, str]:
    """All linear layers of a FLUX of one block of each kind, by their names with "_" for "."."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    return {name.replace(".", "_"): name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def is_text_encoder_key(key: str) -> bool:
    """Whether a key belongs to a LoRA of a text encoder."""
    return key.startswith(_TEXT_ENCODERS)


def find_modules(keys: Iterable[str], where: str) -> dict[str, LoraKeys]:
    """The LoRA's modules, sorted, by their names in the file, without what marks the style.

    Args:
        keys: All keys of a file.
        where: The file, for messages.

    Raises:
        ValueError: If keys are missing, unexpected (of no FLUX module, of a text encoder, or of no plain LoRA), or given twice.
    """
    sides: dict[tuple[Style, str, str], dict[str, str]] = {}
    unexpected = []
    for key in sorted(keys):
        found = _read_key(key)
        if not found:
            unexpected.append(key)
            continue
        style, stem, name, side = found
        module = sides.setdefault((style, stem, name), {})
        if side in module:
            raise ValueError(f"{where}: {module[side]} and {key} are of one module. A file must give each matrix once.")
        module[side] = key
    modules: dict[str, LoraKeys] = {}
    missing: list[str] = []
    counts: Counter[str] = Counter()
    no_weights = torch.zeros(1, 1), torch.zeros(1, 1).expand(_ROWS, 1)
    for (style, stem, name), module in sides.items():
        parts = tuple(convert_module(style, stem, *no_weights))
        if not parts:
            unexpected += module.values()
            continue
        missing += [f"{side} matrix of {name}" for side in ("down", "up") if side not in module]
        counts.update(parts)
        modules[name] = LoraKeys(style, stem, parts, module.get("down", ""), module.get("up", ""), module.get("alpha"))
    if missing or unexpected or not sides:
        raise ValueError(_refusal(missing, sorted(unexpected), where))
    twice = sorted(part for part, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"{where}: has more than one LoRA for {shorten(twice)}. A file must give each matrix once.")
    return dict(sorted(modules.items()))


def _read_key(key: str) -> tuple[Style, str, str, str] | None:
    """Style, stem (see `LoraKeys`), name and side ("down", "up" or "alpha") of a key; None if it is no LoRA's."""
    if xlabs := _XLABS_KEY.fullmatch(key):
        return "xlabs", xlabs[1], xlabs[1], _SIDES[xlabs[2]]
    if plain := read_plain_key(key):
        return "diffusers", plain[0], *plain
    match = _KEY.fullmatch(key)
    if not match or not _is_end(match[3], match[4]):
        return None
    style, prefix = _STYLES[match[1]]
    return (style, prefix + match[2], match[2], _SIDES[match[3]]) if style != "diffusers" else None


def read_plain_key(key: str) -> tuple[str, str] | None:
    """Module of diffusers and side ("down", "up" or "alpha") of a key that names it by its own name, with or without `transformer.`."""
    match = _KEY.fullmatch(key)
    if match and _STYLES[match[1]][0] == "diffusers":
        layer, side, end = match.groups()[1:]
    elif match := _BARE_KEY.fullmatch(key):
        layer, side, end = match.groups()
    else:
        return None
    name = _linear_layer(layer)
    return (name, _SIDES[side]) if name and _is_end(side, end) else None


def _is_end(side: str, end: str) -> bool:
    return end in (("",) if side == "alpha" else (".weight", ".default.weight"))


def _refusal(missing: list[str], unexpected: list[str], where: str) -> str:
    text = (
        f"{where}: keys do not match a FLUX LoRA in the style of diffusers (transformer.), kohya (lora_unet_), ComfyUI "
        f"(diffusion_model.), fal (base_model.model.) or XLabs (double_blocks.N.processor.). "
        f"Missing {len(missing)}: {shorten(missing)}. Unexpected {len(unexpected)}: {shorten(unexpected)}."
    )
    text += peft_hint(unexpected)
    if any(map(is_text_encoder_key, unexpected)):
        text += " It also adapts a text encoder: `python scripts/lora_tools.py import --transformer-only` leaves that part out."
    return text


def peft_hint(keys: Iterable[str]) -> str:
    """What to do where keys are those of PEFT's own save_pretrained; else nothing."""
    if not any(key.startswith(_PEFT_PREFIX) and read_plain_key(key.removeprefix(_PEFT_PREFIX)) for key in keys):
        return ""
    return " PEFT saves it so, its alpha in adapter_config.json: load it with PEFT, and save it by FluxPipeline.save_lora_weights."


def is_reference_lora(modules: Iterable[str]) -> bool:
    """Whether these modules of diffusers are exactly those of a reference LoRA, for any number of blocks."""
    given = set(modules)
    indices = {head: {name.split(".")[1] for name in given if name.startswith(f"{head}transformer_blocks.")} for head in ("", "single_")}
    return given == set(reference_module_names(len(indices[""]), len(indices["single_"])))
