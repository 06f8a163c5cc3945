"""A synthetic set in the exact released layout of SemAlign-MS-Subjects200K, as folders or as archives, and a plain twin of its loader."""

import hashlib
import io
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw
from torch import Tensor

from mosaic.data.semalign.ids import CLASSIC, deflate_library

SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
GOOD = dict.fromkeys(SCORES, 5)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
QUALITY = pa.struct([(name, pa.int64()) for name in SCORES])
DESCRIPTION = pa.struct([(name, pa.string()) for name in ("item", "description_0", "description_1", "category")])
SCHEMA = pa.schema([("image", IMAGE), ("collection", pa.string()), ("quality_assessment", QUALITY), ("description", DESCRIPTION)])
needs_classic_zlib = pytest.mark.skipif(deflate_library() != CLASSIC, reason="Pillow packs PNG files with another deflate library here")
NO_MASK, NO_POINTS, NEITHER = 3, 4, 6  # numbers among the kept rows


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def composite(seed: int, size: tuple[int, int] = (1048, 528)) -> Image.Image:
    """Both panels full of blocks, so that a crop that is off by a pixel shows; white around and between them. Blocks are few: what JPEG
    makes of their borders is slow to pack as PNG."""
    rng = np.random.default_rng(seed)
    result = Image.new("RGB", size, "white")
    for left in (8, 528):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        result.paste(coarse.resize((512, 512), Image.Resampling.NEAREST), (left, 8))
    return result


def encoded_composite(seed: int) -> bytes:
    """JPEG or PNG in turn; one of them with a colour profile, which enters the id."""
    options = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()} if seed % 5 == 2 else {}
    return encode(composite(seed), "PNG" if seed % 2 else "JPEG", **options)


def mask(seed: int, size: int = 512) -> Image.Image:
    """An ellipse with odd borders."""
    rng = np.random.default_rng([seed, 1])
    result = Image.new("L", (size, size), 0)
    left, top = rng.integers(20, size // 4, 2).tolist()
    right, bottom = rng.integers(size * 3 // 4, size - 10, 2).tolist()
    ImageDraw.Draw(result).ellipse((left, top, right, bottom), fill=255)
    return result


def fields(seed: int) -> tuple[Tensor, Tensor]:
    """DIFT and GeoAware fields: a shifted, slightly shrunken copy, in which a part of the cells disagrees."""
    rng = np.random.default_rng([seed, 2])
    y, x = np.divmod(np.arange(4096), 64)
    shift = rng.integers(-6, 7, 2)
    field = np.stack([np.clip(y * 0.9 + shift[0], 0, 63), np.clip(x * 0.9 + shift[1], 0, 63)], axis=1).astype(np.int64)
    other = np.where(rng.random((4096, 1)) < 0.15, rng.integers(0, 64, (4096, 2)), field)
    return torch.from_numpy(field), torch.from_numpy(other)


def row(seed: int, **changes: Any) -> dict[str, Any]:
    """A row that passes the filter."""
    description = {"item": f"Item {seed}", "description_0": f"A täble {seed}, left.", "description_1": "right", "category": "x"}
    image = {"bytes": encoded_composite(seed), "path": None}
    return {"image": image, "collection": "collection_2", "quality_assessment": GOOD, "description": description} | changes


def bad_rows() -> list[dict[str, Any]]:
    """Rows that fail the filter, one in each way."""
    changes = [{"collection": "collection_1"}, {"collection": None}, {"quality_assessment": None}]
    changes += [{"quality_assessment": GOOD | {name: score}} for name in SCORES for score in (4, None)]
    return [row(100, image={"bytes": b"never decoded", "path": None}) | change for change in changes]


@dataclass
class SemAlignSet:
    """What was written: the folder, the kept rows in order, and their ids."""

    root: Path
    kept: list[dict[str, Any]]
    ids: list[str]
    num_rows: int

    def mask_path(self, index: int) -> Path:
        return self.root / f"mask/{self.ids[index]}.png"

    def field_path(self, index: int, matcher: str) -> Path:
        return self.root / f"coord/{matcher}/{self.ids[index]}_ref0.pt"


def write_set(root: Path, num_kept: int = 8) -> SemAlignSet:
    """Two Parquet files with row groups of four; good and bad rows mixed; some masks and coordinates left out."""
    for folder in ("data", "mask", "coord/dift", "coord/geoaware"):
        (root / folder).mkdir(parents=True)
    bad, rows = bad_rows(), []
    for seed in range(num_kept):
        rows += [row(seed), *bad[seed : seed + 1]]
    rows += bad[num_kept:]
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), root / f"data/train-{number:05d}-of-00002.parquet", row_group_size=4)
    kept = [r for r in rows if naive_passes(r)]
    ids = [naive_id(r) for r in kept]
    for index, identifier in enumerate(ids):
        if index not in (NO_MASK, NEITHER):
            mask(index, size=(512, 1024, 500)[index % 3]).save(root / f"mask/{identifier}.png")
        for matcher, field in zip(("dift", "geoaware"), fields(index), strict=True):
            if index not in (NO_POINTS, NEITHER) or (index == NO_POINTS and matcher == "dift"):
                torch.save(field, root / f"coord/{matcher}/{identifier}_ref0.pt")
    return SemAlignSet(root, kept, ids, len(rows))


