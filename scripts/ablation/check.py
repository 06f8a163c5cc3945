"""The shipped adapters of the ablation measured again and compared with the rows of the results."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mosaic.config.loading import config_to_json, from_dict
from mosaic.files import write_text
from mosaic.lora.files import LoraFile, reference_metadata
from scripts.ablation.measures import measure
from scripts.ablation.plan import WORLD_DIGEST, base_digest, judge_digest
from scripts.ablation.results import read_results
from scripts.ablation.tables import markdown
from scripts.ablation.tasks import Task
from scripts.pocket.provenance import commit

SHARES = ("identification", "leakage", "presence")


def require_same_world(results: dict[str, Any]) -> None:
    """Check that base, judge and world are those of the results, without which nothing can be reproduced.

    Raises:
        ValueError: One is another.
    """
    here = {"model": base_digest(results["model"]["name"]), "judge": judge_digest(), "world": WORLD_DIGEST}
    then = {"model": results["model"]["digest"], "judge": results["judge_digest"], "world": results["world_digest"]}
    others = [name for name in here if here[name] != then[name]]
    if others:
        raise ValueError(f"the {' and the '.join(others)} of this checkout are not those of the results: check out {results['commit']}.")


def check_tasks(results: dict[str, Any], arms: Path, output: Path, ks: list[int]) -> dict[str, list[Task]]:
    """What is measured again, by arm.

    Raises:
        FileNotFoundError: There are no adapters, or the folder lacks one of an arm of the results.
        ValueError: A file is no reference LoRA of ours.
    """
    size = results["size"]
    names = [run["arm"] for run in results["runs"] if "main" in run["parts"] and run["seed"] == 0 and run["adapter_digest"]]
    tasks: dict[str, list[Task]] = {}
    for name in names:
        file = LoraFile(arms / f"{name}.safetensors", "adapter of the ablation")
        config = output / "configs" / f"{name}.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        write_text(config, config_to_json(from_dict(reference_metadata(file.metadata, str(file.path)).get("config", {}), str(file.path))))
        for k in ks:
            place = str(output / f"{name}_k{k}.json")
            tasks.setdefault(name, []).append(Task("pictures", place, str(config), str(file.path), k, size["cases"]))
    return tasks


def compare(results: dict[str, Any], tasks: dict[str, list[Task]]) -> tuple[list[list[str]], bool]:
    """Rows of a table (arm, K, then each share with its interval), and whether all shares lie within."""
    rows, all_within = [], True
    stored = {run["arm"]: run["measures"] for run in results["runs"] if "main" in run["parts"] and run["seed"] == 0}
    for name, measured in tasks.items():
        for task in measured:
            cells = []
            for share in SHARES:
                now, row = (task.result() or {})[share]["share"], stored[name][str(task.num_references)][share]
                if now is None or row["share"] is None:
                    cells.append("-")
                    continue
                within = row["low"] <= now <= row["high"]
                all_within &= within
                cells.append(f"{100 * now:.1f} ({'in' if within else 'NOT in'} {100 * row['low']:.1f} to {100 * row['high']:.1f})")
            rows.append([name, str(task.num_references), *cells])
    return rows, all_within


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        FileNotFoundError, OSError, ValueError: The results or an adapter cannot be read, or are of another world.
    """
    commit()  # that of the code as loaded
    results = read_results(arguments.results)
    require_same_world(results)
    unknown = sorted(set(arguments.ks) - {int(k) for k in results["real"]})
    if unknown:
        raise ValueError(f"--ks: {arguments.results} has K = {', '.join(results['real'])}, got {', '.join(map(str, unknown))}.")
    tasks = check_tasks(results, arguments.arms, arguments.output, sorted(set(arguments.ks)))
    for task in tqdm([task for part in tasks.values() for task in part], desc="measuring", unit="task"):
        if task.result() is None:
            task.write(measure(task))
    rows, all_within = compare(results, tasks)
    print(markdown(["arm", "K", *(f"{name}, %" for name in SHARES)], rows))
    return 0 if all_within else 1
