"""Start scripts/train.py on what the environment names: a CPU, one GPU, all GPUs of this machine, or several machines.

train.sh calls this with its own arguments. What is read, each with its default:
  NUM_PROCESSES      processes on this machine (the number of GPUs, at least 1)
  ACCELERATE_CONFIG  an Accelerate config file (configs/accelerate/ddp.yaml)
  NNODES             number of machines (SLURM_STEP_NUM_NODES, else 1)
  NODE_RANK          number of this machine, from 0 (SLURM_NODEID, else 0)
  MASTER_ADDR        name or address of machine 0 (the first host of SLURM_STEP_NODELIST, else 127.0.0.1)
  MASTER_PORT        free port on it (from SLURM_JOB_ID, else 29500; on one machine any free port)
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from mosaic.commands import NOTHING, command
from scripts.launching.processes import run_processes

ROOT = Path(__file__).resolve().parents[2]
USAGE = "usage: bash train.sh CONFIG [--set section.field=value ...] [--resume auto|FOLDER] [--dry-run]"
DEFAULT_CONFIG = ROOT / "configs/accelerate/ddp.yaml"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# On a CPU: keep freed memory, since fresh pages for large tensors cost several percent of a step (glibc; others ignore this).
CPU_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


@dataclasses.dataclass(frozen=True)
class Machines:
    """The machines of a run and which of them this is.

    Attributes:
        count: Number of machines.
        index: Number of this machine, from 0.
        address: Name or address of machine 0.
        port: Port on machine 0; 0: any free one.
        source: Variables that said so, for the message.
    """

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    source: str = ""


def find_machines(environ: Mapping[str, str]) -> Machines:
    """Read the machines from torchrun's variables; those that are not set come from the SLURM step, else they take their defaults.

    Raises:
        ValueError: A variable is missing where several machines need it, contradicts another, or is no number in its range; or something
            has started this once per process.
    """
    given = {name: environ[name] for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if environ.get(name)}
    asked = given.get("NNODES")
    if asked is None and (environ.get("WORLD_SIZE") or "1") != "1":
        raise ValueError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} is set, as torchrun or a job controller sets it for each process, but train.sh starts the "
            "processes of a machine itself. Start it once per machine, with NNODES and NODE_RANK (NNODES=1 for this machine alone)."
        )
    step = _slurm_step(environ) if asked is None or (asked != "1" and asked == environ.get("SLURM_STEP_NUM_NODES")) else {}
    values = {**step, **given}
    if "NNODES" not in values:
        stray = [name for name in ("NODE_RANK", "MASTER_ADDR") if name in given]
        if stray:
            raise ValueError(
                f"{' and '.join(stray)} set, but NNODES is not. Set NNODES to the number of machines, or unset {' and '.join(stray)}."
            )
    count = _integer("NNODES", values.get("NNODES", "1"), 1)
    if count > 1:
        needed = {"NODE_RANK": f"the number of this machine, 0 to {count - 1}", "MASTER_ADDR": "the name or address of machine 0"}
        missing = [f"{name} ({meaning})" for name, meaning in needed.items() if name not in values]
        if missing:
            raise ValueError(f"NNODES={count}, but not set: {', '.join(missing)}.")
    source = ", ".join([*given, *(["SLURM"] if step.keys() - given.keys() else [])])
    return Machines(
        count,
        _integer("NODE_RANK", values.get("NODE_RANK", "0"), 0, count - 1),
        values.get("MASTER_ADDR", Machines.address),
        _integer("MASTER_PORT", values.get("MASTER_PORT", "29500" if count > 1 else "0"), 0, 65535),
        source,
    )


def _slurm_step(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables by torchrun's names, from the job step that srun started; empty outside of one.

    Raises:
        ValueError: A job of several machines without srun, or more than one task per machine.
    """
    count = environ.get("SLURM_STEP_NUM_NODES")
    if not count:
        job = environ.get("SLURM_JOB_NUM_NODES", "1")
        if job != "1":
            raise ValueError(
                f"the SLURM job has {job} machines, but this runs on one of them only. Start it with "
                "srun --ntasks-per-node=1 bash train.sh ..., or set NNODES=1 to use this machine alone."
            )
        return {}
    tasks = environ.get("SLURM_STEP_NUM_TASKS", count)
    if tasks != count:
        raise ValueError(f"srun started {tasks} tasks on {count} machine(s), but one per machine is needed: srun --ntasks-per-node=1.")
    if count == "1":
        return {"NNODES": "1"}
    port = 20000 + int(re.sub(r"\D", "", environ.get("SLURM_JOB_ID", "")) or 0) % 20000  # two jobs on a machine get two ports
    step = {"NNODES": count, "NODE_RANK": environ.get("SLURM_NODEID"), "MASTER_PORT": str(port)}
    step["MASTER_ADDR"] = first_host(environ.get("SLURM_STEP_NODELIST", ""))
    return {name: value for name, value in step.items() if value}


def first_host(nodelist: str) -> str:
    """The first name of a SLURM host list: "gpu[003-007,9]-ib,login" gives "gpu003-ib"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be started here.

    Attributes:
        machines: The machines of the run.
        processes: Processes on each machine.
        num_gpus: GPUs of this machine; 0: all runs on the CPU.
        config: Accelerate config file, for two or more processes.
    """

    machines: Machines
    processes: int
    num_gpus: int
    config: Path

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.machines.count * self.processes

    def describe(self) -> str:
        """What was read and chosen, in one line."""
        machines, device = self.machines, "GPU" if self.num_gpus else "CPU"
        if self.world_size == 1:
            return f"1 process, 1 {device}"
        where = f"machine {machines.index} of {machines.count} ({machines.source}), " if machines.count > 1 else ""
        meet = f", meeting at {machines.address}:{machines.port}" if machines.count > 1 else ""
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''} on {'its' if where else 'the'} {device}"
        return f"{where}{processes}{'s' if self.num_gpus > 1 else ''}{meet}, {self.config}"


