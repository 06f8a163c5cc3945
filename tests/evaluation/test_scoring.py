"""Scoring: bad input before long work, half a list with --partial, kills, processes, and what makes values stale."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mosaic.evaluation import dreambench
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.entries import Entry, Listed, Subject, cases_of, read_lines
from mosaic.evaluation.measures import ClipSimilarity, ReferenceSimilarity
from mosaic.evaluation.records import RECORDS, Key, Record, Records
from mosaic.evaluation.reduction import block_mean
from mosaic.evaluation.scoring import score, sound_entries
from scripts.bench.command import main
from tests import forks
from tests.evaluation import toys

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class MeanColour:
    """An encoder that needs no model: the mean colour, with a constant."""

    provenance = Provenance("mean-colour", "1", "none")

    def __init__(self) -> None:
        self.seen: list[int] = []

    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        self.seen.append(len(pictures))
        colours = [torch.tensor(picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)), dtype=torch.float32) for picture in pictures]
        return torch.nn.functional.normalize(torch.stack(colours) - 100, dim=-1)


def listed_at(lines: Path) -> Listed:
    return read_lines(lines, lambda value, place: dreambench.read_entry(value, place, lines.parent))


def measured(lines: Path, folder: Path, encoder: MeanColour | None = None) -> dict[Key, float]:
    measure, sound = ReferenceSimilarity("dino", encoder or MeanColour()), sound_entries(listed_at(lines), partial=False).entries
    return {record.key: record.value for record in score(sound, [measure], folder, PartialState(cpu=True))}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return toys.write_benchmark(tmp_path)


Change = Callable[[list[dict]], object]
BAD: dict[str, tuple[Change, str]] = {
    "missing": (lambda rows: rows[2].update(picture="none.png"), r"pictures\.jsonl:3: file not found: .*none\.png"),
    "unreadable": (lambda rows: rows[0].update(picture="pictures.jsonl"), r"pictures\.jsonl:1: the file cannot be decoded"),
    "escape": (lambda rows: rows[1].update(picture="../x.png"), r'pictures\.jsonl:2\.picture: must be relative to .* without "\.\."'),
    "escaping subject": (lambda rows: rows[1].update(subjects=["/etc"]), r"pictures\.jsonl:2\.subjects\[0\]: must be relative"),
    "empty folder": (
        lambda rows: rows[3].update(subjects=["subjects/empty"]),
        r"pictures\.jsonl:4\.subjects\[0\]: .* must hold the subject's pictures",
    ),
    "no folder": (lambda rows: rows[3].update(subjects=["subjects/dog"]), r"pictures\.jsonl:4\.subjects\[0\]: there is no folder"),
    "twice": (lambda rows: rows.append(rows[0]), r"pictures\.jsonl:9: run 0 of the case .* is that of .*pictures\.jsonl:1 too"),
    "half a run": (lambda rows: rows.pop(), r"run 1 has 3 of 4 cases: \"cat\+mug: .*\" missing"),
    "key": (lambda rows: rows[5].update(subject="cat"), r"pictures\.jsonl:6\.subject: is not a known setting\. Did you mean subjects"),
    "run": (lambda rows: rows[5].update(run=-1), r"pictures\.jsonl:6\.run: must be an integer of at least 0, got -1"),
    "no list": (lambda rows: rows[5].update(subjects="cat"), r"pictures\.jsonl:6\.subjects: must be a list"),
    "no entry": (lambda rows: rows.clear(), r"must name at least one picture"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_before_anything_is_measured(kind: str, lines: Path, tmp_path: Path) -> None:
    change, message = BAD[kind]
    (tmp_path / "subjects" / "empty").mkdir()
    rows = toys.read_lines(lines)
    change(rows)
    toys.write_lines(lines, rows)
    encoder = MeanColour()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measured(lines, tmp_path / "scores", encoder)
    assert encoder.seen == []
    assert not (tmp_path / "scores" / RECORDS).exists()


def test_all_missing_pictures_are_named_at_once(lines: Path, tmp_path: Path) -> None:
    rows = toys.read_lines(lines)
    for row in rows[:3]:
        row["picture"] += ".gone.png"
    toys.write_lines(lines, rows)
    with pytest.raises(ValueError, match=r"(?s)jsonl:1: file.*jsonl:2: file.*jsonl:3: file.*--partial"):
        sound_entries(listed_at(lines), partial=False)
    sound, problems = sound_entries(listed_at(lines), partial=True)
    assert (len(sound), len(problems)) == (5, 3)


def test_partial_scores_say_so(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = toys.read_lines(lines)
    (tmp_path / rows[7]["picture"]).write_bytes(b"no picture")
    command = ["score", "dreambench", "--pictures", str(lines), "--output", str(tmp_path / "s"), "--metrics", "dino", "--device", "cpu"]
    command += ["--dino", str(toys.write_dino(tmp_path / "dino"))]
    assert main(command) == 2
    assert "pictures.jsonl:8" in capsys.readouterr().err
    assert not (tmp_path / "s" / "scores.json").exists()
    assert main([*command, "--partial"]) == 0
    scores = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert (scores["partial"], scores["num_pictures"], len(scores["left_out"])) == (True, 7, 1)
    assert "PARTIAL" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "model", "message"), [
    ("--dino", "clip", "--dino: .* must be a model of the type vit"),
    ("--clip", "dino", "--clip: .* must be a model of the type clip"),
    ("--dino", "none", "--dino: .*none"),
])  # fmt: skip
def test_an_encoder_of_another_architecture_is_refused(
    flag: str, model: str, message: str, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("clip", "dino"):  # the check needs no weights
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": {"clip": "clip", "dino": "vit"}[name]}))
    metric = {"--dino": "dino", "--clip": "clip_t"}[flag]
    command = ["score", "dreambench", "--pictures", str(lines), "--output", str(tmp_path / "s"), "--metrics", metric, "--device", "cpu"]
    assert main([*command, flag, str(tmp_path / model)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_weights_that_a_model_lacks_are_not_made_up(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = toys.write_dino(tmp_path / "dino")
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    command = ["score", "dreambench", "--pictures", str(lines), "--output", str(tmp_path / "s"), "--metrics", "dino", "--device", "cpu"]
    assert main([*command, "--dino", str(folder)]) == 2
    assert "lacks layernorm.weight" in capsys.readouterr().err


def test_no_number_stops_with_the_picture(lines: Path, tmp_path: Path) -> None:
    class Broken(MeanColour):
        def images(self, pictures: list[Image.Image]) -> torch.Tensor:
            return super().images(pictures) * (float("nan") if pictures[0].size == (40, 40) and len(pictures) == 2 else 1.0)

    with pytest.raises(ValueError, match=r"pictures\.jsonl:1: the embedding of .*0_0\.png is no number"):
        measured(lines, tmp_path / "scores", Broken())


def test_a_subject_compared_with_itself_gives_100(tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    folder.mkdir()
    toys.picture(3).save(folder / "0.png")
    toys.picture(3).save(tmp_path / "made.png")
    lines = toys.write_lines(tmp_path / "pictures.jsonl", [{"picture": "made.png", "prompt": "a cat", "run": 0, "subjects": ["cat"]}])
    assert list(measured(lines, tmp_path / "s").values()) == pytest.approx([100])


def test_a_picture_against_its_prompt_has_0_and_no_factor(tmp_path: Path) -> None:
    class Opposed(MeanColour):
        cosine = -0.5

        def images(self, pictures: list[Image.Image]) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]] * len(pictures))

        def texts(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[self.cosine, (1 - self.cosine**2) ** 0.5]])

    entry = listed_at(toys.write_benchmark(tmp_path)).entries[0]
    opposed = Opposed()
    assert ClipSimilarity(opposed)([entry], [toys.picture(0)]) == pytest.approx([100, 0])
    opposed.cosine = 0.25
    assert ClipSimilarity(opposed)([entry], [toys.picture(0)]) == pytest.approx([100, 25])


def test_what_is_measured_is_left_alone_until_it_changes(lines: Path, tmp_path: Path) -> None:
    folder, encoder = tmp_path / "scores", MeanColour()
    first = measured(lines, folder, encoder)
    assert sorted(encoder.seen) == [2, 2, 2, 2, 2, 3]  # four cases of two runs; the references of two subjects, once
    again = MeanColour()
    assert measured(lines, folder, again) == first
    assert again.seen == []
    toys.picture(77).save(tmp_path / "0_0.png")
    changed = measured(lines, folder, again)
    assert again.seen == [2, 3]
    assert {key for key in first if first[key] != changed[key]} == {Key("dino", f"cat: {toys.PROMPTS[1]}", 0, "cat")}
    toys.picture(78).save(tmp_path / "subjects" / "mug" / "00.png")
    other = MeanColour()
    last = measured(lines, folder, other)
    assert {key.subject for key in first if changed[key] != last[key]} == {"mug"}
    assert sorted(other.seen) == [2, 2, 2, 3]  # the two cases with the mug


def test_a_killed_scoring_goes_on_with_the_same_values(lines: Path, tmp_path: Path) -> None:
    whole = measured(lines, tmp_path / "whole")

    class Killed(MeanColour):
        def images(self, pictures: list[Image.Image]) -> torch.Tensor:
            if len(self.seen) == 4:
                raise KeyboardInterrupt
            return super().images(pictures)

    with pytest.raises(KeyboardInterrupt):
        measured(lines, tmp_path / "killed", Killed())
    [journal] = (tmp_path / "killed").glob(".records_*")
    journal.write_text(journal.read_text() + '{"metric": "dino", "ca')
    encoder = MeanColour()
    assert measured(lines, tmp_path / "killed", encoder) == whole
    assert len(encoder.seen) < 6
    names = [(folder / RECORDS).read_bytes() for folder in (tmp_path / "whole", tmp_path / "killed")]
    assert names[0] == names[1]
    assert [path.name for path in (tmp_path / "killed").glob(".records_*")] == []


def test_two_processes_give_the_scores_of_one(lines: Path, tmp_path: Path) -> None:
    dino = toys.write_dino(tmp_path / "dino")
    flags = ["score", "dreambench", "--pictures", str(lines), "--metrics", "dino", "--dino", str(dino), "--device", "cpu", "--output"]
    assert main([*flags, str(tmp_path / "one")]) == 0
    log = tmp_path / "log.txt"
    assert forks.wait(forks.start("scripts/bench.py", *flags, str(tmp_path / "two"), output=log, processes=2)) == [0, 0], log.read_text()
    assert "2/2 [" in log.read_text()  # of the four cases, what the main process has measured
    for name in (RECORDS, "scores.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 3))
def test_block_means(blocks: list[list[float]], runs: int) -> None:
    """Blocks weigh the same whatever their size; runs are averaged last; the plain mean weighs pictures."""
    values = {
        Key("dino", f"{b}:{n}", run, "cat"): value + run
        for run in range(runs)
        for b, block in enumerate(blocks)
        for n, value in enumerate(block)
    }
    mean = block_mean(values, lambda key: key.case.split(":")[0])
    shift = (runs - 1) / 2
    assert mean.value == pytest.approx(sum(sum(block) / len(block) for block in blocks) / len(blocks) + shift)
    assert mean.plain == pytest.approx(sum(map(sum, blocks)) / sum(map(len, blocks)) + shift)
    assert mean.num_values == runs * sum(map(len, blocks))
    if len(blocks) > 1:
        assert mean.low <= mean.value + 1e-9
        assert mean.value <= mean.high + 1e-9


def test_cases_keep_their_order_and_their_runs_count_up() -> None:
    entries = [Entry(Path(f"{case}{run}"), case, run, "p", (Subject("s", ()),)) for case, run in (("b", 1), ("a", 0), ("b", 0))]
    assert [[(e.case, e.run) for e in case] for case in cases_of(entries)] == [[("b", 0), ("b", 1)], [("a", 0)]]


def test_records_are_all_or_none(tmp_path: Path) -> None:
    record = Record("dino", "cat: a cat", 0, "cat", 50.0, "m", "r", "p", "i")
    Records(tmp_path).add([record])
    Records(tmp_path, 1).add([record])
    assert Records(tmp_path).known == {record.key: record}
    assert Records(tmp_path).write([record.key]) == [record]
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORDS]
