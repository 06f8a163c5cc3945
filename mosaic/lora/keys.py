"""Names of LoRA keys in the styles of diffusers, kohya's sd-scripts and ComfyUI, and the FLUX modules that they stand for.

Diffusers splits what FLUX's original code keeps in one matrix: `img_attn.qkv` is to_q, to_k and to_v; `linear1` of a single-stream block is
to_q, to_k, to_v and proj_mlp. kohya and ComfyUI follow the original code, kohya with "_" in the place of ".".
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from mosaic.lora.adapter import reference_module_names, shorten

Style = Literal["diffusers", "kohya", "comfyui"]

#: Modules of FLUX's original code (the names that kohya and ComfyUI use) -> modules of diffusers whose outputs they stack.
DOUBLE_STREAM = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE_STREAM = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_HEADS = {"double_": "transformer_", "single_": "single_transformer_", "": ""}  # beginnings of block names, original -> diffusers
_TABLES = {"double_": DOUBLE_STREAM, "single_": SINGLE_STREAM, "": OUTSIDE}

_KEY = re.compile(r"(transformer\.|lora_unet_|diffusion_model\.|lora_transformer_)(.+)\.(lora_A|lora_B|lora_down|lora_up|alpha)(.*)")
_SIDES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
_STYLES: dict[str, Style] = {
    "transformer.": "diffusers",
    "lora_transformer_": "diffusers",
    "lora_unet_": "kohya",
    "diffusion_model.": "comfyui",
}
_TEXT_ENCODERS = ("lora_te", "text_encoder")
_BLOCK = re.compile(r"(double_|single_|transformer_|single_transformer_)blocks[._](\d{1,4})[._](.+)")


class Place(NamedTuple):
    """A module: its name in diffusers or in the original code, and the modules of diffusers whose outputs it stacks."""

    name: str
    parts: tuple[str, ...]


class LoraKeys(NamedTuple):
    """The keys of one module in a file.

    Attributes:
        style: The key style.
        parts: Modules of diffusers whose outputs the module stacks; one, or three or four.
        down: Key of A [r, d_in].
        up: Key of B [d_out, r].
        alpha: Key of the number that gives the scale alpha / r; None: the scale is 1, but for what the file's metadata say.
    """

    style: Style
    parts: tuple[str, ...]
    down: str
    up: str
    alpha: str | None


def original_place(module: str) -> Place | None:
    """The place of a module named as in the original code, with "." or "_" between the words; None if FLUX has no such module."""
    head, index, rest = _block_of(module)
    name = next((name for name in _TABLES.get(head, {}) if _flat(name) == _flat(rest)), None)
    if name is None:
        return None
    if not head:
        return Place(name, OUTSIDE[name])
    return Place(f"{head}blocks.{index}.{name}", tuple(f"{_HEADS[head]}blocks.{index}.{part}" for part in _TABLES[head][name]))


def diffusers_place(module: str) -> Place | None:
    """The same for a module named as in diffusers."""
    head, index, rest = _block_of(module)
    table = {_HEADS[original]: table for original, table in _TABLES.items()}.get(head, {})
    name = next((part for parts in table.values() for part in parts if _flat(part) == _flat(rest)), None)
    if name is None:
        return None
    full = f"{head}blocks.{index}.{name}" if head else name
    return Place(full, (full,))


def stack_of(module: str) -> Place:
    """The place in the original code of which a module of diffusers, named as there, is a part."""
    head, index, rest = _block_of(module)
    original = next(original for original, ours in _HEADS.items() if ours == head)
    name = next(name for name, parts in _TABLES[original].items() if rest in parts)
    place = original_place(f"{original}blocks.{index}.{name}" if head else name)
    assert place is not None
    return place


def _block_of(module: str) -> tuple[str, int, str]:
    """Beginning of the block's name, its number, and the name inside the block; outside of blocks "", 0 and the whole name."""
    block = _BLOCK.fullmatch(module)
    return (block[1], int(block[2]), block[3]) if block else ("", 0, module)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def is_text_encoder_key(key: str) -> bool:
    """Whether a key belongs to a LoRA of a text encoder."""
    return key.startswith(_TEXT_ENCODERS)


def find_modules(keys: Iterable[str], where: str) -> dict[str, LoraKeys]:
    """The LoRA's modules, sorted, by their names in diffusers or, in the other styles, in the original code.

    Args:
        keys: All keys of a file.
        where: The file, for messages.

    Raises:
        ValueError: If keys are missing, unexpected (of no FLUX module, of a text encoder, or of no plain LoRA), or given twice.
    """
    sides: dict[str, dict[str, str]] = {}
    places: dict[str, tuple[Style, tuple[str, ...]]] = {}
    unexpected = []
    for key in sorted(keys):
        match = _KEY.fullmatch(key)
        place = match and (diffusers_place if _STYLES[match[1]] == "diffusers" else original_place)(match[2])
        if not place or match[4] not in (("",) if match[3] == "alpha" else (".weight", ".default.weight")):
            unexpected.append(key)
            continue
        module = sides.setdefault(place.name, {})
        if _SIDES[match[3]] in module:
            raise ValueError(f"{where}: {module[_SIDES[match[3]]]} and {key} are of one module. A file must give each matrix once.")
        module[_SIDES[match[3]]] = key
        places[place.name] = _STYLES[match[1]], place.parts
    missing = [f"{side} matrix of {name}" for name, module in sides.items() for side in ("down", "up") if side not in module]
    if missing or unexpected or not sides:
        raise ValueError(_refusal(missing, unexpected, where))
    counts = Counter(part for _, parts in places.values() for part in parts)
    twice = sorted(part for part, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"{where}: has more than one LoRA for {shorten(twice)}. A file must give each matrix once.")
    return {name: LoraKeys(*places[name], module["down"], module["up"], module.get("alpha")) for name, module in sides.items()}


def _refusal(missing: list[str], unexpected: list[str], where: str) -> str:
    text = (
        f"{where}: keys do not match a FLUX LoRA in the style of diffusers (transformer.), kohya (lora_unet_) or ComfyUI "
        f"(diffusion_model.). Missing {len(missing)}: {shorten(missing)}. Unexpected {len(unexpected)}: {shorten(unexpected)}."
    )
    if any(map(is_text_encoder_key, unexpected)):
        text += " It also adapts a text encoder: `python scripts/lora_tools.py import --transformer-only` leaves that part out."
    return text


def is_reference_lora(modules: Iterable[str]) -> bool:
    """Whether these modules of diffusers are exactly those of a reference LoRA, for any number of blocks."""
    given = set(modules)
    indices = {head: {name.split(".")[1] for name in given if name.startswith(f"{head}transformer_blocks.")} for head in ("", "single_")}
    return given == set(reference_module_names(len(indices[""]), len(indices["single_"])))
