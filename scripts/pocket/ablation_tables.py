"""The tables of an ablation in Markdown, from its results file alone."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from scripts.pocket.statistics import over_seeds

Runs = Sequence[dict[str, Any]]
MAX_TRAINED_K = 4


class Measure(NamedTuple):
    """One number per run and K.

    Attributes:
        title: For tables.
        path: Where it stands in a run's measures.
        factor: What it is multiplied with.
        digits: After the point.
        real: Whether real renderings have it.
    """

    title: str
    path: tuple[str, ...]
    factor: float = 100.0
    digits: int = 1
    real: bool = False


IDENTIFICATION = Measure("identification, % (chance 12.5)", ("identification",), real=True)
LEAKAGE = Measure("leakage, %", ("leakage",), real=True)
PRESENCE = Measure("class present, %", ("presence",), real=True)
FRECHET = Measure("Frechet distance to real renderings", ("frechet",), 1.0, 3, real=True)
EXACT = Measure("attention exact, %", ("attention", "exact"))
NEAR = Measure("attention within one token, %", ("attention", "near"))
ENTROPY = Measure("attention entropy, nats", ("shape", "entropy"), 1.0, 2)
OVERLAP = Measure("overlap between references, %", ("shape", "overlap"))
MEASURES = (IDENTIFICATION, LEAKAGE, PRESENCE, FRECHET, EXACT, NEAR, ENTROPY, OVERLAP)


class Value(NamedTuple):
    """A number with its 95 % interval; the ends are not numbers where none is known."""

    mean: float
    low: float
    high: float


def value_of(measure: Measure, runs: Runs, k: int) -> Value:
    """Mean and interval of one arm at one K: Student's t over seeds; of a single seed the Wilson interval, if it is a share."""
    found = [_look_up(measure, run["measures"].get(str(k))) for run in runs]
    found = [entry for entry in found if entry is not None]
    shares = [entry["share"] if isinstance(entry, dict) else entry for entry in found]
    if len(found) == 1 and isinstance(found[0], dict):
        only = found[0]
        return Value(*(math.nan if only[name] is None else measure.factor * only[name] for name in ("share", "low", "high")))
    estimate = over_seeds(shares)
    return Value(*(measure.factor * x for x in (estimate.mean, estimate.mean - estimate.half, estimate.mean + estimate.half)))


def _look_up(measure: Measure, measures: dict[str, Any] | None) -> Any:
    found: Any = measures
    for name in measure.path:
        found = found.get(name) if found is not None else None
    return found


def cell(value: Value, digits: int) -> str:
    """Text such as "41.2 [35.0, 47.4]", without an interval where none is known, "-" where nothing was measured."""
    if math.isnan(value.mean):
        return "-"
    text = f"{value.mean:.{digits}f}"
    return text if math.isnan(value.low) else f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def by_arm(results: dict[str, Any], part: str) -> dict[str, Runs]:
    """The runs of each arm of a part, in the order of the plan."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        if part in run["parts"]:
            arms.setdefault(run["arm"], []).append(run)
    return arms


def ks_of(runs: Sequence[Runs]) -> list[int]:
    """Numbers of references at which any of the runs was measured."""
    return sorted({int(k) for arm in runs for run in arm for k in run["measures"]})


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_table(results: dict[str, Any], k: int, measures: Sequence[Measure] = MEASURES) -> str:
    """Measures of the main arms at one K (the analogue of Table 3)."""
    rows = []
    for runs in by_arm(results, "main").values():
        rows.append([runs[0]["meaning"], str(len(runs)), *(cell(value_of(m, runs, k), m.digits) for m in measures)])
    rows.append(["*real renderings*", "", *(_real_cell(results, m, k) for m in measures)])
    return markdown([f"arm, K = {k}", "seeds", *(m.title for m in measures)], rows)


def k_table(results: dict[str, Any], measure: Measure) -> str:
    """One measure of the main arms over K."""
    arms = by_arm(results, "main")
    ks = ks_of(list(arms.values()))
    rows = [[runs[0]["meaning"], *(cell(value_of(measure, runs, k), measure.digits) for k in ks)] for runs in arms.values()]
    if measure.real:
        rows.append(["*real renderings*", *(_real_cell(results, measure, k) for k in ks)])
    header = [f"K = {k}" + (" (unseen)" if k > MAX_TRAINED_K else "") for k in ks]
    return markdown([measure.title, *header], rows)


def factor_table(results: dict[str, Any], k: int) -> str:
    """One-factor variants at one K, and whether their interval of identification lies apart from the baseline's."""
    arms = by_arm(results, "factors")
    measures = (IDENTIFICATION, LEAKAGE, NEAR, ENTROPY, OVERLAP, FRECHET)
    baseline = value_of(IDENTIFICATION, next(iter(arms.values())), k)
    rows = []
    for runs in arms.values():
        own = value_of(IDENTIFICATION, runs, k)
        place = (
            ["baseline", runs[0]["meaning"]]
            if not runs[0]["factor"] or runs[0]["factor"] == "none"
            else [runs[0]["factor"], runs[0]["meaning"]]
        )
        rows.append([*place, str(len(runs)), *(cell(value_of(m, runs, k), m.digits) for m in measures), apart(own, baseline)])
    rows.append(["*real renderings*", "", "", *(_real_cell(results, m, k) for m in measures), ""])
    return markdown(["factor", f"value, K = {k}", "seeds", *(m.title for m in measures), "identification against the baseline"], rows)


def apart(own: Value, baseline: Value) -> str:
    """Where an interval lies beside another."""
    if own.low > baseline.high:
        return "higher"
    return "lower" if own.high < baseline.low else "not apart"


def attention_table(results: dict[str, Any]) -> str:
    """Modes of reference attention: identification, leakage and seconds per picture over K."""
    arms = by_arm(results, "attention")
    ks = ks_of(list(arms.values()))
    rows = []
    for measure in (IDENTIFICATION, LEAKAGE, FRECHET):
        for runs in arms.values():
            rows.append([measure.title, runs[0]["meaning"], *(cell(value_of(measure, runs, k), measure.digits) for k in ks)])
        rows.append([measure.title, "*real renderings*", *(_real_cell(results, measure, k) for k in ks)])
    seconds: dict[str, dict[int, float]] = {}
    for entry in results["timings"]:
        name = entry["reference_attention"] + (", keys and values computed once" if entry["reference_cache"] else "")
        seconds.setdefault(name, {})[entry["num_references"]] = entry["seconds_per_image"]
    for name, found in seconds.items():
        rows.append(["seconds per picture", name, *(f"{found[k]:.2f}" if k in found else "-" for k in ks)])
    return markdown(["", "a reference sees", *(f"K = {k}" for k in ks)], rows)


def run_table(results: dict[str, Any]) -> str:
    """Where every number comes from."""
    rows = []
    for run in results["runs"]:
        adapter = (run["adapter_digest"] or "-")[:12]
        time = f"{run['training_seconds']:.0f}"
        rows.append(
            [run["folder"], str(run["seed"]), str(run["steps"]), time, run["config"], run["config_digest"][:12], adapter, run["status"]]
        )
    return markdown(["run folder", "seed", "steps", "training s", "config", "config digest", "adapter digest", "status"], rows)


def _real_cell(results: dict[str, Any], measure: Measure, k: int) -> str:
    entry = results["real"].get(str(k))
    if entry is None or not measure.real:
        return "-"
    return cell(value_of(measure, [{"measures": {str(k): entry}}], k), measure.digits)
