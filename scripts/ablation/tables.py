"""The tables of an ablation in Markdown, from its results file alone."""

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

from scripts.pocket.statistics import Estimate, over_seeds, over_seeds_and_scenes

Runs = Sequence[dict[str, Any]]
MAX_TRAINED_K = 4


class Measure(NamedTuple):
    """One number per run and K.

    Attributes:
        title: For tables.
        name: Under which a run's measures have it scene by scene; "": one number of all K together.
        factor: What it is multiplied with.
        digits: After the point.
        real: Which share of real renderings to set beside it, or "frechet" for their distance; "": they have none.
        chance: Name of its chance level among a run's pooled attention measures.
        pooled: It is one number of all scenes together.
    """

    title: str
    name: str
    factor: float = 100.0
    digits: int = 1
    real: str = ""
    chance: str = ""
    pooled: bool = False


IDENTIFICATION = Measure("identification, % (chance 12.5)", "identification", real="identification")
# all subjects of a real rendering are present
IF_PRESENT = Measure("identification of present subjects, %", "identification_if_present", real="identification")
LEAKAGE = Measure("leakage, %", "leakage", real="leakage")
PRESENCE = Measure("class present, %", "presence", real="presence")
EXACT = Measure("attention exact, %", "exact", chance="exact_chance")
NEAR = Measure("attention within one token, %", "near", chance="near_chance")
ATTENTION_LEAKAGE = Measure("attention leakage, %", "attention_leakage", chance="leakage_chance")
ENTROPY = Measure("attention entropy, nats", "entropy", 1.0, 2)
OVERLAP = Measure("overlap between references, %", "overlap")
FRECHET = Measure("Frechet distance to real renderings, all K", "", 1.0, 2, real="frechet")
ON_REFERENCES = Measure("attention on references, %", "on_references")
OWN_REFERENCE = Measure("of it on the own one, %", "own_reference")
PEAK_EXACT = Measure("peak exact, %", "peak_exact")
PEAK_NEAR = Measure("peak within one token, %", "peak_near")
PULLS = (
    Measure("L_diff", "flow_matching", 1.0, 3, pooled=True),
    Measure("SCAL's pull", "correspondence_pull", 1.0, 1, pooled=True),
    Measure("its cosine", "correspondence_cosine", 1.0, 2, pooled=True),
    Measure("MDL's pull", "disentanglement_pull", 1.0, 1, pooled=True),
    Measure("its cosine", "disentanglement_cosine", 1.0, 2, pooled=True),
)
TARGET_ROWS = (ON_REFERENCES, OWN_REFERENCE, PEAK_EXACT, PEAK_NEAR)
MEASURES = (IDENTIFICATION, LEAKAGE, PRESENCE, IF_PRESENT, EXACT, NEAR, ATTENTION_LEAKAGE, ENTROPY, OVERLAP)
PRIMARY_KS = (2, 3, 4)  # over which contrasts are taken
CONTRASTS = {
    "main": (
        ("scal", "flow_matching"),
        ("paper", "scal"),
        ("stable", "scal"),
        ("stable", "paper"),
        ("release", "paper"),
        ("light", "paper"),
        ("light", "stable"),
        ("paper", "flow_matching"),
        ("stable", "flow_matching"),
        ("release", "flow_matching"),
        ("light", "flow_matching"),
    ),
    "attention": (("isolated", "stable"), ("joint", "stable")),
}


class Value(NamedTuple):
    """A number with its 95 % interval; the ends are not numbers where none is known."""

    mean: float
    low: float
    high: float


def value_of(measure: Measure, runs: Runs, k: int) -> Value:
    """Mean and interval of one arm at one K, over seeds and scenes."""
    if not measure.name:
        return _value(over_seeds([run.get("frechet") for run in runs]), measure.factor)
    if measure.pooled:
        return _value(over_seeds([(run["measures"].get(str(k)) or {}).get(measure.name) for run in runs]), measure.factor)
    value = _value(over_seeds_and_scenes(list(by_scene(measure, runs, [k]).values())), measure.factor)
    return Value(value.mean, max(value.low, 0.0), min(value.high, 100.0)) if measure.factor == 100.0 else value


def by_scene(measure: Measure, runs: Runs, ks: Sequence[int]) -> dict[int, list[float]]:
    """The numbers of all scenes of some K, by seed; runs that lack one of the K are left out."""
    found = {}
    for run in runs:
        texts = [(run["measures"].get(str(k)) or {}).get("scenes", {}).get(measure.name) for k in ks]
        if all(text is not None for text in texts):
            found[run["seed"]] = [float(number) for text in texts for number in text.split()]
    return found


def contrast(measure: Measure, first: Runs, second: Runs, ks: Sequence[int]) -> Value:
    """How much the first arm has more than the second: mean and interval of the differences at the same seeds and scenes."""
    one, other = by_scene(measure, first, ks), by_scene(measure, second, ks)
    differences = [[a - b for a, b in zip(one[seed], other[seed], strict=True)] for seed in one if seed in other]
    return _value(over_seeds_and_scenes(differences), measure.factor)


