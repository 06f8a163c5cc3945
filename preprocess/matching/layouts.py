"""Where matching leaves its results: our points files, or the coordinate files of the released layout. Files are replaced as a whole."""

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mosaic.data import Row
from mosaic.data.multi_reference.points_file import MATCH_SCORES, PICTURES, pictures_of
from mosaic.files import path_below, write_bytes, write_text
from mosaic.method.grids import Grid
from preprocess.extractors.protocol import Extractor
from preprocess.matching.matching import match_features
from preprocess.matching.samples import SamplePictures, match_sample, pair_features
from preprocess.matching.settings import MatchingSettings

RELEASE_GRID = (64, 64)
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Layout(Protocol):
    """How the results of a sample are found, written and recognised.

    Attributes:
        name: As on the command line.
        settings_path: Where the settings of the results are kept.
    """

    name: str
    settings_path: Path

    def files(self, row: Row) -> list[Path]:
        """Where the results of a sample belong."""
        ...

    def is_finished(self, row: Row) -> bool:
        """Whether all results of a sample are there and readable."""
        ...

    def drawn_points(self, row: Row) -> dict[str, Any]:
        """The arguments `points`, `target_grid` and `reference_grids` of `correspondence_panel` for a finished sample."""
        ...

    def pictures_of(self, row: Row) -> str | None:
        """The digest (`Manifest.digest`) of what the results of a finished sample were found in; None where they do not say."""
        ...

    def match(self, row: Row, pictures: SamplePictures, digest: str, extractors: Sequence[Extractor], seed: int) -> list[int]:
        """Match a sample and write its results, with the digest of what they were found in; returns the number of points of each
        reference.
        """
        ...


class CompactLayout:
    """The points file that the manifest names. Per reference k: "k" int32 [P_k, 2] of (u, v), "k.similarity" float16 [P_k], "k.cyclic",
    "k.affine" and "k.agreement" float32 [1] (`match_scores`), as far as they are known.
    """

    name = "compact"

    def __init__(self, root: Path, settings: MatchingSettings) -> None:
        self.root, self.settings = root, settings
        self.settings_path = root / "matching.json"

    def files(self, row: Row) -> list[Path]:
        """The sample's points file."""
        return [path_below(self.root, row.points, f"{row.place}.points", str(self.root))]

    def is_finished(self, row: Row) -> bool:
        """Whether the sample's points file is readable and has the tensors of all its references."""
        shapes = {}
        try:
            with safe_open(self.files(row)[0], framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError):
            return False
        expected = {f"{k}{end}" for k in range(len(row.references)) for end in ("", ".similarity")}
        optional = {f"{k}.{name}" for k in range(len(row.references)) for name in MATCH_SCORES}  # results of before have none
        return expected <= shapes.keys() <= expected | optional and all(
            shapes[f"{k}"] == [*shapes[f"{k}.similarity"], 2] for k in range(len(row.references))
        )

    def pictures_of(self, row: Row) -> str | None:
        """What the header of the points file says."""
        return pictures_of(self.files(row)[0].read_bytes())

    def match(self, row: Row, pictures: SamplePictures, digest: str, extractors: Sequence[Extractor], seed: int) -> list[int]:
        """Match a sample and write its points."""
        found = match_sample(pictures, extractors, self.settings, seed)
        tensors = {f"{k}": own.pairs.int().contiguous() for k, own in enumerate(found)}
        tensors |= {f"{k}.similarity": own.similarity.half() for k, own in enumerate(found)}
        tensors |= {f"{k}.{name}": torch.tensor([score]) for k, own in enumerate(found) for name, score in own.scores.items()}
        write_bytes(self.files(row)[0], save(tensors, {PICTURES: digest}))
        return [len(own.pairs) for own in found]

    def drawn_points(self, row: Row) -> dict[str, Any]:
        """The points of the file."""
        tensors = load_file(self.files(row)[0])
        points = [tensors[f"{k}"] for k in range(len(row.references))]
        return {"points": points, "target_grid": row.target_grid, "reference_grids": [entry.grid for entry in row.references]}


