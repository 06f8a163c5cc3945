"""XVerseBench: its lists and lines, what its metrics are by rule, and a whole scoring with tiny models."""

import dataclasses
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mosaic.evaluation import collapse, xversebench
from mosaic.evaluation.dpg import cascading, one_step, share
from mosaic.evaluation.entries import Listed, Question, subject_labels, tile_of
from mosaic.evaluation.prepared import Protocol, entries_of_grids, read_prepared
from mosaic.evaluation.records import Key
from mosaic.evaluation.reduction import case_mean, interval_of_average
from mosaic.evaluation.scoring import sound_entries
from scripts.bench.command import main
from tests.evaluation import tiny_models, toys, xverse_toys

LINE: dict[str, Any] = {
    "picture": "a.png",
    "case": 0,
    "run": 0,
    "prompt": "a cat",
    "references": [{"path": "cat.jpg", "name": "cat", "kind": "animal"}],
    "questions": ["is there a cat?"],
}


def prepare(name: str, data: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    assert main(["prepare", name, "--data", str(data), "--output", str(output), *flags]) == 0
    return json.loads((output / "cases.json").read_text())


def test_both_lists_become_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xverse_toys.write_references(tmp_path)
    for name, listed, groups in (("xversebench", "single", xverse_toys.SINGLE), ("xversebench_multi", "multi", xverse_toys.MULTI)):
        xverse_toys.write_lists(tmp_path, listed, groups)
        cases = prepare(name, tmp_path, tmp_path / name)
        prepared = read_prepared(tmp_path / name)
        assert Counter(xversebench.group_name(case.subjects) for case in prepared.cases) == groups
        assert len(cases) == sum(groups.values())
        assert {(case["height"], case["width"], tuple(case["seeds"])) for case in cases} == {(768, 768, (42, 43, 44, 45))}
        assert [len(case["image_paths"]) for case in cases] == [len(case.subjects) for case in prepared.cases]
    said = capsys.readouterr().out
    assert "  20 of human\n" in said
    assert "  10 of human, animal, object\n" in said
    last = prepared.cases[119]
    assert (last.case, last.prompt) == ("119", "a object 0 and a object 1 in place 119\n")  # word for word, with its line break
    assert last.questions[2] == Question("is it in a place?", (0, 1))
    assert last.questions[0] == Question("is there a object 0?")
    assert (last.subjects[1].name, last.subjects[1].kind, last.subjects[1].references[0].is_file()) == ("object 1", "object", True)


def test_a_list_is_looked_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = xverse_toys.write_lists(tmp_path, "single", {"A": 1, "HO": 1})
    asked = xversebench.questions_file(path)
    arguments = ["prepare", "xversebench", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "3 of 3 pictures are missing" in said
    assert all(f"{kind}/0" in said for kind in ("animal", "human", "object"))
    assert not (tmp_path / "out").exists()
    cases, questions = json.loads(path.read_text()), json.loads(asked.read_text())

    def refused(words: str, cases: list[dict[str, Any]] = cases, questions: list[dict[str, Any]] = questions) -> None:
        path.write_text(json.dumps(cases))
        asked.write_text(json.dumps(questions))
        with pytest.raises(ValueError, match=words):
            xversebench.read_list(path, asked)

    modulation = cases[0]["modulation"][0]
    source = modulation["src_inputs"][0]
    refused(r"DSG\.json\[0\]\.prompt: must be that of .*single\.json\[0\]", questions=[questions[0] | {"prompt": "b"}, questions[1]])
    refused("the questions of the 2 cases", questions=questions[:1])
    refused("index of its own, but 0", cases=[cases[0], cases[1] | {"index": 0}])
    for change, words in (
        ({"use_words": [[0, "cow", "cow"]]}, r"use_words\[0\]: must be words of the prompt"),
        ({"use_words": []}, r"src_inputs\[0\]: no entry of use_words"),
        ({"src_inputs": [source | {"image_path": "assets/../../x/animal/a.jpg"}]}, r"src_inputs\[0\]\.image_path: must be relative"),
        ({"src_inputs": [source | {"image_path": "assets/cow/a.jpg"}]}, "a folder human, animal or object"),
    ):
        refused(words, cases=[cases[0] | {"modulation": [modulation | change]}, cases[1]])
    refused("qid2question: must be", questions=[questions[0] | {"qid2question": {}}, questions[1]])


def test_lines(tmp_path: Path) -> None:
    def read(**changes: Any) -> list[Any]:
        return xversebench.read_entry(LINE | changes, "p.jsonl:1", tmp_path)

    (entry,) = read()
    assert (entry.case, entry.run, entry.tile, entry.questions) == ("0", 0, None, (Question("is there a cat?"),))
    grid = read(run=None, grid=True)
    assert [(one.run, one.tile) for one in grid] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    dsg = {"qid2question": {"1": "a?", "2": "b?"}, "qid2dependency": {"1": [0], "2": [1]}, "qid2tuple": {}}
    assert read(questions=dsg)[0].questions == (Question("a?"), Question("b?", (0,)))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"run": None}, 'line.run must be given, or "grid": true'),
        ({"grid": True}, "line.run must be given"),
        ({"questions": []}, "line.questions"),
        ({"references": [LINE["references"][0] | {"kind": "cow"}]}, "line.references.kind"),
        ({"references": [LINE["references"][0] | {"path": "../cat.jpg"}]}, r"p\.jsonl:1\.references\[0\]\.path"),
        ({"picture": "/etc/passwd"}, r"p\.jsonl:1\.picture"),
    ]
    for changes, words in bad:
        with pytest.raises(ValueError, match=words):
            read(**changes)


