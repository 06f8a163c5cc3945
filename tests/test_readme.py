"""What the README, the shell scripts and the shipped JSON files promise exists."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

import inference
from mosaic.config.loading import load_config
from mosaic.rendering.cases.reading import load_cases
from scripts.pocket import world

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ("README.md", "mosaic/rendering/README.md", "scripts/pocket/README.md")
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.json") if "schema" not in path.name)


def code_blocks(language: str) -> list[str]:
    """Of the README, then of the other guides."""
    texts = [(ROOT / guide).read_text(encoding="utf-8") for guide in GUIDES]
    return [block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)]


def commands(text: str) -> list[list[str]]:
    """Words of every line of a shell text that runs a Python file or a shell script."""
    text = re.sub(r'"?\$\{?python\}?"?', "python", text.replace("\\\n", " "))
    found = [shlex.split(line, comments=True) for line in text.splitlines() if re.match(r"\s*(python|bash) ", line)]
    return [words for words in found if words[1].endswith((".py", ".sh"))]


def known_flags(script: Path) -> set[str]:
    """The flags that a script hands to argparse; those of a thin command stand in the room of its name."""
    room = script.with_suffix("") / "command.py"
    script = room if room.is_file() else script
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {argument.value for call in added for argument in call.args if isinstance(argument, ast.Constant)}


README_COMMANDS = [words for block in code_blocks("bash") for words in commands(block)]
SCRIPT_COMMANDS = [
    words for name in ("quickstart", "check", "test", "environment") for words in commands((ROOT / f"scripts/{name}.sh").read_text())
]


def test_the_two_commands_come_first() -> None:
    assert [words[:2] for words in README_COMMANDS[:2]] == [["bash", "scripts/quickstart.sh"], ["bash", "scripts/test.sh"]]


@pytest.mark.parametrize("words", README_COMMANDS + SCRIPT_COMMANDS, ids=" ".join)
def test_commands_name_scripts_and_flags_that_exist(words: list[str]) -> None:
    script, arguments = ROOT / words[1], words[2:]
    assert script.is_file()
    if script.name == "train.sh":
        script = ROOT / "scripts/train.py"  # gets all arguments
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    assert script.suffix == ".py" or not flags
    if script.suffix == ".py":
        assert set(flags) <= known_flags(script)
    overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
    config = next((word for word in arguments if word.startswith("configs/")), "configs/pocket.json")
    load_config(ROOT / config, [re.sub(r'=.*\$\{?STEPS\}?"?', "=60", override) for override in overrides])


@pytest.mark.parametrize("words", [words for words in README_COMMANDS if words[1] == "inference.py"], ids=" ".join)
def test_inference_commands_parse(words: list[str]) -> None:
    arguments = inference.parse_arguments(words[2:])
    assert isinstance(arguments, argparse.Namespace)
    load_config(ROOT / (arguments.config or "configs/pocket.json"), inference.overrides(arguments))


def test_python_blocks_compile_and_name_existing_files() -> None:
    blocks = code_blocks("python")
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        for path in re.findall(r'"(assets/[^"]+)"', block):
            assert (ROOT / path).exists(), path


def test_the_file_tree_is_true() -> None:
    tree = re.search(r"^## Files\n+```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    paths = [line.split()[0] for line in tree.group(1).splitlines() if line.strip()]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = {f"mosaic/{path.name}" for path in (ROOT / "mosaic").glob("*.py")} - {"mosaic/__init__.py"}
    modules |= {f"mosaic/{path.parent.name}/" for path in (ROOT / "mosaic").glob("*/__init__.py")}
    assert {path for path in paths if path.startswith("mosaic/")} == modules
    assert len(set(paths)) == len(paths)


def test_links_lead_somewhere() -> None:
    for guide in GUIDES:
        links = re.findall(r"\]\(([^)]+)\)", (ROOT / guide).read_text(encoding="utf-8"))
        assert [link for link in links if not re.match("https://|#", link) and not ((ROOT / guide).parent / link).exists()] == []


def equation_rows() -> list[tuple[int, str]]:
    """(equation, dotted name) of every function in the table; a row may name more than one."""
    rows = re.findall(r"^\| Eq\. (\d+) \|(.*)$", README, flags=re.MULTILINE)
    return [(int(number), name) for number, rest in rows for name in re.findall(r"`(mosaic\.[\w.]+)`", rest)]


def test_every_equation_has_a_function() -> None:
    assert sorted({number for number, _ in equation_rows()}) == list(range(1, 16))


def equations_named(text: str) -> set[int]:
    """Numbers of "Eq. 3", "Eq. 4-8" and "Eq. 1, 2"."""
    numbers = set()
    for run in re.findall(r"Eq\. (\d+(?:(?:-|, )\d+)*)", text):
        for part in run.split(", "):
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


@pytest.mark.parametrize(("number", "name"), equation_rows())
def test_the_equation_table_resolves_and_the_code_names_the_equation(number: int, name: str) -> None:
    module_name, _, function_name = name.rpartition(".")
    module = importlib.import_module(module_name)
    function = getattr(module, function_name)
    assert function.__module__ == module_name
    assert number in equations_named(inspect.getsource(function)) | equations_named(module.__doc__), "the way back from code to paper"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.inference.height > 0


def test_example_cases() -> None:
    cases = load_cases(ROOT / "example_cases.json", reference_size=32)
    assert len(cases) >= 8
    assert {len(case.image_paths) for case in cases} == {1, 2, 3, 4, 5, 6}
    looks = {*world.PALETTES, *world.PATTERNS, *world.MARKINGS} - {"none"}
    for case in cases:
        assert not looks & set(re.findall(r"[a-z]+", case.prompt)), "looks come from the references only"
        for path in case.image_paths:
            assert path.resolve().is_relative_to(ROOT / "assets")
            class_name, palette, pattern, marking = path.stem.split("_")
            assert world.is_held_out(world.Identity(class_name, palette, pattern, marking))


def test_json_files_hold_no_path_of_a_machine() -> None:
    for path in [*CONFIGS, ROOT / "example_cases.json"]:
        assert not re.search(r'"(/|~|[A-Za-z]:\\\\)', json.dumps(json.loads(path.read_text())))
