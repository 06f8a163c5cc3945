"""The report of an ablation: report.md with all tables, figures beside it, and the main ones in a page."""

import argparse
import math
from pathlib import Path
from typing import Any

from mosaic.files import write_text
from mosaic.reports.figures import save_picture
from scripts.ablation.plots import CURVES, K_MEASURES, charts, factor_charts, lines_figure
from scripts.ablation.readme import put_into
from scripts.ablation.results import read_results
from scripts.ablation.tables import (
    IDENTIFICATION,
    MEASURES,
    attention_table,
    by_arm,
    contrast_k_table,
    contrast_table,
    factor_table,
    gradient_table,
    k_table,
    ks_of,
    published_table,
    run_table,
    seed_deviation,
    summary_table,
    target_rows_table,
)

SUMMARY_KS = (2, 4)
TARGET_ROWS = """### Where target tokens look

Looks travel from a reference to the target by the target's queries, whose rows no loss supervises: SCAL and MDL supervise those of the
references' queries. No arm supervised the target's, so this shows what comes along with the losses, not a cause. Of the target tokens of
points, on real renderings at noise as in training: how much of their attention falls on references, how much of that on the reference of
their point (chance 1/K), and whether its peak among all reference tokens is at the point's."""
GRADIENTS = """### How the losses pull

Gradients by all weights of the adapter, averaged over the scenes, at noise as in training: how many times as long as that of flow
matching those of SCAL and MDL are at the paper's weights (their pulls), and the cosine of the angle between each and that of flow
matching. Where a loss holds back flow matching they point against each other; at rest between the two, at the paper's weights, they would
be as long (pull 1, cosine -1). Where flow matching is at rest by itself its mean gradient is little more than the rest of its noise:
pulls are long there, and cosines near 0. L_diff is of the same samples."""
LINES = """## Where reference points look

Per arm (seed 0), on one real rendering of held-out identities at timestep 0.5 with the same noise: lines from reference points to the
peaks of their rows, crosses of the same colour where they should end.

![reference points and their peaks](lines.png)"""


def draw(results_file: Path, folder: Path) -> Path:
    """Write the report's folder; returns the path of report.md.

    Raises:
        FileNotFoundError: There is no such results file.
        ValueError: It is not one of ours.
    """
    results = read_results(results_file)
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in {**charts(results), **factor_charts(results)}.items():
        write_text(folder / name, svg)
    figure = lines_figure(results)
    if figure:
        save_picture(figure, folder / "lines.png")
    write_text(folder / "report.md", report(results, figure is not None))
    return folder / "report.md"


def report(results: dict[str, Any], has_lines: bool) -> str:
    """The page in Markdown."""
    parts = ["# Ablation in the pocket world", provenance(results), statistics_note(results)]
    parts += [section(results) for name, section in SECTIONS.items() if by_arm(results, name)]
    if has_lines:
        parts.append(LINES)
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
        f"{hardware['side_by_side']} run(s) side by side, trainings with {hardware['threads']} thread(s) each, "
        "pictures and timings with one",
        f"- {', '.join(f'{name} {version}' for name, version in results['versions'].items())}",
        f"- Added up over all runs: training {hours['training']}, measuring {hours['measuring']}",
        f'- Size "{size["name"]}": {size["train_samples"]} training scenes, {size["steps"]} steps of batch {size["batch_size"]} '
        f"({size['factor_steps']} steps for one-factor variants)",
        f"- Digests: data {(results['data']['manifest_digest'] or 'unknown')[:12]}, base {results['model']['digest'][:12]}, "
        f"judge {results['judge_digest'][:12]}",
    ]
    return "\n".join(lines if results["complete"] else [*lines, "- **Not finished: some runs or measurements are missing.**"])


def statistics_note(results: dict[str, Any]) -> str:
    """How to read the numbers."""
    return f"""All numbers are of {results["size"]["cases"]} scenes per K of identities that training never saw, as means over scenes. In
brackets 95 % intervals for other training seeds and other scenes (two crossed random factors, `scripts/pocket/statistics.py`); of a run
with one seed they are for other scenes only, and those of the Frechet distance and of the losses' pulls for other seeds only. The arm
"light" was chosen among the one-factor variants at seed 0, on the same scenes.

Arms are compared by the differences at the same seeds and scenes, of which all start from the same noise; nothing is corrected for the
number of comparisons: of twenty without a difference one would be called resolved. The judge's own accuracy on real renderings of the
same scenes, with the Wilson interval over subjects of which at least half is visible, is the last row of each table of what it says;
generated subjects count, however little of them can be seen. Chance is that of uniform attention. The Frechet distance is of the pictures
of all K together, for with few pictures it is mostly bias: compare it with that of real renderings.

Attention is read from all blocks in every arm, on real renderings at noise drawn as in training. Pictures are sampled with
`inference.image_guidance_scale` 2.0 as in `configs/pocket.json`, which takes two passes per step; one table is of 1.0, as the method was
published. Learning curves are of the batches of training, MDL's of those with two and more references; that of attention is of held-out
samples and of the averaged adapter. They are of the blocks that an arm captures, so that those of attention leave the preset release
out, which captures others."""


def main_section(results: dict[str, Any]) -> str:
    """Tables and charts of the main arms."""
    ks = ks_of(list(by_arm(results, "main").values()))
    chosen = [k for k in SUMMARY_KS if k in ks] or ks[:1]
    parts = ["## Losses", *(summary_table(results, k) for k in chosen)]
    parts += [f"### Arm against arm\n\n{contrast_table(results)}", contrast_k_table(results), published_table(results)]
    parts.append(f"{GRADIENTS}\n\n{gradient_table(results)}")
    parts.append(f"{TARGET_ROWS}\n\n{target_rows_table(results)}")
    parts += [k_table(results, measure) for measure in MEASURES]
    parts += [f"![{name}](k_{name}.svg)" for name in K_MEASURES]
    parts += [f"![{label}](learning_{name.partition('/')[2]}.svg)" for name, label in CURVES.items()]
    return "\n\n".join(parts)


def factor_section(results: dict[str, Any]) -> str:
    """Tables of the one-factor variants."""
    ks = ks_of(list(by_arm(results, "factors").values()))
    head = "## One factor at a time\n\nEach row differs from the baseline in what its first two columns say, and in nothing else."
    figures = [f"![identification]({name})" for name in factor_charts(results)]
    return "\n\n".join([head, *figures, *(f"{factor_table(results, k)}\n\n{seed_note(results, k)}" for k in ks)])


def seed_note(results: dict[str, Any], k: int) -> str:
    """What another training seed alone would do."""
    deviation = seed_deviation(results, IDENTIFICATION, k)
    if math.isnan(deviation):
        return "How much another training seed would change is not known here: no arm has two."
    return (
        f"From seed to seed identification of a main arm varies by {deviation:.1f} points (standard deviation, K = {k}), which the "
        f"intervals of one seed do not hold: differences below {2 * math.sqrt(2) * deviation:.0f} points are within what another seed does."
    )


def attention_section(results: dict[str, Any]) -> str:
    """The table of the modes of reference attention."""
    return f"## What references attend to\n\n{attention_table(results)}"


SECTIONS = {"main": main_section, "factors": factor_section, "attention": attention_section}


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        FileNotFoundError, OSError, ValueError: The results cannot be read, or a file cannot be written.
    """
    path = draw(arguments.results, arguments.output or arguments.results.parent / "report")
    if arguments.readme:
        put_into(arguments.readme, read_results(arguments.results), path)
    print(f"ablation_figures: {path}")
