"""What a command imports: nothing heavy before it is known to be needed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")
NEVER = ("tensorboard", "datasets", "gradio", "torchvision", "mosaic.training", "mosaic.planning", "scripts")


def imported(code: str, folder: Path) -> tuple[set[str], str]:
    """Modules after running some code in a process of its own, and what it wrote to stderr."""
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint('MODULES', *sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=environment, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split()), done.stderr


def test_what_needs_no_model_imports_no_torch(tmp_path: Path) -> None:
    """One after the other in one process; help comes last, for it ends the process."""
    given = [["--check"], ["--config", "none.json"], ["--set", "inference.no=1"], ["--cases", "none.json"], ["--help"]]
    modules, said = imported(f"import inference; [inference.main(arguments) for arguments in {given}]", tmp_path)
    assert said.count("error: ") == 3, said
    assert modules.isdisjoint(HEAVY), said
    assert "inference" in modules


def test_a_render_imports_flux_alone(tmp_path: Path) -> None:
    """Of diffusers' pipelines only FLUX's; and transformers says nothing."""
    modules, said = imported("import mosaic.rendering.runner", tmp_path)
    assert set(HEAVY) <= modules
    assert [name for name in NEVER if name in modules] == []
    zoo = {name.split(".")[2] for name in modules if name.startswith("diffusers.pipelines.")}
    assert zoo == {"flux", "pipeline_utils", "pipeline_loading_utils"}
    assert said == ""
