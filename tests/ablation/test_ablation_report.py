"""Tables and figures of a made-up results file: numbers by hand, and every run named."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mosaic.reports.charts import COLOURS, Point, Row, Series, line_chart, nice_ticks, row_chart
from scripts import ablation_figures
from scripts.ablation import readme as ablation_readme
from scripts.ablation import tables
from scripts.ablation.arms import PARTS
from scripts.ablation.figures import TITLES, draw
from scripts.ablation.plots import mean_curve
from scripts.ablation.readme import MARKER
from scripts.ablation.results import CURVE_POINTS, FORMAT, VERSION, curves_of
from scripts.ablation.tables import (
    APART,
    CHANGES,
    FRECHET,
    IDENTIFICATION,
    NEAR,
    PULLS,
    TARGET_ROWS,
    Value,
    cell_text,
    contrast,
    value_of,
    verdict,
)
from scripts.pocket.interventions import INTERVENTIONS, NOISE_LEVELS, PLAIN

CELLS = ("distinct_k2", "twins_k2", "distinct_k3")


def share(value: float) -> dict[str, Any]:
    return {"share": value, "low": value - 0.1, "high": value + 0.2, "count": 20}


def text(*values: float) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def pictures(identification: float, cell: str, attention: bool = True) -> dict[str, Any]:
    """Four scenes around a mean; twins are apart half as often as they are identified."""
    around = (identification - 0.1, identification, identification, identification + 0.1)
    scenes = {"identification": text(*around), "presence": text(*[0.9] * 4), "leakage": text(*[0.1] * 4)}
    found = {"identification": share(identification), "leakage": share(0.1), "presence": share(0.9), "seconds": 1.0}
    if cell.startswith("twins"):
        scenes |= {
            "apart": text(*(x / 2 for x in around)),
            "same_look": text(*[0.4] * 4),
            "blending": text(*[0.2] * 4),
            "missing": text(0, 0, 0, 0),
        }
        found |= {"apart": share(identification / 2)}
    if attention:
        scenes |= {"exact": text(*[0.2] * 4), "near": text(*[0.4] * 4), "overlap": text(*[0.3] * 4)}
    return {**found, "scenes": scenes}


def changes(seed: int) -> dict[str, Any]:
    """L_diff 0.23; interventions add 1, 2, ... e-3, at high noise three times that."""
    scenes = {PLAIN: text(0.23, 0.23)}
    for number, name in enumerate(INTERVENTIONS, 1):
        scenes[name] = text(number * 1e-3, (number + seed) * 1e-3)
        scenes |= {f"{name}_{level}": text(*[number * factor * 1e-3] * 2) for level, factor in zip(NOISE_LEVELS, (0, 0, 3), strict=True)}
    return {"scenes": scenes, "seconds": 1.0}


def run(arm: str, seed: int, identification: float, part: str = "scratch", steps: tuple[int, ...] = (5, 10)) -> dict[str, Any]:
    trained = arm != "base"
    measures: dict[str, Any] = {}
    for step in steps if trained else (0,):
        drawn = identification * (step / 10 if trained else 1)
        measures[str(step)] = {"pictures": {cell: pictures(drawn, cell, trained) for cell in (CELLS if step in (0, 10) else CELLS[:2])}}
        if trained:
            measures[str(step)]["interventions"] = {cell: changes(seed) for cell in CELLS}
    if trained and part == "scratch":
        looks = {"on_references": "0.1 0.2", "own_reference": "0.6 0.7", "peak_exact": "0.3 0.5", "peak_near": "0.5 0.5"}
        pull = {"flow_matching": 0.15, "correspondence_pull": 3.0 + seed, "correspondence_cosine": -0.45, "disentanglement_pull": 0.5,
                "disentanglement_cosine": 0.3, "seconds": 1.0}  # fmt: skip
        measures["10"] |= {"target_rows": {"distinct_k2": {"scenes": looks, "seconds": 1.0}}, "gradients": {"distinct_k2": pull}}
    return {
        "name": f"{part}_{arm}_{seed}", "part": part, "arm": arm, "meaning": f"arm {arm}", "seed": seed, "steps": 10 * trained, "first_scene": 7,
        "start": "runs/source/lora.safetensors" if part == "late" else None,
        "folder": f"runs/{part}_{arm}_{seed}", "config": f"configs/{part}_{arm}_{seed}.json", "config_digest": "c" * 64,
        "adapter_digest": "a" * 64 if trained else None, "settings": {}, "status": "finished", "complete": True, "training_seconds": 5.0,
        "commit": "abd" if seed else "abc", "frechet": 1.5 + seed, "measures": measures,
        "curves": {"loss/flow_matching": [[5, 1.0 + seed], [10, 0.5 + seed]]} if trained else {},
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    runs = [run("base", 0, 0.1), *(run("flow_matching", seed, value) for seed, value in enumerate((0.2, 0.4, 0.9)))]
    runs += [run("scal", seed, value) for seed, value in enumerate((0.6, 0.7, 0.9))]
    runs += [run("flow_matching", 20, 0.5, "late", (10,)), run("light", 20, 0.6, "late", (10,))]
    return {
        "format": FORMAT, "version": VERSION, "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "complete": True, "runs": runs,
        "size": {"name": "short", "cases": 8, "checkpoint_cases": 4, "steps": 10, "late_steps": 10, "late_from": 5, "batch_size": 4,
                 "train_samples": 40, "max_subjects": 3},
        "hardware": {"processor": "a processor", "cores": 2, "memory_gib": 4.0, "side_by_side": 2, "threads": 1}, "versions": {"torch": "2"},
        "data": {"folder": "data", "manifest_digest": "d" * 64}, "model": {"name": "m", "digest": "e" * 64}, "judge_digest": "f" * 64,
        "seconds": {"training": 3600.0, "measuring": 36.0}, "real": {"7": {cell: pictures(0.75, cell, False) for cell in CELLS}},
    }  # fmt: skip


def arms_of(results: dict[str, Any]) -> dict[str, tables.Runs]:
    return tables.by_arm(results, "scratch")


def test_intervals_over_seeds_and_scenes(results: dict[str, Any]) -> None:
    arms = arms_of(results)
    # seeds 0.2, 0.4, 0.9 and scenes -0.1, 0, 0, 0.1, added up: MS_seed = 4 * 0.13, MS_scene = 3 * 0.02 / 3, no rest
    half = 100 * math.sqrt((4 * 0.13 + 0.02) / 12) * 4.3027  # 2 degrees of freedom and a little
    found = value_of(IDENTIFICATION, arms["flow_matching"], "distinct_k2")
    assert found == pytest.approx((50, max(50 - half, 0), min(50 + half, 100)))
    only = value_of(IDENTIFICATION, arms["base"], "distinct_k2")  # one run: over scenes
    assert only == pytest.approx((10, max(10 - 100 * 3.1824 * math.sqrt(0.02 / 3 / 4), 0), 10 + 100 * 3.1824 * math.sqrt(0.02 / 3 / 4)))
    assert math.isnan(value_of(NEAR, arms["base"], "distinct_k2").mean)
    assert value_of(FRECHET, arms["flow_matching"], "distinct_k2").mean == 2.5
    assert math.isnan(value_of(IDENTIFICATION, arms["base"], "distinct_k5").mean)
    assert value_of(APART, arms["flow_matching"], "twins_k2").mean == pytest.approx(25)
    assert value_of(APART, arms["flow_matching"], "twins_k2", 5).mean == pytest.approx(12.5)  # on the way


def test_arms_are_compared_at_the_same_seeds_and_scenes(results: dict[str, Any]) -> None:
    """Differences 0.4, 0.3, 0.0 of the seeds; scenes fall out."""
    arms = arms_of(results)
    found = contrast(IDENTIFICATION, arms["scal"], arms["flow_matching"], ["distinct_k2"])
    half = 100 * 4.3027 * math.sqrt((0.4**2 + 0.3**2 - 3 * (0.7 / 3) ** 2) / 2 / 3)
    assert found == pytest.approx((70 / 3, 70 / 3 - half, 70 / 3 + half))
    assert contrast(IDENTIFICATION, arms["scal"], arms["flow_matching"][1:], ["distinct_k2", "twins_k2"]).mean == pytest.approx(15)
    assert math.isnan(contrast(IDENTIFICATION, arms["scal"], arms["flow_matching"], ["distinct_k5"]).mean)


def test_the_primary_measure_and_the_guard_come_first(results: dict[str, Any]) -> None:
    """Identification of distinct scenes is that of K = 2 and 3 together; differences of twins are of their own cell."""
    for entry in results["runs"]:
        if entry["arm"] == "scal":
            entry["measures"]["10"]["pictures"] = {cell: pictures(x, cell) for cell, x in zip(CELLS, (0.6, 0.7, 0.8), strict=True)}
        if entry["arm"] == "flow_matching":
            entry["measures"]["10"]["pictures"] = {cell: pictures(0.5, cell) for cell in CELLS}
    header, _, row = tables.contrast_table(results, "scratch").splitlines()
    assert [title.strip() for title in header.split("|")[2:4]] == [
        "each reference once, %, twins, K = 2",
        "identification, %, distinct, K = 2 and distinct, K = 3",
    ]
    assert row.startswith("| arm scal | 10.0")
    assert row.split("|")[3].strip().startswith("20.0")  # (10 + 30) / 2
    (late,) = tables.contrast_table(results, "late").splitlines()[2:]
    assert late.startswith("| arm light | 5.0")


def test_what_an_interval_says() -> None:
    assert [verdict(Value(m, m - 5, m + 5)) for m in (7, -7, 4)] == ["higher", "lower", "not resolved"]
    assert verdict(Value(9, math.nan, math.nan)) == "not resolved"
    assert cell_text(Value(41.25, 35, 47.5), 1) == "41.2 [35.0, 47.5]"
    assert cell_text(Value(0.5, math.nan, math.nan), 3) == "0.500"
    assert cell_text(Value(math.nan, math.nan, math.nan), 1) == "-"


def test_where_target_tokens_look_and_how_losses_pull(results: dict[str, Any]) -> None:
    for row in tables.diagnosis_table(results, "scratch", TARGET_ROWS).splitlines()[2:]:
        assert [cell.strip().split(" ")[0] for cell in row.split("|")[2:-1]] == ["15.0", "65.0", "40.0", "50.0"]
    rows = tables.diagnosis_table(results, "scratch", PULLS).splitlines()[2:]
    assert len(rows) == 2
    for row in rows:
        assert [cell.strip().split(" ")[0] for cell in row.split("|")[2:-1]] == ["0.150", "4.0", "-0.45", "0.5", "0.30"]
        assert f" 4.0 [{4 - 4.3027 / math.sqrt(3):.1f}, " in row  # seeds 3, 4, 5: s = 1


def test_interventions_have_tables(results: dict[str, Any]) -> None:
    header, _, row, _ = tables.intervention_table(results, "scratch", "twins_k2").splitlines()
    assert [title.strip() for title in header.split("|")[3:-1]] == [intervention.meaning for intervention in INTERVENTIONS.values()]
    # scenes n and n + seed, seeds 0, 1, 2: means n + 1/2
    assert [cell.strip().split(" ")[0] for cell in row.split("|")[2:-1]] == ["230.0", "1.5", "2.5", "3.5", "4.5", "5.5"]
    lines = tables.noise_table(results, "scratch", "twins_k2").splitlines()[2:]
    assert lines[1] == f"| arm flow_matching | {INTERVENTIONS['hide_target'].meaning} | 0.0 | 0.0 | 6.0 |"
    assert len(lines) == 2 * len(INTERVENTIONS)


def test_measures_over_the_steps(results: dict[str, Any]) -> None:
    header, _, row, _ = tables.steps_table(results, "scratch", APART, "twins_k2").splitlines()
    assert [title.strip() for title in header.split("|")[2:-1]] == ["5", "10"]
    assert [cell.strip().split(" ")[0] for cell in row.split("|")[2:-1]] == ["12.5", "25.0"]
    assert "| 2.5 [" in tables.steps_table(results, "scratch", CHANGES["hide_target"], "distinct_k2").splitlines()[2]


def test_rows_of_the_tables(results: dict[str, Any]) -> None:
    table = tables.summary_table(results, "scratch", "twins_k2").splitlines()
    assert len(table) == 2 + 3 + 1
    assert len({line.count("|") for line in table}) == 1
    assert "| 37.5 [27.5, 57.5] | - | 75.0 [65.0, 95.0] |" in table[-1]  # the judge on real renderings: apart, same look, identification
    assert table[3].startswith("| arm flow_matching | 3 | 25.0 [")
    assert tables.summary_table(results, "scratch", "distinct_k2").splitlines()[3].endswith("| 2.50 [0.02, 4.98] |")
    assert FRECHET.title not in tables.summary_table(results, "scratch", "distinct_k3")


def test_every_part_has_a_title() -> None:
    assert list(TITLES) == list(PARTS)


def test_the_report_is_drawn_from_the_file_alone(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert ablation_figures.main([str(tmp_path / "results.json")]) == 0
    folder = tmp_path / "report"
    text = (folder / "report.md").read_text()
    assert all(entry["folder"] in text and entry["config"] in text for entry in results["runs"])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert sorted(links) == sorted(path.name for path in folder.iterdir() if path.name != "report.md")
    assert len(links) == 5 + 3 + 1 + 3
    assert "training 1.00 h, measuring 0.01 h" in text
    assert "commit abc and abd" in text
    assert "Not finished" not in text
    again = {path.name: path.read_bytes() for path in folder.iterdir()}
    draw(tmp_path / "results.json", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == again


def test_runs_that_are_not_measured_yet_are_left_out_of_tables(results: dict[str, Any], tmp_path: Path) -> None:
    for entry in results["runs"]:
        entry["measures"] = {} if entry["arm"] in ("scal", "light") else entry["measures"]
    (tmp_path / "results.json").write_text(json.dumps(results | {"complete": False}))
    draw(tmp_path / "results.json", tmp_path / "report")
    report = (tmp_path / "report/report.md").read_text()
    assert "| arm scal |" not in report
    assert "runs/scratch_scal_0" in report
    assert "Not finished" in report


def test_the_main_ones_go_into_a_page(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between its markers, as often as one likes; what is around them stays."""
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = tmp_path / "README.md"
    page.write_text(f"before\n{MARKER}\nold\n{MARKER}\nafter\n")
    for _ in range(2):
        assert ablation_figures.main([str(tmp_path / "results.json"), "--readme", str(page)]) == 0
        before, inside, after = page.read_text().split(MARKER)
        assert (before, after) == ("before\n", "\nafter\n")
        assert inside.strip() == ablation_readme.block(results, "report")
    links = re.findall(r"\]\(([^)]+)\)", inside)
    assert links[0] == "report/report.md"
    assert len(links) == 1 + 2
    assert all((tmp_path / link).is_file() for link in links)
    (tmp_path / "results.json").write_text(json.dumps(results | {"complete": False}))
    before = page.read_text()
    assert ablation_figures.main([str(tmp_path / "results.json"), "--readme", str(page)]) == 2
    assert "only a finished trial goes into a page" in capsys.readouterr().err
    assert page.read_text() == before
    (tmp_path / "results.json").write_text(json.dumps(results))
    for text in ("no marker\n", f"{MARKER}\none\n"):
        page.write_text(text)
        assert ablation_figures.main([str(tmp_path / "results.json"), "--readme", str(page)]) == 2
        assert "must have two lines" in capsys.readouterr().err
        assert page.read_text() == text


