"""Runs of one or more processes on gloo, forked from one process that has imported everything: `python tests/ranks.py JOBS.json`.

JOBS.json is a list of {"config": file, "processes": n, "signal": null or [rank, step, name]}; `rank` gets that signal, such as "SIGTERM",
in that optimizer step. All resume where they can. Rank r of job j writes `job_<j>_rank_<r>.json` beside JOBS.json:
{"step": [[id, timestep, mean of x_t], ...]}, and the exit codes go to `codes.json`.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from mosaic import objective
from mosaic.training import trainer as training
from scripts.kill_test import preload
from scripts.train import main as train_main


def run_rank(job: dict, rank: int, port: int, record: Path) -> int:
    """One process of a job; returns its exit code."""
    processes = job["processes"]
    if processes > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    seen: dict[int, list] = {}
    train_step, predict = training.train_step, objective.predict

    def spy_step(pipeline, transformer, batch, config, step, generators):  # noqa: ANN001, ANN202
        if job["signal"] and job["signal"][:2] == [rank, step]:
            os.kill(os.getpid(), signal.Signals[job["signal"][2]])

        def spy_predict(pipeline, transformer, encoded, noisy_latents, timesteps, *others):  # noqa: ANN001, ANN002, ANN202
            means = noisy_latents.double().mean(dim=(1, 2)).tolist()
            seen.setdefault(step, []).extend(map(list, zip(batch.ids, timesteps.tolist(), means, strict=True)))
            return predict(pipeline, transformer, encoded, noisy_latents, timesteps, *others)

        objective.predict = spy_predict
        return train_step(pipeline, transformer, batch, config, step, generators)

    training.train_step = spy_step
    code = train_main([job["config"], "--resume", "auto"])
    record.write_text(json.dumps(seen))
    return code


def main(jobs_file: Path) -> None:
    preload()
    codes = []
    for number, job in enumerate(json.loads(jobs_file.read_text())):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(job["processes"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = run_rank(job, rank, port, jobs_file.parent / f"job_{number}_rank_{rank}.json")
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    (jobs_file.parent / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
