"""What was found, as Markdown."""

from typing import Any

from scripts.ablation.tables import (
    IDENTIFICATION,
    LEAKAGE,
    PRESENCE,
    Measure,
    Runs,
    cell_text,
    cell_title,
    contrast,
    markdown,
    value_of,
    verdict,
)

MARKER = "<!-- construction -->"
STAGES = ("synthesis", "segmentation", "references", "points")


def block(results: dict[str, Any]) -> str:
    """All tables."""
    hours = sum(run["seconds"] for run in results["runs"]) / 3600
    seeds = len({run["seed"] for run in results["runs"]})
    made = (
        f"{results['date'][:10]}, {results['samples']:,} samples each, {results['steps']:,} steps of batch 16, {seeds} training seeds, "
        f"{results['cases']} held-out scenes per K; {results['hardware']['processor']}, trainings together {hours:.1f} h of one core."
    )
    return "\n\n".join([made, worth(results), trace_table(results)])


def arms_of(results: dict[str, Any]) -> dict[str, Runs]:
    """The runs of each data set."""
    names = dict.fromkeys(run["arm"] for run in results["runs"])
    return {name: [run for run in results["runs"] if run["arm"] == name] for name in names}


def worth(results: dict[str, Any]) -> str:
    """What adapters trained on each data set reach, and the differences to the exact one."""
    arms, cells = arms_of(results), results["cells"]
    rows = []
    for measure in (IDENTIFICATION, LEAKAGE, PRESENCE):
        of_measure = [cell for cell in cells if measure is not LEAKAGE or not cell.endswith("_k1")]
        for runs in arms.values():
            texts = [cell_text(value_of(measure, runs, cell), 1) if cell in of_measure else "-" for cell in cells]
            rows.append([measure.title, runs[0]["meaning"], *texts])
        exact = next(iter(arms.values()))
        rows += [
            [measure.title, f"*{name} - exact*", *(_difference(measure, runs, exact, cell, cell in of_measure) for cell in cells)]
            for name, runs in arms.items()
            if runs is not exact
        ]
    return markdown(["measure", "trained on", *(cell_title(cell) for cell in cells)], rows)


def _difference(measure: Measure, runs: Runs, exact: Runs, cell: str, known: bool) -> str:
    if not known:
        return "-"
    found = contrast(measure, runs, exact, [cell])
    return f"{cell_text(found, 1)}: {verdict(found)}"


def trace_table(results: dict[str, Any]) -> str:
    """What each stage passes and how right it is."""
    drawn, made = results["traces"]["drawn"], results["traces"]["constructed"]
    rows = [
        [f"passes stage {number}, `{name}`", *(_percent(one["yields"].get(name)) for one in (made, drawn))]
        for number, name in enumerate(STAGES, 2)
    ]
    rows += [
        ["candidates per sample", *(f"{one['candidates'] / results['samples']:.1f}" for one in (made, drawn))],
        ["samples with 1, 2, 3 references", *(_references(one["references"]) for one in (made, drawn))],
        ["subjects found by stage 3, of all", "-", _share(drawn["found"])],
        ["IoU of the masks: all subjects, 0 if not found; in samples", "-", f"{drawn['found']['iou']:.2f}; {drawn['iou']:.2f}"],
        ["references that are recognised as their individual (chance 12.5)", "-", _share(drawn["recognised"])],
        *(
            [f"same {name} in picture and reference", *(_share(one["same_looks"][name]) for one in (made, drawn))]
            for name in made["same_looks"]
        ),
        ["points right; points per reference", "-", f"{_share(drawn['right'])}; {drawn['points']:.0f}"],
    ]
    return markdown(["%", "constructed", "the world's pictures, then constructed"], rows)


def _references(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts.get(str(number), 0)}" for number in range(1, 1 + max(3, *map(int, counts))))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _share(found: dict[str, Any]) -> str:
    return f"{100 * found['share']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
