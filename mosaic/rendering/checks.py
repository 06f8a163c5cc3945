"""What can be checked of a run before anything is loaded: sizes and the output folder."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mosaic.config.loading import Config
from mosaic.files import require_folder
from mosaic.lora.zeros import ALL_ZERO, changes_nothing
from mosaic.method.grids import token_grid
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.prompt_lengths import LostWords, TextWindow
from mosaic.rendering.cases.reading import Case
from mosaic.rendering.folder import check_own, picture_names
from mosaic.weights.digests import vae_scale_factor
from mosaic.weights.hub import resolve_lora_file, resolve_style_lora_file


class Checked(NamedTuple):
    """What a check of a run's cases finds.

    Attributes:
        problems: A message for every case that does not fit the model.
        notes: A message for every case whose prompt is not read whole.
    """

    problems: list[str]
    notes: list[str]


def check_run(cases: Sequence[Case], config: Config) -> Checked:
    """Check the output folder, the packages that the settings need, all sizes and all prompts.

    Of the model its VAE's config and T5's tokenizer are read, and downloaded where it is a hub id.

    Raises:
        FileNotFoundError, OSError, ValueError: The settings do not fit, or there is no such model.
    """
    settings = config.inference
    check_output(Path(settings.output_dir), cases, settings.seed, settings.report and settings.lora is not None)
    notes = check_memory(config)
    factor, problems = vae_scale_factor(config.model.pretrained), []
    options = ResolvedOptions.from_config(config)
    check_sizes(options, factor)
    for case in cases:
        try:
            check_size(options.given(case.options), case, factor)
        except ValueError as error:
            problems.append(str(error))
    return Checked(problems, notes + prompt_notes(cases, lost_words(cases, config)))


def check_memory(config: Config) -> list[str]:
    """Check what the settings of memory need; returns a note where "auto" has not all presets to choose from.

    Raises:
        FileNotFoundError, ValueError: They exclude each other, or need a package or file that is not there.
    """
    settings = config.inference
    if (settings.memory, settings.quantization, settings.gguf) == ("none", None, None):
        return []
    from mosaic.rendering.memory_presets import PRESETS, missing_packages, resolve_preset  # and torch
    from mosaic.weights.quantization import INSTALL

    if settings.memory != "auto":
        resolve_preset(config)
        return []
    resolve_preset(config.replace(inference=settings.replace(memory="none")))
    lacking = {name: missing for name, preset in PRESETS.items() if (missing := missing_packages(preset))}
    packages = sorted({package for missing in lacking.values() for package in missing})
    if not lacking:
        return []
    return [f'inference.memory "auto" cannot choose {", ".join(lacking)}, for {" and ".join(packages)} are not installed: {INSTALL}.']


def lost_words(cases: Iterable[Case], config: Config) -> dict[str, LostWords]:
    """By prompt, what the model does not read of it; prompts that are read whole are not there.

    Raises:
        FileNotFoundError, OSError, ValueError: The model's tokenizer is not there, cannot be reached or read.
    """
    window = TextWindow.of_model(config.model.pretrained, config.model.text_length)
    return dict(window.all_lost(case.prompt for case in cases))


def prompt_notes(cases: Iterable[Case], lost: Mapping[str, LostWords]) -> list[str]:
    """A message for every case whose prompt is not read whole."""
    return [f"{case.place}: its prompt {lost[case.prompt]} (model.text_length)." for case in cases if case.prompt in lost]


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


def check_output(folder: Path, cases: Sequence[Case], seed: int, with_report: bool) -> None:
    """Check that a run can leave its files in a folder, which need not be there yet, and replaces nothing of the user's.

    Args:
        folder: Where the files go.
        cases: Of the run.
        seed: `inference.seed`.
        with_report: Whether reports are written.

    Raises:
        ValueError: The folder's place is taken, nothing can be written there, or something that no run has written has a file's name.
    """
    require_folder(folder, "inference.output_dir")
    check_own(folder, [name for case in cases for name in picture_names(case, seed)], with_report)
