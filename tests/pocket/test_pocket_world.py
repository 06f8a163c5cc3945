"""The pocket world: pure functions, splits, captions, exact correspondences, references, and what is written to disk."""

import dataclasses
import hashlib
import itertools
import json
import math
from dataclasses import replace
from math import cos, radians, sin
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mosaic.data import DatasetWriter, MultiReferenceDataset, ReferenceRecord, SampleRecord
from mosaic.images import prepare_reference
from scripts.make_pocket_world import main as make_world
from scripts.pocket import creatures, world
from scripts.pocket.base_data import LAYOUTS, draw
from scripts.pocket.dataset import make_sample, write_dataset

ALL_LOOKS = list(itertools.product(world.PALETTES, world.PATTERNS))


def coordinate_sprite(class_name: str, palette: str, pattern: str, marking: str, side: int) -> Image.Image:
    """A sprite of the usual silhouette whose red and green tell the position on the sprite canvas."""
    alpha = (creatures.material_map(class_name, marking, side)[0] > 0).astype(np.uint8) * 255
    ramp = ((np.arange(side) + 0.5) / side * 255).round().astype(np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    return Image.fromarray(np.stack([red, green, np.zeros_like(red), alpha], axis=-1))


@pytest.fixture
def coordinate_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every subject is painted with its own coordinates."""
    monkeypatch.setattr(creatures, "sprite", coordinate_sprite)


def two_subjects(mirrored: bool, angle: float = 18.0) -> world.Scene:
    """A cat behind a car that hides part of it."""
    cat = world.Placement(world.Identity("cat", "ember", "dots", "star"), 0.45, 0.45, 0.6, angle, mirrored)
    car = world.Placement(world.Identity("car", "mint", "half", "none"), 0.62, 0.62, 0.45, -12.0, not mirrored)
    return world.Scene("in a meadow", 3, (cat, car))


def test_everything_is_a_pure_function_of_its_arguments() -> None:
    scene = world.sample_scene(7, "train", 3)
    assert scene == world.sample_scene(7, "train", 3)
    assert scene != world.sample_scene(8, "train", 3)
    first, second = world.render_scene(scene, 64), world.render_scene(scene, 64)
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.masks == second.masks).all()
    assert world.render_sheet(world.sample_sheet(5, 2), 64).tobytes() == world.render_sheet(world.sample_sheet(5, 2), 64).tobytes()


@pytest.mark.parametrize(
    ("seed", "split", "regime", "description", "caption", "mean", "areas"),
    [
        (
            *(0, "train", None, "1781174078ec", "a bird, a mushroom, a car and a fish under a night sky"),
            *((102.566, 102.449, 124.818), (260, 268, 300, 299)),
        ),
        (1, "heldout", None, "9f2dcb64eaa0", "a car and a bird in a meadow", (182.365, 196.736, 181.013), (465, 399)),
        (2, "train", None, "e40a986e4cda", "six rockets in a desert", (193.177, 168.698, 148.0), (240, 240, 240, 245, 176, 240)),
        (3, "heldout", "twins", "1264c2bf4304", "two birds in a meadow", (184.098, 199.241, 190.78), (357, 275)),
        (
            *(4, "train", "mixed", "8a1ff8b686fc", "two cars, a cat and a fish in a desert"),
            *((199.827, 176.584, 149.211), (302, 318, 299, 301)),
        ),
    ],
)
def test_scenes_of_a_seed_stay(
    seed: int, split: str, regime: str | None, description: str, caption: str, mean: tuple[float, ...], areas: tuple[int, ...]
) -> None:
    """Where this fails on purpose, `WORLD_DIGEST` of scripts/ablation/plan.py must change: what is trained and measured is of this world."""
    scene = world.sample_scene(seed, split, len(areas), regime)
    assert hashlib.sha256(repr(dataclasses.astuple(scene)).encode()).hexdigest()[:12] == description
    assert world.caption(scene) == caption
    rendered = world.render_scene(scene, 64)
    assert np.asarray(rendered.image).mean((0, 1)) == pytest.approx(mean, abs=0.02)
    assert [int(mask.sum()) for mask in rendered.masks] == pytest.approx(areas, abs=1)


def test_number_of_subjects_and_classes() -> None:
    for count in range(1, 7):
        distinct = world.sample_scene(1, "train", count, "distinct")
        assert len({p.identity.class_name for p in distinct.placements}) == count == len(distinct.placements)
    for seed in range(30):
        repeated = [p.identity for p in world.sample_scene(seed, "train", 4, "repeated").placements]
        assert len({i.class_name for i in repeated}) < 4
        assert len(set(repeated)) == 4
        assert len({p.identity.class_name for p in world.sample_scene(seed, "train", 1, "repeated").placements}) == 1
    free = [len(world.sample_scene(seed).placements) for seed in range(60)]
    assert set(free) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_subjects": 7}, "1..6"),
        ({"num_subjects": 0}, "1..6"),
        ({"split": "test"}, "train, heldout"),
        ({"regime": "triplets"}, "regime must be one of distinct, twins, mixed, repeated; got 'triplets'"),
        ({"regime": "twins", "num_subjects": 1}, "'twins' has at least 2 subjects; got num_subjects 1"),
        ({"regime": "mixed", "num_subjects": 2}, "'mixed' has at least 3 subjects; got num_subjects 2"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        world.sample_scene(0, **arguments)


@pytest.mark.parametrize(("regime", "kinds"), [("distinct", {4}), ("twins", {1}), ("mixed", {2, 3}), ("repeated", {1, 2, 3})])
def test_regimes(regime: str, kinds: set[int]) -> None:
    """Of a regime, classes repeat as it says, all individuals differ, and no class is named twice in the caption."""
    found, most = set(), set()
    for seed in range(40):
        identities = [p.identity for p in world.sample_scene(seed, "heldout", 4, regime).placements]
        names = [identity.class_name for identity in identities]
        assert len(set(identities)) == 4
        assert names == sorted(names, key=names.index)
        found.add(len(set(names)))
        most.add(max(names.count(name) for name in names))
        if regime in world.REGIMES:
            free = len(world.sample_scene(seed, regime=regime).placements)
            assert world.REGIMES[regime] <= free <= 4
    assert found == kinds
    assert most == {"distinct": {1}, "twins": {4}, "mixed": {2, 3}, "repeated": {2, 4}}[regime]
    if regime == "mixed":  # the repeated class is not always named first
        scenes = [world.sample_scene(seed, "train", 3, regime) for seed in range(20)]
        assert {scene.placements[0].identity.class_name == scene.placements[1].identity.class_name for scene in scenes} == {True, False}


def test_shares_of_regimes() -> None:
    """Of those that can hold it; without shares all is as it was drawn before there were any."""
    shares = world.RegimeShares(twins=0.5, mixed=0.2)
    for count, expected in ((1, {None}), (2, {None, "twins"}), (3, {None, "twins", "mixed"})):
        drawn = [shares.draw(seed, count) for seed in range(400)]
        assert set(drawn) == expected
        if count > 1:
            assert drawn.count("twins") == pytest.approx(200, abs=40)
        if count > 2:
            assert drawn.count("mixed") == pytest.approx(80, abs=30)
    assert {world.RegimeShares().draw(seed, 4) for seed in range(50)} == {None}
    for wrong in ((-0.1, 0.0), (0.6, 0.5), (math.nan, 0.0)):
        with pytest.raises(ValueError, match="shares of twins and mixed scenes must be within 0..1"):
            world.RegimeShares(*wrong)


def test_the_base_may_see_more_twins() -> None:
    """In scenes and beside sheets; by default none more than were drawn before."""
    twins = world.RegimeShares(twins=1.0)
    for layout in LAYOUTS[:2]:
        assert layout.scene
        for seed in range(30):
            counts = _count(draw(layout, seed, twins)[1])
            assert len(counts) == 1
        assert any(len(_count(draw(layout, seed)[1])) > 1 for seed in range(5))


def test_split_is_disjoint_and_training_covers_every_attribute() -> None:
    for name in world.CLASSES:
        held = {look for look in ALL_LOOKS if world.is_held_out(world.Identity(name, *look, "none"))}
        assert len(held) == len(world.PALETTES)  # 1 in 5
        seen = set(ALL_LOOKS) - held
        assert {palette for palette, _ in seen} == set(world.PALETTES)
        assert {pattern for _, pattern in seen} == set(world.PATTERNS)
        assert {pattern for _, pattern in held} == set(world.PATTERNS)
        for marking in world.MARKINGS:  # the split does not depend on the marking
            assert {look for look in ALL_LOOKS if world.is_held_out(world.Identity(name, *look, marking))} == held
    for split in world.SPLITS:
        for seed in range(40):
            for placement in world.sample_scene(seed, split).placements:
                assert world.is_held_out(placement.identity) == (split == "heldout")


def test_caption_names_classes_counts_and_background_but_never_looks() -> None:
    looks = {*world.PALETTES, *world.PATTERNS, *world.MARKINGS, "red", "blue", "green", "yellow", "purple", "pink", "grey"}
    for seed in range(80):
        scene = world.sample_scene(seed, num_subjects=seed % 6 + 1)
        text = world.caption(scene)
        assert text == text.lower()
        assert not text.endswith(".")
        assert text.endswith(scene.background)
        assert not looks & set(text.replace(",", "").split())
        assert all(p.identity.class_name in text for p in scene.placements)
        other = replace(
            scene,
            placements=tuple(
                replace(p, identity=replace(p.identity, palette="mint", pattern="half", marking="hat")) for p in scene.placements
            ),
        )
        assert world.caption(other) == text
    identity = world.Identity("mug", "ember", "dots", "none")
    mug = world.Placement(identity, 0.5, 0.5, 0.3, 0, False)
    fish = replace(mug, identity=replace(identity, class_name="fish"))
    cat = replace(mug, identity=replace(identity, class_name="cat"))
    assert world.caption(world.Scene("on a beach", 0, (cat, mug, mug, fish))) == "a cat, two mugs and a fish on a beach"
    assert world.caption(world.Scene("in a room", 0, (fish, fish))) == "two fish in a room"


@pytest.mark.parametrize("mirrored", [False, True])
def test_correspondences_agree_with_painted_coordinates(coordinate_world: None, mirrored: bool) -> None:
    """Red and green carry the canonical position into both pictures; matching colours must be matched points."""
    scene, size, reach = two_subjects(mirrored), 256, creatures.CANVAS_REACH
    rendered = world.render_scene(scene, size)
    picture = np.asarray(rendered.image).astype(float)
    for k, placement in enumerate(scene.placements):
        points = world.correspondences(scene, k, size, size, reference_size=size)
        reference = np.asarray(world.render_reference(placement.identity, size)).astype(float)
        seen, covered = rendered.masks[k] > 0, reference[..., 2] == 0
        inside = np.asarray(
            [  # away from edges, where colours mix with what is beside them
                all(area[i // size - 2 : i // size + 3, i % size - 2 : i % size + 3].all() for area, i in ((covered, u), (seen, v)))
                for u, v in points
            ]
        )
        assert inside.sum() > 2000
        u, v = points[inside].T
        difference = picture[v // size, v % size, :2] - reference[u // size, u % size, :2]
        step = 255 / (2 * reach) / (0.45 * size)  # colour difference of neighbouring reference pixels, about 1
        assert np.abs(difference).max() < step + 1.5
        # No systematic shift, not even of half a reference pixel; resampling in bytes rounds down by about 0.33.
        assert np.abs(difference.mean(axis=0)).max() < 0.42 * step


def test_correspondences_by_hand() -> None:
    """The centre of a subject is the centre of its reference; a step to its right goes where the pose sends it."""
    identity = world.Identity("mug", "ember", "dots", "none")
    for mirrored, angle in itertools.product((False, True), (0.0, 20.0)):
        placement = world.Placement(identity, 0.5, 0.5, 0.5, angle, mirrored)
        points = world.correspondences(world.Scene("in a room", 0, (placement,)), 0, 256, 512, reference_size=256)
        reference_of = {int(v): int(u) for u, v in points}
        direction = -1 if mirrored else 1
        for x, y in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (-0.4, 0.3)):  # canonical
            a = radians(angle)
            column = 256 + 128 * (cos(a) * direction * x - sin(a) * y)
            row = 256 + 128 * (sin(a) * direction * x + cos(a) * y)
            u = reference_of[int(row) * 512 + int(column)]
            assert abs(u % 256 + 0.5 - (128 + 115 * x)) <= 1.5
            assert abs(u // 256 + 0.5 - (128 + 115 * y)) <= 1.5


def test_correspondences_respect_occlusion() -> None:
    scene = two_subjects(False)
    masks = world.render_scene(scene, 64).masks
    alone = world.correspondences(replace(scene, placements=scene.placements[:1]), 0, 32, 64)
    behind, front = (world.correspondences(scene, k, 32, 64) for k in (0, 1))
    assert not set(behind[:, 1]) & set(front[:, 1])
    assert set(map(tuple, behind)) < set(map(tuple, alone))  # the hidden part is gone, the rest is as before
    assert set(alone[:, 1]) - set(behind[:, 1]) <= set(front[:, 1])
    for k, points in enumerate((behind, front)):
        assert sorted(points[:, 1]) == np.flatnonzero(masks[k]).tolist()
        assert points.dtype == np.int64
        assert len(set(points[:, 1])) == len(points)


def test_masks_show_where_a_subject_changes_the_picture() -> None:
    scene = world.sample_scene(11, "train", 4)
    rendered = world.render_scene(scene, 128)
    full = np.asarray(rendered.image).astype(int)
    last = len(scene.placements) - 1
    without = world.render_scene(replace(scene, placements=scene.placements[:last]), 128)
    changed = np.abs(full - np.asarray(without.image)).sum(axis=-1) > 90
    mask = rendered.masks[last].astype(bool)
    assert (changed & mask).sum() / mask.sum() > 0.6
    near = np.asarray(Image.fromarray(mask).convert("L").resize((128, 128)))  # edge pixels are mixed: allow one around
    grown = np.zeros_like(mask)
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        grown |= np.roll(near > 0, (dy, dx), axis=(0, 1))
    assert not (changed & ~grown).any()
    assert rendered.visible_fraction[last] == 1.0


@pytest.mark.parametrize("count", range(1, 7))
def test_subjects_stand_in_the_order_of_the_caption(count: int) -> None:
    """Row by row from the left: two above one or two, three above two or three."""
    above = {1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 6: 3}[count]
    overlaps = 0
    for seed in range(40):
        scene = world.sample_scene(seed, "train", count)
        rows = [scene.placements[:above], scene.placements[above:]]
        for row in rows:
            assert all(left.x < right.x for left, right in itertools.pairwise(row))
        if count > 2:
            assert max(p.y for p in rows[0]) < min(p.y for p in rows[1])
        names = [p.identity.class_name for p in scene.placements]
        counted = list(dict.fromkeys(names))
        assert names == sorted(names, key=counted.index)  # equals are neighbours
        found = [world.caption(scene).find(creatures.DRAWINGS[name].plural if names.count(name) > 1 else name) for name in counted]
        assert found == sorted(found)
        overlaps += world.visible_fractions(scene, 28).min() < 0.999
    assert (overlaps == 0) if count == 1 else 5 < overlaps < 40


def test_visible_fraction_and_layout() -> None:
    for seed in range(20):
        scene = world.sample_scene(seed, num_subjects=seed % 6 + 1)
        rendered = world.render_scene(scene, 64)
        assert rendered.masks.shape == (len(scene.placements), 64, 64)
        assert rendered.masks.dtype == np.uint8
        assert rendered.masks.sum(axis=0).max() <= 1
        assert rendered.visible_fraction.min() > 0.38
        assert rendered.visible_fraction.max() <= 1
        border = np.ones((64, 64), bool)
        border[1:-1, 1:-1] = False
        assert rendered.masks[:, border].sum() < 40  # subjects stay on the canvas
        for placement in scene.placements:
            half = np.array(creatures.half_extents(placement.identity.class_name, placement.identity.marking)) * placement.scale / 2
            c, s = abs(cos(radians(placement.angle))), abs(sin(radians(placement.angle)))
            centre, turned = np.array([placement.x, placement.y]), np.array([[c, s], [s, c]]) @ half
            assert (centre - turned).min() >= -1e-9
            assert (centre + turned).max() <= 1 + 1e-9


@pytest.mark.parametrize("size", [32, 64, 128])
def test_reference_is_prepared(size: int) -> None:
    for i, (name, marking) in enumerate(itertools.product(world.CLASSES, world.MARKINGS)):
        identity = world.Identity(name, world.PALETTES[i % 8], world.PATTERNS[i % 5], marking)
        picture = world.render_reference(identity, size)
        rows, columns = np.nonzero((np.asarray(picture) != 255).any(axis=-1))
        height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert max(height, width) == int(0.9 * size)
        assert abs(rows.min() + rows.max() + 1 - size) <= 1
        assert abs(columns.min() + columns.max() + 1 - size) <= 1
        assert prepare_reference(picture, size).tobytes() == picture.tobytes()  # preparing it again changes nothing


def test_attributes_change_the_picture() -> None:
    for name in world.CLASSES:
        pictures = {
            world.render_reference(world.Identity(name, palette, pattern, marking), 24).tobytes()
            for palette, pattern, marking in itertools.product(world.PALETTES, world.PATTERNS, world.MARKINGS)
        }
        assert len(pictures) == len(world.PALETTES) * len(world.PATTERNS) * len(world.MARKINGS)


def test_sheet_layout() -> None:
    sheet = world.sample_sheet(2, 3)
    picture = world.render_sheet(sheet, 64)
    assert picture.size == (3 * 32 + 64, 64)
    assert world.sheet_caption(sheet) == world.caption(sheet.scene)
    assert picture.crop((96, 0, 160, 64)).tobytes() == world.render_scene(sheet.scene, 64).image.tobytes()
    assert len(set(sheet.subjects)) == 3
    for k in range(3):  # column 0 is next to the scene
        panel = picture.crop((64 - 32 * k, 0, 96 - 32 * k, 32))
        assert panel.tobytes() == world.render_reference(sheet.scene.placements[sheet.subjects[k]].identity, 32).tobytes()
    for column, (subject, pose) in enumerate(zip(sheet.subjects, sheet.poses, strict=True)):
        if pose is not None:
            assert pose.identity == sheet.scene.placements[subject].identity, column
    assert any(pose is not None for pose in sheet.poses)
    first = {world.sample_sheet(seed, 3).subjects[0] for seed in range(40)}
    assert first == {0, 1, 2, 3}  # any subject may be in any column
    blanks = [pose is None for seed in range(60) for pose in world.sample_sheet(seed, 2).poses]
    assert 0 < sum(blanks) < len(blanks) / 2


def test_strips_repeat_identities() -> None:
    kinds = set()
    for seed in range(40):
        strip = world.sample_strip(seed, "heldout")
        counts = sorted([p.identity for p in strip.poses].count(i) for i in {p.identity for p in strip.poses})
        kinds.add(tuple(counts))
        assert world.strip_caption(strip).startswith("drawings of ")
        assert all(world.is_held_out(p.identity) for p in strip.poses)
    assert kinds == {(4,), (2, 2)}
    assert world.render_strip(world.sample_strip(0), 64).size == (128, 32)


def sample_row(root: Path, sample_id: str) -> dict:
    """A sample's row of the manifest."""
    (row,) = [row for row in pq.read_table(root / "manifest.parquet").to_pylist() if row["id"] == sample_id]
    return row


def phrases(root: Path, sample_id: str) -> list[str]:
    """The phrases of a sample's references, in order."""
    return [reference["phrase"] for reference in sample_row(root, sample_id)["references"]]


def test_the_base_sees_one_to_six_subjects() -> None:
    (layout,) = [layout for layout in LAYOUTS if layout.scene and not layout.columns]
    captions = [draw(layout, seed)[1] for seed in range(40)]
    assert {sum(_count(caption).values()) for caption in captions} == set(range(1, 7))


def _count(caption: str) -> dict[str, int]:
    """Subjects of each class that a caption names."""
    words = ("a", "two", "three", "four", "five", "six")
    names = {name: name for name in world.CLASSES} | {creatures.DRAWINGS[name].plural: name for name in world.CLASSES}
    pairs = itertools.pairwise(caption.replace(",", "").split())
    return {names[noun]: 1 + words.index(number) for number, noun in pairs if number in words and noun in names}


def test_references_come_in_any_order() -> None:
    """Each place is taken by each subject about as often, so that the order of references tells nothing."""
    places = np.zeros((3, 3))
    for seed in range(40):
        names = [p.identity.class_name for p in world.sample_scene(seed, "train", 3).placements]
        if len(set(names)) == 3:
            for k, reference in enumerate(make_sample(seed, "train", 3, 64, 16).references):
                places[k, names.index(reference.phrase)] += 1
    assert places.sum() > 80
    assert (places / places.sum(axis=1, keepdims=True)).min() > 0.15


def test_written_dataset_reads_back(tmp_path: Path) -> None:
    root = tmp_path / "pocket"
    write_dataset(root, 0, 4, 4, seed=101)
    assert not root.with_name("pocket.partial").exists()
    assert json.loads((root / "dataset.json").read_text()) == {"format": "mosaic-multi-reference", "version": 1}
    dataset = MultiReferenceDataset(
        root,
        "heldout",
        image_size=(64, 64),
        reference_size=32,
        target_token_grid=(8, 8),
        reference_token_grid=(4, 4),
    )
    assert [len(dataset[i].references) for i in range(4)] == [1, 2, 3, 4]
    scene = world.sample_scene(103, "heldout", 3)
    sample = dataset[2]
    assert sample.prompt == world.caption(scene)
    assert sample.id == "heldout-00000103"
    drawn = np.asarray(world.render_scene(scene, 64).image)
    assert np.abs((sample.target.permute(1, 2, 0).numpy() + 1) * 127.5 - drawn).max() < 1
    stored = load_file(root / "points" / f"{sample.id}.safetensors")
    order = [[p.identity.class_name for p in scene.placements].index(name) for name in phrases(root, sample.id)]
    assert sorted(order) == [0, 1, 2] != order
    assert json.loads(sample_row(root, sample.id)["metadata"])["subjects"] == order
    for k, subject in enumerate(order):
        picture = Image.open(root / "images" / f"{sample.id}_ref{k}.png")
        assert picture.tobytes() == world.render_reference(scene.placements[subject].identity, world.REFERENCE_SIZE).tobytes()
        assert stored[str(k)].dtype == np.int32
        assert (stored[str(k)] == world.correspondences(scene, subject, 32, 64)).all()
        mask = np.asarray(Image.open(root / "images" / f"{sample.id}_mask{k}.png"))
        assert (np.flatnonzero(mask) == np.sort(stored[str(k)][:, 1])).all()


def test_shares_of_regimes_reach_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--num-samples", "4", "--max-subjects", "4", "--scene-size", "32", "--reference-size", "32"]
    for name, extra in (("records", []), ("folders", ["--folders"])):
        assert make_world(["--output", str(tmp_path / name), "--twins-share", "1", *common, *extra]) == 0
    prompts = [row["prompt"] for row in pq.read_table(tmp_path / "records/manifest.parquet").to_pylist()]
    assert [_count(prompt) for prompt in prompts[1:]] == [{name: count} for count, name in enumerate(map(_only, prompts[1:]), start=2)]
    assert sorted(prompts) == sorted(file.read_text().strip() for file in (tmp_path / "folders").rglob("prompt.txt"))
    assert make_world(["--output", str(tmp_path / "none"), "--twins-share", "0.7", "--mixed-share", "0.4"]) == 2
    assert "must be within 0..1, also together; got 0.7 and 0.4" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def _only(caption: str) -> str:
    (name,) = _count(caption)
    return name


def test_writer_refuses_and_cleans_up(tmp_path: Path) -> None:
    white = Image.new("RGB", (8, 8), "white")

    def sample(points: list[list[tuple[int, int]]], sample_id: str = "a") -> SampleRecord:
        references = [ReferenceRecord(white, "cat", np.array(p).reshape(-1, 2)) for p in points]
        return SampleRecord(sample_id, "train", "a cat", white, references, (4, 4), (8, 8))

    for points, message in (
        ([[(16, 0)]], r"references\[0\]: u must lie"),
        ([[(0, 64)]], "v must lie"),
        ([[(0, 1)], [(3, 1)]], r"\[1\]: a target cell"),
    ):
        with pytest.raises(ValueError, match=message), DatasetWriter(tmp_path / "d") as writer:
            writer.add(sample(points))
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="sample id '../a'"), DatasetWriter(tmp_path / "d") as writer:
        writer.add(sample([[]], "../a"))
    with DatasetWriter(tmp_path / "d") as writer:
        writer.add(sample([[]]))
    with pytest.raises(FileExistsError, match="exists already"):
        DatasetWriter(tmp_path / "d")
