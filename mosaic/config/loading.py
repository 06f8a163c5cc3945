"""The settings of training and inference: JSON files and `--set` overrides into one frozen, validated `Config`.

The sections and their fields, with defaults and meanings, are in `mosaic.config.sections`; a config file lists only what differs.
Files and folders named in a config (`data.root`, `inference.cases`, a local `model.pretrained`) are relative to the current
directory, as in a shell, not to the config file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field

from mosaic.config.schema import FieldError, Section, unknown_setting
from mosaic.config.sections import (
    LOSS_PRESETS,
    DataConfig,
    InferenceConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from mosaic.files import read_json, shown

LONG_OVERRIDE = 120  # letters, of which messages show no more

__all__ = [
    "LOSS_PRESETS",
    "Config",
    "DataConfig",
    "InferenceConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "ValidationConfig",
    "config_to_json",
    "from_dict",
    "load_config",
    "load_settings",
    "resolved_dict",
]


Kind = TypeVar("Kind", bound=Section)


class Config(Section):
    """All settings of a run; one schema for training and inference, each of which reads the sections it needs."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The frozen base model."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """The reference adapter that is trained."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The training samples."""
    loss: LossConfig = Field(default_factory=LossConfig)
    """The attention losses."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer and its learning rate."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """Length, batch, precision and outputs of a run."""
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """Cases the training has not seen."""
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    """Rendering of a cases file."""


EXTENDS = "extends"
"""Top-level key of a config file: another config file, whose settings hold where this one gives none."""

MAX_EXTENDS = 32
"""Files that may build on one another."""

IGNORED_KEYS = ("$schema", "$comment")
"""Top-level keys without effect: editors use "$schema" for completion, people read "$comment"."""


class _Override(NamedTuple):
    """One `--set section.field=value`."""

    names: tuple[str, ...]
    value: Any
    source: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config file of a run. Arguments and errors as of `load_settings`."""
    return load_settings(Config, path, overrides)


def load_settings(kind: type[Kind], path: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """Read a config file, apply overrides, validate everything.

    Args:
        kind: What the file holds: sections, and maybe fields beside them.
        path: A JSON file: an object of sections. "extends" in it names another one, relative to it, on which it builds field by field.
        overrides: Strings "section.field=value" in the order given on the command line; the last one for a field wins. The value is read as
            JSON where it is JSON, else as a string: "training.max_steps=100", "loss.capture_blocks=[0, 1]", "data.root=data/pocket".

    Returns:
        The config, with presets resolved.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not JSON, an unknown key, a wrong type, a value out of range, or files that extend each other in a circle. The message
            names the dotted path and the file or override.
    """
    parsed = [_parse_override(kind, text) for text in overrides]
    values, sources = _read_extended(kind, Path(path), ())
    for names, value, source in parsed:
        within: Any = values
        for name in names[:-1]:
            within = within.setdefault(name, {}) if isinstance(within, dict) else None
        if isinstance(within, dict):  # else a section that is none, refused when the config is built
            within[names[-1]] = value
            sources[".".join(names)] = source
    return _build(kind, values, str(path), sources)


def from_dict(values: object, source: str = "config") -> Config:
    """Make a config from parsed JSON; `from_dict(resolved_dict(config)) == config`.

    Args:
        values: An object of sections; missing sections and fields take their defaults.
        source: Where the values come from, for messages.

    Raises:
        ValueError: An unknown key, a wrong type or a value out of range; the message names the dotted path and the source.
    """
    return _build(Config, values, source, {})


def resolved_dict(config: Config) -> dict[str, Any]:
    """Return all settings, defaults and presets filled in, as JSON types."""
    return config.model_dump(mode="json")


def config_to_json(config: Config) -> str:
    """Return `resolved_dict` as indented JSON text, which `load_config` reads back to an equal config."""
    return json.dumps(resolved_dict(config), indent=2, ensure_ascii=False) + "\n"


def _parse_override(kind: type[Section], text: str) -> _Override:
    """Split "section.field=value" and read the value.

    Raises:
        ValueError: It does not have that form, or begins with what is no section.
    """
    source = f"--set {text if len(text) < LONG_OVERRIDE else text[:LONG_OVERRIDE] + '...'}"
    key, equals, raw = text.partition("=")
    names = tuple(key.strip().split("."))
    if not equals or not all(names) or (len(names) == 1 and (names[0] not in kind.model_fields or _section(kind, names[0]))):
        raise ValueError(f"--set must have the form section.field=value, such as lora.rank=32, got {shown(text)}.")
    if names[0] not in kind.model_fields:
        raise unknown_setting(key.strip(), names[0], kind.model_fields, source)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = raw
    return _Override(names, value, source)


def _section(kind: type[Section], name: str) -> type[Section] | None:
    """The section that a field of this name holds; None: it holds something else."""
    field = kind.model_fields.get(name)
    held = field.annotation if field is not None else None
    return held if isinstance(held, type) and issubclass(held, Section) else None


def _read_extended(kind: type[Section], path: Path, extending: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a file over those of the file it extends, and which file each dotted path comes from."""
    here = path.resolve()
    if here in extending:
        raise ValueError(f'{path}: "{EXTENDS}" leads in a circle: {" -> ".join(file.name for file in (*extending, here))}.')
    if len(extending) == MAX_EXTENDS:
        raise ValueError(f'{extending[0]}: "{EXTENDS}" must lead through at most {MAX_EXTENDS} files, and leads on to {path}.')
    given = read_json(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path}: must be a JSON object of sections, got {shown(given)}.")
    base = given.pop(EXTENDS, None)
    if base is not None and not (isinstance(base, str) and base):
        raise FieldError(EXTENDS, f"must be the path of a config file, relative to this one, got {shown(base)}", str(path))
    if base and not (path.parent / base).is_file():
        raise FileNotFoundError(f'{path}: "{EXTENDS}" names {base!r}, relative to this file, but {path.parent / base} is no file.')
    values, sources = _read_extended(kind, path.parent / base, (*extending, here)) if base else ({}, {})
    _lay_over(kind, values, given, sources, str(path))
    return values, sources


def _lay_over(
    kind: type[Section], values: dict[str, Any], given: dict[str, Any], sources: dict[str, str], source: str, path: str = ""
) -> None:
    """Put given values in place of those there, section within section field by field, and note where each comes from."""
    for name, value in given.items():
        here, section = f"{path}{name}", _section(kind, name)
        sources[here] = source
        if section is None or not isinstance(value, dict) or not isinstance(values.get(name, {}), dict):
            values[name] = value
        else:
            _lay_over(section, values.setdefault(name, {}), value, sources, source, f"{here}.")


def _build(kind: type[Kind], values: object, source: str, sources: Mapping[str, str]) -> Kind:
    """Make and validate the config; `sources` gives the place of single dotted paths, `source` that of all others."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: must be a JSON object of sections, got {shown(values)}.")
    try:
        return kind(**{name: value for name, value in values.items() if name not in IGNORED_KEYS})
    except FieldError as error:
        raise FieldError(error.path, error.problem, sources.get(error.path, source)) from error
