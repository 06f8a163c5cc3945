"""The pages of a report: the numbers they show, that they hold no script and nothing from elsewhere, whatever prompts and names hold."""

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mosaic.files import write_text
from mosaic.images import PreparedReference
from mosaic.method.grids import Grid
from mosaic.pipeline.attention_report import PictureAttention
from mosaic.rendering.case_page import case_title, strongest_leak
from mosaic.rendering.cases.reading import Case
from mosaic.rendering.cases.references import Reference
from mosaic.rendering.folder import picture_files
from mosaic.rendering.overview import write_overview
from mosaic.rendering.recipe import Weights, png_text
from mosaic.rendering.recipes import PictureJob, page_digest
from mosaic.rendering.report import Report, make_report
from mosaic.reports.case_figures import EDGE, GAP, SIDE, entropy_chart
from mosaic.reports.charts import LEGEND_ROW
from mosaic.reports.figures import save_picture
from mosaic.reports.html import page_digest_at
from tests.recipes import entry, make_recipe

HOSTILE = "a <script>alert(1)</script> \"cat\" 'x' & </title></style><img src=x onerror=alert(2)> &lt; ]]> <!-- \u202egnp"
REFERENCE, TARGET = Grid(4, 4), Grid(2, 4)
VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Elements, texts and balance of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def one_job(
    prompt: str = "a cat and a mug", names: tuple[str | None, ...] = ("cat", None), points: tuple[tuple[int, int], ...] = ()
) -> PictureJob:
    references = tuple(Reference(Path(f"picture_{k}.png"), name, points=points if k == 0 else ()) for k, name in enumerate(names))
    entries = tuple(entry(reference.path.name, reference.name) for reference in references)
    recipe = make_recipe("case_003_seed_9", index=3, prompt=prompt, seed=9, references=entries)
    return PictureJob("case_003_seed_9", Case(3, prompt, references), recipe)


def known_attention(num_references: int = 2) -> PictureAttention:
    """All of reference 0 on token (0, 1), reference 1 for three quarters there too and for one quarter on token (1, 3)."""
    maps = torch.zeros(num_references, 16, 8)
    maps[0, :, 1] = 1
    maps[1:, :12, 1] = maps[1:, 12:, 7] = 1
    entropy = torch.tensor([[2.0, 1.9], [1.0, 1.5], [0.25, 1.25]])[:, :1].expand(3, num_references)
    return PictureAttention(maps, entropy, torch.ones(num_references, 16, dtype=torch.bool), REFERENCE, TARGET)


def known_report(job: PictureJob | None = None, num_references: int = 2) -> Report:
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("navy", "green", "red", "teal", "gold", "grey", "pink")[:num_references]]
    references = [PreparedReference.make(picture, 32, 1.0) for picture in pictures]
    return make_report(job or one_job(), references, Image.new("RGB", (32, 16), "gold"), known_attention(num_references))


# ---- what a page shows


def test_numbers_are_those_of_the_attention_and_stand_on_the_page() -> None:
    report = known_report()
    numbers = report.numbers
    assert numbers["leakage"] == [[1, 0], [0.75, 0.25]]  # token 1 is reference 0's, with 16 peaks against 12
    assert numbers["owned"] == [0.125, 0.125]
    assert numbers["entropy"] == [[2, 2], [1, 1], [0.25, 0.25]]
    assert numbers["uniform_entropy"] == pytest.approx(2.07944)
    assert (numbers["reference_grid"], numbers["target_grid"]) == ([4, 4], [2, 4])
    assert {line["reference"] for line in numbers["lines"]} == {0, 1}
    assert all(line["peak"] == [0, 1] for line in numbers["lines"] if line["reference"] == 0)
    assert json.loads(json.dumps(numbers)) == numbers
    table = re.search(r'<table class="leakage">.*?</table>', report.page, re.DOTALL)[0]
    shares = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
    shares = [[cell.replace("\u00a0", " ") for cell in row] for row in shares]
    assert shares == [[""], ["100 %", "0 %", "0 %"], ["75 %", "25 %", "0 %"], ["12 %", "12 %", "75 %"]]
    assert "<td>0.250</td>" in report.page
    assert "reference 2 (picture_1) has 75\u00a0% of its attention on the place of reference 1 (cat), 6.0 times" in report.page


