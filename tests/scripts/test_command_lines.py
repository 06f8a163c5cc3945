"""What all commands share: nothing heavy is imported before the arguments stand, and one frame around each."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREPROCESS = ("cache", "compose", "convert", "evaluate_matching", "match", "push")
COMMANDS = [f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.py")) if path.stem != "__init__"]
COMMANDS += ["inference.py"]
COMMANDS += [f"preprocess/{name}.py" for name in PREPROCESS]
PROGRAM = """
import runpy, sys
for command in sys.argv[1:]:
    main = runpy.run_path(command)["main"]
    try:
        code = main(["--help"])
    except SystemExit as end:
        code = end.code
    heavy = sorted({"torch", "diffusers", "transformers", "accelerate", "datasets", "gradio"} & set(sys.modules))
    print("RESULT", command, code, "framed" if hasattr(main, "__wrapped__") else "bare", *heavy)
"""


def test_help_of_every_command_imports_no_torch(tmp_path: Path) -> None:
    """All in one process; and every `main` has the frame."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", PROGRAM, *(str(ROOT / command) for command in COMMANDS)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    said = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert said == [f"{ROOT / command} 0 framed" for command in COMMANDS]
