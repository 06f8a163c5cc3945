"""Processes for tests of whole commands and of several ranks: forks of one server process that has imported everything, once for all tests.

`start("scripts/train.py", "config.json", processes=2, output=file)` is what `torchrun --nproc-per-node 2 scripts/train.py config.json` starts,
without its launcher and without seconds of imports in each process.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = [
    "tests",
    "torch.utils.tensorboard",
    "inference",
    "mosaic.rendering.runner",
    "mosaic.training",
    "preprocess.encoding",
    "preprocess.construct.run",
    "preprocess.matching.run",
    "tests.runs",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTS)


def start(script: str, *arguments: str, output: Path, processes: int = 1, **environment: str) -> list[ForkServerProcess]:
    """Start a script of the project as its ranks; what they print goes to the file `output`."""
    return start_ranks(_run_script, str(ROOT / script), *arguments, output=output, processes=processes, **environment)


def start_ranks(target: Callable[..., Any], *arguments: Any, output: Path, processes: int, **environment: str) -> list[ForkServerProcess]:
    """Start `target(*arguments)` in every rank; a returned number is the exit code."""
    variables = {"OMP_NUM_THREADS": "1", **environment}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        counts = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
        variables |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"} | {name: str(value) for name, value in counts.items()}
    found = []
    for rank in range(processes):
        own = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        found.append(SERVER.Process(target=_enter, args=(target, arguments, own, output)))
    start_server()
    for process in found:
        process.start()
    return found


def wait(processes: list[ForkServerProcess], seconds: float = 120) -> list[int | None]:
    """The exit codes, once all have ended; what has not ended in time is killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def start_server() -> None:
    """Python 3.11 does not hand `sys.path` to the server, which would then import nothing and say nothing."""
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if kept is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = kept


def _enter(target: Callable[..., Any], arguments: tuple, environment: Mapping[str, str], output: Path) -> None:
    """In the new process."""
    import torch

    gc.freeze()
    gc.enable()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = target(*arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _run_script(script: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
