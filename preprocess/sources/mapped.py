"""Lists of any columns, by a mapping that says which field is what."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mosaic.data.masks import decode_mask
from mosaic.data.multi_reference.records import ReferenceRecord, SampleRecord
from mosaic.data.multi_reference.storage import Folder
from mosaic.files import relative_path, shown
from preprocess.sources.fields import Cell, holds_many, many, one
from preprocess.sources.invalid import InvalidSamples
from preprocess.sources.mapping import Fields, Mapping, as_fields
from preprocess.sources.pairs import unmatched_sample
from preprocess.sources.placeholders import resolve
from preprocess.sources.rows import Row, count, rows

__all__ = ["count", "samples"]
logger = logging.getLogger(__name__)


def samples(
    path: Path, mapping: Mapping, invalid: InvalidSamples, split: str = "train", grid: int = 64, image_root: Path | None = None
) -> Iterator[SampleRecord]:
    """Yield the samples in the order of the list, or of the files' names and rows.

    Args:
        path: A JSON list, JSON Lines or a Parquet file, or a folder of the latter two.
        mapping: Which field is what.
        invalid: What to do with rows that cannot be converted.
        split: Split of samples, where the mapping names no field of it.
        grid: Cells per side of a square picture.
        image_root: Folder that paths are relative to; None: that of the list's file.

    Raises:
        FileNotFoundError, ValueError: There is no list, it is damaged or lacks a column; or a row is invalid and not skipped.
    """
    reader = _Reader(mapping, split, grid, image_root)
    try:
        for row in rows(path, mapping.columns):
            with invalid.at(row.place):
                sample = reader.sample(row)
                if sample is not None:
                    yield sample
    finally:
        for what, number in sorted(reader.counts.items()):
            logger.warning("%s: %d %s", path, number, what)


class _Reader:
    """Makes samples of rows.

    Attributes:
        counts: What was left out of valid rows, in words, and how often.
    """

    def __init__(self, mapping: Mapping, split: str, grid: int, image_root: Path | None) -> None:
        self._mapping, self._split, self._grid, self._image_root = mapping, split, grid, image_root
        self._folders: dict[Path, Folder] = {}
        self.counts: Counter[str] = Counter()

    def sample(self, row: Row) -> SampleRecord | None:
        """The sample of a row, None where its scores leave it out.

        Raises:
            FileNotFoundError, ValueError: The row is invalid.
        """
        values, mapping, place = row.values(), self._mapping, row.place
        scores = self._scores(values, place)
        if scores is None:
            return None
        prompt, cells = self._read(values, place)
        total = len(cells)
        phrases = [_text(cell) for cell in self._beside(mapping.phrases, values, place, total)]
        kinds = [_text(cell) for cell in self._beside(mapping.kinds, values, place, total)]
        masks = self._beside(mapping.masks, values, place, total)
        kept = [k for k in range(total) if mapping.missing_references == "refuse" or not _is_missing(cells[k].value)]
        prompt, words = self._resolved(prompt, [(phrases[k] or "").strip() if k in kept else None for k in range(total)])
        folder = self._folder(row.path)
        target = _picture(one(values, mapping.target, place), folder)
        references = []
        for k in kept:
            picture = _picture(cells[k], folder)
            mask = None if _is_missing(masks[k].value) else decode_mask(_picture(masks[k], folder), masks[k].place)
            references.append(ReferenceRecord(picture, self._phrase(phrases[k], words[k], prompt), mask=mask, kind=kinds[k]))
        metadata = {"source": mapping.name, "file": row.path.name, "entry" if isinstance(row.content, str) else "row": row.number}
        metadata |= {name: _kept(values, field, place, total) for name, field in mapping.metadata.items()}
        split = self._split if mapping.split is None else _required_text(one(values, mapping.split, place))
        sample = replace(unmatched_sample(target, references, prompt, metadata, split, self._grid), scores=scores)
        return sample if mapping.id is None else replace(sample, id=_id(one(values, mapping.id, place)))

    def _scores(self, values: dict[str, Any], place: str) -> dict[str, float] | None:
        """The scores of a row, None where they leave it out."""
        found = {}
        for score in self._mapping.scores:
            value = one(values, score.field, place).value
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or (score.most is not None and value > score.most):
                limit = "" if score.most is None else f" of at most {score.most:g}"
                self.counts[f"rows left out, for {score.field} is no number{limit}"] += 1
                return None
            if value < score.least:
                self.counts[f"rows left out, for {score.field} is less than {score.least:g}"] += 1
                return None
            found[score.field] = float(value)
        return found

    def _read(self, values: dict[str, Any], place: str) -> tuple[str, list[Cell]]:
        """The prompt, with its placeholders, and the references."""
        parts = self._mapping.interleaved
        if parts is None:
            assert self._mapping.prompt is not None, "a mapping has a prompt or interleaved"
            prompt = _required_text(one(values, self._mapping.prompt, place))
            return prompt, [cell for field in as_fields(self._mapping.references) for cell in many(values, field, place)]
        texts: list[str] = []
        pictures: list[Cell] = []
        whole = one(values, parts.field, place)
        if not isinstance(whole.value, list):
            raise ValueError(f"{whole.place}: must be a list of texts and pictures, got {shown(whole.value)}.")
        for k, part in enumerate(whole.value):
            at = f"{whole.place}[{k}]"
            given = part if isinstance(part, dict) else {parts.text.split("|")[0]: part}
            text, picture = one(given, parts.text, at), one(given, parts.image, at)
            if (text.value is None) == (picture.value is None):
                raise ValueError(f"{at}: must have a text or a picture, got {shown(part)}.")
            if picture.value is None:
                resolve(_required_text(text), (), None, self._mapping.placeholder_form)
                texts.append(text.value)
            else:
                pictures.append(picture)
                texts.append(self._placeholder(len(pictures)))
        return " ".join(text.strip() for text in texts), pictures

    def _placeholder(self, number: int) -> str:
        """That of a picture between texts."""
        return (self._mapping.placeholder_form or "<image_{number}>").replace("{number}", str(number - 1 + self._mapping.placeholder_start))

    def _resolved(self, prompt: str, phrases: Sequence[str | None]) -> tuple[str, list[str | None]]:
        mapping = self._mapping
        return resolve(prompt, phrases, mapping.placeholder_words, mapping.placeholder_form, mapping.placeholder_start)

    def _beside(self, given: Fields | None, values: dict[str, Any], place: str, total: int) -> list[Cell]:
        """What a row has for each of its references; nothing for all of them where it has nothing."""
        cells = [cell for field in as_fields(given) for cell in many(values, field, place, None if isinstance(given, tuple) else total)]
        if all(cell.value is None for cell in cells):
            return [Cell(None, place)] * total
        if len(cells) != total:
            raise ValueError(f"{cells[0].place}: must be {total} values, one for each reference, got {len(cells)}.")
        return cells

    def _phrase(self, phrase: str | None, word: str | None, prompt: str) -> str:
        """A reference's phrase as far as the prompt holds it, else the words in place of its placeholder."""
        stripped = (phrase or "").strip()
        if stripped in prompt and stripped:
            return stripped
        if stripped:
            self.counts["phrases not used, for their prompts do not hold them"] += 1
        return (word or "").strip()

    def _folder(self, path: Path) -> Folder:
        """The folder that a list's paths are relative to."""
        root = (self._image_root or path.parent) / (self._mapping.folder or "")
        if root not in self._folders:
            self._folders[root] = Folder(root)
        return self._folders[root]


