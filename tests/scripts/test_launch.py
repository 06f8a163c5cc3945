"""scripts/launch.py and train.sh: what is read from the environment, what is started, and with which variables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts.launching import launch
from scripts.launching.launch import Machines, find_machines, first_host, make_plan, process_environments
from scripts.launching.processes import run_processes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/accelerate"
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


# ---- the machines


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Machines()),
        ({"MASTER_PORT": "1234"}, Machines(port=1234, source="MASTER_PORT")),
        ({"NNODES": "1", "MASTER_ADDR": "n0", "NODE_RANK": "0"}, Machines(address="n0", source="NNODES, NODE_RANK, MASTER_ADDR")),
        (
            {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1"},
            Machines(3, 2, "10.0.0.1", 29500, "NNODES, NODE_RANK, MASTER_ADDR"),
        ),
        (SLURM, Machines(2, 1, "gpu007", 23456, "SLURM")),
        ({**SLURM, "MASTER_ADDR": "ib007", "MASTER_PORT": "5"}, Machines(2, 1, "ib007", 5, "MASTER_ADDR, MASTER_PORT, SLURM")),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}, Machines()),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}, Machines(source="SLURM")),
        ({"SLURM_JOB_NUM_NODES": "4", "NNODES": "1"}, Machines(source="NNODES")),
        ({**SLURM, "NNODES": "2"}, Machines(2, 1, "gpu007", 23456, "NNODES, SLURM")),
        ({**SLURM, "NNODES": "2", "NODE_RANK": "0"}, Machines(2, 0, "gpu007", 23456, "NNODES, NODE_RANK, SLURM")),
        ({**SLURM, "NNODES": "1"}, Machines(source="NNODES")),
        ({**SLURM, "NNODES": "3", "NODE_RANK": "0", "MASTER_ADDR": "a"}, Machines(3, 0, "a", 29500, "NNODES, NODE_RANK, MASTER_ADDR")),
        ({"NNODES": "1", "WORLD_SIZE": "8", "RANK": "3"}, Machines(source="NNODES")),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Machines()),
        ({"WORLD_SIZE": ""}, Machines()),
    ],
)
def test_machines(environ: dict[str, str], expected: Machines) -> None:
    assert find_machines(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"NNODES": "2"},
            "NNODES=2, but not set: NODE_RANK (the number of this machine, 0 to 1), MASTER_ADDR (the name or address of machine 0).",
        ),
        ({"NNODES": "2", "NODE_RANK": "1"}, "NNODES=2, but not set: MASTER_ADDR (the name or address of machine 0)."),
        (
            {"WORLD_SIZE": "8", "RANK": "3"},
            "WORLD_SIZE=8 is set, as torchrun or a job controller sets it for each process, but train.sh starts",
        ),
        ({**SLURM, "NNODES": "3"}, "NNODES=3, but not set: NODE_RANK (the number of this machine, 0 to 2), MASTER_ADDR"),
        ({"MASTER_ADDR": "n0"}, "MASTER_ADDR set, but NNODES is not. Set NNODES to the number of machines, or unset MASTER_ADDR."),
        ({"NODE_RANK": "1", "MASTER_ADDR": "n0"}, "NODE_RANK and MASTER_ADDR set, but NNODES is not."),
        ({"NNODES": "two"}, "NNODES must be an integer, at least 1, got 'two'."),
        ({"NNODES": "0"}, "NNODES must be an integer, at least 1, got '0'."),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "n0"}, "NODE_RANK must be an integer, 0 to 1, got '2'."),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "70000"},
            "MASTER_PORT must be an integer, 0 to 65535, got '70000'.",
        ),
        (
            {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"},
            "the SLURM job has 2 machines, but this runs on one of them only. Start it with srun",
        ),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "16"}, "srun started 16 tasks on 2 machine(s), but one per machine is needed"),
        ({**SLURM, "SLURM_NODEID": ""}, "NNODES=2, but not set: NODE_RANK"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "NNODES=2, but not set: MASTER_ADDR"),
    ],
)
def test_half_set_variables(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as found:  # noqa: PT011
        find_machines(environ)
    assert str(found.value).startswith(message)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,9]-ib,login", "gpu003-ib"),
        ("r[1-2]n[04,07]", "r1n04"),
        ("a-b-[5]", "a-b-5"),
        ("", ""),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


# ---- the plan


@pytest.mark.parametrize(
    ("environ", "num_gpus", "line"),
    [
        ({}, 0, "1 process, 1 CPU"),
        ({}, 1, "1 process, 1 GPU"),
        ({}, 8, f"8 processes on the GPUs, {CONFIGS}/ddp.yaml"),
        ({"NUM_PROCESSES": "1"}, 8, "1 process, 1 GPU"),
        ({"NUM_PROCESSES": "2"}, 0, f"2 processes on the CPU, {CONFIGS}/ddp.yaml"),
        (SLURM, 8, f"machine 1 of 2 (SLURM), 8 processes on its GPUs, meeting at gpu007:23456, {CONFIGS}/ddp.yaml"),
        ({**SLURM, "NUM_PROCESSES": "1"}, 0, f"machine 1 of 2 (SLURM), 1 process on its CPU, meeting at gpu007:23456, {CONFIGS}/ddp.yaml"),
        ({"ACCELERATE_CONFIG": f"{CONFIGS}/fsdp2.yaml"}, 2, f"2 processes on the GPUs, {CONFIGS}/fsdp2.yaml"),
    ],
)
def test_plan(environ: dict[str, str], num_gpus: int, line: str) -> None:
    assert make_plan(environ, num_gpus).describe() == line


@pytest.mark.parametrize(
    ("environ", "num_gpus", "message"),
    [
        ({"NUM_PROCESSES": "3"}, 2, "NUM_PROCESSES=3, but this machine has 2 GPU"),
        ({"NUM_PROCESSES": "-1"}, 2, "NUM_PROCESSES must be an integer, at least 1, got '-1'"),
        ({"ACCELERATE_CONFIG": "none.yaml"}, 2, "ACCELERATE_CONFIG=none.yaml: file not found"),
        ({"ACCELERATE_CONFIG": f"{CONFIGS}/fsdp2.yaml"}, 1, "fsdp2.yaml: is for two or more processes"),
    ],
)
def test_plan_mistakes(environ: dict[str, str], num_gpus: int, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_plan(environ, num_gpus)


# ---- the variables of each process


def test_one_process_has_no_ranks_and_a_cpu_keeps_freed_memory() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "HOME": "/h", "MALLOC_TRIM_THRESHOLD_": "5"}
    (found,) = process_environments(make_plan({}, 0), environ)
    assert found == {"HOME": "/h", "ACCELERATE_USE_CPU": "true", "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "5"}
    assert process_environments(make_plan({}, 1), environ) == [{"HOME": "/h", "MALLOC_TRIM_THRESHOLD_": "5"}]


def test_ranks_of_the_second_machine() -> None:
    environ = {**SLURM, "NUM_PROCESSES": "3", "OMP_NUM_THREADS": "7"}
    found = process_environments(make_plan(environ, 4), environ)
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"]) for e in found] == [
        (str(3 + i), str(i), "6", "3") for i in range(3)
    ]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"], e["OMP_NUM_THREADS"]) for e in found} == {("gpu007", "23456", "7")}
    assert not [name for name in found[0] if "FSDP" in name or name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION")]


def test_one_machine_gets_a_free_port() -> None:
    first, second = process_environments(make_plan({}, 2), {})
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert (first["MASTER_ADDR"], first["OMP_NUM_THREADS"]) == ("127.0.0.1", "1")
    assert int(first["MASTER_PORT"]) > 0


@pytest.mark.parametrize("name", ["fsdp2", "hsdp"])
def test_sharding_configs_reach_the_processes(name: str) -> None:
    environ = {**SLURM, "ACCELERATE_CONFIG": str(CONFIGS / f"{name}.yaml")}
    found = process_environments(make_plan(environ, 4), environ)[0]
    assert (found["ACCELERATE_USE_FSDP"], found["FSDP_VERSION"], found["FSDP_RESHARD_AFTER_FORWARD"]) == ("true", "2", "true")
    assert found["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    sizes = {key: found.get(f"PARALLELISM_CONFIG_DP_{key}_SIZE") for key in ("REPLICATE", "SHARD")}
    assert sizes == ({"REPLICATE": "2", "SHARD": "4"} if name == "hsdp" else {"REPLICATE": None, "SHARD": None})


def test_the_deepspeed_config_reaches_the_processes() -> None:
    environ = {**SLURM, "ACCELERATE_CONFIG": str(CONFIGS / "deepspeed_zero2.yaml")}
    found = process_environments(make_plan(environ, 4), environ)[0]
    assert (found["ACCELERATE_USE_DEEPSPEED"], found["ACCELERATE_DEEPSPEED_ZERO_STAGE"]) == ("true", "2")
    assert {found[f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE"] for what in ("OPTIMIZER", "PARAM")} == {"none"}
    assert not [name for name in found if "GRADIENT" in name or "MIXED_PRECISION" in name or "CONFIG_FILE" in name]


def test_a_bad_accelerate_config_is_one_message(tmp_path: Path) -> None:
    for text, message in (
        ("distributed_type: MULTI_GPU\nnum_gpus: 3\n", "unknown keys"),
        ("a: [", ""),
        ("num_machines: 2\n", "distributed_type"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        environ = {"ACCELERATE_CONFIG": str(tmp_path / "bad.yaml")}
        with pytest.raises(ValueError, match=rf"bad\.yaml: Accelerate refuses this config: [\s\S]*{message}"):
            process_environments(make_plan(environ, 2), environ)


# ---- train.sh


def stub_python(folder: Path, body: str) -> str:
    """A program in place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_train_sh_hands_everything_to_the_launcher(tmp_path: Path) -> None:
    stub = stub_python(tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/arguments; exit 75')
    result = subprocess.run(
        ["bash", str(ROOT / "train.sh"), "c.json", "--set", "a.b=c d"], env={**os.environ, "PYTHON": stub}, cwd="/", check=False
    )
    assert result.returncode == 75
    assert (tmp_path / "arguments").read_text().splitlines() == [str(ROOT / "scripts/launch.py"), "c.json", "--set", "a.b=c d"]


def started(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], num_gpus: int) -> list:
    """What main() starts: ("exec" or "run", command, environments)."""
    calls: list = []
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NUM_PROCESSES", "ACCELERATE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "count_gpus", lambda: num_gpus)
    monkeypatch.setattr(os, "execve", lambda program, command, environment: calls.append(("exec", command, [environment])))
    monkeypatch.setattr(launch, "run_processes", lambda command, environments: (calls.append(("run", command, environments)), 0)[1])
    code = launch.main(["c.json", "--set", "a.b=1"])
    return [code, *calls[:1]]  # a real exec does not come back


