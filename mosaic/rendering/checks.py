"""What can be checked of a run before anything is loaded: sizes and the output folder."""

from collections.abc import Sequence
from pathlib import Path

from mosaic.config.loading import Config
from mosaic.files import require_folder
from mosaic.lora.zeros import ALL_ZERO, changes_nothing
from mosaic.method.grids import token_grid
from mosaic.pipeline.options import ResolvedOptions
from mosaic.rendering.cases.reading import Case
from mosaic.weights.digests import vae_scale_factor
from mosaic.weights.hub import resolve_lora_file, resolve_style_lora_file

MANIFEST = "manifest.jsonl"


def check_run(cases: Sequence[Case], config: Config) -> list[str]:
    """Check the output folder and all sizes; of the model only its VAE's config is read.

    Returns:
        A message for every case that does not fit the model.

    Raises:
        FileNotFoundError, OSError, ValueError: The settings do not fit, or there is no such model.
    """
    check_output(Path(config.inference.output_dir))
    factor, problems = vae_scale_factor(config.model.pretrained), []
    options = ResolvedOptions.from_config(config)
    check_sizes(options, factor)
    for case in cases:
        try:
            check_size(options.given(case.options), case, factor)
        except ValueError as error:
            problems.append(str(error))
    return problems


def adapter_notes(config: Config) -> list[str]:
    """What to know of the adapters whose files are on this machine; nothing is downloaded.

    Raises:
        FileNotFoundError, ValueError: There is no such file, or it is no safetensors file.
    """
    settings, notes = config.inference, []
    for name, source, resolve, weight_name in (
        ("inference.lora", settings.lora, resolve_lora_file, settings.lora_weight_name),
        ("inference.style_lora", settings.style_lora, resolve_style_lora_file, settings.style_lora_weight_name),
    ):
        if source is not None and Path(source).exists():
            path = resolve(source, weight_name)
            if changes_nothing(path):
                notes.append(f"{name}: {path}: {ALL_ZERO}.")
    return notes


def check_sizes(options: ResolvedOptions, factor: int) -> None:
    """Check the sizes of a config's options against the model, which has `factor` pixels per latent.

    Raises:
        ValueError: A side is no multiple of the token size.
    """
    token_grid(options.height, options.width, factor, where="inference.height, inference.width")
    token_grid(options.reference_size, options.reference_size, factor, where="data.reference_size")


def check_size(options: ResolvedOptions, case: Case, vae_scale_factor: int) -> None:
    """Check the size of a case's picture against the model.

    Raises:
        ValueError: A side is no multiple of the token size.
    """
    token_grid(options.height, options.width, vae_scale_factor, where=f"{case.place}.height, width")


def check_output(folder: Path) -> None:
    """Check that a run can leave its files in a folder, which need not be there yet.

    Raises:
        ValueError: The folder's place or that of the manifest is taken, or nothing can be written there.
    """
    require_folder(folder, "inference.output_dir")
    manifest = folder / MANIFEST
    if manifest.is_dir():
        raise ValueError(f"inference.output_dir: {manifest} must be a file, but it is a folder. Move it away, or name another folder.")