def _picture(cell: Cell, folder: Folder) -> bytes:
    """The encoded picture of a cell: the content of a file, its path, or an object of both as the datasets library writes it.

    Raises:
        FileNotFoundError, ValueError: It is none of these, the path leads out of the folder, or the file cannot be read.
    """
    value, place = cell
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        value, place = (path, f"{place}.path") if data is None and path is not None else (data, place)
    if isinstance(value, str) and value:
        try:
            relative_path(value, place)
        except ValueError as error:
            raise ValueError(
                f'{error} Paths of the list are relative to --image-root (now {folder.root}): write them as "images/1.png", and name the '
                "folder that holds all pictures by --image-root."
            ) from error
        return folder.read(value, place)
    if not isinstance(value, bytes) or not value:
        raise ValueError(f"{place}: must hold an encoded picture or the path of one, got {shown(value)}.")
    return value


def _is_missing(value: Any) -> bool:
    """Whether a cell holds no picture, also in the form that the datasets library gives to it."""
    return value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None)


def _text(cell: Cell) -> str | None:
    return None if cell.value is None else _required_text(cell)


def _required_text(cell: Cell) -> str:
    if not isinstance(cell.value, str):
        raise ValueError(f"{cell.place}: must be a string, got {shown(cell.value)}.")
    return cell.value


def _id(cell: Cell) -> str:
    if isinstance(cell.value, int) and not isinstance(cell.value, bool):
        return str(cell.value)
    return _required_text(cell)


def _kept(values: dict[str, Any], field: str, place: str, total: int) -> Any:
    """The value of a field for the metadata, a list where the field means several."""
    value = [cell.value for cell in many(values, field, place, total)] if holds_many(field) else one(values, field, place).value
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"{place}: metadata must be what JSON can hold, but {field} is not ({error}).") from error
    return value
