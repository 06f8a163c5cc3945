"""A benchmark made ready, and the pictures of a run of it."""

import json
import re
from pathlib import Path

import pytest

from mosaic.evaluation import dreambench
from mosaic.evaluation.cost import gpu_hours
from mosaic.evaluation.dreambench import ListItem
from mosaic.evaluation.prepared import Protocol, entries_of_run, read_prepared, write_prepared
from mosaic.model.costs import FLUX_DEV, Workload, sampling_flops
from mosaic.rendering.cases.reading import load_cases
from mosaic.weights.digests import file_digest
from scripts.bench.command import main
from tests.evaluation import toys
from tests.evaluation.test_dreambench import write_prompts

ITEMS = [ListItem("a cat in the snow", ("cat/01.png",)), ListItem("a cat and a mug", ("cat/01.png", "mug/00.png"))]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    toys.write_benchmark(tmp_path)
    folder = tmp_path / "prepared"
    write_prepared(folder, "dreambench", Protocol(2, 64, 7), dreambench.prepared_cases(ITEMS, tmp_path / "subjects", "--data"))
    return folder


def write_run(prepared: Path, folder: Path) -> list[dict]:
    """The manifest of a run of all cases, by what inference.py reads."""
    folder.mkdir()
    rows = []
    for case in load_cases(prepared / "cases.json"):
        for seed in case.options.seeds or ():
            references = [{"file": path.name, "sha256": file_digest(path)} for path in case.image_paths]
            row = {"name": f"{case.index}_{seed}", "digest": "d", "index": case.index, "prompt": case.prompt, "seed": seed}
            row |= {
                "height": case.options.height,
                "width": case.options.width,
                "references": references,
                "file": f"{case.index}_{seed}.png",
            }
            toys.picture(seed).save(folder / row["file"])
            rows.append(row)
    toys.write_lines(folder / "manifest.jsonl", rows)
    return rows


def test_cases_are_those_of_the_list_with_the_protocols_seeds_and_size(prepared: Path, tmp_path: Path) -> None:
    cases = load_cases(prepared / "cases.json")
    assert [case.prompt for case in cases] == [item.prompt for item in ITEMS]
    assert [[path.resolve() for path in case.image_paths] for case in cases] == [
        [tmp_path / "subjects" / picture for picture in item.pictures] for item in ITEMS
    ]
    assert {(case.options.seeds, case.options.height, case.options.width) for case in cases} == {((7, 8), 64, 64)}


def test_a_run_gives_the_entries_with_all_pictures_of_the_subjects(prepared: Path, tmp_path: Path) -> None:
    write_run(prepared, tmp_path / "run")
    entries, problems = entries_of_run(tmp_path / "run", read_prepared(prepared))
    assert problems == []
    assert [(entry.case, entry.run) for entry in entries] == [
        ("cat: a cat in the snow", 0), ("cat: a cat in the snow", 1), ("cat+mug: a cat and a mug", 0), ("cat+mug: a cat and a mug", 1),
    ]  # fmt: skip
    assert [len(subject.references) for subject in entries[2].subjects] == [3, 2]
    assert entries[1].picture == tmp_path / "run" / "0_8.png"


@pytest.mark.parametrize(("change", "message"), [
    ({"index": 2}, "manifest.jsonl:1: index must be one of the 2 cases"),
    ({"prompt": "a dog"}, "manifest.jsonl:1: prompt must be that of the case"),
    ({"seed": 9}, r"manifest.jsonl:1: seed must be one of 7\.\.8, got 9"),
    ({"width": 32}, "manifest.jsonl:1: the picture must have 64 x 64 px, got 64 x 32"),
    ({"references": [{"sha256": "0"}]}, "manifest.jsonl:1: its references are others"),
    ({"file": "../x.png"}, "manifest.jsonl:1: file: must be relative"),
    (None, "3 of the 4 pictures of dreambench are there. Let the run end"),
])  # fmt: skip
def test_pictures_of_another_run_are_refused(change: dict | None, message: str, prepared: Path, tmp_path: Path) -> None:
    rows = write_run(prepared, tmp_path / "run")
    rows = rows[1:] if change is None else [rows[0] | change, *rows[1:]]
    toys.write_lines(tmp_path / "run" / "manifest.jsonl", rows)
    entries, [problem, *_] = entries_of_run(tmp_path / "run", read_prepared(prepared))
    assert re.search(message, problem)
    assert len(entries) == 3


def test_missing_data_are_all_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    write_prompts(tmp_path / "data")
    command = ["prepare", "dreambench", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert all(str(tmp_path / "data" / name) in told for name in ("backpack", "wolf_plushie", "cat/04.jpg"))
    assert not (tmp_path / "out").exists()


def test_prepare_takes_a_list_and_other_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.write_benchmark(tmp_path)
    listed = [{"prompt": item.prompt, "image_paths": [f"./dreambooth/dataset/{one}" for one in item.pictures]} for item in ITEMS]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    command = ["prepare", "dreambench", "--data", str(tmp_path / "subjects"), "--list", str(tmp_path / "list.json")]
    assert main([*command, "--output", str(tmp_path / "out"), "--runs", "3", "--size", "128"]) == 0
    assert "runs, size not the protocol's" in capsys.readouterr().out
    assert read_prepared(tmp_path / "out").protocol == Protocol(3, 128, 3407)
    assert main([*command, "--output", str(tmp_path / "again"), "--runs", "0"]) == 2
    assert main([*command[:1], "dreambensch", *command[2:], "--output", str(tmp_path / "again")]) == 2
    assert "Did you mean dreambench" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_cost_grows_with_pictures_and_references(prepared: Path) -> None:
    single, double = read_prepared(prepared).cases
    fast, slow = gpu_hours([single], Protocol(1, 512, 0))
    assert fast * 5 == pytest.approx(slow * 3)
    flops = sampling_flops(FLUX_DEV, Workload(1, 1, 1024, 1024, 512, 128, "target"), 28)
    assert fast == pytest.approx(flops / 989e12 / 0.5 / 3600)
    assert gpu_hours([single, single], Protocol(3, 512, 0))[0] == pytest.approx(6 * fast)
    assert gpu_hours([double], Protocol(1, 512, 0))[0] > 1.2 * fast