def zip_set(found: SemAlignSet, root: Path) -> Path:
    """The same set with `mask.zip` and `coord.zip` instead of folders."""
    root.mkdir()
    shutil.copytree(found.root / "data", root / "data")
    for path in found.root.glob("semalign_ids.parquet"):
        shutil.copy(path, root)
    for name, method in (("mask", zipfile.ZIP_STORED), ("coord", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(root / f"{name}.zip", "w", method) as archive:
            for path in sorted((found.root / name).rglob("*")):
                archive.write(path, path.relative_to(found.root).as_posix())
    return root


# ---- the twin, in loops


def naive_passes(stored: dict[str, Any]) -> bool:
    """The quality filter."""
    quality = stored["quality_assessment"]
    return stored["collection"] == "collection_2" and bool(quality) and all((quality.get(name) or 0) >= 5 for name in SCORES)


def naive_id(stored: dict[str, Any]) -> str:
    """The id recipe."""
    picture = Image.open(io.BytesIO(stored["image"]["bytes"]))
    buffer = io.BytesIO()
    picture.crop((8, 8, 520, 520)).save(buffer, format="PNG")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    description = stored["description"]
    return hashlib.sha256((description["item"] + "_" + description["description_0"] + "_" + digest).encode("utf-8")).hexdigest()


def naive_panel(stored: dict[str, Any], box: tuple[int, int, int, int], size: int) -> Tensor:
    """A panel in [-1, 1], value by value as ToTensor and Normalize make it."""
    picture = Image.open(io.BytesIO(stored["image"]["bytes"])).crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return (torch.from_numpy(np.array(picture).copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def naive_release(first: Tensor, second: Tensor, mask_image: Image.Image, image_size: int, reference_size: int) -> dict[int, int]:
    """The released loader's dictionary from reference token to target token, for 512 and 1024 px."""
    side, reference_side = image_size // 16, reference_size // 16
    pixels = np.asarray(mask_image.resize((image_size, image_size), Image.Resampling.NEAREST))
    first_cells, second_cells = first.tolist(), second.tolist()

    def at(field: list[list[int]], row_: int, column: int) -> tuple[int, int]:
        if side == 64:
            y, x = field[64 * row_ + column]
            return y, x
        assert side == 32  # the mean of a 2 x 2 block, truncated
        block = [field[64 * (2 * row_ + a) + 2 * column + b] for a in (0, 1) for b in (0, 1)]
        return sum(y for y, _ in block) // 4, sum(x for _, x in block) // 4

    result: dict[int, int] = {}
    for t in range(side * side):
        row_, column = divmod(t, side)
        (y, x), other = at(first_cells, row_, column), at(second_cells, row_, column)
        if (y, x) == other and pixels[16 * row_, 16 * column] / 255 > 0.5:
            reference = (y * reference_side // 64) * reference_side + x * reference_side // 64
            if reference not in result:
                result[reference] = t
    return result


def naive_vote(first: Tensor, second: Tensor, mask_image: Image.Image, image_size: int, reference_size: int) -> dict[int, int]:
    """Consensus on the 64 x 64 grid, then two majorities, by dictionaries."""
    side, reference_side = image_size // 16, reference_size // 16
    pixels = np.asarray(mask_image.resize((1024, 1024), Image.Resampling.NEAREST))
    first_cells, second_cells = first.tolist(), second.tolist()
    votes: dict[int, dict[int, int]] = {}
    for t in range(4096):
        row_, column = divmod(t, 64)
        if first_cells[t] == second_cells[t] and pixels[16 * row_, 16 * column] > 127:
            y, x = first_cells[t]
            v = (row_ * side // 64) * side + column * side // 64
            u = (y * reference_side // 64) * reference_side + x * reference_side // 64
            votes.setdefault(v, {}).setdefault(u, 0)
            votes[v][u] += 1
    result: dict[int, int] = {}
    best: dict[int, int] = {}
    for v in sorted(votes):
        u, count = min(votes[v].items(), key=lambda item: (-item[1], item[0]))
        if u not in result or count > best[u]:
            result[u], best[u] = v, count
    return result
