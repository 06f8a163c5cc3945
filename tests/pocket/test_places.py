"""The judge asked place by place: regions by hand, and how well it sees real renderings of look-alikes."""

import math

import pytest
import torch
from PIL import Image

from scripts.pocket import places, world
from scripts.pocket.evaluation import FIRST_SEED
from scripts.pocket.judge import ATTRIBUTES, GRID, Judge, JudgeConfig, load_judge
from scripts.pocket.places import find_peaks, find_places, regions
from scripts.pocket.regimes import RegimeOutcome, judge_regime


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def cell(row: int, column: int) -> int:
    return row * GRID + column


def test_regions_by_hand() -> None:
    scores = torch.full((GRID * GRID,), -6.0)
    scores[cell(4, 3)], scores[cell(4, 6)], scores[cell(4, 11)] = 1.0, 0.9, 2.0  # the second is 3 cells from the first
    scores[cell(14, 14)] = places.THRESHOLD - 0.1
    (peaks,) = find_peaks(scores[None])
    assert peaks == [cell(4, 11), cell(4, 3)]
    right, left = regions(peaks)
    assert not (left & right).any()
    assert left[cell(4, 6)]
    assert left[cell(4, 7)] != right[cell(4, 7)]  # in the middle
    assert right[cell(4, 8)]
    assert left[cell(9, 3)]  # 5 cells down
    assert not left[cell(10, 3)]
    scores[cell(4, 7)] = 0.5  # 4 cells from either
    assert find_peaks(scores[None]) == [[cell(4, 11), cell(4, 3), cell(4, 7)]]
    assert find_peaks(torch.full((2, GRID * GRID), -6.0)) == [[], []]
    assert regions([]).shape == (0, GRID * GRID)


def test_two_classes_in_one_place_are_one_subject() -> None:
    maps = torch.full((3, GRID * GRID), -6.0)
    maps[0, cell(4, 4)], maps[1, cell(5, 5)], maps[1, cell(10, 10)], maps[2, cell(4, 7)] = 1.0, 2.0, 1.0, 0.5
    assert find_peaks(maps) == [[], [cell(5, 5), cell(10, 10)], []]  # the third is 2.2 cells from the second
    maps[2, cell(4, 7)], maps[2, cell(4, 8)] = -6.0, 0.5
    assert find_peaks(maps)[2] == [cell(4, 8)]


def test_looks_are_those_that_the_heads_read_there() -> None:
    """With all attention the looks are those of the whole picture; with a region's, those of its cells alone."""
    torch.manual_seed(0)
    judge = Judge(JudgeConfig(fine=8, coarse=16, found=16)).eval()
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    features, scores = judge.maps(picture)
    verdict, index = judge(picture), world.CLASSES.index("mug")
    looks = judge.looks_at(features[0], scores[0, index].softmax(dim=-1), index)
    for found, attribute in zip(looks, ATTRIBUTES, strict=True):
        torch.testing.assert_close(found, getattr(verdict, attribute)[0, index])
    one = torch.zeros(GRID * GRID)
    one[7] = 1.0
    changed = features[0].clone()
    changed[8:] = 0.0
    for found, expected in zip(judge.looks_at(features[0], one, index), judge.looks_at(changed, one, index), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("regime", "k"), [("distinct", 4), ("twins", 2), ("twins", 3), ("twins", 4), ("twins", 6), ("mixed", 3), ("mixed", 6)]
)
def test_real_renderings(judge: Judge, regime: str, k: int) -> None:
    """A coarse net under what is measured on 150 scenes each (docs/pocket_world.md)."""
    scenes = [world.sample_scene(FIRST_SEED + 900_000 + i, "heldout", k, regime) for i in range(8)]
    outcomes = judge_regime(judge, [world.render_scene(scene, 64).image for scene in scenes], scenes)
    means = {name: sum(values) / 8 for name, values in zip(RegimeOutcome._fields, zip(*outcomes, strict=True), strict=True)}
    assert means["apart"] >= 0.85, means
    assert means["identification"] >= 0.93, means
    assert means["missing"] + means["doubled"] <= 0.05, means


def test_places_are_where_the_subjects_stand(judge: Judge) -> None:
    scene = world.sample_scene(60_000_000, "heldout", 2, "twins")
    picture = world.render_scene(scene, 128).image
    for seen in (picture, picture.convert("RGBA")):
        (found,) = find_places(judge, [seen])
        mine = [place for place in found if place.class_name == scene.placements[0].identity.class_name]
        assert sorted(place.x for place in mine) == pytest.approx([p.x for p in scene.placements], abs=0.12)
        for place in mine:
            for values in place.log_looks.values():
                assert math.fsum(map(math.exp, values.values())) == pytest.approx(1)
            assert [place.likeliest(name) for name in ATTRIBUTES] in [
                [getattr(p.identity, name) for name in ATTRIBUTES] for p in scene.placements
            ]
            identity = scene.placements[0].identity
            assert place.scores([identity]) == [sum(place.log_looks[name][getattr(identity, name)] for name in ATTRIBUTES)]
    assert find_places(judge, []) == []
    assert find_places(judge, [Image.new("RGB", (64, 64), "white")]) == [[]]
