"""Points beside their subjects: how many, why, and that training, preflight and doctor refuse them with the likely cause."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mosaic.data import DatasetWriter, ReferenceRecord, SampleRecord
from mosaic.data.inspection import Inspection
from mosaic.data.placement import Placement, check_placement, share_outside, subject_cells
from mosaic.method.grids import Grid
from mosaic.planning.data_checks import look_at_data
from mosaic.planning.findings import STOP
from mosaic.planning.model_shape import read_model_shape
from mosaic.training import Trainer
from scripts.doctor import command as doctor
from tests import runs

GRID, REFERENCE_GRID = Grid(16, 16), Grid(8, 8)


def block(grid: Grid, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """Cells of a rectangle, int64."""
    rows, columns = torch.arange(top, top + height), torch.arange(left, left + width)
    return (rows[:, None] * grid.columns + columns).flatten()


def cells(grid: Grid, shown: torch.Tensor) -> torch.Tensor:
    return torch.zeros(grid.num_tokens, dtype=torch.bool).index_fill(0, shown, True)


def drawing(grid: Grid, shown: torch.Tensor, side: int = 2) -> Image.Image:
    """A picture on white with some cells, `side` px each, in colour."""
    colours = np.where(cells(grid, shown).reshape(tuple(grid)).numpy()[..., None], np.uint8([40, 90, 160]), np.uint8(255))
    return Image.fromarray(colours.repeat(side, axis=0).repeat(side, axis=1))


# Two subjects of a sample: wide ones in different places, so that every mistake moves points off them.
TARGETS = (block(GRID, 2, 1, 3, 12), block(GRID, 10, 6, 4, 9))
REFERENCES = (block(REFERENCE_GRID, 1, 1, 2, 6), block(REFERENCE_GRID, 4, 1, 3, 6))


def inspection(name: str = "a", shift: int = 0, **changes: object) -> Inspection:
    """Two references whose points lie on their subjects, `shift` rows further down in the target."""
    targets = [shown + shift * GRID.columns for shown in TARGETS]
    points = [torch.stack([u[torch.arange(len(v)) % len(u)], v], dim=1) for u, v in zip(REFERENCES, targets, strict=True)]
    values = {
        "id": name,
        "prompt": "a cat and a mug",
        "target": Image.new("RGB", (32, 32)),
        "references": tuple(drawing(REFERENCE_GRID, shown) for shown in REFERENCES),
        "points": tuple(points),
        "reference_grids": (REFERENCE_GRID,) * 2,
        "target_grid": GRID,
        "masks": tuple(cells(GRID, shown) for shown in targets),
    }
    return Inspection(**(values | changes))


def moved(found: Inspection, u: Callable[[torch.Tensor], torch.Tensor] = torch.clone, v: Callable = torch.clone) -> tuple:
    return tuple(torch.stack([u(pairs[:, 0]), v(pairs[:, 1])], dim=1) for pairs in found.points)


def reasons(*found: Inspection) -> list[str]:
    placement = Placement(0.05)
    for one in found:
        placement.add(one)
    return placement.reasons()


def test_points_on_their_subjects_are_no_reason() -> None:
    placement = Placement(0.0)
    placement.add(inspection())
    placement.add(inspection("b", 1, masks=(None, None), points=(torch.zeros(0, 2), torch.zeros(0, 2))))
    assert (placement.target, placement.reference, placement.examples, placement.reasons()) == ([0.0, 0.0], [0.0, 0.0], [], [])


def test_shares() -> None:
    subject = cells(Grid(2, 4), torch.tensor([1, 2, 6]))
    assert share_outside(torch.tensor([1, 2, 5, 6], dtype=torch.int32), subject) == 0.25
    assert share_outside(torch.tensor([]), subject) == 0
    # The mean over references: 0 and 6 of 36, of which the second alone is above the limit.
    wide, high = inspection().masks
    wide[TARGETS[0][:6]] = False
    placement = Placement(0.1)
    placement.add(inspection(masks=(wide, high)))
    assert placement.target == [pytest.approx(6 / 36), 0]
    assert placement.examples == ["a"]
    assert placement.reasons() == []
    placement.limit = 0.08
    assert placement.reasons()[0].startswith("8.3% of the points lie outside the masks over the target, at most 8.0% may: ")


def test_the_subject_is_what_is_not_joined_to_the_border_by_white() -> None:
    grid = Grid(4, 5)
    ring = torch.tensor([6, 7, 8, 11, 13, 16, 17, 18])  # around cell 12, which is white within the subject
    assert subject_cells(drawing(grid, ring), grid).nonzero().flatten().tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    square = Grid(5, 5)
    open_ring = drawing(square, torch.tensor([6, 7, 8, 11, 16, 17, 18]))  # around cell 12, which is joined to the border by cell 13
    for turns in range(4):  # whichever way the white comes in
        turned = open_ring.rotate(90 * turns)
        assert not subject_cells(turned, square)[12]
        assert subject_cells(turned, square).sum() == 7
    nearly = Image.new("RGB", (10, 8), (250, 251, 255))
    assert not subject_cells(nearly, grid).any()
    nearly.putpixel((9, 7), (249, 255, 255))  # one pixel that is no white makes its cell a part of the subject
    assert subject_cells(nearly, grid).nonzero().flatten().tolist() == [19]
    assert subject_cells(Image.new("RGB", (10, 8), (90, 90, 90)), grid).all()


def finer_columns(shown: torch.Tensor) -> torch.Tensor:
    """The cells of the 16 x 16 grid on one of 8 x 32 over the same picture."""
    row, column = shown // 16, shown % 16
    return torch.cat([row // 2 * 32 + 2 * column, row // 2 * 32 + 2 * column + 1])


def transposed(grid: Grid) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda index: index % grid.columns * grid.rows + index // grid.columns


WIDE = {"target_grid": Grid(8, 32), "masks": tuple(cells(Grid(8, 32), finer_columns(shown)) for shown in TARGETS)}
HALVED = moved(inspection(), v=lambda v: v // 16 // 2 * 8 + v % 16 // 2)  # on a target grid of 8 x 8, as the references
MISTAKES = {
    "target grid": ([inspection(**WIDE)], ["target_grid is written wrong: [8, 32] stands there, and the points fit when they are read on [16, 16]"]),
    "coarser points": (
        [inspection(points=moved(inspection(), v=lambda v: v // 16 // 4 * 4 + v % 16 // 4))],
        ["target_grid is written wrong: [16, 16] stands there, and the points fit when they are read on [4, 4]"],
    ),
    "reference grid": (
        [inspection(reference_grids=(Grid(4, 16),) * 2)],
        ["reference_grid is written wrong: [4, 16] stands there, and the points fit when they are read on [8, 8]"],
    ),
    "transposed": ([inspection(points=moved(inspection(), v=transposed(GRID)))], ["rows and columns are exchanged"]),
    "transposed on a wide grid": (
        [inspection(**WIDE, points=moved(inspection(), v=lambda v: transposed(Grid(8, 32))(v // 16 // 2 * 32 + v % 16 * 2)))],
        ["rows and columns are exchanged"],
    ),
    "transposed references": ([inspection(points=moved(inspection(), u=transposed(REFERENCE_GRID)))], ["rows and columns are exchanged"]),
    "sides": (
        [inspection(target_grid=Grid(8, 8), points=[pairs.flip(1) for pairs in HALVED], masks=[
            cells(Grid(8, 8), pairs[:, 1]) for pairs in HALVED
        ])],
        ["the two sides are exchanged"] * 2,
    ),
    "masks of the sample": ([inspection(masks=inspection().masks[::-1])], ["the masks of a sample's references are exchanged"]),
    "masks of others": (
        [inspection(masks=inspection(shift=2).masks), inspection("b", 2, masks=inspection().masks)],
        ["the masks are those of other samples"],
    ),
    "inverted masks": ([inspection(masks=[~mask for mask in inspection().masks])], ["nearly all points of such references lie outside masks that are mostly white"]),
    "black masks": ([inspection(masks=[mask & False for mask in inspection().masks])], ["the masks of 2 of 2 such references are black all over"]),
    "one of four": (
        [inspection("good"), inspection("better"), inspection("best"), inspection(points=moved(inspection(), v=transposed(GRID)))],
        ["rows and columns are exchanged"],
    ),
    "nothing but a mask that holds everything": (
        [inspection(points=moved(inspection(), v=lambda v: v * 37 % 256)), inspection("b", masks=(cells(GRID, torch.arange(256)),) * 2)],
        ["no other grid or order of the points fits either"],
    ),
    "nothing of it": (
        [inspection(points=moved(inspection(), v=lambda v: v * 37 % 256))],
        ["no other grid or order of the points fits either: the masks are of other pictures, or the points are wrong"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("found", "causes"), MISTAKES.values(), ids=MISTAKES)
def test_the_likely_cause_is_named(found: list[Inspection], causes: list[str]) -> None:
    told = [re.search(r"may: (.*)\. Worst: a", reason)[1] for reason in reasons(*found)]
    assert [cause[: len(start)] for cause, start in zip(told, causes, strict=True)] == causes


def test_the_worst_come_first() -> None:
    wide, high = inspection().masks
    wide[TARGETS[0][:12]] = False
    assert reasons(inspection("b", masks=(wide, high)), inspection(points=moved(inspection(), v=transposed(GRID))))[0].endswith(
        "Worst: a, b"
    )


def test_grids_of_samples_may_differ() -> None:
    small = inspection("b", target_grid=Grid(8, 8), points=HALVED, masks=[cells(Grid(8, 8), pairs[:, 1]) for pairs in HALVED])
    assert reasons(inspection(), small) == []


# ---- on disk


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples for the small model, with masks; not to be changed."""
    root = tmp_path_factory.mktemp("masked") / "data"
    grid, side = Grid(8, 12), Grid(6, 6)
    u, v = block(side, 1, 1, 2, 4).repeat(2), block(grid, 1, 6, 4, 4)
    with DatasetWriter(root) as writer:
        for index in range(4):
            mask = Image.fromarray(cells(grid, v).reshape(8, 12).numpy().astype(np.uint8) * 255).resize((24, 16), Image.Resampling.NEAREST)
            reference = ReferenceRecord(drawing(side, u), "cat", torch.stack([u, v], dim=1).numpy(), mask)
            target = Image.new("RGB", (24, 16), (index, 90, 160))
            writer.add(SampleRecord(f"train-{index}", "train", "a cat", target, [reference], tuple(side), tuple(grid)))
    return root