class ReleaseLayout:
    """The released layout: `coord/<extractor>/<id>_ref<k>.pt`, int64 [rows * columns, 2] of (y, x), the nearest reference cell of each
    target cell (data fact A7). Every target cell has one; no filter and no consensus apply, which is left to the reader. These files have
    no room for a digest, so `coord/pictures/<id>.txt` holds it, written last.
    """

    name = "release"

    def __init__(self, root: Path, settings: MatchingSettings, methods: Sequence[str]) -> None:
        self.root, self.settings, self.methods = root, settings, methods
        self.grid = Grid(*(settings.grid or RELEASE_GRID))
        self.settings_path = root / "coord" / "matching.json"

    def files(self, row: Row) -> list[Path]:
        """The sample's coordinate files: per method, per reference."""
        return [self._path(row, method, k) for method in self.methods for k in range(len(row.references))]

    def is_finished(self, row: Row) -> bool:
        """Whether all coordinate files of a sample are readable and of the right shape."""
        return all(_is_coordinates(path, self.grid) for path in self.files(row))

    def pictures_of(self, row: Row) -> str | None:
        """What the file beside the coordinates says."""
        path = self._digest_path(row)
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None

    def match(self, row: Row, pictures: SamplePictures, digest: str, extractors: Sequence[Extractor], seed: int) -> list[int]:
        """Match a sample and write its coordinates."""
        self._digest_path(row).unlink(missing_ok=True)  # of what is replaced now
        settings = self.settings
        on_grid = MatchingSettings(
            grid=(self.grid.rows, self.grid.columns), background=settings.background, white_threshold=settings.white_threshold
        )
        for k, features in enumerate(pair_features(pictures, extractors, on_grid, seed)):
            for method, pair in zip(self.methods, features, strict=True):
                match = match_features(pair.target, pair.reference, score=settings.score, chunk_size=settings.chunk_size)
                buffer = io.BytesIO()  # in memory, since a file's name would go into its content
                torch.save(coordinates(match.index, self.grid).cpu(), buffer)
                write_bytes(self._path(row, method, k), buffer.getvalue())
        write_text(self._digest_path(row), f"{digest}\n")
        return [self.grid.num_tokens] * len(row.references)

    def drawn_points(self, row: Row) -> dict[str, Any]:
        """The matches of all target cells by the first method."""
        points = []
        for path in self.files(row)[: len(row.references)]:
            y, x = torch.load(path, map_location="cpu", weights_only=True).unbind(1)
            points.append(torch.stack([y * self.grid.columns + x, torch.arange(len(y))], dim=1))
        return {"points": points, "target_grid": self.grid, "reference_grids": [self.grid] * len(points)}

    def _path(self, row: Row, method: str, k: int) -> Path:
        return self._below(row, f"{method}/{row.id}_ref{k}.pt")

    def _digest_path(self, row: Row) -> Path:
        return self._below(row, f"pictures/{row.id}.txt")

    def _below(self, row: Row, relative: str) -> Path:
        if not _FILE_NAME.fullmatch(row.id):
            raise ValueError(f'{row.place}.id: must be of letters, digits, "-" and "_" to name a file, got "{row.id}".')
        return path_below(self.root, f"coord/{relative}", row.place, str(self.root))


def coordinates(index: Tensor, grid: Grid) -> Tensor:
    """Cells as int64 [N, 2] of (y, x), the order of the released files."""
    return torch.stack([torch.div(index, grid.columns, rounding_mode="floor"), index % grid.columns], dim=1)


def _is_coordinates(path: Path, grid: Grid) -> bool:
    """Whether a file holds int64 [N, 2]; nothing in it is executed."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError):
        return False
    return isinstance(found, Tensor) and found.dtype == torch.int64 and tuple(found.shape) == (grid.num_tokens, 2)
