"""The shipped adapters measured again and compared with the rows of the results."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mosaic.config.loading import config_to_json, from_dict
from mosaic.files import write_text
from mosaic.lora.files import LoraFile, reference_metadata
from scripts.ablation.measures import measure
from scripts.ablation.plan import WORLD_DIGEST, base_digest, judge_digest
from scripts.ablation.results import read_measured
from scripts.ablation.tables import cell_title, end_of, markdown
from scripts.ablation.tasks import Task
from scripts.pocket.provenance import commit

SHARES = ("apart", "identification", "leakage", "presence")


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


def shipped_runs(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs whose adapters ship, by the names of their files: of each arm that with the lowest seed of its part."""
    found: dict[str, dict[str, Any]] = {}
    for run in sorted(results["runs"], key=lambda run: run["seed"]):
        if run["adapter_digest"] and run["measures"]:
            found.setdefault(f"{run['part']}_{run['arm']}" if "part" in run else run["arm"], run)
    return found


def check_tasks(results: dict[str, Any], arms: Path, output: Path, ks: list[int]) -> dict[str, dict[str, Task]]:
    """What is measured again, by file and cell.

    Raises:
        FileNotFoundError: There are no adapters, or the folder lacks one of an arm of the results.
        ValueError: A file is no reference LoRA of ours.
    """
    tasks: dict[str, dict[str, Task]] = {}
    for name, run in shipped_runs(results).items():
        file = LoraFile(arms / f"{name}.safetensors", "adapter of the ablation")
        config = output / "configs" / f"{name}.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        write_text(config, config_to_json(from_dict(reference_metadata(file.metadata, str(file.path)).get("config", {}), str(file.path))))
        for cell in pictures_of(run):
            regime, _, k = cell.partition("_k")
            if int(k) in ks:
                place = (regime, int(k), run["first_scene"], results["size"]["cases"])
                tasks.setdefault(name, {})[cell] = Task(
                    "pictures", str(output / f"{name}_{cell}.json"), str(config), str(file.path), *place
                )
    return tasks


def pictures_of(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of pictures at the end of a run, by cell."""
    return run["measures"][str(end_of(run))]["pictures"]


def compare(results: dict[str, Any], tasks: dict[str, dict[str, Task]]) -> tuple[list[list[str]], bool]:
    """Rows of a table (file, cell, then each share with its interval), and whether all shares lie within."""
    rows, all_within, stored = [], True, shipped_runs(results)
    for name, measured in tasks.items():
        for cell, task in measured.items():
            cells = []
            for share in SHARES:
                now, row = (task.result() or {}).get(share), pictures_of(stored[name])[cell].get(share)
                if now is None or row is None or now["share"] is None or row["share"] is None:
                    cells.append("-")
                    continue
                low, high = (row["share"] if row[end] is None else row[end] for end in ("low", "high"))
                within = low <= now["share"] <= high
                all_within &= within
                limits = f"{100 * low:.1f} to {100 * high:.1f}"
                cells.append(f"{100 * now['share']:.1f} ({'in' if within else 'NOT in'} {limits})")
            rows.append([name, cell_title(cell), *cells])
    return rows, all_within


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        FileNotFoundError, OSError, ValueError: The results or an adapter cannot be read, or are of another world.
    """
    commit()  # that of the code as loaded
    results = read_measured(arguments.results)
    require_same_world(results)
    known = sorted({int(cell.partition("_k")[2]) for run in shipped_runs(results).values() for cell in pictures_of(run)})
    unknown = sorted(set(arguments.ks) - set(known))
    if unknown:
        raise ValueError(f"--ks: {arguments.results} has K = {', '.join(map(str, known))}, got {', '.join(map(str, unknown))}.")
    tasks = check_tasks(results, arguments.arms, arguments.output, sorted(set(arguments.ks)))
    for task in tqdm([task for part in tasks.values() for task in part.values()], desc="measuring", unit="task"):
        if task.result() is None:
            task.write(measure(task))
    rows, all_within = compare(results, tasks)
    print(markdown(["adapter", "scenes", *(f"{name}, %" for name in SHARES)], rows))
    return 0 if all_within else 1
