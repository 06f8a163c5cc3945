"""LoRA files in the key styles of other programs, checked and read as diffusers names and splits them.

Where the original code has one matrix for what diffusers splits, a LoRA of the whole becomes LoRAs of its parts; the products B A stay
exactly what they were. Scales are taken into the factors here, in every style alike: diffusers' converters drop those of the last layer.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mosaic.lora.adapter import PREFIX, shorten
from mosaic.lora.files import LoraFile, check_finite, narrowed
from mosaic.lora.keys import LINEAR1_WIDTH, LoraKeys, convert_module, find_modules, is_text_encoder_key
from mosaic.lora.scales import Alpha, module_scale, peft_config

#: Number formats of matrices, by their names in a file's header.
NUMBER_FORMATS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
FORMAT_NAMES = "float64, float32, float16, bfloat16, float8_e4m3fn or float8_e5m2"
LINEAR1_PARTS = 4  # to_q, to_k, to_v and proj_mlp
WIDER = {"proj_mlp": 4}  # output rows of a part of a stack, in widths of the model; of all others 1
SWAPPED = "norm_out.linear"  # its rows are two halves, scale and shift


def read_module(tensors: Mapping[str, Tensor], keys: LoraKeys, config: Mapping[str, Any], where: str) -> tuple[Tensor, Tensor, float]:
    """A, B and the scale s of a module; its weights change by s B A.

    Args:
        tensors: A `LoraFile`, or tensors by key.
        keys: Of the module.
        config: Of `peft_config`.
        where: The file, for messages.

    Returns:
        A [r, d_in], B [d_out, r], where they are float8 as bfloat16, which holds the same numbers; s of `module_scale`.

    Raises:
        ValueError: If one of them is no finite floating point matrix, the ranks of A and B differ or are 0, the rows do not fit the module,
            or alpha is no sensible number.
    """
    a, b = (_finite_matrix(tensors[key], key, where) for key in (keys.down, keys.up))
    rank = len(a)
    if rank == 0 or b.shape[1] != rank:
        raise ValueError(f"{where}: {keys.up} must have a column for each row of {keys.down}, one or more, got {b.shape[1]} and {rank}.")
    rows = sum(part_rows(keys.parts, a.shape[1])) if len(keys.parts) > 1 else len(b) + len(b) % 2 * (keys.parts[0] == SWAPPED)
    if len(b) != rows:
        raise ValueError(f"{where}: {keys.up} must have {rows} rows ({len(keys.parts)} parts), got {len(b)}. Is it for another model?")
    if len(keys.parts) == LINEAR1_PARTS and a.shape[1] > LINEAR1_WIDTH:
        raise ValueError(f"{where}: {keys.down} must have at most FLUX.1's {LINEAR1_WIDTH} columns, got {a.shape[1]}.")
    alpha = None if keys.alpha is None else Alpha(keys.alpha, tensors[keys.alpha])
    return a, b, module_scale(config, keys.parts[0], rank, alpha, where)


def _finite_matrix(matrix: Tensor, key: str, where: str) -> Tensor:
    if matrix.ndim != 2 or matrix.dtype not in NUMBER_FORMATS.values():
        raise ValueError(f"{where}: {key} must be a matrix of {FORMAT_NAMES}, got {matrix.dtype} of shape {tuple(matrix.shape)}.")
    matrix = matrix.bfloat16() if matrix.element_size() == 1 else matrix
    check_finite(matrix, key, where)
    return matrix


def part_rows(parts: tuple[str, ...], width: int) -> list[int]:
    """Output rows of each part of a stack, in a model of this width."""
    return [width * WIDER.get(part.rsplit(".", 1)[-1], 1) for part in parts]


def fold_scale(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A' and B' with B' A' = s B A, in the given number formats where these hold them. Exact where s is a power of two; both factors take
    about half of it.
    """
    if scale == 1:
        return a, b
    half = 2.0 ** round(math.log2(scale) / 2)
    return narrowed(_wide(a) * (scale / half), a.dtype), narrowed(_wide(b) * half, b.dtype)


def _wide(factor: Tensor) -> Tensor:
    return factor if factor.dtype == torch.float64 else factor.float()


def to_diffusers(file: LoraFile, transformer_only: bool = False) -> dict[str, Tensor]:
    """A file of any style as `transformer.<module>.lora_A.weight` [r, d_in] and `.lora_B.weight` [d_out, r], scale 1.

    Args:
        file: The file.
        transformer_only: Leave out LoRAs of text encoders instead of refusing the file.

    Raises:
        ValueError: See `find_modules` and `read_module`.
    """
    where, result = str(file.path), {}
    config = peft_config(file.metadata, where)
    modules = find_modules([key for key in file if not (transformer_only and is_text_encoder_key(key))], where)
    for keys in modules.values():
        a, b = fold_scale(*read_module(file, keys, config, where))
        parts = list(split_stack(a, b, keys))
        if [part for part, _, _ in parts] != list(keys.parts):
            raise ValueError(f"{where}: {keys.stem} does not come apart into {shorten(list(keys.parts))}. Nothing may be left out.")
        for part, part_a, part_b in parts:
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
