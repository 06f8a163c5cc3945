"""The SLURM examples with stand-ins for srun and scontrol: signals reach the training, code 75 queues the job again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "configs/slurm"

TRAIN = """
stop() { echo "$1" > signal; exit 75; }
trap 'stop USR1' USR1
trap 'stop TERM' TERM
printf '%s\\n' "$@" > arguments
while true; do sleep 0.05; done
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A submit folder with a train.sh that waits for a signal, and srun and scontrol that only pass on and record."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/slurm").symlink_to(SLURM)
    (tmp_path / "train.sh").write_text(TRAIN)
    programs = {"srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"', "scontrol": 'echo "$@" > scontrol'}
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "4"}


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("name", ["train", "array"])
def test_a_signal_to_the_batch_shell_queues_the_job_again(
    cluster: dict[str, str], tmp_path: Path, name: str, number: signal.Signals
) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"} if name == "array" else {}
    command = ["bash", str(SLURM / f"{name}.sbatch"), "configs/mosaic_512.json", "--set", "data.root=some data"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**cluster, **array})
    wait_for(tmp_path / "arguments")
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "signal").read_text().strip() == number.name.removeprefix("SIG")
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "70_2" if array else "77"]
    given = ["--set", "training.seed=2", "--set", "training.output_dir=outputs/mosaic_512_seed_2"] if array else []
    expected = ["configs/mosaic_512.json", "--set", "data.root=some data", *given, "--resume", "auto"]
    assert (tmp_path / "arguments").read_text().splitlines() == expected


@pytest.mark.parametrize("code", [0, 2])
def test_other_codes_end_the_job(cluster: dict[str, str], tmp_path: Path, code: int) -> None:
    command = ["bash", "configs/slurm/requeue.sh", "bash", "-c", f"exit {code}"]
    assert subprocess.run(command, cwd=tmp_path, env=cluster, check=False).returncode == code
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("name", ["train", "array"])
def test_options_of_the_examples(name: str) -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (SLURM / f"{name}.sbatch").read_text(), flags=re.MULTILINE))
    assert (options["signal"], options["requeue"], options["ntasks-per-node"], options["open-mode"]) == ("B:USR1@120", "", "1", "append")
    assert ("array" in options) == (name == "array")


def test_machines_end_together() -> None:
    """Code 75 of one ends no other one at once; a failed one holds none for long."""
    command = (SLURM / "train.sbatch").read_text().splitlines()[-1]
    assert "--kill-on-bad-exit=0 --wait=300 bash train.sh" in command