def _value(estimate: Estimate, factor: float) -> Value:
    return Value(*(factor * x for x in (estimate.mean, estimate.mean - estimate.half, estimate.mean + estimate.half)))


def cell(value: Value, digits: int) -> str:
    """Text such as "41.2 [35.0, 47.4]", without an interval where none is known, "-" where nothing was measured."""
    if math.isnan(value.mean):
        return "-"
    text = f"{value.mean:.{digits}f}"
    return text if math.isnan(value.low) else f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def by_arm(results: dict[str, Any], part: str) -> dict[str, Runs]:
    """The runs of each arm of a part, in the order of the plan."""
    runs = [run for run in results["runs"] if part in run["parts"]]
    return {name: [run for run in runs if run["arm"] == name] for name in dict.fromkeys(run["arm"] for run in runs)}


def ks_of(runs: Sequence[Runs]) -> list[int]:
    """Numbers of references at which any of the runs was measured."""
    return sorted({int(k) for arm in runs for run in arm for k in run["measures"]})


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_table(results: dict[str, Any], k: int, measures: Sequence[Measure] = (*MEASURES, FRECHET)) -> str:
    """Measures of the main arms at one K (the analogue of Table 3)."""
    rows = []
    for runs in by_arm(results, "main").values():
        seeds = len(by_scene(IDENTIFICATION, runs, [k]))
        rows.append([runs[0]["meaning"], str(seeds), *(cell(value_of(m, runs, k), m.digits) for m in measures)])
    rows.append(["*chance*", "", *(_chance_cell(results, m, k) for m in measures)])
    rows.append(["*real renderings*", "", *(_real_cell(results, m, k) for m in measures)])
    return markdown([f"arm, K = {k}", "seeds", *(m.title for m in measures)], rows)


def k_table(results: dict[str, Any], measure: Measure) -> str:
    """One measure of the main arms over K."""
    arms = by_arm(results, "main")
    ks = ks_of(list(arms.values()))
    rows = [[runs[0]["meaning"], *(cell(value_of(measure, runs, k), measure.digits) for k in ks)] for runs in arms.values()]
    if measure.chance:
        rows.append(["*chance*", *(_chance_cell(results, measure, k) for k in ks)])
    if measure.real:
        rows.append(["*real renderings*", *(_real_cell(results, measure, k) for k in ks)])
    return markdown([measure.title, *map(_k_title, ks)], rows)


def published_table(results: dict[str, Any]) -> str:
    """Identification and leakage of the main arms without image guidance, as the method was published."""
    return _table_of(results, "published", "image guidance 1", (IDENTIFICATION, LEAKAGE))


def target_rows_table(results: dict[str, Any], only: Sequence[int] | None = None) -> str:
    """Where the target tokens of points look in the main arms, at all K or only some."""
    return _table_of(results, "target_rows", "target tokens of points", TARGET_ROWS, only)


def gradient_table(results: dict[str, Any], only: Sequence[int] | None = None) -> str:
    """How the losses pull at the adapters of the main arms, at all K or only some."""
    return _table_of(results, "gradients", "at the end of training", PULLS, only)


def _table_of(results: dict[str, Any], part: str, title: str, measures: Sequence[Measure], only: Sequence[int] | None = None) -> str:
    """Measures of the trained main arms over K, from another part of a run than its usual measures."""
    trained = {name: runs for name, runs in by_arm(results, "main").items() if runs[0]["steps"]}
    arms = {name: [{**run, "measures": run[part]} for run in runs] for name, runs in trained.items()}
    ks = [k for k in ks_of(list(arms.values())) if only is None or k in only]
    rows = []
    for runs in arms.values():
        rows.append([runs[0]["meaning"], *(cell(value_of(m, runs, k), m.digits) for m in measures for k in ks)])
    if any(measure.real for measure in measures):
        rows.append(["*real renderings*", *(_real_cell(results, m, k) for m in measures for k in ks)])
    return markdown([title, *(f"{measure.title}, K = {k}" for measure in measures for k in ks)], rows)


def contrast_table(results: dict[str, Any]) -> str:
    """The arms against each other, at the same seeds and scenes."""
    rows = []
    for first, second in _compared(results):
        ks = [k for k in PRIMARY_KS if k in ks_of([first]) and k in ks_of([second])]
        cells = [_difference_cell(measure, first, second, ks) for measure in (IDENTIFICATION, LEAKAGE, NEAR)]
        rows.append([_pair(first, second), ", ".join(map(str, ks)), *cells])
    titles = (measure.title.split(" (")[0] for measure in (IDENTIFICATION, LEAKAGE, NEAR))
    return markdown(["difference, percentage points", "K", *titles], rows)


def contrast_k_table(results: dict[str, Any]) -> str:
    """Identification of the arms against each other, at the same seeds and scenes, K by K."""
    pairs = _compared(results)
    ks = ks_of([runs for pair in pairs for runs in pair])
    rows = [[_pair(*pair), *(_difference_cell(IDENTIFICATION, *pair, [k]) for k in ks)] for pair in pairs]
    return markdown(["difference in identification, percentage points", *map(_k_title, ks)], rows)


