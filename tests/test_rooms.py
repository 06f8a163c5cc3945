"""Imports go one way: from a room to those below it, in the order that CONTRIBUTING.md states, and in no circle of files."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for room in ("mosaic", "scripts", "preprocess") for path in (ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def order() -> list[str]:
    """From the bottom to the top; `mosaic/__init__.py`, which gives names to users, and the commands stand above all rooms."""
    rule = re.search(
        r"\*\*Imports go one way\*\*.*?(`files\.py`.*?);", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    return [word.removesuffix(".py") for word in re.findall(r"`([\w.]+)`", rule.group(1))]


def imports(path: Path) -> set[str]:
    """Names of our modules that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrow"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules if len(submodules) == len(node.names) else submodules | {node.module}
    return found & set(MODULES)


def test_every_room_has_its_place() -> None:
    rooms = {path.name for path in (ROOT / "mosaic").iterdir() if (path / "__init__.py").is_file()}
    files = {path.stem for path in (ROOT / "mosaic").glob("*.py")} - {"__init__"}
    assert sorted(order()) == sorted(rooms | files)


def test_no_import_goes_up() -> None:
    height = {name: place for place, name in enumerate(order())}

    def place(module: str) -> int:
        top, _, rest = module.partition(".")
        return height[rest.split(".")[0]] if top == "mosaic" and rest else len(height)

    arrows = [(module, target) for module, path in MODULES.items() for target in imports(path)]
    assert len(arrows) > 500
    assert [arrow for arrow in arrows if place(arrow[0]) < place(arrow[1])] == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    tuple(TopologicalSorter({module: imports(path) - {module} for module, path in MODULES.items()}).static_order())


COMMANDS = sorted(path for room in ("scripts", "preprocess") for path in (ROOT / room).glob("*.py") if path.name != "__init__.py")


def test_commands_find_our_modules_before_they_import_them() -> None:
    """`python scripts/x.py` has `scripts/` on its path, not the repository."""
    for path in COMMANDS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Expr) and ast.unparse(node).startswith("sys.path.insert(")]
        for node in tree.body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if found and any(name.partition(".")[0] in ("mosaic", "scripts", "preprocess", "inference") for name in names):
                assert node.lineno > found[0], f"{path}:{node.lineno}"
