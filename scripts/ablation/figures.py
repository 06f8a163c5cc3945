"""The report of a trial: report.md with all tables, figures beside it, and the main ones in a page."""

import argparse
from pathlib import Path
from typing import Any

from mosaic.files import write_text
from scripts.ablation.arms import PARTS
from scripts.ablation.plots import WATCHED, charts
from scripts.ablation.readme import put_into
from scripts.ablation.results import read_results
from scripts.ablation.tables import (
    PULLS,
    TARGET_ROWS,
    by_arm,
    cells_of,
    contrast_table,
    diagnosis_table,
    intervention_table,
    noise_table,
    run_table,
    steps_table,
    summary_table,
)

TITLES = {
    "scratch": "From scratch",
    "selection": "Selection of settings",
    "late": "From flow matching's adapter",
    "confirmation": "Confirmation",
    "binding": "References from left to right",
}
STATISTICS = """All numbers are of identities that training never saw, as means over scenes. In brackets 95 % intervals for other training
seeds and other scenes (two crossed random factors, `scripts/pocket/statistics.py`); of an arm with one seed they are for other scenes only,
and those of the Frechet distance and of the losses' pulls for other seeds only. Differences are at the same seeds and scenes, of which all
start from the same noise; nothing is corrected for the number of comparisons: of twenty without a difference one would be called resolved.

The judge's own numbers on real renderings of the same scenes are the last row of each table of pictures. Attention is read from all blocks
in every arm, on real renderings at noise drawn as in training. Pictures are sampled with `inference.image_guidance_scale` 2.0 as in
`configs/pocket.json`."""
INTERVENTIONS = """### Interventions

Rows of attention at points are replaced in all heads and blocks, on real renderings, without training (`scripts/pocket/interventions.py`):
how much L_diff grows, times 1,000. Without a channel that is in use nothing is missed; where a replacement lowers L_diff, a loss that asks
for it has something to give."""
PULL = """Pulls: how many times as long as the gradient of flow matching those of SCAL and MDL are at the paper's weights, averaged over the
scenes at noise as in training, and the cosines of the angles between them."""


def draw(results_file: Path, folder: Path) -> Path:
    """Write the report's folder; returns the path of report.md.

    Raises:
        FileNotFoundError: There is no such results file.
        ValueError: It is not one of ours.
    """
    results = read_results(results_file)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {part: charts(results, part) for part in PARTS if by_arm(results, part)}
    for name, svg in (item for of_part in figures.values() for item in of_part.items()):
        write_text(folder / name, svg)
    write_text(folder / "report.md", report(results, {part: list(of_part) for part, of_part in figures.items()}))
    return folder / "report.md"


def report(results: dict[str, Any], figures: dict[str, list[str]]) -> str:
    """The page in Markdown; `figures` has the files of each part that is measured."""
    parts = ["# The trial in the pocket world", provenance(results), STATISTICS]
    parts += [section(results, part, files) for part, files in figures.items()]
    parts.append(f"## Runs\n\n{run_table(results)}")
    return "\n\n".join(parts) + "\n"


def provenance(results: dict[str, Any]) -> str:
    """When, where and with what the numbers were made."""
    size, hardware, seconds = results["size"], results["hardware"], results["seconds"]
    hours = {name: f"{value / 3600:.2f} h" for name, value in seconds.items()}
    commits = sorted({found for run in results["runs"] if (found := run.get("commit"))} | ({results["commit"]} - {None}))
    lines = [
        f"- {results['date']}, commit {' and '.join(commits) or 'unknown'}",
        f"- {hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB; "
        f"{hardware['side_by_side']} run(s) side by side with {hardware['threads']} thread(s) each",
        f"- {', '.join(f'{name} {version}' for name, version in results['versions'].items())}",
        f"- Added up over all runs: training {hours['training']}, measuring {hours['measuring']}",
        f'- Size "{size["name"]}": {size["train_samples"]} training scenes of up to {size["max_subjects"]} subjects, batch '
        f"{size['batch_size']}; from scratch {size['steps']} steps, late starts {size['late_steps']} from step {size['late_from']}; "
        f"{size['cases']} scenes per cell at the end of a run, {size['checkpoint_cases']} before and for interventions",
        f"- Digests: data {(results['data']['manifest_digest'] or 'unknown')[:12]}, base {results['model']['digest'][:12]}, "
        f"judge {results['judge_digest'][:12]}",
    ]
    return "\n".join(lines if results["complete"] else [*lines, "- **Not finished: some runs or measurements are missing.**"])


def section(results: dict[str, Any], part: str, files: list[str]) -> str:
    """Tables and figures of a part."""
    cells = cells_of(by_arm(results, part))
    parts = [f"## {TITLES[part]}", contrast_table(results, part), *(summary_table(results, part, cell) for cell in cells)]
    if part == "scratch":
        parts += [steps_table(results, part, measure, cell) for _, measure, cell in WATCHED]
    parts += [INTERVENTIONS, *(intervention_table(results, part, cell) for cell in cells)]
    parts += [f"By thirds of noise:\n\n{noise_table(results, part, cell)}" for cell in cells]
    if part == "scratch":
        parts += [f"### Why\n\n{diagnosis_table(results, part, TARGET_ROWS)}", PULL, diagnosis_table(results, part, PULLS)]
    parts += [f"![{name.removesuffix('.svg').replace('_', ' ')}]({name})" for name in files]
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        FileNotFoundError, OSError, ValueError: The results cannot be read, or a file cannot be written.
    """
    path = draw(arguments.results, arguments.output or arguments.results.parent / "report")
    if arguments.readme:
        put_into(arguments.readme, read_results(arguments.results), path)
    print(f"ablation_figures: {path}")