def test_lines_run_from_points_to_peaks() -> None:
    report = known_report()
    figure = re.findall(r'<svg class="lines".*?</svg>', report.page, re.DOTALL)[1]
    lines = [line for line in report.numbers["lines"] if line["reference"] == 1]
    drawn = re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)" stroke="#[0-9a-f]{6}"', figure)
    assert len(drawn) == len(lines) == 4
    for line, ends in zip(lines, drawn, strict=True):
        (row, column), (to_row, to_column) = line["point"], line["peak"]
        # The result is twice as wide as high: it fills the width of its square, and half of its height from a quarter down.
        expected = [(column + 0.5) / 4, (row + 0.5) / 4, (to_column + 0.5) / 4 + (SIDE + GAP) / SIDE, (to_row + 0.5) / 4 + 0.25]
        assert [float(x) / SIDE for x in ends] == pytest.approx(expected, abs=1e-3)
    assert f'viewBox="-{EDGE} -{EDGE} ' in figure


def test_chosen_points_replace_the_strongest_of_their_reference() -> None:
    job = one_job(points=((0, 0), (63, 20)))
    report = known_report(job)
    assert [line["point"] for line in report.numbers["lines"] if line["reference"] == 0] == [[0, 0], [1, 3]]
    assert len([line for line in report.numbers["lines"] if line["reference"] == 1]) == 4
    assert report.page.count("Points of the cases file") == 1
    assert page_digest(job) != page_digest(one_job())


