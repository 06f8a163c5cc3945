"""Cases as people keep them: other projects' keys, JSONL, names, patterns, grids, options; and the schema that says the same."""

import json
import os
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from mosaic.rendering.cases.reading import CaseOptions, load_cases, read_cases
from mosaic.rendering.folder import picture_seeds
from scripts.schemas import cases as make_cases_schema


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bags").mkdir()
    for name in ("a.png", "b.png", "bags/2.png", "bags/10.png", "bags/1.jpg", "odd[1].png"):
        Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / name)
    (tmp_path / "bags/notes.txt").write_text("no picture")
    return tmp_path


def read(folder: Path, values: Any, name: str = "cases.json") -> list[Any]:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return load_cases(path)


def files(case: Any, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in case.image_paths]


UNO = {"prompt": "a cat", "image_paths": ["a.png", "b.png"]}
GOOD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "MOSAIC": ({"index": 4, **UNO}, ["a.png", "b.png"]),
    "UNO": (UNO, ["a.png", "b.png"]),
    "USO": ({**UNO, "save_dir": "../../results"}, ["a.png", "b.png"]),
    "UNO training": ({"prompt": "a cat", "image_path": "a.png", "image_tgt_path": "target.png"}, ["a.png"]),
    "UNO training, several": ({**UNO, "image_tgt_path": "target.png"}, ["a.png", "b.png"]),
    "OmniGen2": (
        {"task_type": "edit", "instruction": "a cat", "input_images": ["a.png", "b.png"], "output_image": "c.png"},
        ["a.png", "b.png"],
    ),
    "MUSAR-Gen": (
        {"cond_img_1": "b.png", "cond_img_0": "a.png", "tgt_img": "t.png", "cond_prompt_0": "x", "prompt": "a cat"},
        ["a.png", "b.png"],
    ),
    "names": ({"prompt": "a <cat>", "references": {"cat": "b.png"}}, ["b.png"]),
    "names in a list": (
        {"prompt": "a <cat>", "references": [{"path": "b.png", "name": "cat", "strength": 1}, "a.png"]},
        ["b.png", "a.png"],
    ),
    "points": (
        {"prompt": "a cat", "references": [{"path": "b.png", "points": [[0, 0], [7, 7]]}, {"path": "a.png", "points": []}]},
        ["b.png", "a.png"],
    ),
    "names with strength": ({"prompt": "a <cat>", "references": {"cat": {"path": "b.png", "strength": 0.5}}}, ["b.png"]),
    "pattern": ({"prompt": "a cat", "references": ["bags/*", "a.png"]}, ["bags/1.jpg", "bags/10.png", "bags/2.png", "a.png"]),
    "file that looks like a pattern": ({"prompt": "a cat", "references": ["odd[1].png"]}, ["odd[1].png"]),
    "options": (
        {**UNO, "seed": 3, "height": 16, "width": 8, "num_inference_steps": 2, "guidance_scale": 0, "image_guidance_scale": 2.5},
        ["a.png", "b.png"],
    ),
    "seeds": ({**UNO, "seeds": [3, 1]}, ["a.png", "b.png"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_cases(folder: Path, name: str) -> None:
    entry, expected = GOOD[name]
    (case,) = read(folder, [entry])
    assert (case.prompt, files(case, folder)) == ("a cat", expected)
    assert case.index == entry.get("index", 0)
    assert replace(read(folder, json.dumps(entry) + "\n", "cases.jsonl")[0], place="") == replace(case, place="")
    jsonschema.validate([entry], make_cases_schema.cases_schema())


def test_the_schema_file_is_current() -> None:
    assert make_cases_schema.FILE.read_text(encoding="utf-8") == make_cases_schema.schema_text()
    jsonschema.Draft202012Validator.check_schema(make_cases_schema.cases_schema())
    jsonschema.validate(json.loads((make_cases_schema.ROOT / "example_cases.json").read_text()), make_cases_schema.cases_schema())


def test_keys_without_use_are_noted(folder: Path) -> None:
    path = folder / "cases.json"
    path.write_text(json.dumps([GOOD["USO"][0], GOOD["OmniGen2"][0]]))
    (note,) = read_cases(path).notes
    assert note.startswith(f"{path}: output_image, save_dir, task_type of its cases: of no use here")


def test_lines_count_in_messages_and_a_bad_line_costs_only_itself(folder: Path) -> None:
    path = folder / "cases.jsonl"
    path.write_text(
        "\n".join([json.dumps(UNO), "", "{", json.dumps(UNO), '{"prompt": 1, "image_paths": ["a.png"]}', '{"a": 1, "a": 2}']) + "\n"
    )
    file = read_cases(path)
    assert [case.index for case in file.cases] == [0, 2]  # the bad line keeps its number
    starts = [
        f"{path}:3: not valid JSON: line 1, column 2",
        f"{path}:5.prompt: must be a string",
        f"{path}:6: not valid JSON: the key 'a' is given twice",
    ]
    for problem, start in zip(file.problems, starts, strict=True):
        assert str(problem).startswith(start)
    (folder / "lines.json").write_text(path.read_text().replace("\n\n", "\n"))
    with pytest.raises(ValueError, match=r"Extra data\. A file with a case per line must be named lines\.jsonl\."):
        read_cases(folder / "lines.json")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": (
        {"prompt": "a <dog>", "references": {"cat": "a.png"}},
        "[0].prompt: <dog> names no reference of this case. The names here: cat.",
    ),
    "name without names": (
        {"prompt": "a <dog>", "references": ["a.png"]},
        '[0].prompt: <dog> names no reference of this case. Give names as "references"',
    ),
    "unused name": ({"prompt": "a cat", "references": {"cat": "a.png"}}, "[0].prompt: must use every name, but <cat> is missing"),
    "bad name": (
        {"prompt": "a <c/t>", "references": {"c/t": "a.png"}},
        '[0].references.c/t.name: must be made of letters, digits, spaces and hyphens, got "c/t".',
    ),
    "name twice": (
        {"prompt": "<x>", "references": [{"path": "a.png", "name": "x"}, {"path": "b.png", "name": "x"}]},
        '[0].references: a name must stand for one reference picture, but "x" stands for 2.',
    ),
    "name of a pattern": (
        {"prompt": "<x>", "references": {"x": "bags/*"}},
        '[0].references.x: a name must stand for one picture, but "bags/*" matches 3.',
    ),
    "strength": (
        {"prompt": "<x>", "references": {"x": {"path": "a.png", "strength": 10.5}}},
        "[0].references.x.strength: must be a number from 0 (absent) to 10, got 10.5.",
    ),
    "points of a pattern": (
        {"prompt": "x", "references": [{"path": "*.png", "points": [[1, 1]]}]},
        "[0].references[0]: points must lie on one picture, but",
    ),
    "point beside the picture": (
        {"prompt": "<x>", "references": {"x": {"path": "a.png", "points": [[1, 1], [8, 0]]}}},
        "[0].references.x.points[1]: must lie on the subject, x in [0, 8) and y in [0, 8) of the 8 x 8 pixels, got [8, 0].",
    ),
    "no points": (
        {"prompt": "x", "references": [{"path": "a.png", "points": [1, 2]}]},
        "[0].references[0].points[0]: must be two integers [x, y]",
    ),
    "point of a huge number": (
        {"prompt": "x", "references": [{"path": "a.png", "points": [[10**400, 1]]}]},
        "[0].references[0].points[0]: must be two integers [x, y] in [0, 1000000), pixels of the picture, got ",
    ),
    "points a number": (
        {"prompt": "x", "references": [{"path": "a.png", "points": 3}]},
        "[0].references[0].points: must be a list of at most 20",
    ),
    "no strength": (
        {"prompt": "x", "references": [{"path": "a.png", "strength": "1"}]},
        '[0].references[0].strength: must be a number from 0 (absent) to 10, got "1".',
    ),
    "missing of a name": ({"prompt": "<x>", "references": {"x": "none.png"}}, "[0].references.x: file not found: "),
    "pattern without a match": ({"prompt": "x", "references": ["none/*.png"]}, '[0].references[0]: no picture file matches "none/*.png".'),
    "pattern through all folders": ({"prompt": "x", "references": ["**/*.png"]}, '[0].references[0]: a pattern must not hold "**"'),
    "two ways": ({**UNO, "references": ["a.png"]}, "[0]: references and image_paths mean the same: give one of them."),
    "two ways of OmniGen2": ({"prompt": "x", "instruction": "x", "input_images": ["a.png"]}, "[0]: instruction and prompt mean the same"),
    "a gap": (
        {"prompt": "x", "cond_img_0": "a.png", "cond_img_2": "b.png"},
        "[0]: cond_img_0, cond_img_2: must be numbered from 0 without gaps.",
    ),
    "their key in messages": ({"instruction": "x", "input_images": [3]}, "[0].input_images[0]: must be a string, got 3."),
    "seed and seeds": ({**UNO, "seed": 1, "seeds": [1]}, "[0].seed: must not be given together with seeds."),
    "equal seeds": ({**UNO, "seeds": [1, 1]}, "[0].seeds: must differ, since they name the output files, got [1, 1]."),
    "no seeds": ({**UNO, "seeds": []}, "[0].seeds: must be a list of 1 to 1000 values, each an integer of at least 0"),
    "steps": (
        {**UNO, "num_inference_steps": 0},
        "[0].num_inference_steps: must be an integer of at least 1 and at most 1000 or null, got 0.",
    ),
    "grid": ({"grid": {"prompts": []}}, "[0].grid: must be an object with the keys prompts and references"),
    "empty grid": ({"grid": {"prompts": [], "references": ["a.png"]}}, "[0].grid.prompts: must be a list of one or more values, got []."),
    "guidance without end": (
        {**UNO, "guidance_scale": 1e299},
        "[0].guidance_scale: must be a number of at least 0 and at most 100 or null, got 1e+299.",
    ),
    "image guidance without end": (
        {**UNO, "image_guidance_scale": 1e40},
        "[0].image_guidance_scale: must be a number of at least 0 and at most",
    ),
    "many seeds": ({**UNO, "seeds": list(range(1001))}, "[0].seeds: must be a list of 1 to 1000 values, each an integer of at least 0"),
    "names under image_paths": (
        {"prompt": "a <cat>", "image_paths": {"cat": "a.png"}},
        '[0].image_paths: must be a list of paths of reference pictures, got {"cat": "a.png"}: names, strengths and points go under "references"',
    ),
    "strength under image_paths": (
        {"prompt": "a cat", "image_paths": [{"path": "a.png", "strength": 0.5}]},
        "[0].image_paths: must be a list of paths of reference pictures, got",
    ),
    "object that is in no list": (
        {"prompt": "x", "references": {"path": "a.png", "strength": 0.5}},
        '[0].references: must be a list where a reference is an object: put it into brackets, [{"path": "a.png", "strength": 0.5}].',
    ),
    "path alone that is in no list": (
        {"prompt": "x", "references": {"path": "a.png"}},
        "[0].prompt: must use every name, but <path> is missing",
    ),
    "name in capitals": (
        {"prompt": "a <BAG>", "references": {"bag": "a.png"}},
        "[0].prompt: <BAG> names no reference of this case. Did you mean bag? The names here: bag.",
    ),
    "mark on nothing": (
        {"prompt": "a <\u0301x>", "references": {"\u0301x": "a.png"}},
        "[0].references.\u0301x.name: must be made of letters",
    ),
    "prompt in a grid": (
        {"grid": {"prompts": [3], "references": ["a.png"]}},
        "[0].grid(prompts[0], references[0]).prompt: must be a string, got 3.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cases(folder: Path, name: str) -> None:
    entry, message = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(f"{folder / 'cases.json'}{message}")):
        read(folder, [entry])


@pytest.mark.parametrize(
    "name",
    [
        *("strength", "no strength", "no points", "points a number", "point of a huge number", "two ways", "no seeds", "steps"),
        *("grid", "empty grid", "prompt in a grid", "their key in messages"),
        *("guidance without end", "image guidance without end", "many seeds"),
        *("names under image_paths", "strength under image_paths", "object that is in no list"),
    ],
)
def test_the_schema_refuses_them_too(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([BAD[name][0]], make_cases_schema.cases_schema())


def test_the_model_sees_names_without_brackets(folder: Path) -> None:
    entry = {"prompt": "<my bag> beside <Tasche>, <my bag>", "references": {"Tasche": "b.png", "my bag": "a.png"}}
    (case,) = read(folder, [entry])
    assert case.prompt == "my bag beside Tasche, my bag"
    assert [reference.name for reference in case.references] == ["Tasche", "my bag"]  # the order of the object, not of the prompt
    assert read(folder, [{"prompt": "<3 > 2", "image_paths": ["a.png"]}])[0].prompt == "<3 > 2"  # no names: a prompt is a prompt


def test_composed_and_decomposed_letters_are_one_name(folder: Path) -> None:
    entry = {"prompt": "a <cafe\u0301>", "references": {"caf\u00e9": "a.png"}}
    assert read(folder, [entry])[0].references[0].name == "caf\u00e9"


def test_names_in_scripts_that_write_marks(folder: Path) -> None:
    for name in ("हाथी", "สิงโต", "cafe\u0301", "بَيْت", "x\u0301 y-z"):
        (case,) = read(folder, [{"prompt": f"a <{name}>", "references": {name: "a.png"}}])
        assert case.references[0].name == unicodedata.normalize("NFC", name)
        assert case.prompt == f"a {name}"


def test_a_line_that_is_not_utf_8_costs_only_itself(folder: Path) -> None:
    path = folder / "cases.jsonl"
    good = json.dumps(UNO).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b'\r\n{"prompt": "\xe9", "image_paths": ["a.png"]}\n' + good)
    file = read_cases(path)
    assert [case.index for case in file.cases] == [0, 2]
    (problem,) = file.problems
    assert str(problem) == f"{path}:2: must be UTF-8 text, but its letter 13 is not. Save the file as UTF-8."


def test_an_index_that_was_not_given_says_so(folder: Path) -> None:
    for entries, message in (
        ([{**UNO, "index": 1}, UNO], 'is also its position in the file, and the index of FILE[0]. Give it an "index" of its own.'),
        ([UNO, {**UNO, "index": 0}], 'is also the position of FILE[0], which has no index. Give FILE[0] an "index" of its own.'),
    ):
        with pytest.raises(ValueError, match=re.escape(message.replace("FILE", str(folder / "cases.json")))):
            read(folder, entries)


def test_no_case_takes_another_name_because_a_grid_failed(folder: Path) -> None:
    grid = {"grid": {"prompts": ["x"], "references": ["none/*.png"]}}
    (folder / "cases.json").write_text(json.dumps([UNO, {"prompt": 3}, UNO, grid, UNO, {**UNO, "index": 9}]))
    file = read_cases(folder / "cases.json")
    assert [case.index for case in file.cases] == [0, 2, 9]  # the bad case keeps its place
    place = folder / "cases.json"
    assert str(file.problems[2]) == (
        f'{place}[4].index: is missing, and the position is not known, since the grid {place}[3] failed: give it an "index", or mend the grid.'
    )
    grid["grid"]["references"] = ["bags/*"]
    (folder / "cases.json").write_text(json.dumps([grid, UNO]))
    file = read_cases(folder / "cases.json")
    assert [case.index for case in file.cases] == [0, 1, 2, 3]
    assert file.notes == [f'{place}: cases after a grid have no "index": their names and seeds change when the grid grows. Give them one.']


def test_a_file_asks_for_a_limited_number_of_pictures(folder: Path) -> None:
    place = folder / "cases.json"
    grid = {"grid": {"prompts": ["x"] * 50, "references": ["a.png", "b.png"]}, "num_images_per_prompt": 1000}
    with pytest.raises(ValueError, match=re.escape(f"{place}: must ask for at most 100000 pictures, got more at {place}[1].")):
        read(folder, [grid, UNO])
    grid["grid"]["prompts"].append("x")
    message = f"{place}[0].grid: must give at most 100000 pictures, got 51 prompts x 2 references or more x 1000 pictures."
    with pytest.raises(ValueError, match=re.escape(message)):
        read(folder, [grid])
    for name, text in (("cases.json", f"[{'0,' * 100_000}0]"), ("cases.jsonl", "0\n" * 100_001)):
        with pytest.raises(ValueError, match="must hold at most 100000 cases, got .*Split it into several files"):
            read(folder, text, name)


def test_devices_and_pipes_are_not_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    for path in (Path("/dev/zero"), folder / "pipe.jsonl"):
        with pytest.raises(ValueError, match=re.escape(f"{path}: must be a regular file, but it is a pipe or device.")):
            read_cases(path)


def test_grids(folder: Path) -> None:
    entry = {"grid": {"prompts": ["a", "b"], "references": [["a.png", "b.png"], "bags/*"]}, "index": 10, "seed": 7}
    cases = read(folder, [entry, {**UNO, "index": 3}])
    pictures = [["a.png", "b.png"], ["bags/1.jpg"], ["bags/10.png"], ["bags/2.png"]]
    assert [(case.prompt, files(case, folder)) for case in cases[:-1]] == [(prompt, row) for prompt in "ab" for row in pictures]
    assert [case.index for case in cases] == [*range(10, 18), 3]
    assert {case.options.seed for case in cases[:-1]} == {7}
    assert len(read(folder, {"grid": {"prompts": ["<x>"], "references": [{"x": "a.png"}]}})) == 1
    jsonschema.validate([entry], make_cases_schema.cases_schema())


def test_seeds_of_pictures(folder: Path) -> None:
    case = read(folder, [{**UNO, "index": 4}])[0]
    for options, expected in (({}, [46]), ({"seed": 1}, [1]), ({"seeds": (5, 2)}, [5, 2]), ({"num_images_per_prompt": 3}, [46, 47, 48])):
        assert list(picture_seeds(replace(case, options=CaseOptions(**options)), 42)) == expected