def test_two_subjects_of_one_name_are_told_apart(tmp_path: Path) -> None:
    man = {"path": "a.jpg", "name": "man", "kind": "human"}
    line = LINE | {"references": [man, man | {"path": "b.jpg"}, man | {"name": "dog"}]}
    assert subject_labels(xversebench.read_entry(line, "", tmp_path)[0].subjects) == ["man", "man (2)", "dog"]


CHAIN = (Question("a"), Question("b", (0,)), Question("c", (1,)))


def test_dpg_counts_a_question_with_its_parents() -> None:
    assert share(one_step([True] * 3, CHAIN)) == 100
    assert one_step([False, True, True], CHAIN) == [False, False, True]  # XVerse asks what the parent's answer was,
    assert cascading([False, True, True], CHAIN) == [False, False, False]  # ELLA what became of it
    backwards = (Question("c", (1,)), Question("b", (2,)), Question("a"))
    assert one_step([True, True, False], backwards) == [True, False, False]
    assert cascading([True, True, False], backwards) == [False, False, False]
    assert share(one_step([True, False, True], CHAIN)) == pytest.approx(100 / 3)


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 5), max_size=3)), min_size=6, max_size=6))
def test_dependencies_only_lower_dpg(drawn: list[tuple[bool, list[int]]]) -> None:
    answers, questions = [answer for answer, _ in drawn], [Question("", tuple(parents)) for _, parents in drawn]
    assert sum(cascading(answers, questions)) <= sum(one_step(answers, questions)) <= sum(answers)


def test_means_are_over_values_and_intervals_over_cases() -> None:
    values = {Key("ip_sim", "a", run, f"s{k}"): 10.0 for run in range(4) for k in range(3)} | {Key("ip_sim", "b", 0, "s"): 36.0}
    mean = case_mean(values)
    assert (mean.value, mean.num_values) == (pytest.approx(12), 13)  # not 23, the mean of the cases' means
    assert (mean.low, mean.high) == (pytest.approx(10), pytest.approx(36))
    faces = {Key("id_sim", "a", 0, "s"): 50.0}  # draws without the case a have no faces and are left out
    low, high = interval_of_average([values, faces])
    assert (low, high) == (pytest.approx(30), pytest.approx(31))
    assert interval_of_average([faces]) == (None, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    torch.save(tiny_models.head_state(), folder / "head.pth")
    torch.save(tiny_models.arcface_state(), folder / "ir.pth")
    found = {
        "vqa": tiny_models.write_blip(folder / "blip"),
        "detector": tiny_models.write_florence(folder / "florence", [(100, 200, 600, 900), (0, 0, 500, 500), (0, 0, 30, 30)]),
        "segmenter": tiny_models.write_sam2(folder / "sam2"),
        "dino": toys.write_dino(folder / "dino", 28),
        "dinov2": tiny_models.write_dinov2(folder / "dinov2"),
        "siglip": tiny_models.write_siglip(folder / "siglip"),
        "aesthetic": folder / "head.pth",
        "arcface": folder / "ir.pth",
    }
    return [f"--{name}={path}" for name, path in found.items()]


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_whole_scoring_of_grids(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "facer", xverse_toys.Facer())  # type: ignore[arg-type]
    data, prepared, grids = tmp_path / "data", tmp_path / "prepared", tmp_path / "grids"
    xverse_toys.write_references(data)
    xverse_toys.write_lists(data, "single", {"H": 1, "O": 1})
    prepare("xversebench", data, prepared)
    grids.mkdir()
    for case in range(2):
        grid = Image.new("RGB", (160, 120))  # dark pictures, without faces,
        grid.paste(toys.picture(case, 80, 60), (80, 0))  # but for the second one
        grid.save(grids / f"{case}_a_thing_in_a_place.png")
    Image.new("RGB", (8, 8)).save(grids / "overview.png")
    given_to = ["score", "xversebench", "--grids", str(grids), "--prepared", str(prepared), "--device", "cpu", *models]
    assert main([*given_to, "--collapse", "--output", str(tmp_path / "scores")]) == 0
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "scores/records.jsonl").read_text().splitlines()]
    counts = {"dpg": 8, "dpg_cascading": 8, "dpg_answer": 16, "id_sim": 4, "id_sim_assigned": 4, "ip_sim": 4, "ip_sim_assigned": 4}
    counts |= {"ip_sim_dinov2": 4, "ip_sim_dinov2_assigned": 4, "aes": 2, "aes_picture": 8}
    counts |= dict.fromkeys(collapse.METRICS, 8)
    assert scores["num_values"] == counts == Counter(record["metric"] for record in records)
    assert (scores["num_pictures"], scores["num_cases"], scores["num_runs"]) == (8, 2, 4)
    assert scores["dpg"] == 100  # the judge says yes to everything
    faces = {record["run"]: record["value"] for record in records if record["metric"] == "id_sim"}
    assert [run for run, value in faces.items() if value] == [1]
    assert scores["id_sim"] == pytest.approx(faces[1] / 4)
    alike = [record["value"] for record in records if record["metric"] == "ip_sim"]
    assert 0 < abs(alike[0]) < 100
    assert scores["avg"] == pytest.approx(np.mean([scores[metric] for metric in ("dpg", "id_sim", "ip_sim", "aes")]))
    assert scores["aes"] != pytest.approx(scores["aes_picture"], abs=1e-3)
    assert scores["per_group"]["aes"].keys() == {"H", "O"}
    assert scores["models"]["dpg"]["model"] == "blip"
    assert all(word in scores["models"]["ip_sim"]["preprocessing"] for word in ("florence", "sam2", "white square"))
    assert scores["models"]["ip_sim_dinov2"]["model"] == scores["models"]["instance"]["model"] == "dinov2"
    shares = [float(scores["collapse"]["instance"]["1"][threshold]) for threshold in ("40", "50", "60")]
    assert 0 <= shares[0] <= shares[1] <= shares[2] <= 100


