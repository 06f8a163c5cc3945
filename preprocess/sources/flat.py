"""A flat folder of pictures with captions, as people keep them to train other models: made into sample folders that lack their references.

The caption of `0001.png` is in `0001.txt` (or `0001.caption`, `0001.png.txt`), or in a line of `metadata.jsonl`, `{"file_name": "0001.png",
"text": "..."}`, as the datasets library has it. Every file is used, or refused by its name.
"""

import shutil
from collections import defaultdict
from pathlib import Path

from mosaic.files import parse_json, path_below, read_text, relative_path, shown
from mosaic.images import load_image
from preprocess.sources.invalid import InvalidSamples
from preprocess.sources.listing import Listing, formats_in_words, is_picture

METADATA = "metadata.jsonl"
CAPTIONS = (".txt", ".caption")
KEYS = ("prompt", "text", "caption")


def is_flat(root: Path) -> bool:
    """Whether a folder holds pictures with captions, and not folders of samples."""
    found = Listing().of(root) if root.is_dir() else []
    if any(path.name.lower() == METADATA for path in found):
        return True
    pictures = [path for path in found if is_picture(path)]
    return bool(pictures) and not any(path.is_dir() for path in found) and all(path.stem.lower() != "target" for path in pictures)


def what_is_missing(folder: Path) -> str:
    """What a user has to do with the sample folders, in some lines."""
    return (
        f"{folder} is no data set yet, for its samples lack their references: pictures of each subject alone, on white or transparent.\n"
        f"Put them beside target.* as ref_0.png, ref_1.png, ...: best another picture of the subject, cut out. To cut out what the targets "
        f'show (pip install "rembg[cpu,cli]"):\n'
        f'  for sample in {folder}/*/; do rembg i "$sample"target.* "$sample"ref_0.png; done\n'
        f"Then convert the folders, with the options that you gave here: python preprocess/convert.py folder {folder} DATA"
    )


def write_sample_folders(root: Path, dest: Path, invalid: InvalidSamples, limit: int | None = None) -> int:
    """Make a sample folder of every picture, named by it, with `target.*` (the file as it is) and `prompt.txt`.

    Args:
        root: The flat folder.
        dest: Where to write; made here.
        invalid: What to do with pictures without a caption or that do not decode, and with files that are of no use.
        limit: Folders at most.

    Returns:
        How many were written.

    Raises:
        FileNotFoundError, ValueError: Something is invalid and not skipped.
    """
    listing = Listing()
    files = _files(root, listing, any(path.name.lower() == METADATA for path in root.iterdir()))
    listing.report()
    dest.mkdir(parents=True)
    captions, pictures = _captions(root, files, invalid), [path for path in files if is_picture(path)]
    taken: dict[str, Path] = {}
    written = 0
    for picture in pictures:
        with invalid.at(str(picture)):
            inside = picture.relative_to(root)
            name = "_".join(inside.with_suffix("").parts)
            keys = dict.fromkeys((_key(inside), _key(inside.with_suffix(""))))
            given = [caption for key in keys for caption in captions.pop(key, ())]
            if name.casefold() in taken:
                raise ValueError(f"{taken[name.casefold()]} has the same name; rename one of them.")
            taken[name.casefold()] = picture
            if len(given) != 1:
                places = ", ".join(place for place, _ in given)
                raise ValueError(f"must have one caption, in {inside.with_suffix('.txt')} or {METADATA}; found {places or 'none'}.")
            place, text = given[0]
            if not text.strip():
                raise ValueError(f"{place}: the caption must not be empty.")
            load_image(picture)
            (dest / name).mkdir()
            shutil.copyfile(picture, dest / name / f"target{picture.suffix.lower()}")
            (dest / name / "prompt.txt").write_text(text.strip() + "\n", encoding="utf-8")
            written += 1
        if written == limit:
            return written
    for place, _ in (caption for given in captions.values() for caption in given):
        with invalid.at(place):
            raise ValueError("is the caption of no picture that is there.")
    return written


def _files(folder: Path, listing: Listing, deep: bool) -> list[Path]:
    """All files; those of folders only where `metadata.jsonl` may name them."""
    found = []
    for path in listing.of(folder):
        found += _files(path, listing, deep) if deep and path.is_dir() and not path.is_symlink() else [path]
    return found


def _captions(root: Path, files: list[Path], invalid: InvalidSamples) -> dict[str, list[tuple[str, str]]]:
    """By the key of a picture, with or without its ending: place and text of each caption. Files that are nothing of use are refused."""
    captions = defaultdict(list)
    for path in files:
        with invalid.at(str(path)):
            if path == root / path.name and path.name.lower() == METADATA:
                for place, name, text in _lines(root, path):
                    captions[_key(Path(name))].append((place, text))
            elif path.suffix.lower() in CAPTIONS and path.is_file():
                captions[_key(path.relative_to(root).with_suffix(""))].append((str(path), read_text(path)))
            elif not is_picture(path):
                raise ValueError(
                    f"must be a picture ({formats_in_words()}), its caption ({', '.join(CAPTIONS)}) or {METADATA}. Take it away, or put "
                    "each sample into a folder of its own."
                )
    return captions


def _lines(root: Path, path: Path) -> list[tuple[str, str, str]]:
    """Place, file name and caption of every line of `metadata.jsonl`."""
    found = []
    for number, line in enumerate(read_text(path).splitlines()):
        place = f"{path}[{number}]"
        if not line.strip():
            continue
        values = parse_json(line, place)
        if not isinstance(values, dict):
            raise ValueError(f"{place}: must be an object, got {shown(values)}.")
        keys = [key for key in KEYS if isinstance(values.get(key), str)]
        if len(keys) != 1:
            raise ValueError(f"{place}: must have one caption, as {' or '.join(KEYS)}; got {shown(values)}.")
        name = relative_path(values.get("file_name"), f"{place}.file_name", str(root))
        if not path_below(root, name, f"{place}.file_name", str(root)).is_file():
            raise FileNotFoundError(f"{place}.file_name: file not found: {root / name}.")
        found.append((place, name, values[keys[0]]))
    return found


def _key(path: Path) -> str:
    """How a caption and its picture find each other."""
    return path.as_posix().casefold()
