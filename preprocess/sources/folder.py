"""A plain folder of samples: one folder per sample with `target.png`, `ref_*.png`, `prompt.txt`, and `mask_*.png` where masks are known."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mosaic.data.multi_reference.records import ReferenceRecord, SampleRecord
from mosaic.images import load_image
from preprocess.sources.invalid import InvalidSamples
from preprocess.sources.pairs import unmatched_sample

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


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
    for folder in _folders(root):
        with invalid.at(str(folder)):
            yield _sample(folder, split, grid)


def count(root: Path) -> int:
    """Return the number of samples."""
    return len(_folders(root))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder; it must hold one folder per sample.")
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{root}: must hold one folder per sample, with target.png, ref_*.png and prompt.txt; got none.")
    return found


def _sample(folder: Path, split: str, grid: int) -> SampleRecord:
    """Read one sample folder."""
    pictures = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    names = sorted((name for name in pictures if name.startswith("ref_")), key=_natural)
    if "target" not in pictures:
        raise FileNotFoundError(f"{folder / 'target.png'}: file not found.")
    if not names:
        raise FileNotFoundError(f"{folder / 'ref_0.png'}: file not found; a sample needs at least one ref_*.png.")
    prompt = folder / "prompt.txt"
    if not prompt.is_file():
        raise FileNotFoundError(f"{prompt}: file not found.")
    references = []
    for name in names:
        mask = pictures.get(f"mask_{name.removeprefix('ref_')}")
        shown = None if mask is None else np.asarray(load_image(mask).convert("L")) > 127
        references.append(ReferenceRecord(pictures[name], mask=shown))
    metadata = {"source": "folder", "folder": folder.name}
    return unmatched_sample(pictures["target"], references, prompt.read_text(encoding="utf-8-sig"), metadata, split, grid)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that puts ref_2 before ref_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
