"""What scripts/lora_tools.py does: look into a LoRA file, lower its rank, bring its keys into the style of diffusers."""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]

from mosaic.lora.adapter import shorten
from mosaic.lora.files import METADATA_KEY, LoraFile, kept_metadata, reference_metadata, write_tensors
from mosaic.lora.formats import to_diffusers
from mosaic.lora.keys import LoraKeys, find_modules, is_reference_lora, is_text_encoder_key
from mosaic.lora.reduction import REPORT_KEY, find_rank, overall, reduce_file, reduction_report
from mosaic.lora.resize import ReducedModule
from mosaic.lora.scales import Alpha, module_scale, peft_config
from mosaic.lora.zeros import ALL_ZERO, changes_nothing
from mosaic.weights.digests import weights_digest

NUM_WORST = 10


# ---- info


def describe(file: LoraFile) -> dict[str, Any]:
    """What is in a file, ready for JSON; matrices are read only up to the first that is not zero.

    Raises:
        ValueError: If it is no plain LoRA of a known style.
    """
    text_encoder = [key for key in file if is_text_encoder_key(key)]
    modules = find_modules([key for key in file if not is_text_encoder_key(key)], str(file.path))
    parts = [part for keys in modules.values() for part in keys.parts]
    config = peft_config(file.metadata, str(file.path))
    ours = reference_metadata(file.metadata, str(file.path))
    others = {key: text for key, text in file.metadata.items() if key not in (METADATA_KEY, REPORT_KEY, "format")}
    return {
        "file": file.path.name,
        "digest": weights_digest(file.path),
        "bytes": file.path.stat().st_size,
        "kind": "reference LoRA" if ours or is_reference_lora(parts) else "style LoRA",
        "styles": sorted({keys.style for keys in modules.values()}),
        "modules": len(modules),
        "ranks": dict(Counter(_rank(file, keys.down) for keys in modules.values()).most_common()),
        "dtypes": dict(Counter(file.dtype(key) for key in file).most_common()),
        "parameters": sum(math.prod(file.shape(key)) for keys in modules.values() for key in (keys.down, keys.up)),
        "with_alpha": sum(keys.alpha is not None for keys in modules.values()),
        "scales": dict(Counter(f"{_scale(file, keys, config):g}" for keys in modules.values()).most_common()),
        "all_zero": changes_nothing(file.path),
        "text_encoder_tensors": len(text_encoder),
        "config": ours.get("config", {}),
        "reduction": _summary(file.metadata.get(REPORT_KEY)),
        "metadata": others,
    }


def _rank(file: LoraFile, down: str) -> int:
    shape = file.shape(down)
    if len(shape) != 2:
        raise ValueError(f"{file.path}: {down} must be a matrix, got shape {shape}.")
    return shape[0]


def _scale(file: LoraFile, keys: LoraKeys, config: dict[str, Any]) -> float:
    alpha = None if keys.alpha is None else Alpha(keys.alpha, file[keys.alpha])
    return module_scale(config, keys.parts[0], _rank(file, keys.down), alpha, str(file.path))


def _summary(text: str | None) -> dict[str, Any] | None:
    """The head of the report that `reduce` left in a file; None if there is none that can be read."""
    try:
        report = json.loads(text or "")
        return {key: report[key] for key in ("source", "relative_error", "kept")}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def show_info(found: dict[str, Any]) -> None:
    """Print what `describe` found, a line each."""
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in found["ranks"].items())
    dtypes = ", ".join(f"{name} ({count})" for name, count in found["dtypes"].items())
    lines = {
        "file": f"{found['file']} ({found['bytes']:,} bytes)",
        "digest": found["digest"],
        "kind": found["kind"],
        "key style": ", ".join(found["styles"]),
        "modules": f"{found['modules']}, of which {found['with_alpha']} give an alpha" + (f"; {ALL_ZERO}" if found["all_zero"] else ""),
        "rank": ranks,
        "scale": ", ".join(f"{scale} ({count} modules)" for scale, count in found["scales"].items()),
        "tensors": dtypes,
        "parameters": f"{found['parameters']:,}",
        "text encoder": f"{found['text_encoder_tensors']} tensors" if found["text_encoder_tensors"] else "none",
        "reduced from": json.dumps(found["reduction"]) if found["reduction"] else "no reduction noted",
        "config": _cut(json.dumps(found["config"])) if found["config"] else "none in the metadata",
    }
    lines |= {f"metadata {json.dumps(key)[:60]}": _cut(json.dumps(text)) for key, text in found["metadata"].items()}
    for name, text in lines.items():
        print(f"{name + ':':<14} {text}")


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}... (--json prints all)"