def test_what_cannot_be_scored_is_told_before_models_are_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = toys.write_lines(
        tmp_path / "p.jsonl", [LINE | {"references": [LINE["references"][0], {"path": "m.jpg", "name": "man", "kind": "human"}]}]
    )
    arguments = ["score", "xversebench", "--pictures", str(lines), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("--arcface", "model_ir_se50.pth", "--aesthetic", "--metrics dpg ip_sim"))
    (tmp_path / "none.pth").touch()
    for name in (LINE["picture"], LINE["references"][0]["path"], "m.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        toys.picture(0).save(tmp_path / name)
    assert main([*arguments, "--metrics", "id_sim", "--arcface", str(tmp_path / "none.pth")]) == 2
    assert "pip install pyfacer" in capsys.readouterr().err


def test_grids_are_found_by_their_numbers(tmp_path: Path) -> None:
    xverse_toys.write_references(tmp_path)
    xverse_toys.write_lists(tmp_path, "single", {"O": 3})
    prepare("xversebench", tmp_path, tmp_path / "prepared")
    prepared, grids = read_prepared(tmp_path / "prepared"), tmp_path / "grids"
    grids.mkdir()
    for name, width in (("1_a.png", 8), ("01_b.png", 8), ("7_c.png", 8), ("0_d.png", 9), ("d.png", 8)):
        Image.new("RGB", (width, 8)).save(grids / name)
    entries, problems = entries_of_grids(grids, prepared)
    assert [(entry.picture.name, entry.case, entry.run, entry.tile) for entry in entries] == [("0_d.png", "0", k, k) for k in range(4)]
    for problem, words in zip(problems, ("7_c.png: is of the case 7", "1_, got .*01_b.png and .*1_a.png", "2_, got none"), strict=True):
        assert re.search(words, problem)
    with pytest.raises(ValueError, match="must have even sides, got 9 x 8 px: .*0_d.png"):
        sound_entries(Listed(entries, []), partial=False, shown=False)
    with pytest.raises(ValueError, match="holds 4 pictures of a case, but the prepared cases have 6"):
        entries_of_grids(grids, dataclasses.replace(prepared, protocol=Protocol(6, 8, 0)))


def test_tiles_are_numbered_row_by_row(tmp_path: Path) -> None:
    grid = Image.new("RGB", (6, 4))
    for tile, (x, y) in enumerate(itertools.product(range(2), range(2))):
        grid.paste((tile, 0, 0), (3 * y, 2 * x, 3 * y + 3, 2 * x + 2))
    entries = xversebench.read_entry({key: value for key, value in LINE.items() if key != "run"} | {"grid": True}, "", tmp_path)
    shown = [tile_of(grid, entry.tile) for entry in entries]
    assert [picture.getcolors() for picture in shown] == [[(6, (tile, 0, 0))] for tile in range(4)]
