"""The report of a made-up run and made-up pictures: one page, nothing outside it."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mosaic.reports.figures import save_picture
from scripts.report import curve, main


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    for index in (2, 10):
        for name in ("panel", "attention"):
            save_picture(Image.new("RGB", (4, 4), "red"), tmp_path / f"examples/case_{index:03d}_{name}.png")
    return tmp_path / "examples"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step, colour in ((0, "blue"), (2, "green"), (4, "white")):
        save_picture(Image.new("RGB", (5, 5), colour), folder / f"validation/step_{step:08d}/case_0.png")
    entries = [
        {"step": 0, "attention/exact": 0.0156, "attention/exact_chance": 0.0156, "attention/near": 0.12, "attention/near_chance": 0.11}
    ]
    for step in range(1, 5):
        entries.append(
            {"step": step, "loss/total": 1.0, "loss/flow_matching": 0.9 / step, "loss/correspondence": 4.0, "loss/disentanglement": -0.1}
        )
    entries.append({"step": 4, "loss/total": None, "attention/exact": None})
    entries.append(
        {"step": 4, "attention/exact": 0.25, "attention/exact_chance": 0.0156, "attention/near": 0.5, "attention/near_chance": 0.11}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def page_of(tmp_path: Path, *arguments: str) -> str:
    assert main([*arguments, "--output", str(tmp_path / "report/page.html")]) == 0
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["page.html"]
    return (tmp_path / "report/page.html").read_text()


def test_the_page_is_self_contained_and_complete(tmp_path: Path, examples: Path, run: Path) -> None:
    page = page_of(tmp_path, "--examples", str(examples), "--run", str(run))
    assert not re.search("https?:", page)
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s>)]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(sources) == 4 + 2  # panels and maps; the first and the last held-out picture
    assert str(tmp_path) not in page
    assert [title for title in ("flow matching", "SCAL", "MDL") if f'aria-label="{title}"' in page] == ["flow matching", "SCAL", "MDL"]
    assert page.index("case 002") < page.index("case 010")
    assert "case_0, step 0<" in page
    assert "case_0, step 4<" in page
    assert "step 2<" not in page
    for value in ("1.6 %", "12.0 %", "25.0 %", "50.0 %"):
        assert f"<td>{value}</td>" in page


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (0.25, "Training works: attention peaks at the right token for 1.6 % before and 25.0 % after 4 steps (chance 1.6 %)."),
        (
            0.02,
            "Too short to judge: attention peaks at the right token for 1.6 % before and 2.0 % after 4 steps (chance 1.6 %). Train longer",
        ),
    ],
)
def test_the_run_has_a_verdict(tmp_path: Path, run: Path, last: float, words: str) -> None:
    text = (run / "metrics.jsonl").read_text().replace('"attention/exact": 0.25', f'"attention/exact": {last}')
    (run / "metrics.jsonl").write_text(text)
    assert words in page_of(tmp_path, "--run", str(run))


def test_every_term_has_its_curve(tmp_path: Path, run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss/edge_sharpness": 2.0}\n')
    assert 'aria-label="edge sharpness"' in page_of(tmp_path, "--run", str(run))


def test_each_half_alone(tmp_path: Path, examples: Path, run: Path) -> None:
    assert "polyline" not in page_of(tmp_path, "--examples", str(examples))
    assert "case 002" not in page_of(tmp_path, "--run", str(run))


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_a_falling_curve_falls() -> None:
    thin, bold = points_of(curve([(10, 3.0), (20, 2.0), (40, 1.0)], "loss"))
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    assert thin[2][0] - thin[1][0] == pytest.approx(2 * (thin[1][0] - thin[0][0]), abs=0.2)
    assert thin[0][1] < thin[1][1] < thin[2][1]  # SVG's y grows downwards
    assert thin[0] == bold[0]
    assert thin[0][1] < bold[2][1] < thin[2][1]  # the mean lags behind


@pytest.mark.parametrize("points", [[(3, 1.0)], [(1, 2.0), (2, 2.0)]])
def test_a_curve_of_one_value(points: list[tuple[float, float]]) -> None:
    assert "nan" not in curve(points, "loss")


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path, run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss/flow_matching": NaN}\n{"step": 5, "attention/exact": NaN}\n')
    assert "nan" not in page_of(tmp_path, "--run", str(run))


def test_missing_inputs(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([], "error: give --examples, --run, or both."),
        (["--examples", f"{tmp_path}/none"], f"error: --examples {tmp_path}/none: no case_*_panel.png there; run inference.py"),
        (["--run", str(run)], f"error: --run {run}: metrics.jsonl is missing; give the output_dir of a training run."),
    ):
        assert main([*arguments, "--output", str(tmp_path / "page.html")]) == 2
        assert message in capsys.readouterr().err
    for content, message in (("", "metrics.jsonl: is empty"), ("{", "metrics.jsonl: must hold one JSON object per line")):
        (run / "metrics.jsonl").write_text(content)
        assert main(["--run", str(run), "--output", str(tmp_path / "page.html")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
