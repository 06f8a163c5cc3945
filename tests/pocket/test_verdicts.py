"""Verdicts on rendered cases: a subject that is missing is named, one that is there is recognised, by the judge alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.make_examples import reference_name
from scripts.pocket import world
from scripts.pocket.judge import Judge, load_judge
from scripts.pocket.verdicts import MISSING, OTHER, RIGHT, SubjectVerdict, identity_of, judge_picture, judge_rows
from scripts.report import main


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def scenes(count: int) -> list[world.Scene]:
    return [world.sample_scene(70_000_000 + number, "heldout", 3, "distinct") for number in range(count)]


def identities(scene: world.Scene) -> list[world.Identity]:
    return [placement.identity for placement in scene.placements]


def test_names_of_reference_pictures_tell_the_identity() -> None:
    for scene in scenes(20):
        for identity in identities(scene):
            assert identity_of(f"some/folder/{reference_name(identity)}") == identity
    for name in ("cat.png", "bird_honey_dots.png", "bird_honey_dots_scarf_2.png", "dog_honey_dots_scarf.png", "bird_honey_dots_.png", ""):
        assert identity_of(name) is None


def test_subjects_as_drawn_are_right_and_absent_ones_missing(judge: Judge) -> None:
    """On real renderings the judge is right about nearly all; of a class that is not there it says so."""
    verdicts: list[str] = []
    for scene in scenes(20):
        picture, there = world.render_scene(scene, 64).image, identities(scene)
        absent = next(name for name in world.CLASSES if name not in {identity.class_name for identity in there})
        extra = world.Identity(absent, *(getattr(there[0], name) for name in ("palette", "pattern", "marking")))
        found = judge_picture(judge, picture, [*there, extra])
        verdicts += [verdict.verdict for verdict in found[:3]]
        assert found[3] == SubjectVerdict(absent, MISSING)
    assert verdicts.count(RIGHT) >= 0.85 * len(verdicts)


def test_other_looks_are_told_with_their_owner(judge: Judge) -> None:
    """Asked with the references of two subjects exchanged, it sees each with the other's looks."""
    told = 0
    for scene in scenes(20):
        first, second, _ = identities(scene)
        if first.palette == second.palette:
            continue
        swapped = [
            world.Identity(first.class_name, second.palette, second.pattern, second.marking),
            world.Identity(second.class_name, first.palette, first.pattern, first.marking),
        ]
        found = judge_picture(judge, world.render_scene(scene, 64).image, swapped)
        told += [(verdict.verdict, verdict.looks_of) for verdict in found] == [(OTHER, second.class_name), (OTHER, first.class_name)]
    assert told >= 10
    assert str(SubjectVerdict("cat", OTHER, "mug")) == (
        "the cat is there, but not recognised as its reference, it has the looks of the mug's reference"
    )


def test_of_two_of_a_class_the_second_may_be_missing(judge: Judge) -> None:
    scene = scenes(1)[0]
    one, *_ = identities(scene)
    found = judge_picture(judge, world.render_scene(scene, 64).image, [one, one])
    assert [verdict.verdict for verdict in found] == [RIGHT, MISSING]


def test_two_of_a_class_are_recognised_each_at_its_place(judge: Judge) -> None:
    """In any order of the references; where both have one look, one is not recognised, and it is told whose looks it has."""
    told, taken = [], []
    for number in range(10):
        scene = world.sample_scene(70_000_000 + number, "heldout", 2, "twins")
        picture, (one, two) = world.render_scene(scene, 64).image, identities(scene)
        for asked in ([one, two], [two, one]):
            told += [verdict.verdict for verdict in judge_picture(judge, picture, asked)]
        strangers = [world.Identity(one.class_name, palette, one.pattern, one.marking) for palette in world.PALETTES]
        taken += judge_picture(judge, picture, [two, next(who for who in strangers if who not in (one, two))])
    assert told.count(RIGHT) >= 0.9 * len(told)
    assert [verdict.verdict for verdict in taken[::2]].count(RIGHT) >= 9
    assert [verdict.verdict for verdict in taken[1::2]].count(OTHER) >= 6
    found = judge_picture(judge, picture, [one, two, strangers[0], strangers[1]])
    assert sorted(verdict.verdict for verdict in found) == sorted([RIGHT, RIGHT, MISSING, MISSING])
    assert str(SubjectVerdict("cat", OTHER, "cat")).endswith("it has the looks of another cat's reference")


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Two rendered cases: as drawn, with its page, and without its last subject; and one of other pictures."""
    folder, rows = tmp_path / "examples", []
    folder.mkdir()
    scene = scenes(1)[0]
    for number, wanted in enumerate((identities(scene), identities(scene), [])):
        name = f"case_{number:03d}"
        picture = world.render_scene(scene, 64).image if number != 1 else Image.new("RGB", (64, 64), "white")
        picture.save(folder / f"{name}.png")
        picture.save(folder / f"{name}_panel.png")
        files = [reference_name(identity) for identity in wanted] or ["my_cat.jpg"]
        rows.append({"name": name, "digest": "0", "file": f"{name}.png", "references": [{"file": file} for file in files]})
    (folder / "case_000_report.html").write_text("its page")
    rows += [{"name": "case_007", "digest": "0", "file": "case_007.png", "references": rows[0]["references"]}, {"name": "x", "digest": "1"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_of_other_pictures_have_no_verdict(judge: Judge, examples: Path) -> None:
    rows = [json.loads(line) for line in (examples / "manifest.jsonl").read_text().splitlines()]
    assert list(judge_rows(judge, examples, rows)) == ["case_000", "case_001"]


def test_the_report_names_the_missing_and_links_the_pages(examples: Path, tmp_path: Path) -> None:
    assert main(["--examples", str(examples), "--output", str(tmp_path / "deep/report.html")]) == 0
    page = (tmp_path / "deep/report.html").read_text()
    assert "The judge looked for 6 subjects: 3 are missing, 3 are recognised as their references, 0 are there with other looks." in page
    assert page.count(" is missing") >= 3
    assert page.count('<a href="../examples/case_000_report.html">') == 1
    assert "case_001_report.html" not in page
    assert "What next" in page
    for name in {placement.identity.class_name for placement in scenes(1)[0].placements}:
        assert f"the {name} is missing" in page
        assert f"the {name} is there and recognised as its reference" in page
