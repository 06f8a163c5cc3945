"""The tables of a trial in Markdown, from its results file alone."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from scripts.ablation.arms import BASELINE
from scripts.pocket.interventions import INTERVENTIONS, NOISE_LEVELS, PLAIN
from scripts.pocket.statistics import Estimate, over_seeds, over_seeds_and_scenes

Runs = Sequence[dict[str, Any]]


class Measure(NamedTuple):
    """One number per run and cell.

    Attributes:
        title: For tables.
        name: Under which a measurement has it scene by scene.
        kind: Of the measurement; "": one number of the run itself, of all scenes together.
        factor: What it is multiplied with.
        digits: After the point.
        real: Which share of real renderings to set beside it; "": they have none.
        pooled: It is one number of all scenes together.
    """

    title: str
    name: str
    kind: str = "pictures"
    factor: float = 100.0
    digits: int = 1
    real: str = ""
    pooled: bool = False


IDENTIFICATION = Measure("identification, % (chance 12.5)", "identification", real="identification")
LEAKAGE = Measure("leakage, %", "leakage", real="leakage")
PRESENCE = Measure("class present, %", "presence", real="presence")
APART = Measure("each reference once, %", "apart", real="apart")
SAME_LOOK = Measure("same look, %", "same_look", real="same_look")
BLENDING = Measure("blending, %", "blending", real="blending")
MISSING = Measure("missing, %", "missing", real="missing")
EXACT = Measure("attention exact, %", "exact")
NEAR = Measure("attention within one token, %", "near")
OVERLAP = Measure("overlap between references, %", "overlap")
FRECHET = Measure("Frechet distance to real renderings", "frechet", "", 1.0, 2, pooled=True)
TARGET_ROWS = (
    Measure("attention on references, %", "on_references", "target_rows"),
    Measure("of it on the own one, %", "own_reference", "target_rows"),
    Measure("peak exact, %", "peak_exact", "target_rows"),
    Measure("peak within one token, %", "peak_near", "target_rows"),
)
PULLS = (
    Measure("L_diff", "flow_matching", "gradients", 1.0, 3, pooled=True),
    Measure("SCAL's pull", "correspondence_pull", "gradients", 1.0, 1, pooled=True),
    Measure("its cosine", "correspondence_cosine", "gradients", 1.0, 2, pooled=True),
    Measure("MDL's pull", "disentanglement_pull", "gradients", 1.0, 1, pooled=True),
    Measure("its cosine", "disentanglement_cosine", "gradients", 1.0, 2, pooled=True),
)
L_DIFF = Measure("L_diff x 1e3", PLAIN, "interventions", 1000.0)
CHANGES = {name: Measure(intervention.meaning, name, "interventions", 1000.0) for name, intervention in INTERVENTIONS.items()}
OF_REGIME = {
    "distinct": (IDENTIFICATION, LEAKAGE, PRESENCE, EXACT, NEAR, OVERLAP),
    "twins": (APART, SAME_LOOK, IDENTIFICATION, BLENDING, MISSING, EXACT, NEAR, OVERLAP),
}
PRIMARY, GUARD = (APART, ("twins_k2",)), (IDENTIFICATION, ("distinct_k2", "distinct_k3"))
CONTRASTS = (PRIMARY, GUARD, (IDENTIFICATION, ("twins_k2",)), (APART, ("twins_k3",)), (NEAR, ("distinct_k2",)))


class Value(NamedTuple):
    """A number with its 95 % interval; the ends are not numbers where none is known."""

    mean: float
    low: float
    high: float


def value_of(measure: Measure, runs: Runs, cell: str, step: int | None = None) -> Value:
    """Mean and interval of one arm in one cell, over seeds and scenes; at the end of its runs or at a step before."""
    if measure.pooled:
        found = [run[measure.name] if not measure.kind else _measured(measure, run, cell, step).get(measure.name) for run in runs]
        return _value(over_seeds(found), measure.factor)
    value = _value(over_seeds_and_scenes(list(by_scene(measure, runs, [cell], step).values())), measure.factor)
    return Value(value.mean, max(value.low, 0.0), min(value.high, 100.0)) if measure.factor == 100.0 else value


def by_scene(measure: Measure, runs: Runs, cells: Sequence[str], step: int | None = None) -> dict[int, list[float]]:
    """The numbers of all scenes of some cells, by seed; runs that lack one of the cells are left out."""
    found = {}
    for run in runs:
        texts = [_measured(measure, run, cell, step).get("scenes", {}).get(measure.name) for cell in cells]
        if all(text is not None for text in texts):
            found[run["seed"]] = [float(number) for text in texts for number in text.split()]
    return found


def _measured(measure: Measure, run: dict[str, Any], cell: str, step: int | None) -> dict[str, Any]:
    at = str(end_of(run) if step is None else step)
    return run["measures"].get(at, {}).get(measure.kind, {}).get(cell, {})


def end_of(run: dict[str, Any]) -> int:
    """The step at the end of a run, at which the most is measured."""
    return max(map(int, run["measures"]), default=0)


def contrast(measure: Measure, first: Runs, second: Runs, cells: Sequence[str]) -> Value:
    """How much the first arm has more than the second: mean and interval of the differences at the same seeds and scenes."""
    one, other = by_scene(measure, first, cells), by_scene(measure, second, cells)
    differences = [[a - b for a, b in zip(one[seed], other[seed], strict=True)] for seed in one if seed in other]
    return _value(over_seeds_and_scenes(differences), measure.factor)


def _value(estimate: Estimate, factor: float) -> Value:
    return Value(*(factor * x for x in (estimate.mean, estimate.mean - estimate.half, estimate.mean + estimate.half)))


def cell_text(value: Value, digits: int) -> str:
    """Text such as "41.2 [35.0, 47.4]", without an interval where none is known, "-" where nothing was measured."""
    if math.isnan(value.mean):
        return "-"
    text = f"{value.mean:.{digits}f}"
    return text if math.isnan(value.low) else f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def verdict(difference: Value) -> str:
    """What an interval of a difference says."""
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "not resolved"


def by_arm(results: dict[str, Any], part: str) -> dict[str, Runs]:
    """The runs of each arm of a part that are measured, in the order of the plan."""
    runs = [run for run in results["runs"] if run["part"] == part and run["measures"]]
    return {name: [run for run in runs if run["arm"] == name] for name in dict.fromkeys(run["arm"] for run in runs)}


def cells_of(arms: dict[str, Runs]) -> list[str]:
    """The cells in which any of the runs was measured, in their order."""
    kinds = [kinds for runs in arms.values() for run in runs for kinds in run["measures"].values()]
    return list(dict.fromkeys(cell for found in kinds for cell in found.get("pictures", {})))


def cell_title(cell: str) -> str:
    """Such as "twins, K = 2"."""
    regime, _, k = cell.partition("_k")
    return f"{regime}, K = {k}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_table(results: dict[str, Any], part: str, cell: str) -> str:
    """All measures of the arms of a part in one cell, the judge on real renderings last."""
    arms, measures = by_arm(results, part), [*OF_REGIME[cell.partition("_k")[0]]]
    measures += [FRECHET] if cell == "distinct_k2" else []
    rows = []
    for runs in arms.values():
        seeds = len(by_scene(IDENTIFICATION, runs, [cell]))
        rows.append([runs[0]["meaning"], str(seeds), *(cell_text(value_of(m, runs, cell), m.digits) for m in measures)])
    first = next(iter(arms.values()))[0]["first_scene"]
    real = results["real"].get(str(first), {}).get(cell, {})
    rows.append(["*real renderings*", "", *(_real_cell(real, measure) for measure in measures)])
    return markdown([cell_title(cell), "seeds", *(measure.title for measure in measures)], rows)


def _real_cell(real: dict[str, Any], measure: Measure) -> str:
    share = real.get(measure.real) if measure.real else None
    if share is None or share["share"] is None:
        return "-"
    ends = (share[name] if share[name] is not None else math.nan for name in ("share", "low", "high"))
    return cell_text(Value(*(measure.factor * end for end in ends)), measure.digits)


def contrast_table(results: dict[str, Any], part: str) -> str:
    """The arms of a part against flow matching alone, at the same seeds and scenes: what decides first."""
    arms = by_arm(results, part)
    measured = cells_of(arms)
    compared = [(measure, [cell for cell in cells if cell in measured]) for measure, cells in CONTRASTS]
    compared = [(measure, cells) for measure, cells in compared if cells]
    rows = []
    for name, runs in arms.items():
        if name != BASELINE and runs[0]["steps"]:
            cells = [_difference_cell(measure, runs, arms.get(BASELINE, []), cells) for measure, cells in compared]
            rows.append([runs[0]["meaning"], *cells])
    titles = [f"{measure.title.split(' (')[0]}, {' and '.join(map(cell_title, cells))}" for measure, cells in compared]
    return markdown(["difference to flow matching only, points", *titles], rows)


def _difference_cell(measure: Measure, first: Runs, second: Runs, cells: Sequence[str]) -> str:
    difference = contrast(measure, first, second, cells)
    return f"{cell_text(difference, 1)}: {verdict(difference)}"


def intervention_table(results: dict[str, Any], part: str, cell: str) -> str:
    """What each intervention adds to L_diff, x 1e3, at the end of the runs."""
    columns = (L_DIFF, *CHANGES.values())
    rows = [[runs[0]["meaning"], *(cell_text(value_of(m, runs, cell), m.digits) for m in columns)] for runs in _trained(results, part)]
    return markdown([cell_title(cell), *(measure.title for measure in columns)], rows)


def noise_table(results: dict[str, Any], part: str, cell: str) -> str:
    """The same by thirds of noise, without intervals."""
    rows = []
    for runs in _trained(results, part):
        for name, measure in CHANGES.items():
            levels = [value_of(measure._replace(name=f"{name}_{level}"), runs, cell) for level in NOISE_LEVELS]
            rows.append([runs[0]["meaning"], measure.title, *(cell_text(Value(v.mean, math.nan, math.nan), 1) for v in levels)])
    return markdown([cell_title(cell), "intervention", *(f"{level} noise" for level in NOISE_LEVELS)], rows)


def diagnosis_table(results: dict[str, Any], part: str, measures: Sequence[Measure], cell: str = "distinct_k2") -> str:
    """Where target tokens look, or how losses pull."""
    rows = [[runs[0]["meaning"], *(cell_text(value_of(m, runs, cell), m.digits) for m in measures)] for runs in _trained(results, part)]
    return markdown([cell_title(cell), *(measure.title for measure in measures)], rows)


def steps_table(results: dict[str, Any], part: str, measure: Measure, cell: str) -> str:
    """One measure of the arms over the steps at which they were measured."""
    arms = _trained(results, part)
    steps = steps_of(arms)
    rows = [[runs[0]["meaning"], *(cell_text(value_of(measure, runs, cell, step), measure.digits) for step in steps)] for runs in arms]
    return markdown([f"{measure.title}, {cell_title(cell)}", *(f"{step:,}" for step in steps)], rows)


def steps_of(arms: Sequence[Runs]) -> list[int]:
    """All steps at which any of the runs was measured."""
    return sorted({int(step) for runs in arms for run in runs for step in run["measures"]})


def _trained(results: dict[str, Any], part: str) -> list[Runs]:
    return [runs for runs in by_arm(results, part).values() if runs[0]["steps"]]


def run_table(results: dict[str, Any]) -> str:
    """Where every number comes from."""
    rows = []
    for run in results["runs"]:
        adapter, time = (run["adapter_digest"] or "-")[:12], f"{run['training_seconds']:.0f}"
        digests = [run["config"], run["config_digest"][:12], adapter, run["status"]]
        rows.append([run["folder"], str(run["seed"]), str(run["steps"]), run["start"] or "-", time, *digests])
    return markdown(["run folder", "seed", "steps", "start", "training s", "config", "config digest", "adapter digest", "status"], rows)