def test_what_is_started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(ROOT / "scripts/train.py"), "c.json", "--set", "a.b=1"]
    for environ, num_gpus, how, count in (({}, 1, "exec", 1), ({}, 2, "run", 2), ({**SLURM, "NUM_PROCESSES": "1"}, 1, "run", 1)):
        with monkeypatch.context() as patch:
            _, call = started(patch, environ, num_gpus)
        assert call[:2] == (how, command)
        assert len(call[2]) == count
        assert capsys.readouterr().err.startswith("launch: ")


def test_torch_is_asked_only_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for driver in (False, True):
        monkeypatch.setattr(launch, "has_gpu_driver", lambda driver=driver: driver)
        assert launch.count_gpus() == 3 * driver


def test_the_launcher_of_one_process_imports_no_torch(tmp_path: Path) -> None:
    program = """
import os, sys
from scripts.launching import launch
launch.has_gpu_driver = lambda: False
os.execve = lambda *call: sys.exit(print("MODULES", *sys.modules))
launch.main(["c.json"])
"""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    modules = set(done.stdout.partition("MODULES")[2].split())
    assert "scripts.launching.launch" in modules
    assert modules.isdisjoint(["torch", "accelerate", "diffusers", "numpy", "pydantic"])


def test_mistakes_end_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert started(monkeypatch, {"NNODES": "2"}, 1) == [2]
    assert capsys.readouterr().err.startswith("error: NNODES=2, but not set: NODE_RANK")


