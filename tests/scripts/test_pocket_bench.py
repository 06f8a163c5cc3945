"""The pocket bench: its subjects and lists, its numbers, and the whole chain with pictures that no model renders."""

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inference
from mosaic.evaluation import reduction
from mosaic.evaluation.records import Key
from mosaic.weights.digests import file_digest
from scripts.bench import models
from scripts.bench import pocket_data as data
from scripts.bench import pocket_numbers as numbers
from scripts.bench.command import main
from scripts.pocket import world
from scripts.pocket.evaluation import identified, judge_scenes
from scripts.pocket.judge import load_judge

FULL, TINY = data.SIZES["full"], data.SIZES["tiny"]


def test_subjects_are_held_out_and_three_of_a_class_look_alike_in_part() -> None:
    assert len(set(data.SUBJECTS.values())) == 24
    assert all(world.is_held_out(identity) for identity in data.SUBJECTS.values())
    for name in world.CLASSES:
        first, second, third = (data.SUBJECTS[name + number] for number in ("", "2", "3"))
        assert (second.palette, second.pattern) == (first.palette, first.pattern)
        assert second.marking != first.marking
        assert (third.pattern, third.marking) == (first.pattern, first.marking)
        assert third.palette != first.palette
        assert [data.other_of_class(name + number) for number in ("", "2", "3")] == [f"{name}2", f"{name}3", name]


def test_lists_follow_the_rule() -> None:
    """Sets of subjects of different classes, each with all its prompts; at every number of subjects each subject appears as often."""
    lists = data.lists(FULL)
    assert {name: len(items) for name, items in lists.items()} == {"dreambench": 72, "dreambench_multi": 216}
    for k in (1, 2, 3, 4):
        items = data.items(k, FULL)
        blocks = Counter(item.subjects for item in items)
        assert len(blocks) == 24
        assert set(blocks.values()) == {3}
        assert set(Counter(name for block in blocks for name in block).values()) == {k}
        assert Counter(item.background for item in items) == dict.fromkeys(world.BACKGROUNDS, 12)
        assert all(len({data.SUBJECTS[name].class_name for name in block}) == k for block in blocks)
    assert data.Item(("cat2", "mug", "fish3"), "in the snow").prompt == "a cat, a mug and a fish in the snow"


def test_real_renderings_show_the_case() -> None:
    items = [data.items(k, FULL)[5] for k in (1, 2, 3, 4)]
    scenes = [data.scene_of(item) for item in items]
    for item, scene in zip(items, scenes, strict=True):
        assert [placement.identity for placement in scene.placements] == [data.SUBJECTS[name] for name in item.subjects]
        assert world.caption(scene) == item.prompt
        assert scene == data.scene_of(item)
    judge, pictures = load_judge(), [world.render_scene(scene, data.SIDE).image for scene in scenes]
    hits = identified(judge, pictures, scenes)
    assert np.mean([hit for of_scene in hits for hit in of_scene]) >= 0.9
    turned = pictures[::-1]  # pictures of others: hits and misses
    assert identified(judge, turned, scenes) == [list(outcome.identification) for outcome in judge_scenes(judge, turned, scenes)]


def values_of(rows: dict[str, dict[str, list[float]]]) -> numbers.Values:
    """Values of blocks "a" and "b", of two cases each, and of the pair "a+b"."""
    cases = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("a+b", "x")]
    return {
        arm: {
            metric: {
                Key(metric, f"{block}: {prompt}", 0, subject): value
                for (block, prompt), value in zip(cases, found, strict=True)
                for subject in block.split("+")
            }
            for metric, found in metrics.items()
        }
        for arm, metrics in rows.items()
    }


