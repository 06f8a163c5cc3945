"""Measures of matching by hand, the evaluation command on the pocket world, and the benchmark's measurement."""

import json
import math
from pathlib import Path

import pytest
import torch

from mosaic.method.grids import Grid
from preprocess import evaluate_matching
from preprocess.matching.benchmark import _measure, table
from preprocess.matching.metrics import FilterCounts, Truth, cell_positions, filter_counts, pck
from scripts.doctor.matches import LEAST_AGREEMENT, LEAST_COHERENCE, LEAST_COVERAGE, UNFIT_COHERENCE
from scripts.pocket.dataset import write_dataset
from tests import tiny_extractors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pocket") / "data"
    write_dataset(root, 3, 0, max_subjects=2, seed=0)
    return root


def truth() -> Truth:
    """A grid of 4 x 2 over 40 x 40 px: cells are 10 px high and 20 px wide. Two true points; the subject is 20 px long."""
    return Truth(torch.tensor([0, 7]), torch.tensor([2, 5]), Grid(4, 2), (40, 40), 20.0)


def test_errors_are_in_pixels_of_each_axis() -> None:
    """One row off is 10 px, one column off 20 px; sub-cell positions count; a missing match is infinitely far."""
    index = torch.full((6,), -1)
    index[2] = 2  # one row below cell 0
    assert truth().errors(cell_positions(index, Grid(4, 2))).tolist() == [0.5, math.inf]
    index[2], index[5] = 1, 7  # one column beside cell 0; exact
    assert truth().errors(cell_positions(index, Grid(4, 2))).tolist() == [1.0, 0.0]
    positions = torch.full((6, 2), torch.nan)
    positions[2], positions[5] = torch.tensor([0.0, 0.25]), torch.tensor([2.5, 1.0])
    assert truth().errors(positions).tolist() == [0.25, 0.25]


def test_pck_by_hand() -> None:
    """The threshold is inclusive; pairs of unequal size make the two averages differ; pairs without points do not count."""
    errors = [torch.tensor([0.0, 0.05, 0.1, 0.3], dtype=torch.float64), torch.tensor([math.inf]), torch.zeros(0)]
    result = pck(errors)
    assert result.per_point == pytest.approx({"0.05": 2 / 5, "0.1": 3 / 5, "0.2": 3 / 5})
    assert result.per_pair == pytest.approx({"0.05": 1 / 4, "0.1": 3 / 8, "0.2": 3 / 8})
    assert (result.num_points, result.num_pairs) == (5, 2)
    perfect = pck([torch.zeros(3)])
    assert set(perfect.per_point.values()) == set(perfect.per_pair.values()) == {1.0}
    with pytest.raises(ValueError, match="at least one"):
        pck([torch.zeros(0)])


def test_filter_counts_by_hand() -> None:
    """Kept: a correct one, a wrong one, and one on a cell that has no true point. The other true point is filtered out."""
    index = torch.tensor([3, 3, 0, -1, -1, 7])
    keep = torch.tensor([True, False, True, False, False, False])
    positions = cell_positions(index, Grid(4, 2))
    count = filter_counts(keep, positions, truth(), 0.1)
    assert count == FilterCounts(kept=2, correct=1, true=2)
    assert (count.precision, count.recall) == (0.5, 0.5)
    everything = count + filter_counts(torch.ones(6, dtype=torch.bool), positions, truth(), 0.1)
    assert everything == FilterCounts(8, 3, 4)
    assert math.isnan(FilterCounts().precision)
    assert math.isnan(FilterCounts().recall)


