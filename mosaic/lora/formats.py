"""LoRA files in the key styles of other programs: read from any of them, written for any of them.

Where the original code has one matrix for what diffusers splits, LoRAs of the parts are one of the whole: their A stacked, their B on a
block diagonal. The products B A stay exactly what they were, both ways.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mosaic.lora.adapter import PREFIX
from mosaic.lora.files import DIFFUSERS_METADATA, LoraFile, check_finite, metadata_object
from mosaic.lora.keys import LoraKeys, Place, Style, find_modules, is_text_encoder_key, stack_of

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WIDER = {"proj_mlp": 4}  # output rows of a part of a stack, in widths of the model; of all others 1
SCALES = (1e-6, 1e6)  # beyond them a file is damaged, and factors that take the scale up would overflow
SWAPPED = "norm_out.linear"  # its rows are (scale, shift) in diffusers, (shift, scale) in the original code


def read_module(tensors: Mapping[str, Tensor], keys: LoraKeys, metadata: Mapping[str, str], where: str) -> tuple[Tensor, Tensor, float]:
    """A, B and the scale s of a module; its weights change by s B A.

    Args:
        tensors: A `LoraFile`, or tensors by key.
        keys: Of the module.
        metadata: Of the file.
        where: The file, for messages.

    Returns:
        A [r, d_in], B [d_out, r], and s = alpha / r (1 where no alpha is given).

    Raises:
        ValueError: If one of them is no finite floating point matrix, the ranks of A and B differ or are 0, the rows do not fit the module,
            or alpha is no sensible number.
    """
    a, b = tensors[keys.down], tensors[keys.up]
    for key, matrix in ((keys.down, a), (keys.up, b)):
        if matrix.ndim != 2 or matrix.dtype not in FLOATS:
            raise ValueError(f"{where}: {key} must be a floating point matrix, got {matrix.dtype} of shape {tuple(matrix.shape)}.")
        check_finite(matrix, key, where)
    rank = len(a)
    if rank == 0 or b.shape[1] != rank:
        raise ValueError(f"{where}: {keys.up} must have a column for each row of {keys.down}, one or more, got {b.shape[1]} and {rank}.")
    rows = sum(part_rows(keys.parts, a.shape[1])) if len(keys.parts) > 1 else len(b) + len(b) % 2 * (keys.parts[0] == SWAPPED)
    if len(b) != rows:
        raise ValueError(f"{where}: {keys.up} must have {rows} rows ({len(keys.parts)} parts), got {len(b)}. Is it for another model?")
    if keys.alpha is None:
        alpha, source = _declared_alpha(metadata, keys.parts[0], rank, where), "lora_alpha in its metadata"
    else:
        alpha, source = _one_number(tensors[keys.alpha]), keys.alpha
    if not SCALES[0] <= alpha / rank <= SCALES[1]:
        given = f"between {SCALES[0]:g} and {SCALES[1]:g} times the rank {rank}, got {alpha:g}"
        raise ValueError(f"{where}: {source} must be one number {given}. The file is damaged.")
    return a, b, alpha / rank


def _one_number(tensor: Tensor) -> float:
    """The value of a tensor of one element, else NaN."""
    return float(tensor) if tensor.numel() == 1 else math.nan


def _declared_alpha(metadata: Mapping[str, str], module: str, rank: int, where: str) -> float:
    """The alpha that PEFT's config in a file's metadata gives a module; the rank without such metadata."""
    declared = metadata_object(metadata, DIFFUSERS_METADATA, where)
    config = {key.removeprefix(PREFIX): value for key, value in declared.items() if key.startswith(PREFIX)} or declared
    if config.get("use_dora") or config.get("use_rslora"):
        raise ValueError(f"{where}: is a DoRA or a rank-stabilised LoRA by its metadata; only plain LoRA can be read.")
    try:
        matching = [value for name, value in (config.get("alpha_pattern") or {}).items() if _names(name, module)]
        return float([*matching, config.get("lora_alpha", rank)][0])
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: alphas of modules cannot be read from {DIFFUSERS_METADATA!r} of its metadata: {error}.") from error


def _names(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's alpha_pattern, a module's name or its end, is of this module."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(f"the pattern {pattern!r} is more than a name")
    return module == name or (not pattern.startswith("^") and module.endswith(f".{name}"))


def part_rows(parts: tuple[str, ...], width: int) -> list[int]:
    """Output rows of each part of a stack, in a model of this width."""
    return [width * WIDER.get(part.rsplit(".", 1)[-1], 1) for part in parts]


def fold_scale(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A' and B' with B' A' = s B A, in the given number format. Exact where s is a power of two; both factors take about half of it."""
    if scale == 1:
        return a, b
    half = 2.0 ** round(math.log2(scale) / 2)
    return a * (scale / half), b * half


