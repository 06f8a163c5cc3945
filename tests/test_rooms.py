"""Rules of the house that hold for every file: imports go one way, from a room to those below it, in the order that CONTRIBUTING.md states,
and in no circle of files; nothing is replaced from outside.
"""

import ast
import re
from functools import cache
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


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """The nodes of a file's syntax tree, which is parsed once."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path) -> set[str]:
    """Names of our modules that a file imports, within functions too."""
    found = set()
    for node in nodes_of(path):
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
        module = nodes_of(path)[0]
        assert isinstance(module, ast.Module)
        found = [node.lineno for node in nodes_of(path) if isinstance(node, ast.Expr) and ast.unparse(node).startswith("sys.path.insert(")]
        for node in module.body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if found and any(name.partition(".")[0] in ("mosaic", "scripts", "preprocess", "inference") for name in names):
                assert node.lineno > found[0], f"{path}:{node.lineno}"


def test_nothing_is_replaced_from_outside() -> None:
    """No assignment like `pipeline.encode_prompt = ...` (what encodes is `pipeline.encoders`, and that may be given), `model.forward = ...`
    or `functional.linear = ...`, by `setattr` neither; settings such as `torch._dynamo.config.x = ...` and `sys.excepthook` are meant to be set.
    """
    names = {"encode_prompt", "_encode_references", "vae_scale_factor", "forward"}
    found = []
    for path in FILES:
        nodes = nodes_of(path)
        imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        imported = {(alias.asname or alias.name).split(".")[0] for alias in imports}
        for node in nodes:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            outside = [(ast.unparse(target.value), target.attr) for target in targets if isinstance(target, ast.Attribute)]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
                outside.append((ast.unparse(node.args[0]), name))
            for owner, name in outside:
                is_setting = owner.endswith(".config") or (owner, name) == ("sys", "excepthook")
                if owner != "self" and (name in names or (owner.split(".")[0] in imported and not is_setting)):
                    found.append(f"{path.relative_to(ROOT)}: {owner}.{name}")
    assert found == []