WRONG = r"75\.0% of the points lie outside the masks .*target_grid is written wrong: \[4, 24\] stands there, .* read on \[8, 12\]"


@pytest.mark.usefixtures("fresh_accelerator")
def test_doctor_preflight_and_training_refuse(world: Path, masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(shutil.copytree(masked, tmp_path / "data"))
    sizes = ["--image-size", "16", "--reference-size", "12", "--token-size", "4", "--workers", "0"]
    settings = {"data__root": str(data), "lora__pretrained": None}
    assert check_placement(Trainer(runs.make_config(world, tmp_path / "run", **settings)).dataset, 0.0).target == [0.0] * 4
    doctor.main([str(data), *sizes])
    assert re.search(r"^outside masks +0\.0% of points$", capsys.readouterr().out, re.MULTILINE)
    table = pq.read_table(data / "manifest.parquet")
    rows = [row | {"target_grid": [4, 24]} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), data / "manifest.parquet")
    assert doctor.main([str(data), *sizes]) == 1
    assert re.search(f"NOT FIT: {WRONG}", capsys.readouterr().out)
    assert doctor.main([str(data), *sizes, "--max-outside", "0.8", "--looked"]) == 0
    config = runs.make_config(world, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=WRONG + r".* 4 of 4 samples were looked at; .*doctor.py.* data.max_points_outside"):
        Trainer(config)
    _, findings = look_at_data(config, read_model_shape(config.model.pretrained), 1, None)
    stopped = {finding.subject: finding.message for finding in findings if finding.level == STOP}
    assert re.match(WRONG, stopped["placement"])
    lenient = runs.make_config(world, tmp_path / "run", **settings, data__max_points_outside=0.8)
    assert "placement" not in {
        finding.subject for finding in look_at_data(lenient, read_model_shape(config.model.pretrained), 1, None)[1] if finding.level == STOP
    }


def test_the_look_before_training_is_bounded() -> None:
    class Many:
        def __init__(self) -> None:
            self.read: list[int] = []

        def __len__(self) -> int:
            return 10_000

        def inspect(self, index: int) -> Inspection:
            self.read.append(index)
            return inspection()

    data = Many()
    check_placement(data, 0.05)
    assert (data.read[0], data.read[-1], len(set(data.read))) == (0, 9_999, 32)
    data.read.clear()
    assert check_placement(data, 1.0).target == []
    assert data.read == []
