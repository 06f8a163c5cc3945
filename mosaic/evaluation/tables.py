"""Tables of scores: ours beside those that were published, each with what it was measured by."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mosaic.evaluation.benchmarks import BENCHMARKS
from mosaic.evaluation.published import AVERAGED, overall, published_for
from mosaic.files import nearest, read_json, shown

SCORES = "scores.json"
SINGLE, MULTI = "xversebench", "xversebench_multi"  # the lists of which Overall is the mean
NAMES = {
    "clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO", "dpg": "DPG", "id_sim": "ID-Sim", "ip_sim": "IP-Sim", "aes": "AES",
    "avg": "AVG", "overall": "Overall", "instance": "instance", "leakage": "leakage", "missing": "missing", "doubled": "doubled",
    "judge_prompt": "judge: prompt", "judge_fidelity": "judge: fidelity", "judge_present": "judge: present",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        method: What made the pictures.
        values: By metric, in percent.
        intervals: By metric, [low, high]; those that are not known are left out.
        protocol: What the values were measured with and of; differences from the benchmark's protocol first.
        ours: Whether it was measured here.
    """

    method: str
    values: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]
    protocol: str
    ours: bool


@dataclass(frozen=True)
class Table:
    """Rows of one benchmark.

    Attributes:
        benchmark: Its name.
        about: What it is.
        metrics: The columns.
        rows: Published ones first.
    """

    benchmark: str
    about: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


def read_scores(path: Path) -> dict[str, Any]:
    """Read what `bench.py score` wrote.

    Args:
        path: `scores.json`, or the folder that holds it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else.
    """
    file = path / SCORES if path.is_dir() else path
    values = read_json(file)
    if not isinstance(values, dict) or values.get("format") != "mosaic-scores":
        raise ValueError(f"{file}: must be a file that `bench.py score` wrote, got {shown(values)}.")
    if values.get("benchmark") not in BENCHMARKS:
        raise ValueError(
            f"{file}: is of the unknown benchmark {shown(values.get('benchmark'))}.{nearest(str(values.get('benchmark')), BENCHMARKS)}"
        )
    return values


def make_tables(scored: Sequence[tuple[str, Mapping[str, Any]]], *, with_published: bool = True) -> list[Table]:
    """A table for each benchmark.

    Args:
        scored: Name of the method, and its scores as `read_scores` gives them.
        with_published: Whether published rows come first.
    """
    tables = []
    for name in dict.fromkeys(scores["benchmark"] for _, scores in scored):
        ours = [_our_row(method, scores) for method, scores in scored if scores["benchmark"] == name]
        published = [
            Row(row.method, row.values, {}, f"{row.source}: {row.protocol}", False) for row in published_for(name) if with_published
        ]
        if name == MULTI:
            published = [_with_overall(row, {one.method: one.values for one in published_for(SINGLE)}) for row in published]
            ours = [_with_overall(row, {method: scores for method, scores in scored if scores["benchmark"] == SINGLE}) for row in ours]
        metrics = [metric for metric in NAMES if any(metric in row.values for row in (*published, *ours))]
        tables.append(Table(name, BENCHMARKS[name].about, tuple(metrics), (*published, *ours)))
    return tables


def _with_overall(row: Row, single: Mapping[str, Mapping[str, Any]]) -> Row:
    """A row of XVerseBench's second list with Overall, where all four metrics of both lists are known of the method."""
    both = (single.get(row.method, {}), row.values)
    if not all(values.get(metric) is not None for values in both for metric in AVERAGED):
        return row
    return replace(row, values={**row.values, "overall": overall(*both)})


def to_markdown(table: Table) -> str:
    """A table with a note per protocol; rows of one protocol share its number, so that those of different ones are told apart."""
    notes = list(dict.fromkeys(row.protocol for row in table.rows))
    lines = [f"| {table.benchmark} | " + " | ".join(NAMES[metric] for metric in table.metrics) + " | measured |"]
    lines.append("|" + "---|" * (len(table.metrics) + 2))
    for row in table.rows:
        cells = [_cell(row, metric) for metric in table.metrics]
        method = f"**{row.method}**" if row.ours else row.method
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {notes.index(row.protocol) + 1} |")
    return "\n".join([*lines, "", *(f"{number}. {note}." for number, note in enumerate(notes, 1))]) + "\n"


def _cell(row: Row, metric: str) -> str:
    """A value with its interval."""
    if metric not in row.values or row.values[metric] is None:
        return "-"
    low, high = row.intervals.get(metric, (None, None))
    return f"{row.values[metric]:.2f}" + ("" if low is None or high is None else f" ({low:.1f} to {high:.1f})")


def _our_row(method: str, scores: Mapping[str, Any]) -> Row:
    metrics = [metric for metric in NAMES if metric in scores]
    values = {metric: scores[metric] for metric in metrics}
    return Row(
        method, values, {metric: scores["intervals"].get(metric, (None, None)) for metric in metrics}, protocol_in_words(scores), True
    )


def protocol_in_words(scores: Mapping[str, Any]) -> str:
    """What scores were measured of and with; what differs from the benchmark's protocol comes first."""
    differences = differences_of(scores)
    made = scores["protocol"]
    pictures = f"{scores['num_cases']} cases x {scores['num_runs']} pictures"
    size = f"{made['size']} px, seeds from {made['seed']}" if made else "sizes and seeds of another generator"
    models = "; ".join(
        f"{NAMES[metric]} by {of['model']} ({of['revision'][:8]})" for metric, of in scores["models"].items() if metric in NAMES
    )
    said = f"DIFFERS from the protocol in {', '.join(differences)}: " if differences else ""
    return f"measured here: {said}{pictures}, {size}; {models}"


def differences_of(scores: Mapping[str, Any]) -> list[str]:
    """What of scores is not the benchmark's protocol, a word or two each."""
    benchmark = BENCHMARKS[scores["benchmark"]]
    found = []
    if scores["partial"]:
        found.append(f"{len(scores['left_out'])} PROBLEMS LEFT OUT")
    if scores["num_cases"] != benchmark.num_cases:
        found.append(f"cases ({scores['num_cases']}, not {benchmark.num_cases})")
    wanted = asdict(benchmark.protocol)
    made = scores["protocol"] or {"runs": scores["num_runs"]}
    found += [f"{name} ({made[name]}, not {wanted[name]})" for name in wanted if name in made and made[name] != wanted[name]]
    for metric, of in scores["models"].items():
        model = benchmark.models.get(metric)
        if model is not None and of["model"] not in (model, model.split("/")[-1]):
            found.append(f"{NAMES.get(metric, metric)}'s model (not {model})")
    return found
