"""The shapes in which people keep cases, told apart by their keys, and one shape for the rest of the code."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

PROMPT, REFERENCES, IMAGE_PATHS = "prompt", "references", "image_paths"


class Shape(NamedTuple):
    """Keys of a case in another project's files.

    Attributes:
        name: What the shape is called in messages.
        told_by: The case has this shape if it holds one of these keys.
        renamed: Its key for each of ours.
        one_path: Key of a single reference path.
        path_prefix: Beginning of the keys of numbered reference paths.
        unused: Keys that name a picture to learn from or a place for the result. They have no use here, and a note says so.
    """

    name: str
    told_by: tuple[str, ...]
    renamed: Mapping[str, str] = MappingProxyType({})
    one_path: str | None = None
    path_prefix: str | None = None
    unused: tuple[str, ...] = ()


SHAPES = (
    Shape(
        "OmniGen2",
        ("instruction", "input_images"),
        renamed={"instruction": PROMPT, "input_images": IMAGE_PATHS},
        unused=("task_type", "output_image"),
    ),
    Shape(
        "MUSAR-Gen",
        ("cond_img_0",),
        path_prefix="cond_img_",
        unused=("tgt_img", "cond_prompt_0", "cond_prompt_1"),
    ),
    Shape("UNO / USO", ("image_path", "image_tgt_path", "save_dir"), one_path="image_path", unused=("image_tgt_path", "save_dir")),
)
"""Shapes with keys of their own. MOSAIC's and UNO's `prompt, image_paths` are ours already."""


class Entry(NamedTuple):
    """A case in our keys.

    Attributes:
        values: What was given, by our keys.
        given_keys: The file's key for each of ours that has another name there, for messages.
        unused: Known keys of the file that have no use here.
    """

    values: dict[str, Any]
    given_keys: dict[str, str]
    unused: tuple[str, ...]


def unify(entry: dict[str, Any]) -> Entry:
    """A case of any shape in our keys. Unknown keys stay, to be refused by the reader.

    Raises:
        ValueError: Two of its keys mean the same.
    """
    shape = next((shape for shape in SHAPES if any(key in entry for key in shape.told_by)), None)
    if shape is None:
        return Entry(dict(entry), {}, ())
    values: dict[str, Any] = {}
    given_keys: dict[str, str] = {}
    for key, value in entry.items():
        ours = shape.renamed.get(key, key)
        if key == shape.one_path:
            ours, value = IMAGE_PATHS, [value]
        elif shape.path_prefix and key.startswith(shape.path_prefix):
            ours, value = IMAGE_PATHS, _numbered(entry, shape.path_prefix)
        elif key in shape.unused:
            continue
        if ours in values and not (shape.path_prefix and ours == IMAGE_PATHS):
            raise ValueError(f"{key} and {given_keys.get(ours, ours)} mean the same: give one of them.")
        values[ours] = value
        if ours != key:
            given_keys[ours] = shape.path_prefix + "*" if shape.path_prefix and ours == IMAGE_PATHS else key
    return Entry(values, given_keys, tuple(key for key in shape.unused if key in entry))


def _numbered(entry: dict[str, Any], prefix: str) -> list[Any]:
    """Values of the keys prefix0, prefix1, ... in the order of their numbers.

    Raises:
        ValueError: The numbers have a gap.
    """
    keys = [key for key in entry if key.startswith(prefix)]
    wanted = [f"{prefix}{number}" for number in range(len(keys))]
    if sorted(keys) != sorted(wanted):
        raise ValueError(f"{', '.join(sorted(keys))}: must be numbered from 0 without gaps.")
    return [entry[key] for key in wanted]