@pytest.mark.parametrize("num_references", [1, 2, 6, 7])
def test_pages_are_whole_and_every_figure_has_words(num_references: int) -> None:
    job = one_job(names=tuple(f"name {k}" for k in range(num_references)))
    page = Page(known_report(job, num_references).page)
    figures = [attributes for tag, attributes in page.elements if tag == "svg" and "aria-hidden" not in attributes]
    assert len(figures) == 3 * num_references + 1
    assert all(figure["role"] == "img" and len(figure["aria-label"]) > 10 for figure in figures)
    assert all(attributes["alt"] for tag, attributes in page.elements if tag == "img")
    assert ("html", {"lang": "en"}) in page.elements
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {attributes["href"][1:] for tag, attributes in page.elements if tag == "use"} <= set(ids)
    headings = [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings[:3] == ["h1", "h2", "h3"]
    assert ("Strongest leak:" in page.texts) == (num_references > 1)


# ---- hostile words


def assert_harmless(content: str, link: str) -> Page:
    """No script, no handler, no address but pictures inside the page and the one link."""
    page = Page(content)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "link", "base", "foreignobject", "animate", "set"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data"):
            address = attributes.get(name)
            allowed = (r"data:image/(png|jpeg);base64,[\w+/=]+", r"#(reference\d+|result)", re.escape(link))
            assert address is None or any(re.fullmatch(pattern, address) for pattern in allowed), (tag, address[:80])
    assert "default-src 'none'" in next(a["content"] for tag, a in page.elements if a.get("http-equiv"))
    return page


def test_hostile_prompts_and_names_are_text() -> None:
    job = one_job(HOSTILE, (HOSTILE, None))
    references = (job.recipe.references[0], entry('"><script>alert(3)</script>.png'))
    run = replace(job.recipe.run, model=Weights(HOSTILE, "0"), lora=Weights(HOSTILE, "1"))
    job = job._replace(recipe=replace(job.recipe, references=references, run=run))
    page = assert_harmless(known_report(job).page, "report.html")
    words = " ".join(HOSTILE.split())
    assert page.texts.count(words) >= 2
    assert any(attributes.get("alt") == f"The generated picture for: {words}" for _, attributes in page.elements)
    assert HOSTILE in json.loads("".join(page.texts[page.texts.index("The whole recipe") + 1 :]).rpartition("}")[0] + "}").values()


def reported(folder: Path, job: PictureJob) -> dict[str, Any]:
    """A job's files in a folder, and its line of the manifest."""
    report, files = known_report(job), picture_files(job.name, folder)
    write_text(files.page, report.page)
    save_picture(report.panel, files.panel, png_text(job.recipe))
    return {**job.recipe.to_json(), "attention": report.numbers}


def test_overview(tmp_path: Path) -> None:
    job = one_job(HOSTILE)
    row = reported(tmp_path, job)
    strangers: list[Any] = [
        {**row, "name": "../case_003_seed_9"},
        {**row, "name": "case_004"},  # has no files
        {**row, "attention": {"leakage": [["<b>"]], "owned": [1]}},
        {**row, "attention": {"leakage": [[1], [2]], "owned": [1]}},
        {**row, "attention": {"leakage": 7, "owned": 7}},
        {**row, "attention": None},
        {**row, "prompt": ["x"]},
        {key: value for key, value in row.items() if key != "attention"},
    ]
    lines = [json.dumps(line) for line in [row, *strangers]]
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, "[]", "{", "7"]), encoding="utf-8")
    write_overview(tmp_path)
    page = assert_harmless((tmp_path / "report.html").read_text(encoding="utf-8"), "case_003_seed_9_report.html")
    assert [attributes["href"] for tag, attributes in page.elements if tag == "a"] == ["case_003_seed_9_report.html"]
    assert " ".join(HOSTILE.split()) in page.texts
    assert "own place 62\u00a0% · others\u2019 places 38\u00a0%" in "".join(page.texts)
    assert "Strongest leak: reference 2 on the place of 1, 75\u00a0%" in "".join(page.texts)
    with open(picture_files(job.name, tmp_path).panel, "r+b") as file:
        file.truncate(300)
    write_overview(tmp_path)
    assert not (tmp_path / "report.html").exists()
    reported(tmp_path, job)
    write_overview(tmp_path)
    assert (tmp_path / "report.html").exists()
    picture_files(job.name, tmp_path).page.unlink()
    write_overview(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ---- parts


def test_the_digest_of_a_page_is_read_again(tmp_path: Path) -> None:
    job = one_job(f'<head><meta name="mosaic-digest" content="{"cd" * 32}">')
    write_text(tmp_path / "page.html", known_report(job).page)
    assert page_digest_at(tmp_path / "page.html") == page_digest(job)
    (tmp_path / "other.html").write_bytes(b"\xff<html>")
    assert page_digest_at(tmp_path / "other.html") is page_digest_at(tmp_path / "none.html") is page_digest_at(tmp_path) is None


def test_the_strongest_leak_is_beyond_the_share_of_the_picture() -> None:
    assert strongest_leak({"leakage": [[0.4, 0.3, 0.2], [0.1, 0.5, 0], [0, 0, 1]], "owned": [0.2, 0.28, 0.02]}) == (0, 2)
    assert strongest_leak({"leakage": [[0.7, 0.2], [0.04, 0.9]], "owned": [0, 0.2]}) is None
    assert strongest_leak({"leakage": [[0.1]], "owned": [0.9]}) is None


@pytest.mark.parametrize("values", [[1.0] * 12, [0.0] * 12, [2.07] * 12, [0.1 * k for k in range(12)]])
def test_names_of_curves_do_not_cover_each_other(values: list[float]) -> None:
    chart = entropy_chart(["x" * 90] * 12, {"entropy": [values, values], "uniform_entropy": 2.08})
    heights = sorted(float(y) for y in re.findall(r'<text x="86.0" y="([-\d.]+)"[^>]*>\d+ x{20,}…<', chart))
    assert len(heights) == 12
    assert min(b - a for a, b in itertools.pairwise(heights)) >= LEGEND_ROW
    lowest = max(float(y) for line in re.findall(r'points="([^"]*)"', chart) for y in re.findall(r",([\d.]+)", line))
    assert lowest < heights[0]
    assert heights[-1] < float(re.search(r'height="(\d+)"', chart)[1])
    assert "nan" not in entropy_chart(["a"], {"entropy": [[0.0]], "uniform_entropy": 0.0})


def test_the_entropy_is_drawn_from_nought_to_beyond_that_of_even_attention() -> None:
    """Ends of the axis at 0 and at the next whole nat, of the steps at the first and the last, counted from 1."""
    chart = entropy_chart(["a"], {"entropy": [[1.5]] * 29, "uniform_entropy": 2.08})
    assert re.findall(r'text-anchor="end">([^<]*)<', chart) == ["0", "1", "2", "3", "even: 2.08"]
    assert re.findall(r'text-anchor="middle">([^<]*)<', chart) == ["sampling step", "1", "8", "15", "22", "29"]


def test_a_falling_entropy_falls() -> None:
    (path,) = re.findall(r'points="([^"]*)"', entropy_chart(["a"], {"entropy": [[2.0], [1.0], [0.0]], "uniform_entropy": 2.08}))
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in path.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y2 > y1  # SVG's y grows downwards


def test_case_titles() -> None:
    assert [case_title(name) for name in ("case_007", "case_010_seed_3", "<x>")] == ["Case 7", "Case 10, seed 3", "<x>"]