def make_plan(environ: Mapping[str, str], num_gpus: int) -> Plan:
    """Choose what to start.

    Raises:
        ValueError: See `find_machines`; more processes than GPUs; an Accelerate config for a single process.
        FileNotFoundError: There is no such Accelerate config.
    """
    machines = find_machines(environ)
    processes = _integer("NUM_PROCESSES", environ.get("NUM_PROCESSES") or str(max(num_gpus, 1)), 1)
    if num_gpus and processes > num_gpus:
        raise ValueError(f"NUM_PROCESSES={processes}, but this machine has {num_gpus} GPU(s); one process needs one GPU.")
    chosen = environ.get("ACCELERATE_CONFIG")
    if chosen and not Path(chosen).is_file():
        raise FileNotFoundError(f"ACCELERATE_CONFIG={chosen}: file not found. Those that come along are in configs/accelerate/.")
    plan = Plan(machines, processes, num_gpus, Path(chosen) if chosen else DEFAULT_CONFIG)
    if chosen and plan.world_size == 1:
        raise ValueError(f"ACCELERATE_CONFIG={chosen}: is for two or more processes, but there is one. Unset it, or set NUM_PROCESSES.")
    return plan


def process_environments(plan: Plan, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each process of this machine, with the variables that PyTorch and Accelerate read.

    Raises:
        ValueError: Accelerate refuses its config.
    """
    base = {name: value for name, value in environ.items() if name not in RANK_VARIABLES}
    if not plan.num_gpus:
        base = {**CPU_MEMORY, **base, "ACCELERATE_USE_CPU": "true"}
    if plan.world_size == 1:
        return [base]
    base = {"OMP_NUM_THREADS": "1", **base, **accelerate_environment(plan)}
    machines = plan.machines
    port = machines.port or free_port()
    return [
        {
            **base,
            "MASTER_ADDR": machines.address,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(plan.world_size),
            "LOCAL_WORLD_SIZE": str(plan.processes),
            "RANK": str(machines.index * plan.processes + local_rank),
            "LOCAL_RANK": str(local_rank),
        }
        for local_rank in range(plan.processes)
    ]


def accelerate_environment(plan: Plan) -> dict[str, str]:
    """The variables in which Accelerate's own launcher would put its config file; precision and threads are not its to decide here.

    Raises:
        ValueError: Accelerate refuses the file.
    """
    import yaml
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    machines = plan.machines
    arguments = ["--config_file", str(plan.config), "--num_processes", str(plan.world_size), "--num_machines", str(machines.count)]
    arguments += ["--machine_rank", str(machines.index), "--main_process_ip", machines.address, "--main_process_port", "0"]
    # Hybrid sharding: shards inside a machine, replicas across machines. Read only where the file has a parallelism_config.
    arguments += ["--parallelism_config_dp_replicate_size", str(machines.count)]
    arguments += ["--parallelism_config_dp_shard_size", str(plan.processes)]
    try:
        parsed = launch.launch_command_parser().parse_args([*arguments, "scripts/train.py"])
        parsed, _, _ = launch._validate_launch_command(parsed)
        parsed.deepspeed_fields_from_accelerate_config = ""  # only a DeepSpeed JSON file, which is not supported, would be held against it
        found = (prepare_deepspeed_cmd_env(parsed)[1]) if parsed.use_deepspeed else prepare_multi_gpu_env(parsed)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{plan.config}: Accelerate refuses this config: {error}") from error
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    found = {name: value for name, value in found.items() if name.startswith(prefixes) and value != os.environ.get(name)}
    # mosaic.training.distributed.environment reads the mesh from the two sizes itself; Accelerate would refuse them on a CPU.
    return {name: value for name, value in found.items() if name not in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_PARALLELISM_CONFIG")}


def free_port() -> int:
    """A port that is free now."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _integer(name: str, text: str, minimum: int, maximum: int | None = None) -> int:
    """Read a number of the environment."""
    words = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
    if not re.fullmatch(r"\d+", text) or int(text) < minimum or (maximum is not None and int(text) > maximum):
        raise ValueError(f"{name} must be an integer, {words}, got {text!r}.")
    return int(text)


def count_gpus() -> int:
    """CUDA devices that this process may see; torch, which takes two seconds to import, is asked only where there may be one."""
    if not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def has_gpu_driver() -> bool:
    """Whether NVIDIA's driver can be loaded, or AMD's is there."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


@command(NOTHING)
def main(argv: list[str] | None = None) -> int:
    """Command line; all arguments go to scripts/train.py. Returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(USAGE, file=sys.stderr)
        return 2
    if arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n{__doc__}")
        return 0
    prints_only = not {"--dry-run", "--print-config"}.isdisjoint(arguments)
    plan = make_plan({} if prints_only else os.environ, 0 if prints_only else count_gpus())
    environments = process_environments(plan, os.environ)
    print(f"launch: {plan.describe()}", file=sys.stderr, flush=True)
    command = [sys.executable, str(ROOT / "scripts/train.py"), *arguments]
    if len(environments) == 1 and plan.world_size == 1:
        os.execve(sys.executable, command, environments[0])  # signals and exit code are then the trainer's own
    return run_processes(command, environments)