# ---- reduce, import


def reduce(arguments: argparse.Namespace, file: LoraFile) -> None:
    """The subcommand reduce."""
    modules = find_modules(file, str(file.path))
    rank = arguments.rank
    if rank is None:
        with tqdm(total=len(modules), desc="singular values", unit="module") as progress:
            rank = find_rank(file, arguments.energy, progress.update)
    with tqdm(total=len(modules), desc=f"rank {rank}", unit="module") as progress:
        tensors, reduced = reduce_file(file, rank, progress.update)
    report = reduction_report(reduced, file.path.name, weights_digest(file.path))
    write_tensors(tensors, arguments.output, kept_metadata(file.metadata) | {REPORT_KEY: json.dumps(report)})
    show_reduction(reduced)
    note_of_zeros(file)
    before, after = file.path.stat().st_size, arguments.output.stat().st_size
    print(f"{arguments.output}: rank {rank}, {after:,} bytes ({after / before:.1%} of {before:,})")


def show_reduction(reduced: dict[str, ReducedModule]) -> None:
    """Print the modules that lost most, and all of them together."""
    worst = sorted(reduced.items(), key=lambda item: -item[1].relative_error)[:NUM_WORST]
    width = max(len(name) for name, _ in worst)
    print(f"{'module':<{width}}  rank        kept  relative error")
    for name, module in worst:
        ranks = f"{module.rank_before} -> {module.rank}"
        print(f"{name:<{width}}  {ranks:<10} {module.energy:>6.2%}  {module.relative_error:.3e}")
    error, energy = overall(reduced)
    print(f"all {len(reduced)} modules: {energy:.4%} of the squared norm kept, relative Frobenius error {error:.3e}")


def bring(arguments: argparse.Namespace, file: LoraFile) -> None:
    """The subcommand import."""
    left_out = [key for key in file if is_text_encoder_key(key)]
    tensors = to_diffusers(file, arguments.transformer_only)
    metadata = kept_metadata(file.metadata)
    reference_metadata(metadata, str(file.path))  # refused where it could not be loaded
    write_tensors(tensors, arguments.output, metadata)
    note_of_zeros(file)
    if left_out:
        print(f"note: left out {len(left_out)} tensors of text encoders: {shorten(left_out, 2)}", file=sys.stderr)
    print(f"{arguments.output}: {len(tensors) // 2} modules, {arguments.output.stat().st_size:,} bytes")


def note_of_zeros(file: LoraFile) -> None:
    """Say so where a file changes nothing."""
    if changes_nothing(file.path):
        print(f"note: {file.path}: {ALL_ZERO}", file=sys.stderr)


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that cannot or must not be written, before any work.

    Raises:
        ValueError: It is a folder, is the source, has another ending, or is there already.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"--output must end in .safetensors, got {output}.")
    if output.is_dir():
        raise ValueError(f"--output must be a file, but {output} is a folder.")
    if output.exists() and (output.samefile(source) if source.exists() else False):
        raise ValueError(f"--output must be another file than {source}, which is still being read.")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is there already. Give another --output, or --overwrite to replace it.")


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        FileNotFoundError, OSError, ValueError: The file cannot be read or is no LoRA, or the output must not be written.
    """
    if arguments.command != "info":
        check_output(arguments.output, arguments.file, arguments.overwrite)
    file = LoraFile(arguments.file)
    if arguments.command == "info":
        found = describe(file)
        print(json.dumps(found)) if arguments.json else show_info(found)
    else:
        {"reduce": reduce, "import": bring}[arguments.command](arguments, file)