def test_rows_are_compared_to_the_first() -> None:
    rows = [Row("none", "baseline", Point(20, 0, 10, 30)), Row("a", "a: 1", Point(40, 0)), Row("a", "a: 2", Point(math.nan, 0))]
    svg = row_chart(rows, "t", "x")
    first, second = (float(x) for x in re.findall(r'<circle cx="([^"]*)"', svg))
    assert second > first
    assert f'x1="{first:.1f}" y1="38.0" x2="{first:.1f}"' in svg  # the dashed line
    assert "a: 2" not in svg
    width = float(re.search(r'width="(\d+)"', svg)[1])
    longer = row_chart([Row("a", "a name of many letters, three times as long", Point(20, 0))], "t", "x")
    assert float(re.search(r'width="(\d+)"', longer)[1]) > width + 150
    assert "nan" not in svg
    assert "nothing measured yet" in row_chart(rows[2:], "t", "x")


def test_files_that_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"format": "x"}')
    for name, message in (("other.json", "must be a results file of scripts/ablation.py"), ("none.json", "file not found")):
        assert ablation_figures.main([str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_curves_of_a_run_and_their_mean(tmp_path: Path, results: dict[str, Any]) -> None:
    entries = [
        {"step": step, "loss/flow_matching": float(step), "loss/correspondence": math.nan, "loss/disentanglement": -1.0 * (step % 4 == 0)}
        for step in range(1, 2 * CURVE_POINTS + 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    curves = curves_of(tmp_path / "metrics.jsonl")
    assert curves["loss/flow_matching"][:2] == [[1.5, 1.5], [3.5, 3.5]]
    assert len(curves["loss/flow_matching"]) == CURVE_POINTS
    assert curves["loss/correspondence"] == []
    assert curves["loss/disentanglement"] == [[step, -1.0] for step in [x + 0.5 for x in range(3, 2 * CURVE_POINTS + 1, 4)]]  # 0: K = 1
    assert curves_of(tmp_path / "none.jsonl")["loss/own_reference"] == []
    assert mean_curve(arms_of(results)["scal"], "loss/flow_matching") == [Point(5, 2.0), Point(10, 1.5)]


def test_a_chart_puts_larger_values_higher() -> None:
    svg = line_chart([Series("a & b", [Point(1, 10, 5, 15), Point(2, 30), Point(3, math.nan)])], "t", "x", "y", ("chance", 12.5))
    (line,) = re.findall(r'points="([^"]*)"', svg)
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in line.split())
    assert x0 < x1
    assert y1 < y0  # SVG's y grows downwards
    assert "a &amp; b" in svg
    assert "nan" not in svg
    assert "nothing measured yet" in line_chart([Series("a", [])], "t", "x", "y")


def test_a_series_keeps_its_colour_beside_one_without_points() -> None:
    alone, both = (
        line_chart([Series("base", points), Series("b", [Point(1, 2), Point(2, 3)])], "t", "x", "y") for points in ([], [Point(1, 1)])
    )
    assert COLOURS[1] in alone
    assert COLOURS[0] in both
    assert COLOURS[0] not in alone
    assert "base" not in alone


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-8.2, 0), (0.003, 0.0031), (5, 5), (12, 97)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 8