def test_command_on_the_pocket_world(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dino = tiny_extractors.save_dinov2(tmp_path / "dino")
    flags = ["--extractors", "pixels,dinov2", "--set", f"dinov2.model={dino}", "--set", "dinov2.size=224", "--device", "cpu"]
    assert evaluate_matching.main(["--data", str(data), *flags, "--output", str(tmp_path / "result.json")]) == 0
    text, result = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    assert {(entry["extractor"], entry["soft_argmax"]) for entry in result["pck"]} == {
        (name, soft) for name in ("pixels", "dinov2") for soft in (False, True)
    }
    assert all(entry["num_pairs"] == 4 for entry in result["pck"])
    for entry in result["pck"]:
        assert entry["per_point"]["0.05"] <= entry["per_point"]["0.1"] <= entry["per_point"]["0.2"]
    found = {(entry["filter"], entry["extractors"]): entry for entry in result["filters"]}
    both = found["both masks", "pixels"]
    assert both["recall"] == pytest.approx(next(e for e in result["pck"] if e["extractor"] == "pixels")["per_point"]["0.1"])
    assert both["precision"] > 5 * found["no mask", "pixels"]["precision"]
    names = ["consensus within 0", "consensus within 1", "consensus within 2"]
    kept = [found[name, "pixels + dinov2"]["kept"] for name in names]
    assert kept == sorted(kept)
    assert kept[-1] <= both["kept"]
    figures = {entry["points"]: entry for entry in result["figures"]}
    spoilt = [figures[name] for name in ("exact", "a fifth at random", "half at random", "all at random")]
    assert [entry["right"][0] for entry in spoilt] == pytest.approx([1, 0.8, 0.5, 0], abs=0.05)
    means = [entry["coherence"][0] for entry in spoilt]  # the doctor's thresholds lie between them
    assert means[0] > 0.99 > means[1] > LEAST_COHERENCE > UNFIT_COHERENCE > means[2] > 0.15 > means[3]
    assert spoilt[0]["coverage"][1] > 2 * LEAST_COVERAGE
    assert figures["pixels"]["coherence"][0] < UNFIT_COHERENCE
    assert figures["pixels"]["right"][0] == pytest.approx(both["precision"], abs=0.05)
    assert figures["pixels"]["agreement"] is figures["exact"]["cyclic"] is None
    assert figures["pixels + dinov2"]["agreement"][0] < LEAST_AGREEMENT
    assert all(entry["references"] == 4 for name, entry in figures.items() if "+" not in name)
    assert "| exact | 1.00 [1.00, 1.00] | 1.00 [" in text
    assert "| both masks | pixels |" in text
    assert "| extractor | soft-argmax | PCK@0.05 per point |" in text


def test_sweep_measures_each_setting_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every combination once, beside the extractors that are not swept, each with the numbers of a call of its own."""
    usual = ["--data", str(data), "--limit", "1", "--device", "cpu", "--output", str(tmp_path / "result.json")]
    flags = ["--extractors", "pixels,vae", "--set", "vae.size=64", "--sweep", "pixels.cells=8,16", "--sweep", "pixels.scales=1,3"]
    assert evaluate_matching.main([*usual, *flags]) == 0
    text, swept = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    labels = [f"pixels cells={cells} scales={scales}" for cells in (8, 16) for scales in (1, 3)]
    assert list(swept) == [*labels, "vae"]
    assert evaluate_matching.main([*usual, "--extractors", "pixels", "--set", "pixels.cells=16", "--set", "pixels.scales=1"]) == 0
    alone = json.loads((tmp_path / "result.json").read_text())
    assert [entry | {"extractor": labels[2]} for entry in alone["pck"]] == swept[labels[2]]["pck"]
    assert len({json.dumps(swept[label]["pck"][0]["per_point"]) for label in labels}) == 4
    row = next(line for line in text.splitlines() if line.startswith(f"| {labels[2]} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    found = next(entry for entry in alone["filters"] if entry["filter"] == "cycle within 2")
    figures = {entry["points"]: entry for entry in alone["figures"]}
    shares = [*alone["pck"][0]["per_point"].values(), found["precision"], found["recall"]]
    assert cells[:5] == [f"{100 * share:.1f}" for share in shares]
    assert cells[5:] == [f"{figures['pixels']['cyclic'][0]:.2f}", f"{figures['pixels, cycle within 2']['coherence'][0]:.2f}"]


def test_mistakes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for argv, message in (
        ([], "--data must name"),
        (["--data", str(tmp_path / "none"), "--extractors", "pixels"], "no such folder"),
        (["--benchmark", "--sides", "0"], "at least 1"),
        (["--data", str(data), "--sweep", "flux.block=1,2"], "--sweep flux.block=1,2: flux is not among --extractors pixels,vae"),
        (["--data", str(data), "--sweep", "vae.size=64,"], "vae.size must be an integer"),
    ):
        assert evaluate_matching.main(argv) == 2
        assert message in capsys.readouterr().err
    points = sorted((data / "points").iterdir())[0]
    kept = points.read_bytes()
    try:
        for content, message in ((kept[:40], "is not a readable safetensors file"), (None, "exact points is needed")):
            points.unlink()
            if content:
                points.write_bytes(content)
            assert evaluate_matching.main(["--data", str(data), "--extractors", "pixels", "--device", "cpu"]) == 2
            assert message in capsys.readouterr().err
    finally:
        points.write_bytes(kept)


def test_benchmark_measures_more_for_more() -> None:
    before = torch.get_num_threads()
    try:
        small = _measure(8, 16, "cpu", 1)
    finally:
        torch.set_num_threads(before)
    assert small["side"] == 8
    assert small["seconds"] > 0
    assert small["peak_mib"] >= 0
    assert "| 8 x 8 | 16 | cpu |" in table([small])
