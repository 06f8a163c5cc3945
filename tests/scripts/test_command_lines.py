"""What the commands import to read their command lines: nothing heavy before the arguments stand."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_COMMAND_LINE = {"__init__", "make_cases_schema", "make_config_schema", "make_examples"}
PREPROCESS = ("cache", "compose", "convert", "evaluate_matching", "match", "push")
COMMANDS = [f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.py")) if path.stem not in NO_COMMAND_LINE]
COMMANDS += [f"preprocess/{name}.py" for name in PREPROCESS]
PROGRAM = """
import runpy, sys
for command in sys.argv[1:]:
    try:
        code = runpy.run_path(command)["main"](["--help"])
    except SystemExit as end:
        code = end.code
    heavy = sorted({"torch", "diffusers", "transformers", "accelerate", "datasets", "gradio"} & set(sys.modules))
    print("RESULT", command, code, *heavy)
    if heavy:
        break
"""


def test_help_of_every_command_imports_no_torch(tmp_path: Path) -> None:
    """All in one process, up to the first that does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", PROGRAM, *(str(ROOT / command) for command in COMMANDS)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    said = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert said == [f"{ROOT / command} 0" for command in COMMANDS]
