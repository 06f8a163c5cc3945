"""A plain folder of samples: one folder per sample with `target.*`, `ref_*.*`, `prompt.txt`, and `mask_*.*` where masks are known.

Every file of a sample's folder is used, or the sample is refused and the file named: nothing is left out without a word.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mosaic.data.masks import decode_mask
from mosaic.data.multi_reference.records import ReferenceRecord, SampleRecord
from mosaic.files import read_text
from mosaic.images import read_picture
from preprocess.sources.invalid import InvalidSamples
from preprocess.sources.listing import Listing, formats_in_words, is_picture
from preprocess.sources.pairs import unmatched_sample

logger = logging.getLogger(__name__)
RULE = "a sample's folder holds target.*, ref_0.*, ref_1.*, ..., mask_0.* (where ref_0 is seen in the target) and prompt.txt"
_LABELLED = re.compile(r"(ref|mask)_([\w-]+)", re.IGNORECASE)


class SampleFiles(NamedTuple):
    """The files of a sample by what they are.

    Attributes:
        target: The target picture.
        references: The reference pictures by label, such as "0" of ref_0.png, in the order of the labels.
        masks: The masks by label.
        prompt: The caption.
    """

    target: Path
    references: dict[str, Path]
    masks: dict[str, Path]
    prompt: Path


def samples(root: Path, invalid: InvalidSamples, split: str = "train", grid: int = 64) -> Iterator[SampleRecord]:
    """Yield the samples in the order of their folders' names.

    Args:
        root: Folder that holds the sample folders.
        invalid: What to do with samples that cannot be converted.
        split: Split of all samples.
        grid: Cells per side of a square picture.

    Raises:
        FileNotFoundError, ValueError: `root` is no folder or holds none; or a sample is invalid and not skipped.
    """
    listing = Listing()
    folders, files = _contents(root, listing)
    if files:
        logger.warning("%s: beside the samples' folders, and not read: %s", root, ", ".join(path.name for path in files))
    try:
        for folder in folders:
            with invalid.at(str(folder)):
                yield _sample(folder, listing, split, grid)
    finally:
        listing.report()


def count(root: Path) -> int:
    """Return the number of samples."""
    return len(_contents(root, Listing())[0])


def _contents(root: Path, listing: Listing) -> tuple[list[Path], list[Path]]:
    """The samples' folders, and the files beside them."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder; it must hold one folder per sample.")
    found = listing.of(root)
    folders, files = [path for path in found if path.is_dir()], [path for path in found if not path.is_dir()]
    if any(path.stem.lower() == "target" and is_picture(path) for path in files):
        raise ValueError(f"{root}: is the folder of one sample; name the folder that holds it, {root.absolute().parent}.")
    if not folders:
        raise ValueError(f"{root}: must hold one folder per sample, with target.png, ref_*.png and prompt.txt; got none.")
    pictures = [path.name for path in files if is_picture(path)]
    if pictures:
        raise ValueError(
            f"{root}: holds folders and pictures; {_some(pictures)} would be left out. Put each sample into a folder of its own, or the "
            "pictures alone, with their captions, into another folder."
        )
    return folders, files


def sample_files(folder: Path, paths: list[Path]) -> SampleFiles:
    """Say what each file of a sample is.

    Args:
        folder: The sample's folder.
        paths: All that it holds.

    Raises:
        FileNotFoundError: The target, the prompt or a reference is missing.
        ValueError: Something is there that is none of these, or twice.
    """
    found: dict[tuple[str, str], Path] = {}
    unknown = []
    for path in paths:
        part = _part(path)
        if part is None:
            unknown.append(path.name)
        elif part in found:
            raise ValueError(f"{folder}: {found[part].name} and {path.name} are both the {'_'.join(filter(None, part))}; keep one of them.")
        else:
            found[part] = path
    if unknown:
        raise ValueError(
            f"{folder}: {_some(unknown)} would be left out: {RULE}; pictures end in {formats_in_words()}. Rename it, or take it away."
        )
    references, masks = ({label: path for (kind, label), path in found.items() if kind == wanted} for wanted in ("ref", "mask"))
    for name, kind in (("target.png", "target"), ("prompt.txt", "prompt")):
        if (kind, "") not in found:
            raise FileNotFoundError(f"{folder / name}: file not found.")
    if not references:
        raise FileNotFoundError(f"{folder / 'ref_0.png'}: file not found; a sample needs at least one ref_*.png.")
    for label, path in masks.items():
        if label not in references:
            there = ", ".join(reference.name for reference in references.values())
            raise ValueError(f"{folder}: {path.name} is the mask of no reference; found {there}. Number both alike.")
    ordered = {label: references[label] for label in sorted(references, key=lambda label: _natural(references[label].stem[4:]))}
    return SampleFiles(found["target", ""], ordered, masks, found["prompt", ""])


def _part(path: Path) -> tuple[str, str] | None:
    """What a file is, with its label: ("target", ""), ("prompt", ""), ("ref", "0"), ("mask", "0"); None: none of these."""
    stem = path.stem.lower()
    if stem == "prompt" and path.suffix.lower() == ".txt" and not path.is_dir():
        return "prompt", ""
    if not is_picture(path):
        return None
    labelled = _LABELLED.fullmatch(stem)
    if labelled:
        return labelled[1], str(int(labelled[2])) if labelled[2].isdecimal() else labelled[2]
    return ("target", "") if stem == "target" else None


def _sample(folder: Path, listing: Listing, split: str, grid: int) -> SampleRecord:
    """Read one sample folder."""
    files = sample_files(folder, listing.of(folder))
    references = []
    for label, picture in files.references.items():
        mask = files.masks.get(label)
        shown = None if mask is None else decode_mask(read_picture(mask), str(mask))
        references.append(ReferenceRecord(picture, mask=shown))
    metadata = {"source": "folder", "folder": folder.name}
    return unmatched_sample(files.target, references, read_text(files.prompt), metadata, split, grid)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that puts ref_2 before ref_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _some(names: list[str], most: int = 5) -> str:
    """Names in one line, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