def _compared(results: dict[str, Any]) -> list[tuple[Runs, Runs]]:
    """The runs of the arms that are compared, where both are there."""
    arms = {part: by_arm(results, part) for part in CONTRASTS}
    pairs = [(arms[part], names) for part, contrasts in CONTRASTS.items() for names in contrasts]
    return [(found[first], found[second]) for found, (first, second) in pairs if first in found and second in found]


def _pair(first: Runs, second: Runs) -> str:
    return f"{first[0]['meaning']} - {second[0]['meaning']}"


def _difference_cell(measure: Measure, first: Runs, second: Runs, ks: Sequence[int]) -> str:
    difference = contrast(measure, first, second, ks)
    return f"{cell(difference, 1)}: {verdict(difference)}"


def _k_title(k: int) -> str:
    return f"K = {k}" + (" (unseen)" if k > MAX_TRAINED_K else "")


def factor_table(results: dict[str, Any], k: int) -> str:
    """One-factor variants at one K, and whether they differ from the baseline at the same scenes.

    Raises:
        ValueError: The results have no baseline.
    """
    arms = by_arm(results, "factors")
    measures = (IDENTIFICATION, LEAKAGE, NEAR, ATTENTION_LEAKAGE, ENTROPY, OVERLAP)
    baseline = baseline_of(results)
    rows = []
    for runs in arms.values():
        place = ["baseline" if is_baseline(runs) else runs[0]["factor"], runs[0]["meaning"]]
        against = ["", ""] if is_baseline(runs) else [verdict(contrast(measure, runs, baseline, [k])) for measure in (IDENTIFICATION, NEAR)]
        rows.append([*place, str(len(runs)), *(cell(value_of(m, runs, k), m.digits) for m in measures), *against])
    rows.append(["*real renderings*", "", "", *(_real_cell(results, m, k) for m in measures), "", ""])
    against = ["identification against the baseline", "attention within one token against it"]
    return markdown(["factor", f"value, K = {k}", "seeds", *(m.title for m in measures), *against], rows)


def baseline_of(results: dict[str, Any]) -> Runs:
    """The runs that one-factor variants are compared with.

    Raises:
        ValueError: There are none.
    """
    found = [runs for runs in by_arm(results, "factors").values() if is_baseline(runs)]
    if not found:
        raise ValueError('the results have variants without their baseline: run the ablation with --arms that name "stable", too.')
    return found[0]


def is_baseline(runs: Runs) -> bool:
    """Whether these are the runs without a changed factor."""
    return runs[0]["factor"] in ("", "none")


def seed_deviation(results: dict[str, Any], measure: Measure, k: int) -> float:
    """Standard deviation of an arm's mean from seed to seed, pooled over the main arms; not a number where none has two seeds."""
    means = [[fmean(row) for row in by_scene(measure, runs, [k]).values()] for runs in by_arm(results, "main").values()]
    variances = [variance(values) for values in means if len(values) > 1]
    return measure.factor * math.sqrt(fmean(variances)) if variances else math.nan


def verdict(difference: Value) -> str:
    """What an interval of a difference says."""
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "not resolved"


def attention_table(results: dict[str, Any]) -> str:
    """Modes of reference attention: identification, leakage and seconds per picture over K."""
    arms = by_arm(results, "attention")
    ks = ks_of(list(arms.values()))
    rows = []
    for measure in (IDENTIFICATION, LEAKAGE):
        for runs in arms.values():
            mode = runs[0]["settings"].get("model.reference_attention", "target")  # the run of "target" is that of the main arm
            rows.append([measure.title, mode, *(cell(value_of(measure, runs, k), measure.digits) for k in ks)])
        rows.append([measure.title, "*real renderings*", *(_real_cell(results, measure, k) for k in ks)])
    seconds: dict[str, dict[int, float]] = {}
    for entry in results["timings"]:
        name = entry["reference_attention"] + (", keys and values computed once" if entry["reference_cache"] else "")
        seconds.setdefault(name, {})[entry["num_references"]] = entry["seconds_per_image"]
    for name, found in seconds.items():
        rows.append(["seconds per picture", name, *(f"{found[k]:.2f}" if k in found else "-" for k in ks)])
    return markdown(["", "reference attention", *(f"K = {k}" for k in ks)], rows)


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


def _chance_cell(results: dict[str, Any], measure: Measure, k: int) -> str:
    """What uniform attention would have: of the scenes, so alike in all runs."""
    pooled = (run["measures"].get(str(k), {}).get("attention") or {} for run in results["runs"])
    found = next((value for attention in pooled if (value := attention.get(measure.chance)) is not None), None)
    return "-" if found is None else f"{measure.factor * found:.{measure.digits}f}"


def _real_cell(results: dict[str, Any], measure: Measure, k: int) -> str:
    if measure.real == "frechet":
        found = results["real_frechet"]
        return "-" if found is None else f"{found:.{measure.digits}f}"
    share = results["real"].get(str(k), {}).get(measure.real)
    if share is None or share["share"] is None:
        return "-"
    return cell(Value(*(measure.factor * share[name] for name in ("share", "low", "high"))), measure.digits)
