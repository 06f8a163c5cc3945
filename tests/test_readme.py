"""What the README, the guides, the shell scripts and the shipped JSON files promise exists."""

import argparse
import ast
import importlib
import json
import re
import shlex
from functools import cache
from itertools import dropwhile, pairwise, takewhile
from pathlib import Path

import pytest
from PIL import Image

import inference
from mosaic.config.loading import load_config
from mosaic.rendering.cases.reading import load_cases
from preprocess.construct.config import load_construct_config
from scripts import lora_tools
from scripts.launching.launch import make_plan
from scripts.pocket import world

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "configs/README.md", "preprocess/README.md", "preprocess/FORMAT.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
GUIDES = {page: (ROOT / page).read_text(encoding="utf-8") for page in (*PAGES, *DOCS)}
EXTRACTORS = ("pixels.", "vae.", "flux.", "cleandift.", "geoaware.", "dinov2_diysc.")  # --set of preprocess/match.py
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.json") if "schema" not in path.name and "construct" not in path.name)
VARIABLE = re.compile(r"[A-Z_]+=")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(language: str) -> list[str]:
    """Of the README, then of the other guides."""
    return [block for text in GUIDES.values() for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)]


def inline_commands() -> str:
    """The commands within sentences, one a line; three dots stand for words left out."""
    found = re.findall(r"`((?:python|bash|accelerate)\s[^`]+)`", "\n".join(map(without_code, GUIDES.values())))
    return "\n".join(" ".join(code.split()) for code in found if "..." not in code)


def commands(text: str) -> list[list[str]]:
    """Words of every command of a shell text that runs a Python file or a shell script, variables before it included."""
    text = re.sub(r'"?\$\{?python\}?"?', "python", text.replace("\\\n", " ").replace(" && ", "\n"))
    starts = r"\s*([A-Z_]+=\S+ )*(python|bash|accelerate|torchrun|sbatch) "
    found = [shlex.split(line, comments=True) for line in text.splitlines() if re.match(starts, line)]
    return [words for words in found if script_of(words)]