def test_numbers_are_taken_by_number_of_subjects_and_case_by_case() -> None:
    values = values_of(
        {
            "adapter": {"dino": [10.0, 20, 60, 70, 5], "identification": [0.0, 0, 100, 100, 0]},
            "base": {"dino": [4.0, 16, 30, 40, 1], "identification": [0.0, 100, 0, 0, 100]},
        }
    )
    assert numbers.score(values, "adapter", "dino", 1).value == 40
    assert numbers.score(values, "adapter", "dino", 2)[:3] == (5, None, None)
    difference = numbers.apart(values, "adapter", "base", "dino", 1)
    assert (difference.value, difference.low, difference.high) == (17.5, 5, 30)  # 5 in one block, 30 in the other
    assert numbers.correlation(values, "dino", ["adapter"], 1)[::2] == (pytest.approx(0.894, abs=1e-3), 4)
    assert numbers.correlation(values, "dino", ["base"], 1).value < 0
    assert numbers.correlation(values, "dino", ["adapter", "base"]).num_cases == 10
    assert np.isnan(numbers.correlation(values, "dino", ["adapter"], 2).value)  # one case


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What inference.py is asked for; in its place something draws the cases, worse for every arm, and writes what a run writes."""
    asked: list[list[str]] = []

    def render(argv: list[str]) -> int:
        if argv in asked:  # finished before
            return 0
        asked.append(argv)
        flags = inference.parse_arguments(argv)
        cases, output = Path(flags.cases), Path(flags.output_dir)
        others = cases.parent.name.endswith("_of_others")
        items = data.lists(TINY)[cases.parent.name.removesuffix("_of_others")]
        noise = 120 if flags.set else 40 if others else 10
        output.mkdir(parents=True)
        rows = []
        for case, item in zip(json.loads(cases.read_text()), items, strict=True):
            shown = item._replace(subjects=tuple(map(data.other_of_class, item.subjects))) if others else item
            pixels = np.asarray(world.render_scene(data.scene_of(shown), 64).image) / 1.0
            pixels += np.random.default_rng(case["index"]).normal(0, noise, pixels.shape)
            name = f"case_{case['index']:03d}"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(output / f"{name}.png")
            used = [{"sha256": file_digest(cases.parent / path)} for path in case["image_paths"]]
            row = {key: case[key] for key in ("index", "prompt", "height", "width")}
            rows.append({**row, "seed": case["seeds"][0], "references": used, "file": f"{name}.png", "name": name, "digest": "0"})
        (output / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    monkeypatch.setattr(inference, "main", render)
    monkeypatch.setattr(models, "ClipEncoder", functools.cache(models.ClipEncoder))
    monkeypatch.setattr(models, "DinoEncoder", functools.cache(models.DinoEncoder))
    monkeypatch.setattr(reduction, "RESAMPLES", 99)
    monkeypatch.setattr(data, "lists", lambda size: {"dreambench": data.items(1, size), "dreambench_multi": data.items(2, size)})
    return asked


def test_the_whole_chain_and_that_it_goes_on(
    rendered: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh_accelerator: None
) -> None:
    words = ["pocket", "--output", str(tmp_path / "bench"), "--size", "tiny", "--processes", "1", "--lora", "my.safetensors"]
    draw = inference.main
    monkeypatch.setattr(inference, "main", lambda argv: 1 if "base" in argv[3] else draw(argv))
    assert main(words) == 2
    assert "bench.py render" in capsys.readouterr().err
    monkeypatch.setattr(inference, "main", draw)
    assert main(words) == 0
    folder = tmp_path / "bench"
    asked = {(Path(argv[3]).parent.name, Path(argv[3]).name): argv[4:] for argv in rendered}
    assert len(asked) == 6
    assert {(arm, Path(argv[1]).parent.name.endswith("_of_others")) for (arm, _), argv in zip(asked, rendered, strict=True)} == {
        ("adapter", False),
        ("other", True),
        ("base", False),
    }
    for (arm, _), flags in asked.items():
        assert flags == ["--steps", "1", *(["--set", "inference.lora=null"] if arm == "base" else ["--lora", "my.safetensors"])]
    found: dict[str, Any] = json.loads((folder / "pocket.json").read_text())
    for k in "12":
        for metric in numbers.OF_LOOKS:
            by_arm = {arm: found["scores"][metric][k][arm]["value"] for arm in numbers.ARMS}
            assert by_arm["real"] > by_arm["base"]
            assert by_arm["real"] > by_arm["other"]
            assert found["differences"][metric][k]["real - adapter"]["value"] == pytest.approx(by_arm["real"] - by_arm["adapter"])
    assert found["correlations"]["dino"]["generated"]["num_cases"] == 12
    page = (folder / "index.html").read_text()
    assert page.count("adapter, references of others") >= 8
    assert (folder / "table" / "table.html").is_file()
    before = (folder / "pocket.json").read_bytes()
    assert main(words) == 0
    assert len(rendered) == 6
    assert (folder / "pocket.json").read_bytes() == before
    capsys.readouterr()
    assert main([*words[:-2], "--lora", "other.safetensors"]) == 2
    assert "was begun with --lora my.safetensors" in capsys.readouterr().err


def test_several_processes_are_started_for_what_renders_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.bench import pocket

    started: list[tuple[list[str], list[dict[str, str]]]] = []
    monkeypatch.setattr(pocket, "run_processes", lambda command, environments: started.append((command, environments)) or 0)
    chain = pocket.Chain(data.Folder(tmp_path, TINY), None, 3, main)
    chain.render("base", "dreambench")
    ((command, environments),) = started
    assert command[2:4] == ["render", str(tmp_path / "lists" / "dreambench")]
    assert [(one["RANK"], one["WORLD_SIZE"], one["OMP_NUM_THREADS"]) for one in environments] == [(str(i), "3", "1") for i in range(3)]
    monkeypatch.setattr(pocket, "run_processes", lambda command, environments: 70)
    with pytest.raises(ValueError, match="bench.py render .*dreambench ended with exit code 70"):
        chain.render("base", "dreambench")
