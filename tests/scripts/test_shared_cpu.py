"""OpenMP's threads spin briefly: set before torch in every command, unless the user has set it; and the benchmark that shows why."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mosaic
from scripts.benchmarks import command as benchmark
from scripts.benchmarks import shared_cpu

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "inference.py", *sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "preprocess").glob("*.py"))]
COMMANDS = [str(path.relative_to(ROOT)) for path in FILES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]

WITHOUT_TORCH = ("huggingface_hub", "numpy", "PIL", "safetensors", "tqdm")


def environment(**variables: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name not in mosaic.SPIN_VARIABLES}, **variables}


def imports(path: Path) -> list[str]:
    """Packages that are not Python's own, in the order of the lines."""
    nodes = sorted(
        (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(node, "lineno")), key=lambda n: n.lineno
    )
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return [name.partition(".")[0] for name in names if name.partition(".")[0] not in sys.stdlib_module_names]


def test_every_command_imports_this_package_first() -> None:
    """Itself, or by way of a room that does so; torch comes with one of ours, or after it."""
    assert len(COMMANDS) > 25
    for command in COMMANDS:
        first = next(name for name in imports(ROOT / command) if name not in WITHOUT_TORCH)
        assert first in ("mosaic", "scripts", "preprocess"), command
    for room in ("scripts", "preprocess", "tests"):
        assert imports(ROOT / room / "__init__.py") == ["mosaic"]
    code = "import os, sys, mosaic; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True, capture_output=True, text=True).stdout
    assert printed.split() == [mosaic.SPIN_COUNT, "False"]


@pytest.mark.parametrize("variables", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_what_the_user_has_set_stays(variables: dict[str, str]) -> None:
    code = "import os, mosaic; print([os.environ.get(name) for name in mosaic.SPIN_VARIABLES])"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**variables), check=True, capture_output=True, text=True
    )
    assert printed.stdout.strip() == str([variables.get(name) for name in mosaic.SPIN_VARIABLES])


def test_the_benchmark_takes_turns_and_tells_what_a_wait_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each process prints its steps; here one that only counts, with the variables it has got."""
    own = "import os, time\nprint('ready', flush=True)\nseconds = 0.5 if os.environ.get('GOMP_SPINCOUNT') == '300000' else 0.25\n"
    own += "while True:\n    print(seconds, flush=True)\n    time.sleep(0.01)\n"
    popen, started = subprocess.Popen, []

    def stand_in(command: list[str], **settings: object) -> subprocess.Popen:
        started.append("busy" if command[-1] == shared_cpu.BUSY else settings["env"].get("GOMP_SPINCOUNT", "passive"))
        return popen([sys.executable, "-c", "import time; time.sleep(60)" if started[-1] == "busy" else own], **settings)

    monkeypatch.setattr(subprocess, "Popen", stand_in)
    cores = os.sched_getaffinity(0)
    options = ["shared", "--spin-counts", "300000", "7", "--rounds", "1", "--seconds", "0.05", "--threads", "1"]
    try:
        result = benchmark.measure([*options, "--output", str(tmp_path / "result.json")])
    finally:
        os.sched_setaffinity(0, cores)
    assert started == ["300000", "7", "passive", "busy", "300000", "busy", "7", "busy", "passive"]
    assert result["seconds_per_step"]["GOMP_SPINCOUNT=300000"] == {"0": 0.5, "1": 0.5}
    assert json.loads((tmp_path / "result.json").read_text())["seconds_per_step"] == result["seconds_per_step"]
    printed = capsys.readouterr().out
    assert "| `GOMP_SPINCOUNT=7` | 0.250 | -50.0 | 0.25 | 0.5 |" in printed


def test_a_step_that_takes_too_long_is_told_by_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen
    slow = "import time\nprint('ready', flush=True)\ntime.sleep(60)"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **settings: popen([sys.executable, "-c", slow], **settings))
    args = benchmark.parse(["shared", "--limit", "0.1"])
    assert shared_cpu.seconds_per_step("GOMP_SPINCOUNT=300000", args) == 0.1
