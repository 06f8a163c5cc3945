"""Tables and figures of a made-up results file: numbers by hand, and every run named."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mosaic.reports.charts import COLOURS, Point, Row, Series, line_chart, nice_ticks, row_chart
from scripts import ablation_figures
from scripts.ablation import readme as ablation_readme
from scripts.ablation import tables as tables
from scripts.ablation.figures import draw, seed_note
from scripts.ablation.plots import mean_curve, peak_share, spread
from scripts.ablation.readme import MARKER
from scripts.ablation.results import CURVE_POINTS, FORMAT, VERSION, curves_of
from scripts.ablation.tables import FRECHET, IDENTIFICATION, LEAKAGE, NEAR, Value, cell, contrast, value_of, verdict

NOTHING = {"share": None, "low": None, "high": None, "count": 0}


def share(value: float) -> dict[str, Any]:
    return {"share": value, "low": value - 0.1, "high": value + 0.2, "count": 20}


def measures(identification: float, k: int, attention: bool = True) -> dict[str, Any]:
    """Four scenes around a mean."""
    shares = [identification - 0.1, identification, identification, identification + 0.1]
    scenes = {"identification": shares, "leakage": [0.1] * 4 if k > 1 else [math.nan] * 4, "presence": [0.9] * 4}
    scenes["identification_if_present"] = shares
    if attention:
        scenes |= {"exact": [0.2] * 4, "near": [0.4] * 4, "attention_leakage": [0.3] * 4, "entropy": [2.5] * 4, "overlap": [0.3] * 4}
    found = {"identification": share(identification), "leakage": share(0.1) if k > 1 else NOTHING, "presence": share(0.9)}
    found["attention"] = {"exact_chance": 0.01, "near_chance": 0.2 / k, "leakage_chance": 0.3} if attention else None
    return found | {"scenes": {name: " ".join(f"{value:.4g}" for value in values) for name, values in scenes.items()}, "seconds": 1.0}


def run(arm: str, seed: int, identification: float, parts: tuple[str, ...] = ("main",), factor: str = "") -> dict[str, Any]:
    trained = arm != "base"
    lines = {
        "target_columns": 8,
        "reference_tokens": 16,
        "k": [0, 0, 1, 2],
        "u": [5, 6, 5, 9],
        "v": [0, 9, 20, 63],
        "peak": [1, 27, 20, 56],
    }
    return {
        "name": f"{arm}_{seed}", "parts": list(parts), "arm": arm, "meaning": f"arm {arm}", "factor": factor, "seed": seed, "steps": 10 * trained,
        "folder": f"runs/{arm}_{seed}", "config": f"configs/{arm}_{seed}.json", "config_digest": "c" * 64,
        "adapter_digest": "a" * 64 if trained else None, "settings": {"model.reference_attention": arm} if arm == "joint" else {}, "status": "finished", "complete": True, "training_seconds": 5.0,
        "commit": "abd" if seed else "abc", "frechet": 1.5 + seed,
        "measures": {str(k): measures(identification, k, trained) for k in (1, 2, 6)},
        "published": {"2": measures(identification / 2, 2)} if trained else {}, "lines": lines if trained else None,
        "target_rows": {"2": {"scenes": {"on_references": "0.1 0.2", "own_reference": "0.6 0.7", "peak_exact": "0.3 0.5", "peak_near": "0.5 0.5"},
                              "seconds": 1.0}} if trained else {},
        "gradients": {"2": {"flow_matching": 0.15, "correspondence_pull": 3.0 + seed, "correspondence_cosine": -0.45, "disentanglement_pull": 0.5,
                            "disentanglement_cosine": 0.3, "seconds": 1.0}} if trained else {},
        "curves": {"loss/flow_matching": [[5, 1.0 + seed], [10, 0.5 + seed]]} if trained else {},
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    runs = [run("base", 0, 0.1), *(run("stable", seed, value, ("main", "attention")) for seed, value in enumerate((0.2, 0.4, 0.9)))]
    runs += [run("scal", seed, value) for seed, value in enumerate((0.6, 0.7, 0.9))]
    runs += [
        run("stable", 0, 0.5, ("factors",), "none"),
        run("weight", 0, 0.9, ("factors",), "MDL's weight"),
        run("joint", 0, 0.3, ("attention",)),
    ]
    timing = {"reference_attention": "joint", "reference_cache": False, "num_references": 2, "seconds_per_image": 1.25, "seconds": 3.0}
    return {
        "format": FORMAT, "version": VERSION, "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "complete": True, "runs": runs,
        "size": {"name": "short", "cases": 8, "steps": 10, "factor_steps": 5, "batch_size": 4, "train_samples": 40,
                 "seeds": 3, "factor_seeds": 1},
        "hardware": {"processor": "a processor", "cores": 2, "memory_gib": 4.0, "side_by_side": 2, "threads": 1}, "versions": {"torch": "2"},
        "data": {"folder": "data", "manifest_digest": "d" * 64}, "model": {"name": "m", "digest": "e" * 64}, "judge_digest": "f" * 64,
        "seconds": {"training": 3600.0, "measuring": 36.0}, "real": {str(k): measures(0.75, k, False) for k in (1, 2, 6)}, "real_frechet": 0.25,
        "timings": [timing],
    }  # fmt: skip


def test_intervals_over_seeds_and_scenes(results: dict[str, Any]) -> None:
    arms = tables.by_arm(results, "main")
    # seeds 0.2, 0.4, 0.9 and scenes -0.1, 0, 0, 0.1, added up: MS_seed = 4 * 0.13, MS_scene = 3 * 0.02 / 3, no rest
    half = 100 * math.sqrt((4 * 0.13 + 0.02) / 12) * 4.3027  # 2 degrees of freedom and a little
    found = value_of(IDENTIFICATION, arms["stable"], 2)
    assert found == pytest.approx((50, max(50 - half, 0), min(50 + half, 100)))
    only = value_of(IDENTIFICATION, arms["base"], 2)  # one run: over scenes
    assert only == pytest.approx((10, max(10 - 100 * 3.1824 * math.sqrt(0.02 / 3 / 4), 0), 10 + 100 * 3.1824 * math.sqrt(0.02 / 3 / 4)))
    assert math.isnan(value_of(LEAKAGE, arms["base"], 1).mean)
    assert math.isnan(value_of(NEAR, arms["base"], 2).mean)
    assert value_of(FRECHET, arms["base"], 2).mean == 1.5
    assert value_of(FRECHET, arms["stable"], 6).mean == 2.5
    assert math.isnan(value_of(IDENTIFICATION, arms["base"], 5).mean)


def test_arms_are_compared_at_the_same_seeds_and_scenes(results: dict[str, Any]) -> None:
    """Differences 0.4, 0.3, 0.0 of the seeds; scenes fall out."""
    arms = tables.by_arm(results, "main")
    found = contrast(IDENTIFICATION, arms["scal"], arms["stable"], [2])
    half = 100 * 4.3027 * math.sqrt((0.4**2 + 0.3**2 - 3 * (0.7 / 3) ** 2) / 2 / 3)
    assert found == pytest.approx((70 / 3, 70 / 3 - half, 70 / 3 + half))
    assert contrast(IDENTIFICATION, arms["scal"], arms["stable"][1:], [1, 2]).mean == pytest.approx(15)
    assert math.isnan(contrast(IDENTIFICATION, arms["scal"], arms["stable"], [5]).mean)
    table = tables.contrast_table(results)
    assert "| arm stable - arm scal | 2 | -23.3 [" in table
    assert "| arm joint - arm stable | 2 | 10.0" in table  # at seed 0: 0.3 - 0.2, at every scene


def test_contrasts_are_averaged_over_k_2_3_and_4(results: dict[str, Any]) -> None:
    """Ten points at K = 2, twenty at 3, sixty at 4; what K = 1 and 6 say does not count."""
    for entry in results["runs"]:
        more = {1: 0.5, 2: 0.1, 3: 0.2, 4: 0.6, 6: 0.5} if entry["arm"] == "scal" else {}
        entry["measures"] = {str(k): measures(0.3 + more.get(k, 0), k) for k in (1, 2, 3, 4, 6)}
    assert "| arm stable - arm scal | 2, 3, 4 | -30.0" in tables.contrast_table(results)


def test_differences_are_also_shown_k_by_k(results: dict[str, Any]) -> None:
    for entry in results["runs"]:
        more = {1: 0.5, 2: 0.1, 6: -0.2} if entry["arm"] == "scal" else {}
        entry["measures"] = {str(k): measures(0.3 + more.get(k, 0), k) for k in (1, 2, 6)}
    header, _, row, joint = tables.contrast_k_table(results).splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["K = 1", "K = 2", "K = 6 (unseen)"]
    assert row.startswith("| arm stable - arm scal | -50.0")
    assert [cell.strip().split(":")[0].split(" ")[0] for cell in row.split("|")[2:-1]] == ["-50.0", "-10.0", "20.0"]
    assert joint.startswith("| arm joint - arm stable | 0.0")


def test_what_an_interval_says() -> None:
    assert [verdict(Value(m, m - 5, m + 5)) for m in (7, -7, 4)] == ["higher", "lower", "not resolved"]
    assert verdict(Value(9, math.nan, math.nan)) == "not resolved"
    assert cell(Value(41.25, 35, 47.5), 1) == "41.2 [35.0, 47.5]"
    assert cell(Value(0.5, math.nan, math.nan), 3) == "0.500"
    assert cell(Value(math.nan, math.nan, math.nan), 1) == "-"


def test_variants_need_their_baseline(results: dict[str, Any]) -> None:
    results["runs"] = [entry for entry in results["runs"] if entry["factor"] != "none"]
    with pytest.raises(ValueError, match="variants without their baseline"):
        tables.factor_table(results, 2)


def test_seeds_of_the_main_arms_say_what_another_seed_does(results: dict[str, Any]) -> None:
    expected = 100 * math.sqrt((0.13 + (0.36 + 0.49 + 0.81 - 3 * (2.2 / 3) ** 2) / 2) / 2)
    assert tables.seed_deviation(results, IDENTIFICATION, 2) == pytest.approx(expected)
    assert f"varies by {expected:.1f} points" in seed_note(results, 2)


def test_the_method_as_published_has_a_table(results: dict[str, Any]) -> None:
    header, _, stable, scal, real = tables.published_table(results).splitlines()
    assert header.count("K = 2") == 2
    assert real == "| *real renderings* | 75.0 [65.0, 95.0] | 10.0 [0.0, 30.0] |"  # the judge itself
    assert stable.startswith("| arm stable | 25.0 [")
    assert scal.startswith("| arm scal | 36.7 [")


def test_where_target_tokens_look_has_a_table(results: dict[str, Any]) -> None:
    header, _, stable, scal = tables.target_rows_table(results).splitlines()
    titles = ("attention on references", "of it on the own one", "peak exact", "peak within one token")
    assert [cell.strip().split(",")[0] for cell in header.split("|")[2:-1]] == list(titles)
    for row in (stable, scal):
        assert [cell.strip().split(" ")[0] for cell in row.split("|")[2:-1]] == ["15.0", "65.0", "40.0", "50.0"]


def test_how_the_losses_pull_has_a_table(results: dict[str, Any]) -> None:
    _, _, stable, scal = tables.gradient_table(results).splitlines()
    for row in (stable, scal):
        assert [cell.strip().split(" ")[0] for cell in row.split("|")[2:-1]] == ["0.150", "4.0", "-0.45", "0.5", "0.30"]
        assert f" 4.0 [{4 - 4.3027 / math.sqrt(3):.1f}, " in row  # seeds 3, 4, 5: s = 1


def test_rows_of_the_tables(results: dict[str, Any]) -> None:
    table = tables.summary_table(results, 2).splitlines()
    assert len(table) == 2 + 3 + 2
    chance = [cell.strip() for cell in table[-2].split("|")[1:-1]]
    assert (chance[0], chance[6:9]) == ("*chance*", ["1.0", "10.0", "30.0"])
    assert {*chance[2:6], *chance[9:]} == {"-"}
    assert tables.k_table(results, NEAR).splitlines()[-1] == "| *chance* | 20.0 | 10.0 | 3.3 |"
    assert len({line.count("|") for line in table}) == 1
    assert "75.0 [65.0, 95.0]" in table[-1]  # the judge on real renderings
    assert table[-1].endswith("| 0.25 |")
    assert "75.0 [65.0, 95.0]" in tables.k_table(results, tables.IF_PRESENT).splitlines()[-1]  # all subjects are present there
    header, _, _, stable, _, real = tables.k_table(results, LEAKAGE).splitlines()
    assert "K = 6 (unseen)" in header
    assert stable.split("|")[2].strip() == real.split("|")[2].strip() == "-"  # nothing leaks at K = 1
    factors = tables.factor_table(results, 2).splitlines()
    assert factors[2].startswith("| baseline | arm stable")
    assert factors[3].endswith("| not resolved | not resolved |")  # 40 points at every scene: of the spread nothing is known
    attention = tables.attention_table(results)
    assert "| seconds per picture | joint | - | 1.25 | - |" in attention
    modes = [line.split("|")[2].strip() for line in attention.splitlines()[2:]]
    assert modes == [*("target", "joint", "*real renderings*") * 2, "joint"]


def test_the_report_is_drawn_from_the_file_alone(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert ablation_figures.main([str(tmp_path / "results.json")]) == 0
    folder = tmp_path / "report"
    text = (folder / "report.md").read_text()
    assert all(entry["folder"] in text and entry["config"] in text for entry in results["runs"])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert sorted(links) == sorted(path.name for path in folder.iterdir() if path.name != "report.md")
    assert len(links) == 4 + 6 + 3 + 1
    assert "training 1.00 h, measuring 0.01 h" in text
    assert "commit abc and abd" in text
    assert "Not finished" not in text
    with Image.open(folder / "lines.png") as figure:
        assert figure.width > 600
    again = {path.name: path.read_bytes() for path in folder.iterdir()}
    draw(tmp_path / "results.json", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == again


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
    assert len(links) == 1 + 4
    assert all((tmp_path / link).is_file() for link in links)
    assert "2026-01-02, 3 training seeds, 10 steps of batch 4" in inside
    (tmp_path / "results.json").write_text(json.dumps(results | {"complete": False}))
    before = page.read_text()
    assert ablation_figures.main([str(tmp_path / "results.json"), "--readme", str(page)]) == 2
    assert "only a finished ablation goes into a page" in capsys.readouterr().err
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


def test_peaks_within_one_token(results: dict[str, Any]) -> None:
    # (0,0)-(0,1) near; (1,1)-(3,3) far; equal; (7,7)-(7,0) far, though the numbers are close to a row's end
    assert peak_share(results["runs"][1]["lines"]) == "2 of 4 points within one token"
    assert spread([3, 4, 5, 6, 7, 8], 3) == [3, 5, 7]
    assert spread([3], 5) == [3]


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
    assert curves_of(tmp_path / "none.jsonl")["attention/near"] == []
    assert mean_curve(tables.by_arm(results, "main")["stable"], "loss/flow_matching") == [Point(5, 2.0), Point(10, 1.5)]


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