def script_of(words: list[str]) -> str | None:
    """The Python file or shell script that a command runs."""
    return next((word for word in words if word.endswith((".py", ".sh", ".sbatch"))), None)


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """The nodes of a file's syntax tree; most files are asked for by many commands."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def body_of(script: Path) -> Path:
    """The file that holds a command line: of a thin command, the one from which it imports `main`."""
    imports = [node for node in nodes_of(script) if isinstance(node, ast.ImportFrom)]
    bodies = [node.module for node in imports if "main" in {alias.name for alias in node.names}]
    return ROOT / f"{bodies[0].replace('.', '/')}.py" if bodies else script


@cache
def known_flags(script: Path) -> set[str]:
    """The flags that a command, or a file from which it imports, hands to argparse."""
    nodes = list(nodes_of(body_of(script)))
    imported = [ROOT / f"{node.module.replace('.', '/')}.py" for node in nodes if isinstance(node, ast.ImportFrom)]
    ours = [path for path in imported if path.is_file() and path.parts[len(ROOT.parts)] in ("scripts", "preprocess", "inference.py")]
    nodes += [node for path in ours for node in nodes_of(path)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    added = [call for call in calls if call.func.attr == "add_argument"]
    return {argument.value for call in added for argument in call.args if isinstance(argument, ast.Constant)} | {"--help"}


BLOCK_COMMANDS = [words for block in code_blocks("bash") for words in commands(block)]
GUIDE_COMMANDS = BLOCK_COMMANDS + commands(inline_commands())
SHELL_SCRIPTS = ("quickstart", "check", "test", "environment")
SCRIPT_COMMANDS = [words for name in SHELL_SCRIPTS for words in commands((ROOT / f"scripts/{name}.sh").read_text())]


def test_the_readme_is_read_in_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 140] == []


def test_the_two_commands_come_first() -> None:
    assert [words[:2] for words in BLOCK_COMMANDS[:2]] == [["bash", "scripts/quickstart.sh"], ["bash", "scripts/test.sh"]]


def test_every_line_of_a_command_block_starts_with_a_program() -> None:
    """Others would escape the tests of commands."""
    programs = {"python", "bash", "accelerate", "torchrun", "sbatch"} | {"pip", "hf", "rm", "cp", "export", "source", "git", "pre-commit"}
    lines = [line for block in code_blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    first = [next(dropwhile(VARIABLE.match, shlex.split(line, comments=True)), None) for line in lines]
    assert [line for line, word in zip(lines, first, strict=True) if word not in programs] == []


@pytest.mark.parametrize("words", GUIDE_COMMANDS + SCRIPT_COMMANDS, ids=" ".join)
def test_commands_name_scripts_and_flags_that_exist(words: list[str]) -> None:
    environ = dict(word.split("=", 1) for word in takewhile(VARIABLE.match, words))
    name = script_of(words)
    script, arguments = ROOT / name, words[words.index(name) + 1 :]
    assert script.is_file()
    if script.suffix == ".sbatch" or script.name == "train.sh":
        make_plan(
            {"NUM_PROCESSES": "2", **{variable: value.replace("configs/", f"{ROOT}/configs/") for variable, value in environ.items()}}, 0
        )
        script = ROOT / "scripts/train.py"  # gets all arguments
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    assert script.suffix == ".py" or not flags
    if script.suffix == ".py":
        assert set(flags) <= known_flags(script)
    shipped = [word for word in arguments if word.startswith(("assets/", "configs/", "preprocess/", "scripts/"))]
    assert [word for word in shipped if not (ROOT / word).exists()] == []
    overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
    config = next((word for word in arguments if word.startswith("configs/")), "configs/pocket.json")
    load = load_construct_config if script.name == "construct.py" else load_config
    load(ROOT / config, [re.sub(r'=.*\$\{?STEPS\}?"?', "=60", override) for override in overrides if not override.startswith(EXTRACTORS)])


@pytest.mark.parametrize("words", [words for words in GUIDE_COMMANDS if script_of(words) == "inference.py"], ids=" ".join)
def test_inference_commands_parse(words: list[str]) -> None:
    arguments = inference.parse_arguments(words[words.index("inference.py") + 1 :])
    assert isinstance(arguments, argparse.Namespace)
    load_config(ROOT / (arguments.config or "configs/pocket.json"), inference.overrides(arguments))


def test_python_blocks_compile_and_name_existing_files() -> None:
    blocks = code_blocks("python")
    assert blocks
    for block in blocks:
        compile(block, "a guide", "exec")
        for path in re.findall(r'"(assets/[^"]+)"', block):
            assert (ROOT / path).exists(), path


def test_the_python_snippet_runs_outside_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mosaic installed and the clone named; one step, to be quick."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert (block.count('Path(".")'), block.count("steps=20")) == (1, 1)
    exec(block.replace('Path(".")', f"Path({str(ROOT)!r})").replace("steps=20", "steps=1"), {})
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (64, 64)


def test_the_map_is_true() -> None:
    tree = re.search(r"^## Map of the house\n+```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    paths = [line.split()[0] for line in tree.group(1).splitlines() if line.strip()]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = {f"mosaic/{path.name}" for path in (ROOT / "mosaic").glob("*.py")} - {"mosaic/__init__.py"}
    modules |= {f"mosaic/{path.parent.name}/" for path in (ROOT / "mosaic").glob("*/__init__.py")}
    assert {path for path in paths if path.startswith("mosaic/")} == modules
    assert len(set(paths)) == len(paths)


def test_the_lora_guide_says_what_reducing_the_shipped_adapter_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reduce", str(ROOT / "assets/pocket/lora.safetensors"), "--energy", "0.9", "--output", str(tmp_path / "lora.safetensors")]
    assert lora_tools.main(command) == 0
    printed = capsys.readouterr().out
    share, error = re.search(r"all \d+ modules: ([\d.]+)% of the squared norm kept, relative Frobenius error (\S+)", printed).groups()
    rank, size = re.search(r": rank (\d+), [\d,]+ bytes \(([\d.]+)% of", printed).groups()
    said = f"gives rank {rank}, {float(share):.1f} % of the squared norm, relative error {float(error):.3f}, {size} % of the bytes"
    assert said in " ".join(GUIDES["docs/lora.md"].split())


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", without_code(GUIDES[guide])) if not link.startswith("https://")]
    for link in links:
        path, _, anchor = link.partition("#")
        page = (ROOT / guide).parent / path if path else ROOT / guide
        assert page.exists(), link
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), link


def test_every_guide_is_linked_from_the_readme_and_opens_with_commands() -> None:
    assert [guide for guide in DOCS if f"({guide})" not in README] == []
    opening = {guide: GUIDES[guide].split("\n## ")[0] for guide in DOCS}
    assert [guide for guide, text in opening.items() if len(re.findall(r"^```bash\n(?:.+\n){3}```", text, flags=re.MULTILINE)) != 1] == []


def equation_rows() -> list[tuple[int, str]]:
    """(equation, dotted name) of every function in the table; a row may name more than one."""
    rows = re.findall(r"^\| Eq\. (\d+) \|(.*)$", README, flags=re.MULTILINE)
    return [(int(number), name) for number, rest in rows for name in re.findall(r"`(mosaic\.[\w.]+)`", rest)]


def test_every_equation_has_a_function() -> None:
    assert sorted({number for number, _ in equation_rows()}) == list(range(1, 16))


@pytest.mark.parametrize(("number", "name"), equation_rows())
def test_the_equation_table_resolves_and_the_code_names_the_equation(number: int, name: str) -> None:
    module_name, _, function_name = name.rpartition(".")
    module = importlib.import_module(module_name)
    function = getattr(module, function_name)
    assert function.__module__ == module_name
    assert re.search(rf"\bEq\. {number}\b(?!-)", function.__doc__), "the way back from code to paper"


def test_equations_are_named_one_by_one() -> None:
    for path in sorted((ROOT / "mosaic").rglob("*.py")):
        assert not re.search(r"Eq\. \d+(-|, ?)\d", path.read_text(encoding="utf-8")), f"{path}: grep finds no number within a range"


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
