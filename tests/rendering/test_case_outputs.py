"""What a run leaves beside its pictures: journals, contact sheets, digests of weights, recipes in PNGs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosaic.images import load_image
from mosaic.rendering.cases.reading import Case
from mosaic.rendering.cases.references import Reference
from mosaic.rendering.folder import PANELS_PER_SHEET
from mosaic.rendering.notes import read_notes
from mosaic.rendering.outputs import Journal, manifest_rows, write_manifest, write_sheets
from mosaic.rendering.recipe import png_text, read_recipe
from mosaic.rendering.recipes import PictureJob
from mosaic.reports.figures import save_picture
from mosaic.weights.digests import BLOCK, WHOLE, weights_digest
from tests.recipes import make_recipe

CASE = Case(0, "a cat", (Reference(Path("cat.png")),))


def test_a_digest_of_large_weights_sees_a_change_at_both_ends_and_of_the_size(tmp_path: Path) -> None:
    path, digests = tmp_path / "weights.safetensors", set()
    size = WHOLE + 2 * BLOCK
    for position in (None, 0, size - 1, "longer"):
        with open(path, "wb") as file:
            file.truncate(size + (position == "longer"))
            if isinstance(position, int):
                file.seek(position)
                file.write(b"x")
        digests.add(weights_digest(path))
    assert len(digests) == 4


def test_many_panels_make_several_sheets(tmp_path: Path) -> None:
    jobs = [PictureJob(f"case_{index:03d}", CASE, make_recipe(f"case_{index:03d}", seed=index)) for index in range(PANELS_PER_SHEET + 1)]
    for job in jobs:
        save_picture(Image.new("RGB", (10, 10)), tmp_path / f"{job.name}_panel.png", png_text(job.recipe))
    write_sheets(jobs, tmp_path)
    assert load_image(tmp_path / "overview_1.png").size == (20, 10 * PANELS_PER_SHEET // 2)
    assert load_image(tmp_path / "overview_2.png").size == (10, 10)
    (tmp_path / "overview_mine.png").touch()
    write_sheets(jobs[:1], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("overview*")) == ["overview.png", "overview_mine.png"]


def test_sheets_leave_out_damaged_panels_and_those_of_earlier_recipes(tmp_path: Path) -> None:
    jobs = [PictureJob(f"case_{index:03d}", CASE, make_recipe(f"case_{index:03d}", seed=index)) for index in range(3)]
    panels = [tmp_path / f"{job.name}_panel.png" for job in jobs]
    for panel, recipe in zip(panels, (jobs[0].recipe, jobs[1].recipe, make_recipe(seed=7)), strict=True):
        save_picture(Image.new("RGB", (10, 10)), panel, png_text(recipe))
    panels[1].write_bytes(panels[1].read_bytes()[:-40])
    write_sheets(jobs, tmp_path)
    assert load_image(tmp_path / "overview.png").size == (10, 10)
    write_sheets(jobs[1:], tmp_path)
    assert not (tmp_path / "overview.png").exists()


def test_lines_hold_null_for_what_json_does_not_know(tmp_path: Path) -> None:
    job, note = PictureJob("a", CASE, make_recipe("a")), {"owned": [math.nan, 1.0], "leakage": [(math.inf, -math.inf)]}
    save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.png", png_text(job.recipe))
    Journal(tmp_path, 0).add(job, seconds=1.5, attention=note)
    found, missing = manifest_rows([job], tmp_path, {}, {})
    assert missing == []
    write_manifest(found, tmp_path)
    line = (tmp_path / "manifest.jsonl").read_text()
    expected = {"owned": [None, 1.0], "leakage": [[None, None]]}
    assert json.loads(line, parse_constant=pytest.fail) == {**job.recipe.to_json(), "file": "a.png", "seconds": 1.5, "attention": expected}
    with pytest.raises(ValueError, match="JSON"):
        png_text(make_recipe(guidance_scale=math.inf))


def test_a_journal_survives_half_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 3)
    journal.path.write_text('{"name": "a", "dig')
    job = PictureJob("b", CASE, make_recipe("b"))
    journal.add(job, seconds=1)
    journal.add(job, seconds=2)
    (tmp_path / "manifest.jsonl").write_text('{"name": "a", "digest": "1", "seconds": 5}\n[]\n{"digest": 3}\nNaN\n')
    assert {key: note["seconds"] for key, note in read_notes(tmp_path).items()} == {("a", "1"): 5, ("b", job.recipe.digest): 2}


def test_a_picture_that_was_made_counts_more_than_an_earlier_failure(tmp_path: Path) -> None:
    """Started again, it went to another process, whose journal comes before that with the failure."""
    job = PictureJob("a", CASE, make_recipe("a"))
    digest = job.recipe.digest
    Journal(tmp_path, 1).add(job, error="killed")
    assert read_notes(tmp_path)["a", digest]["error"] == "killed"
    Journal(tmp_path, 0).add(job, seconds=2)
    assert read_notes(tmp_path)["a", digest] == {"name": "a", "digest": digest, "seconds": 2}


def test_saved_text_is_unicode(tmp_path: Path) -> None:
    save_picture(Image.fromarray(np.zeros((2, 2, 3), np.uint8)), tmp_path / "a.png", {"mosaic": '{"prompt": "Käse 🧀"}'})
    assert read_recipe(tmp_path / "a.png") == {"prompt": "Käse 🧀"}
    save_picture(Image.new("RGB", (2, 2)), tmp_path / "b.png")
    assert read_recipe(tmp_path / "b.png") is None
