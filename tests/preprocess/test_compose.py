"""Composition: the pocket world's single-subject samples must come through exactly; layouts and points in general."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from mosaic.config.loading import Config, ModelConfig
from mosaic.data import DatasetWriter, Manifest, MultiReferenceDataset, ReferenceRecord, SampleRecord
from mosaic.method.grids import Grid
from preprocess import compose, composing
from preprocess.composition import (
    LAYOUTS,
    MARGIN_COLOURS,
    Panel,
    cell_size,
    compose_mask,
    compose_picture,
    compose_points,
    draw_layout,
    join_captions,
    place_name,
)
from scripts.pocket import world
from scripts.pocket.dataset import write_dataset
from tests.runs import files_below

ROOT = Path(__file__).resolve().parents[2]
FAST = settings(max_examples=80, deadline=None)
GRIDS = st.builds(Grid, st.integers(1, 30), st.integers(1, 30))
KS = st.integers(2, 6)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen scenes of one and two subjects in turn."""
    root = tmp_path_factory.mktemp("pocket") / "source"
    write_dataset(root, 14, 0, 2, seed=3)
    return root


@pytest.fixture(scope="module")
def composed(pocket: Path) -> Path:
    root = pocket.with_name("composed")
    assert compose.main([str(pocket), str(root), "--num-samples", "8", "--references", "2,3,4,5,6", "--seed", "7"]) == 0
    return root


def test_the_pocket_world_comes_through_exactly(pocket: Path, composed: Path) -> None:
    manifest = Manifest(composed, "train")
    assert len(manifest) == 8
    assert len(set(manifest.num_references.tolist())) > 2
    for index in range(len(manifest)):
        row = manifest.row(index)
        metadata = json.loads(row.metadata)
        side, cell = metadata["layout"]["side"], metadata["layout"]["cell"]
        assert cell == 1  # the scenes have one pixel per cell
        target = np.asarray(Image.open(composed / row.target))
        assert target.shape == (side, side, 3)
        stored = load_file(composed / row.points)
        assert set(stored) == {str(k) for k in range(len(row.references))}
        assert len({panel["id"] for panel in metadata["panels"]}) == len(row.references)
        covered = np.zeros((side, side), int)
        for k, panel in enumerate(metadata["panels"]):
            scene = world.sample_scene(panel["metadata"]["scene"]["seed"], "train", 1)
            top, left = panel["corner"]
            region = (slice(top, top + 64), slice(left, left + 64))
            covered[region] += 1
            assert np.array_equal(target[region], np.asarray(world.render_scene(scene, 64).image))
            expected = world.correspondences(scene, 0, 32, 64)
            assert np.array_equal(stored[str(k)][:, 0], expected[:, 0])
            rows, columns = np.divmod(stored[str(k)][:, 1], side)
            assert np.array_equal((rows - top) * 64 + columns - left, expected[:, 1])
            mask = np.asarray(Image.open(composed / row.references[k].mask))
            assert np.array_equal(np.flatnonzero(mask), np.sort(stored[str(k)][:, 1]))
            identity = scene.placements[0].identity
            assert np.array_equal(
                np.asarray(Image.open(composed / row.references[k].image)), np.asarray(world.render_reference(identity, 128))
            )
            assert row.references[k].phrase == identity.class_name
            assert tuple(row.references[k].grid) == (32, 32)
            assert world.caption(scene).rstrip(".") in row.prompt
        assert covered.max() == 1
        assert (target[covered == 0] == metadata["layout"]["margin_colour"]).all()


def test_composed_samples_train(composed: Path) -> None:
    """Every sample reads as training reads it, with points for each of its references."""
    options: dict[str, Any] = {"image_size": (64, 64), "reference_size": 32, "target_token_grid": (8, 8), "reference_token_grid": (4, 4)}
    dataset = MultiReferenceDataset(composed, **options)
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.missing == ()
        assert sum(len(points) > 0 for points in sample.points) >= 2
        assert len(torch.cat(sample.points)) > 0