def to_diffusers(file: LoraFile, transformer_only: bool = False) -> dict[str, Tensor]:
    """A file of any style as `transformer.<module>.lora_A.weight` [r, d_in] and `.lora_B.weight` [d_out, r], scale 1.

    Args:
        file: The file.
        transformer_only: Leave out LoRAs of text encoders instead of refusing the file.

    Raises:
        ValueError: See `find_modules` and `read_module`.
    """
    where, result = str(file.path), {}
    modules = find_modules([key for key in file if not (transformer_only and is_text_encoder_key(key))], where)
    for keys in modules.values():
        a, b = fold_scale(*read_module(file, keys, file.metadata, where))
        for part, part_a, part_b in split_stack(a, b, keys):
            result[f"{PREFIX}{part}.lora_A.weight"], result[f"{PREFIX}{part}.lora_B.weight"] = part_a, part_b
    return result


def split_stack(a: Tensor, b: Tensor, keys: LoraKeys) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The LoRAs of a module's parts, (name in diffusers, A, B), with the products B A of the whole's rows.

    Factors on a block diagonal come apart again: equal blocks as they are, others without the columns of B that a part does not use (a part
    that uses none has no LoRA). A dense B gives its rows to the parts, and A to each.
    """
    if len(keys.parts) == 1:
        if keys.style != "diffusers" and keys.parts[0] == SWAPPED:
            b = swap_halves(b)
        yield keys.parts[0], a.contiguous(), b.contiguous()
        return
    pieces = b.split(part_rows(keys.parts, a.shape[1]))
    used = [piece.any(dim=0) for piece in pieces]
    blocks = torch.eye(len(pieces), dtype=torch.bool).repeat_interleave(len(a) // len(pieces), dim=1)
    if len(a) % len(pieces) == 0 and not any(bool((mine & ~block).any()) for mine, block in zip(used, blocks, strict=True)):
        used = list(blocks)
    for part, piece, columns in zip(keys.parts, pieces, used, strict=True):
        if columns.any():
            yield part, a[columns].clone(), piece[:, columns].clone()


def swap_halves(b: Tensor) -> Tensor:
    """The rows' second half, then the first."""
    first, second = b.chunk(2)
    return torch.cat([second, first])


def from_diffusers(tensors: Mapping[str, Tensor], style: Style) -> dict[str, Tensor]:
    """The tensors of `to_diffusers` in another style, with the same products B A.

    In the styles of kohya and ComfyUI the LoRAs of a stack become one, its A rows stacked, its B on a block diagonal (parts without a LoRA
    have rows of zeros), its rank their sum; parts that share one A keep it. alpha is the rank: the scale is 1.

    Raises:
        ValueError: If the shapes of a stack's part are not what the model's width asks for.
    """
    if style == "diffusers":
        return dict(tensors)
    stacks: dict[Place, list[str]] = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            stacks.setdefault(stack_of(name), []).append(name)
    result = {}
    for place, found in stacks.items():
        a, b = _stacked(tensors, place, found)
        name = f"lora_unet_{place.name.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{place.name}"
        result |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(float(len(a)))}
    return result


def _stacked(tensors: Mapping[str, Tensor], place: Place, found: list[str]) -> tuple[Tensor, Tensor]:
    """One LoRA of those of a stack's parts, of which `found` are there."""
    parts = place.parts
    factors = {name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]) for name in found}
    if len(parts) == 1:
        a, b = factors[parts[0]]
        return a, swap_halves(b) if parts[0] == SWAPPED else b
    a, _ = factors[found[0]]
    rows = dict(zip(parts, part_rows(parts, a.shape[1]), strict=True))
    for name, (other, b) in factors.items():
        if (len(b), other.shape[1]) != (rows[name], a.shape[1]):
            shapes = f"{rows[name]} rows and an A of {a.shape[1]} columns to be part of {place.name}, got {len(b)} and {other.shape[1]}"
            raise ValueError(f"{PREFIX}{name}.lora_B.weight must have {shapes}. Is it for another model?")
    if len(found) == len(parts) and all(torch.equal(a, other) for other, _ in factors.values()):
        return a, torch.cat([factors[name][1] for name in parts])
    ranks = [len(factors[name][0]) if name in factors else 0 for name in parts]
    dtype = functools.reduce(torch.promote_types, [b.dtype for _, b in factors.values()])
    whole = torch.zeros(sum(rows.values()), sum(ranks), dtype=dtype)
    row = column = 0
    for name, rank in zip(parts, ranks, strict=True):
        if name in factors:
            whole[row : row + rows[name], column : column + rank] = factors[name][1]
        row, column = row + rows[name], column + rank
    return torch.cat([factors[name][0] for name in parts if name in factors]), whole
