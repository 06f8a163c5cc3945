"""LoRA files in the key styles of other programs, checked and read as diffusers names and splits them.

Where the original code has one matrix for what diffusers splits, a LoRA of the whole becomes LoRAs of its parts; the products B A stay
exactly what they were. Scales are taken into the factors here, in every style alike: diffusers' converters drop those of the last layer.
"""

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from mosaic.lora.adapter import PREFIX
from mosaic.lora.files import DIFFUSERS_METADATA, LoraFile, check_finite, metadata_object
from mosaic.lora.keys import LINEAR1_WIDTH, LoraKeys, convert_module, find_modules, is_text_encoder_key

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LINEAR1_PARTS = 4  # to_q, to_k, to_v and proj_mlp
WIDER = {"proj_mlp": 4}  # output rows of a part of a stack, in widths of the model; of all others 1
SCALES = (1e-6, 1e6)  # beyond them a file is damaged, and factors that take the scale up would overflow
SWAPPED = "norm_out.linear"  # its rows are two halves, scale and shift


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
    if len(keys.parts) == LINEAR1_PARTS and a.shape[1] > LINEAR1_WIDTH:
        raise ValueError(f"{where}: {keys.down} must have at most FLUX.1's {LINEAR1_WIDTH} columns, got {a.shape[1]}.")
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
    """The LoRAs of a module's parts, (name in diffusers, A, B), none sharing memory, with the products B A of the whole's rows."""
    if len(keys.parts) != LINEAR1_PARTS:
        for name, (part_a, part_b) in convert_module(keys.style, keys.stem, a, b).items():
            yield name, part_a.clone(), part_b.contiguous()
        return
    # diffusers splits linear1 where FLUX.1's rows part; rows of zeros bring those of a narrower model there, and go again
    rows, wide = part_rows(keys.parts, a.shape[1]), part_rows(keys.parts, LINEAR1_WIDTH)
    b = torch.cat([functional.pad(piece, (0, 0, 0, w - r)) for piece, r, w in zip(b.split(rows), rows, wide, strict=True)])
    for (name, (part_a, part_b)), count in zip(convert_module(keys.style, keys.stem, a, b).items(), rows, strict=True):
        yield name, part_a.clone(), part_b[:count].contiguous()
