"""Tables: ours beside published rows, protocols told apart, and a page with the pictures at both ends."""

import json
from pathlib import Path

import pytest

from mosaic.evaluation.extremes import extremes
from mosaic.evaluation.tables import differences_of, make_tables, protocol_in_words, read_scores, to_markdown
from scripts.bench.command import main
from tests.evaluation import toys
from tests.evaluation.test_scoring import MeanColour, listed_at, measured


def scores_like(folder: Path, **changes: object) -> dict:
    """Scores by the protocol, with changes."""
    lines = toys.write_benchmark(folder)
    values = measured(lines, folder / "measured", MeanColour())
    models = {"dino": {"model": "facebook/dino-vits16", "revision": "0123456789", "preprocessing": "p"}}
    found = {
        "format": "mosaic-scores", "version": 1, "benchmark": "dreambench", "dino": 61.234, "intervals": {"dino": [60.0, 62.5]},
        "num_pictures": 4500, "num_cases": 750, "num_runs": 6, "protocol": {"runs": 6, "size": 512, "seed": 3407}, "models": models,
        "extremes": {"dino": extremes(values, listed_at(lines).entries, folder)}, "partial": False, "left_out": [],
    }  # fmt: skip
    return found | changes


@pytest.mark.usefixtures("fresh_accelerator")
def test_differences_from_the_protocol_are_told(tmp_path: Path) -> None:
    scores = scores_like(tmp_path)
    assert differences_of(scores) == []
    assert "DIFFERS" not in protocol_in_words(scores)
    changed = scores | {"num_cases": 8, "protocol": {"runs": 2, "size": 768, "seed": 3407}, "partial": True, "left_out": ["x"]}
    changed["models"] = {"dino": scores["models"]["dino"] | {"model": "facebook/dinov2-base"}}
    assert differences_of(changed) == [
        "1 PROBLEMS LEFT OUT", "cases (8, not 750)", "runs (2, not 6)", "size (768, not 512)", "DINO's model (not facebook/dino-vits16)",
    ]  # fmt: skip
    local = scores | {"models": {"dino": scores["models"]["dino"] | {"model": "dino-vits16"}}, "protocol": None}
    assert differences_of(local) == []
    assert "another generator" in protocol_in_words(local)


@pytest.mark.usefixtures("fresh_accelerator")
def test_rows_of_other_protocols_have_other_numbers(tmp_path: Path) -> None:
    scores = scores_like(tmp_path)
    [table] = make_tables([("ours", scores), ("fewer", scores | {"num_cases": 3})])
    lines = to_markdown(table).splitlines()
    assert lines[0] == "| dreambench | CLIP-I | CLIP-T | DINO | measured |"
    rows = {
        line.split(" | ")[0].strip("| *"): [cell.strip(" |") for cell in line.split(" | ")[1:]]
        for line in lines[2:]
        if line.startswith("|")
    }
    assert rows["UNO"] == ["83.50", "30.41", "75.97", "1"]
    assert rows["MOSAIC"][-1] == "2"
    assert rows["ours"] == ["-", "-", "61.23 (60.0 to 62.5)", "3"]
    assert rows["fewer"][-1] == "4"
    assert [line[:2] for line in lines[-4:]] == ["1.", "2.", "3.", "4."]
    assert "DIFFERS" in lines[-1]


@pytest.mark.usefixtures("fresh_accelerator")
def test_both_ends_of_a_metric(tmp_path: Path) -> None:
    both = scores_like(tmp_path)["extremes"]["dino"]
    assert [len(shown) for shown in both.values()] == [8, 8]
    values = [one["value"] for one in both["worst"]]
    assert values == sorted(values)
    assert both["best"] == both["worst"][::-1]
    assert both["worst"][0]["picture"].endswith(".png")
    assert all((tmp_path / path).is_file() for one in both["best"] for path in (one["picture"], *one["references"]))


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(scores_like(tmp_path)))
    assert main(["table", f"Ours <b>={tmp_path}", "--output", str(tmp_path / "table")]) == 0
    html = (tmp_path / "table" / "table.html").read_text()
    assert "Ours &lt;b&gt;" in html
    assert html.count("data:image/jpeg") == 2 * (8 + 10)  # eight pictures with their references, of which two have two
    assert "Ours <b>" in (tmp_path / "table" / "table.md").read_text()
    assert "UNO" in html
    assert main(["table", str(tmp_path), "--ours-alone", "--output", str(tmp_path / "alone")]) == 0
    assert "UNO" not in (tmp_path / "alone" / "table.md").read_text() + (tmp_path / "alone" / "table.html").read_text()
    assert main(["table", str(tmp_path), str(tmp_path), "--output", str(tmp_path / "again")]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: must be a file that `bench\.py score` wrote"):
        read_scores(tmp_path / "other.json")


def test_overall_stands_beside_the_second_list_where_both_are_known() -> None:
    four = {"dpg": 90.0, "id_sim": 50.0, "ip_sim": 70.0, "aes": 60.0}
    rest = {"intervals": {}, "num_cases": 1, "num_runs": 4, "protocol": None, "partial": False, "left_out": [], "models": {}}
    single, multi = (rest | four | {"benchmark": name} for name in ("xversebench", "xversebench_multi"))
    multi["dpg"] = 70.0
    table = make_tables([("both", single), ("both", multi), ("one", multi)])[1]
    found = {row.method: row.values.get("overall") for row in table.rows}
    assert found["MOSAIC"] == pytest.approx(76.04, abs=0.0151)
    assert (found["both"], found["one"]) == ((67.5 + 62.5) / 2, None)
    assert "Overall" in to_markdown(table).splitlines()[0]