def test_captions_that_the_training_will_cut_are_named(
    pocket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    arguments = [str(pocket), "--num-samples", "4", "--references", "3"]
    for length, cut in ((12, True), (512, False)):
        config.write_text(json.dumps({"model": {"pretrained": str(ROOT / "assets/pocket/flux"), "text_length": length}}))
        assert compose.main([*arguments[:1], str(tmp_path / str(length)), *arguments[1:], "--config", str(config)]) == 0
        assert ("warning: 4 of 4 captions are longer than model.text_length 12 and are cut" in capsys.readouterr().err) == cut
    for length, cut in ((6, True), (512, False)):  # without a config
        monkeypatch.setattr(composing, "Config", lambda length=length: Config(model=ModelConfig(text_length=length)))
        assert compose.main([*arguments[:1], str(tmp_path / f"words_{length}"), *arguments[1:]]) == 0
        assert ("has at least " in capsys.readouterr().err) == cut


def test_order_is_a_function_of_the_seed_and_the_number(pocket: Path, composed: Path, tmp_path: Path) -> None:
    arguments = ["--references", "2,3,4,5,6", "--num-samples"]
    assert compose.main([str(pocket), str(tmp_path / "more"), *arguments, "10", "--seed", "7"]) == 0
    assert compose.main([str(pocket), str(tmp_path / "other"), *arguments, "8", "--seed", "8"]) == 0
    ids = {path.name: list(Manifest(path, "train").column("id")) for path in (composed, tmp_path / "more", tmp_path / "other")}
    assert ids["more"][:8] == ids["composed"]
    assert not set(ids["other"]) & set(ids["composed"])
    files, more = files_below(composed), files_below(tmp_path / "more")
    del files["manifest.parquet"]
    assert all(more[name] == data for name, data in files.items())


def test_unmatched_samples(pocket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    root = tmp_path / "set"
    shutil.copytree(pocket, root)
    single = [index for index, k in enumerate(Manifest(root, "train").num_references) if k == 1]
    (root / Manifest(root, "train").row(single[0]).points).unlink()
    assert compose.main([str(root), str(tmp_path / "a"), "--num-samples", "30"]) == 2
    assert "points: must be there for all single-subject samples or for none" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    for path in (root / "points").iterdir():
        path.unlink()
    assert compose.main([str(root), str(tmp_path / "b"), "--num-samples", "3"]) == 0
    assert list((tmp_path / "b/points").iterdir()) == []
    assert Manifest(tmp_path / "b", "train").row(0).references[0].mask is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "out"], "none: there is no such folder"),
        (["SET", "out", "--split", "heldout"], 'has no sample of the split "heldout"'),
        (["SET", "out", "--size", "100"], "--size must be at least"),
        (["SET", "SET"], "exists already"),
        (["few", "out"], "must hold at least 4 single-subject samples with one target_grid"),
    ],
)
def test_user_mistakes(
    pocket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "few" in arguments:
        write_dataset(tmp_path / "few", 2, 0, 2, seed=3)
    given = [str(pocket) if argument == "SET" else argument for argument in arguments]
    assert compose.main([*given, "--num-samples", "5"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--references", "1,2"], ["--references", "7"], ["--num-samples", "0"], ["--seed", "-1"]])
def test_bad_flags(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        compose.parse(["a", "b", "--num-samples", "1", *flags])


@FAST
@given(KS, GRIDS, SEEDS)
def test_panels_are_whole_disjoint_and_on_the_canvas(num_panels: int, grid: Grid, seed: int) -> None:
    layout = draw_layout(num_panels, grid, np.random.default_rng(seed))
    assert layout == draw_layout(num_panels, grid, np.random.default_rng(seed))
    assert layout.slots in LAYOUTS[num_panels]
    covered = np.zeros((layout.side, layout.side), int)
    for top, left in layout.corners:
        assert top >= 0
        assert left >= 0
        region = covered[top : top + grid.rows, left : left + grid.columns]
        assert region.shape == tuple(grid)
        region += 1
    assert covered.max() == 1
    assert list(layout.places) == sorted(set(layout.places))
    assert list(layout.corners) == sorted(layout.corners)  # reading order, as the places
    names = {place_name(place, layout.slots) for place in layout.places}
    assert len(names) == num_panels


@FAST
@given(KS, GRIDS, SEEDS)
def test_points_stay_disjoint_and_map_back(num_panels: int, grid: Grid, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = draw_layout(num_panels, grid, rng)
    seen: set[int] = set()
    for corner in layout.corners:
        v = rng.permutation(grid.num_tokens)[: int(rng.integers(grid.num_tokens + 1))]
        points = np.stack([rng.integers(0, 50, len(v)), v], axis=1)
        moved = compose_points(points, grid, corner, layout.side)
        assert np.array_equal(moved[:, 0], points[:, 0])
        assert ((moved[:, 1] >= 0) & (moved[:, 1] < layout.side**2)).all()
        cells = set(moved[:, 1].tolist())
        assert len(cells) == len(v)
        assert seen.isdisjoint(cells)
        seen |= cells
        row, column = np.divmod(moved[:, 1], layout.side)
        assert np.array_equal((row - corner[0]) * grid.columns + (column - corner[1]), v)


@FAST
@given(KS, GRIDS, st.integers(1, 4), SEEDS)
def test_a_cell_shows_the_same_pixels_on_the_canvas(num_panels: int, grid: Grid, pixels: int, seed: int) -> None:
    """With room for all pixels nothing is resampled: cell v of a panel and cell v' of the canvas hold the same picture."""
    rng = np.random.default_rng(seed)
    layout = draw_layout(num_panels, grid, rng)
    shape = (grid.rows * pixels, grid.columns * pixels, 3)
    pictures = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(num_panels)]
    panels = [Panel(f"p{i}", picture, grid, None, None) for i, picture in enumerate(pictures)]
    cell = cell_size(panels, layout.side, 10**6)
    assert cell == pixels
    canvas = np.asarray(compose_picture(panels, layout, cell))
    for picture, corner in zip(pictures, layout.corners, strict=True):
        v = int(rng.integers(grid.num_tokens))
        moved = int(compose_points(np.array([[0, v]]), grid, corner, layout.side)[0, 1])
        y, x = (moved // layout.side * cell, moved % layout.side * cell)
        row, column = divmod(v, grid.columns)
        own = np.asarray(picture)[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        assert np.array_equal(canvas[y : y + cell, x : x + cell], own)
        mask = np.zeros(shape[:2], np.uint8)
        mask[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
        moved_mask = compose_mask(mask, grid, corner, layout.side, cell)
        assert moved_mask.sum() == cell * cell
        assert moved_mask[y : y + cell, x : x + cell].all()


def test_panels_shrink_to_whole_pixels_and_never_grow() -> None:
    grid = Grid(4, 8)
    panels = [Panel("p", Image.new("RGB", (80, 40), colour), grid, None, None) for colour in MARGIN_COLOURS[:2]]
    assert cell_size(panels, 16, 1000) == 10
    assert cell_size(panels, 16, 100) == 6
    with pytest.raises(ValueError, match="--size must be at least 16 px"):
        cell_size(panels, 16, 15)
    layout = draw_layout(2, grid, np.random.default_rng(0))
    assert compose_picture(panels, layout, 6).size == (layout.side * 6,) * 2


def test_captions_keep_every_prompt() -> None:
    prompts = ["a cat on a roof.", "two mugs", "a fish"]
    forms = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        layout = draw_layout(3, Grid(4, 4), rng)
        caption = join_captions(prompts, layout, rng)
        assert all(prompt.rstrip(".") in caption for prompt in prompts)
        forms.add(caption.split(" ")[1])
    assert join_captions(prompts, layout, FixedForm(0)) == "a cat on a roof, two mugs and a fish"
    assert join_captions(prompts[:2], layout, FixedForm(1)) == "2 pictures: a cat on a roof; two mugs"
    assert len(forms) == 3


class FixedForm:
    """A generator that draws one number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def integers(self, _: int) -> int:
        return self.number


def test_own_reference_grids_and_other_target_grids(tmp_path: Path) -> None:
    """Wide references keep their grids; samples with another target grid are never put beside these."""
    rng = np.random.default_rng(0)

    def sample(index: int, rows: int) -> SampleRecord:
        target = Image.fromarray(rng.integers(0, 256, (rows * 8, 32, 3), dtype=np.uint8))
        reference = ReferenceRecord(Image.new("RGB", (40, 20), "red"), "thing", np.array([[31, 0]]), grid=(4, 8))
        return SampleRecord(f"s{index}", "train", f"p{index}", target, [reference], (8, 8), (rows, 4))

    with DatasetWriter(tmp_path / "in") as writer:
        for index in range(12):
            writer.add(sample(index, 4 if index % 2 else 6))
    assert compose.main([str(tmp_path / "in"), str(tmp_path / "out"), "--num-samples", "6", "--references", "2,3"]) == 0
    manifest = Manifest(tmp_path / "out", "train")
    grids = set()
    for index in range(6):
        row = manifest.row(index)
        panels = json.loads(row.metadata)["panels"]
        assert len({int(panel["id"][1:]) % 2 for panel in panels}) == 1
        grids.add(tuple(panels[0]["grid"]))
        assert all(tuple(entry.grid) == (4, 8) for entry in row.references)
        stored = load_file(tmp_path / "out" / row.points)
        assert [stored[str(k)][:, 0].tolist() for k in range(len(panels))] == [[31]] * len(panels)
    assert grids == {(4, 4), (6, 4)}