# ---- the processes of a machine


def script(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "child.py").write_text(text)
    return [sys.executable, "-S", str(tmp_path / "child.py")]


def environments(**values: list[str]) -> list[dict[str, str]]:
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


@pytest.mark.parametrize(
    ("codes", "expected"), [(["0", "0"], 0), (["75", "75"], 75), (["0", "75"], 75), (["0", "2"], 2), (["3", "75"], 3), (["-9", "0"], 137)]
)
def test_exit_code(tmp_path: Path, codes: list[str], expected: int) -> None:
    command = script(tmp_path, "import os, sys\nn = int(os.environ['N'])\nos.kill(os.getpid(), -n) if n < 0 else sys.exit(n)")
    assert run_processes(command, environments(N=codes)) == expected


def test_a_failure_ends_the_others_even_those_that_do_not_listen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready = tmp_path / "ready"
    text = f"""
import os, signal, sys, time
if os.environ["N"] == "1":
    while not os.path.exists("{ready}"):
        time.sleep(0.01)
    sys.exit(4)
if os.environ["N"] == "2":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open("{ready}", "w").close()
time.sleep(60)
"""
    begin = time.monotonic()
    assert run_processes(script(tmp_path, text), environments(N=["0", "1", "2"]), grace=0.3) == 4
    assert time.monotonic() - begin < 20
    assert "0.3 s after a failure are killed" in capsys.readouterr().err


LISTENING = """
import os, signal, sys, time
def stop(number, _):
    open(os.environ["FILE"], "a").write(f"{number}\\n")
    sys.exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
open(os.environ["FILE"], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_once_and_the_requeue_code_comes_back(tmp_path: Path, number: int) -> None:
    files = [str(tmp_path / f"child_{i}") for i in range(2)]
    launcher = "import json, os, sys\nfrom scripts.launching.processes import run_processes\n"
    launcher += "sys.exit(run_processes(json.loads(sys.argv[1]), json.loads(sys.argv[2])))"
    arguments = [json.dumps(script(tmp_path, LISTENING)), json.dumps([{"FILE": file} for file in files])]
    process = subprocess.Popen([sys.executable, "-c", launcher, *arguments], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not all(Path(file).exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does
    assert process.wait(timeout=60) == 75
    assert [Path(file).read_text() for file in files] == [f"{int(number)}\n"] * 2
