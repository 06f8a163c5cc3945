"""The settings of training and inference: JSON files and `--set` overrides into one frozen, validated `Config`.

The sections and their fields, with defaults and meanings, are in `mosaic.config.sections`; a config file lists only what differs.
Files and folders named in a config (`data.root`, `inference.cases`, a local `model.pretrained`) are relative to the current
directory, as in a shell, not to the config file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    "resolved_dict",
]


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


SECTIONS: dict[str, type[Section]] = {name: type(section) for name, section in Config()}
"""The sections by the name under which they stand in a file."""

EXTENDS = "extends"
"""Top-level key of a config file: another config file, whose settings hold where this one gives none."""

MAX_EXTENDS = 32
"""Files that may build on one another."""

IGNORED_KEYS = ("$schema", "$comment")
"""Top-level keys without effect: editors use "$schema" for completion, people read "$comment"."""


class _Override(NamedTuple):
    """One `--set section.field=value`."""

    section: str
    field: str
    value: Any
    source: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides, validate everything.

    Args:
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
    parsed = [_parse_override(text) for text in overrides]
    values, sources = _read_extended(Path(path), ())
    for section, field, value, source in parsed:
        if isinstance(values.setdefault(section, {}), dict):
            values[section][field] = value
            sources[f"{section}.{field}"] = source
    return _build(values, str(path), sources)


def from_dict(values: object, source: str = "config") -> Config:
    """Make a config from parsed JSON; `from_dict(resolved_dict(config)) == config`.

    Args:
        values: An object of sections; missing sections and fields take their defaults.
        source: Where the values come from, for messages.

    Raises:
        ValueError: An unknown key, a wrong type or a value out of range; the message names the dotted path and the source.
    """
    return _build(values, source, {})


def resolved_dict(config: Config) -> dict[str, Any]:
    """Return all settings, defaults and presets filled in, as JSON types."""
    return config.model_dump(mode="json")


def config_to_json(config: Config) -> str:
    """Return `resolved_dict` as indented JSON text, which `load_config` reads back to an equal config."""
    return json.dumps(resolved_dict(config), indent=2, ensure_ascii=False) + "\n"


def _parse_override(text: str) -> _Override:
    """Split "section.field=value" and read the value.

    Raises:
        ValueError: It does not have that form, or names no known section.
    """
    source = f"--set {text if len(text) < LONG_OVERRIDE else text[:LONG_OVERRIDE] + '...'}"
    key, equals, raw = text.partition("=")
    section, dot, field = key.strip().partition(".")
    if not (equals and dot and section and field):
        raise ValueError(f"--set must have the form section.field=value, such as lora.rank=32, got {shown(text)}.")
    if section not in SECTIONS:
        raise unknown_setting(key.strip(), section, SECTIONS, source)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = raw
    return _Override(section, field, value, source)


def _read_extended(path: Path, extending: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The sections of a file over those of the file it extends, and which file each section and "section.field" comes from."""
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
    values, sources = _read_extended(path.parent / base, (*extending, here)) if base else ({}, {})
    for section, fields in given.items():
        sources[section] = str(path)
        if not isinstance(fields, dict) or not isinstance(values.get(section, {}), dict):
            values[section] = fields  # no section at all: refused when the config is built
            continue
        values.setdefault(section, {}).update(fields)
        sources.update({f"{section}.{field}": str(path) for field in fields})
    return values, sources


def _build(values: object, source: str, sources: Mapping[str, str]) -> Config:
    """Make and validate the config; `sources` gives the place of single dotted paths, `source` that of all others."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: must be a JSON object of sections, got {shown(values)}.")
    try:
        return Config(**{name: value for name, value in values.items() if name not in IGNORED_KEYS})
    except FieldError as error:
        raise FieldError(error.path, error.problem, sources.get(error.path, source)) from error
