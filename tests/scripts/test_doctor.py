"""The doctor: what it counts, when it calls a data set starved, and the quick form that training runs."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from mosaic.data import Sample
from mosaic.data.inspection import Coverage, Inspection, check_supervision, fingerprint, touched_cells
from mosaic.data.readable import ReadableSamples, Unreadable
from mosaic.method.grids import Grid
from mosaic.training import Trainer
from scripts.doctor import command as doctor
from scripts.doctor.findings import Findings, Training, near_duplicates, shared_cells, summarise, tokens_per_sample
from scripts.doctor.page import Sheet
from scripts.doctor.wording import rows
from tests import runs

GRID = Grid(2, 4)


def pairs(*points: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.int64).reshape(-1, 2)


def cells(*covered: int) -> torch.Tensor:
    return torch.zeros(GRID.num_tokens, dtype=torch.bool).index_fill(0, torch.tensor(covered), True)


def picture(width: int, height: int, seed: str = "") -> Image.Image:
    rng = np.random.default_rng(list(seed.encode()))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def inspection(name: str = "a", **changes: object) -> Inspection:
    values = {
        "id": name,
        "prompt": "a cat and a mug",
        "target": picture(64, 32, name),
        "references": (picture(32, 32), picture(16, 32)),
        "points": (pairs((0, 1), (2, 3)), pairs((1, 2))),
        "reference_grids": (GRID, GRID),
        "target_grid": GRID,
        "masks": (cells(1), None),
    }
    return Inspection(**(values | changes))


def collect(*found: Inspection | Unreadable, max_outside: float = 0.05) -> Findings:
    findings = Findings(Training(token_pixels=8, image_size=(32, 64), reference_size=32, text_length=10, max_outside=max_outside))
    for one in found:
        findings.add(one)
    return findings


def test_a_healthy_set() -> None:
    summary = summarise(collect(inspection("a"), inspection("b", prompt="a dog", masks=(cells(1, 3), cells(2))), max_outside=0.2))
    assert summary["healthy"]
    assert summary["reasons"] == []
    assert (summary["coverage"]["points"], summary["coverage"]["masks"], summary["coverage"]["references"]) == (1.0, 0.75, 4)
    assert summary["references_per_sample"] == {"2": 2}
    assert summary["points_per_reference"] == {"min": 1, "median": 1.5, "mean": 1.5, "max": 2, "below_8": 4}
    assert summary["points_outside_masks"] == {"share": pytest.approx((0.5 + 0 + 0) / 3), "examples": ["a"]}
    assert summary["target_sizes"] == [["64 x 32", 2.0, 2]]
    assert sorted(summary["reference_sizes"]) == [["16 x 32", 0.5, 2], ["32 x 32", 1.0, 2]]
    assert summary["tokens_per_sample"] == 10 + 4 * 8 + 2 * 16
    assert (summary["captions"]["distinct"], summary["captions"]["max_words"]) == (2, 5)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (
            inspection(points=(pairs((0, 1)), pairs()), missing=("points",)),
            r"1 of 2 references \(50.0%\) have points, 95% are wanted: .*match.py",
        ),
        (inspection(points=(pairs((0, 1)), pairs((3, 1)))), r"1 samples have a target cell in two references \(Eq. 2\)"),
        (Unreadable(7, "x.png: broken"), "1 of 2 samples cannot be read"),
    ],
)
def test_a_starved_set(found: Inspection | Unreadable, reason: str) -> None:
    coverage = 0.5 if isinstance(found, Inspection) and found.missing else 1.0
    findings = collect(found) if coverage < 1 else collect(inspection("b"), found)
    summary = summarise(findings)
    assert not summary["healthy"]
    assert re.search(reason, " ".join(summary["reasons"]))
    if isinstance(found, Unreadable):
        assert summary["unreadable"]["examples"] == [[7, "x.png: broken"]]


def test_nothing_at_all_is_starved() -> None:
    assert not summarise(collect())["healthy"]


def test_shared_cells() -> None:
    assert shared_cells([pairs((0, 1), (1, 1)), pairs((0, 2))]) == 0  # v may repeat within a reference
    assert shared_cells([pairs((0, 1)), pairs((0, 1), (1, 3)), pairs((2, 3))]) == 2


def test_near_duplicates_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    base = [int(x) for x in rng.integers(0, 2**64, 40, dtype=np.uint64)]
    near = [value ^ sum(1 << int(bit) for bit in rng.choice(64, size=flips, replace=False)) for flips, value in enumerate(base[:6])]
    named = [(value, str(i)) for i, value in enumerate(base + near)]
    want = {(a, b) for i, (x, a) in enumerate(named) for y, b in named[i + 1 :] if (x ^ y).bit_count() <= 3}
    assert set(near_duplicates(named)) == want
    assert len(want) == 4  # 0 to 3 flipped bits, not 4 and 5


def test_fingerprints_follow_the_picture_not_its_encoding() -> None:
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(6))
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    same = (fingerprint(picture) ^ fingerprint(picture.resize((192, 128)))).bit_count()
    assert same <= 3 < (fingerprint(picture) ^ fingerprint(other)).bit_count()
    ramp = Image.fromarray(np.tile(np.arange(0, 180, 20, dtype=np.uint8), (8, 1)))
    assert (fingerprint(ramp), fingerprint(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) == (2**64 - 1, 0)


def test_touched_cells_are_those_that_the_mask_touches() -> None:
    mask = np.zeros((32, 64), np.uint8)
    mask[0, 16] = mask[31, 63] = 255
    assert touched_cells(mask > 0, GRID).nonzero().flatten().tolist() == [1, 7]


def test_tokens() -> None:
    assert tokens_per_sample(Training(), 2) == 512 + 1024 + 2 * 1024


# ---- the quick form


class Stored:
    """A data set of which every `gap`-th sample has no points on its second reference."""

    def __init__(self, count: int, gap: int) -> None:
        self.count, self.gap, self.read = count, gap, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        second = pairs() if index % self.gap == 0 else pairs((1, 2))
        missing = ("mask",) if index % self.gap == 0 else ()
        return Sample(f"s{index}", "a cat", torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8), [pairs((0, 1)), second], missing)


def test_starved_supervision_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"only 3 of 4 references \(75%\) .*asks for 95%.*Samples without: s0\. 1 of these samples lack their mask\. .*doctor.*match.py.*=0",
    ):
        check_supervision(Stored(2, 2), 0.95)
    assert check_supervision(Stored(2, 2), 0.75) == Coverage(4, 3, ["s0"], Counter(mask=1))
    assert check_supervision(Stored(2, 1), 0.0).share == 0.5
    data = Stored(1000, 40)
    assert check_supervision(data, 0.95, 50).references == 100
    assert (data.read[0], data.read[-1], len(set(data.read))) == (0, 999, 50)


# ---- the quality of matches

SQUARE = Grid(8, 8)
ALL = torch.arange(64)


def matched(name: str, u: torch.Tensor, scores: tuple[dict[str, float], ...] = ()) -> Inspection:
    """One reference, of which every cell is matched: cell u[v] to cell v."""
    return inspection(
        name,
        references=(picture(32, 32),),
        points=(torch.stack([u, ALL], dim=1),),
        reference_grids=(SQUARE,),
        target_grid=SQUARE,
        masks=(None,),
        scores=scores,
    )


def shuffled(share: float, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(64, generator=rng) < share, ALL[torch.randperm(64, generator=rng)], ALL)


def test_matches_without_order_are_not_fit() -> None:
    summary = summarise(collect(matched("a", shuffled(1)), matched("b", shuffled(1, 1))))
    assert (summary["verdict"], summary["healthy"]) == ("not fit for training", False)
    assert summary["reasons"][0].startswith("the matches have no spatial order: their coherence is 0.0")
    assert summary["matches"]["incoherent_references"] == 2
    one, other = matched("c", shuffled(1)), matched("c", ALL)
    two = replace(one, **{name: getattr(one, name) + getattr(other, name) for name in ("references", "points", "reference_grids", "masks")})
    assert summarise(collect(two))["matches"]["least_coherent"] == [["c", pytest.approx(0, abs=0.1)]]
    good = summarise(collect(matched("a", ALL), matched("b", ALL.reshape(8, 8).flip(1).flatten())))
    assert (good["verdict"], good["healthy"], good["doubts"]) == ("fit for training", True, [])
    assert (good["matches"]["coherence"], good["matches"]["coverage"], good["matches"]["cyclic"]) == (pytest.approx(1), 1, None)


@pytest.mark.parametrize(
    ("found", "doubt"),
    [
        ([matched("a", shuffled(0.4))], r"the coherence of the matches is 0\.[34]\d of 1: a third of them or more may be wrong"),
        ([matched("a", ALL)] * 7 + [matched("b", shuffled(1))], "the matches of 1 of 8 references have no spatial order"),
        ([matched("a", ALL // 16 * 16 + ALL % 8 // 4 * 4)], "the points cover 12% of the subjects of the references, less than 25%"),
        ([matched("a", ALL, ({"cyclic": 0.4},))], "the matches lead back to where they came from in 40% of the cells, less than 50%"),
        ([matched("a", ALL, ({"cyclic": 0.6, "agreement": 0.1},))], "the extractors agree on 10% of the cells, less than 20%"),
    ],
)
def test_doubts_ask_for_a_look(found: list[Inspection], doubt: str) -> None:
    findings = collect(*found)
    summary = summarise(findings)
    assert (summary["verdict"], summary["healthy"], summary["reasons"]) == ("look first", False, [])
    assert [re.match(doubt, one) is not None for one in summary["doubts"]] == [True]
    findings.looked = True  # somebody did
    summary = summarise(findings)
    assert (summary["verdict"], summary["healthy"], len(summary["doubts"])) == ("fit for training", True, 1)


def test_the_sheet_shows_the_worst_first() -> None:
    sheet = Sheet()
    beside = replace(matched("beside", ALL), masks=(torch.arange(64) < 32,))  # half of its points lie outside the mask
    few = inspection("few", points=(pairs((0, 1)), pairs()), masks=(cells(1), None))
    for found, kept in ((beside, 1.0), (few, None), *((matched(f"s{index}", ALL), index / 20) for index in range(1, 20))):
        sheet.add(found, kept)
    shown = [one.found.id for one in sheet.worst]
    assert shown == ["few", *(f"s{index}" for index in range(1, 10)), "beside", "s10"]
    captions = [caption for _, caption in sheet.panels()]
    assert captions[:2] == ["few: no reference has 16 points; a cat and a mug", "s1: coherence 0.05; a cat and a mug"]


def test_findings_are_told_in_words() -> None:
    """No brackets and quotes of a programming language, whatever was found."""
    found = (matched("a", ALL), inspection("b"), inspection("c", points=(pairs(), pairs((0, 1)))), Unreadable(7, "x.png: broken"))
    summary = summarise(collect(*found)) | {"data_set": {"found_points": 2, "canary": "zlib"}}
    told = dict(rows(summary))
    text = "\n".join(map(str, told.values()))
    assert re.search(r"[][{}()]|None|nan|'", text) is None, text
    assert told["unreadable samples"] == "1; first: sample 7: x.png: broken"
    assert told["references per sample"] == "1: 1 samples, 2: 2 samples"
    assert told["references with points"] == "80.0%; none in: c"
    assert told["target sizes (px)"] == "64 x 32: 3 pictures"
    assert (told["matched by"], told["data set: found points"], told["data set: canary"]) == ("not known", "2", "zlib")
    assert not re.search(r"None|nan", "\n".join(value for _, value in rows(summarise(collect()) | {"data_set": {}})))


def test_captions_that_will_be_cut_are_told() -> None:
    long = "a cat beside two mugs on the beach in the snow"  # 11 words; with the end token 12, of which 10 are read
    summary = summarise(collect(inspection("a"), inspection("b", prompt=long)))
    told = dict(rows(summary | {"data_set": {}}))
    words = 'b has at least 12 tokens of T5, of which 10 are read: its last 2 words are lost: "the snow"'
    assert told["captions cut"] == f"1; first: {words}"
    assert (summary["captions"]["cut"], summary["captions"]["cut_examples"]) == (1, [words])


# ---- the command


SIZES = ["--image-size", "32", "--reference-size", "16", "--token-size", "4", "--workers", "0"]


@pytest.fixture
def data(world: Path, tmp_path: Path) -> Path:
    """A copy of the small data set, to be damaged."""
    return Path(shutil.copytree(world / "data", tmp_path / "data"))


def test_the_command_on_a_healthy_set(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings, page = tmp_path / "out/findings.json", tmp_path / "out/page.html"
    assert doctor.main([str(data), *SIZES, "--json", str(findings), "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith("fit for training\n")
    found = json.loads(findings.read_text())
    assert found["healthy"]
    assert found["coverage"]["points"] == 1.0
    assert sum(found["references_per_sample"].values()) == found["samples"] == found["data_set"]["samples"]
    text = page.read_text()
    assert "Fit for training." in text
    assert "Somebody must look at the contact sheet" in text
    assert ": no reference has 16 points; " in text
    assert "data:image/png;base64," in text
    assert re.search(r'(src|href)="(?!data:)', text) is None  # nothing is loaded from elsewhere


def test_the_command_counts_the_tokens_of_a_configs_model(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(runs.settings(world, tmp_path / "run")))
    command = [str(world / "data"), "--config", str(config), "--workers", "0"]
    assert doctor.main([*command, "--text-length", "5"]) == 0
    assert 'of which 5 are read: its last word is lost: "mug"' in capsys.readouterr().out
    assert doctor.main(command) == 0
    assert re.search(r"captions cut +none", capsys.readouterr().out)


def test_the_command_names_what_is_missing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = sorted((data / "points").glob("train-*"))
    for file in points[::2]:
        file.unlink()
    assert doctor.main([str(data), *SIZES]) == 1
    assert re.search(r"NOT FIT: \d+ of \d+ references .*preprocess/match.py", capsys.readouterr().out)
    assert doctor.main([str(data), *SIZES, "--min-coverage", "0.3"]) == 0
    capsys.readouterr()
    next((data / "images").glob("train-*_target.png")).write_bytes(b"no picture")
    assert doctor.main([str(data), *SIZES, "--min-coverage", "0.3"]) == 1
    assert re.search(r"NOT FIT: 1 of \d+ samples cannot be read", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        doctor.main([str(data), *SIZES, "--token-size", "1"])
    assert "--token-size must be even" in capsys.readouterr().err
    assert doctor.main([str(data), *SIZES, "--json", str(data)]) == 2
    assert f"--json: must be a file, but {data} is a folder" in capsys.readouterr().err


def test_sizes_of_a_config(data: Path, world: Path, tmp_path: Path) -> None:
    """Those that the flags say, and the token size by the model that the config names; a flag wins."""

    def findings(*arguments: str) -> Any:
        doctor.main([str(data), *arguments, "--workers", "0", "--json", str(tmp_path / "findings.json")])
        return json.loads((tmp_path / "findings.json").read_text())

    config = {
        "model": {"pretrained": str(world / "model"), "text_length": 8},
        "data": {"image_size": [32, 32], "reference_size": 16, "min_point_coverage": 1.0, "split": "heldout"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_config = findings("--config", str(tmp_path / "config.json"))
    assert by_config == findings(*SIZES, "--text-length", "8", "--split", "heldout")
    assert by_config["samples"] != findings("--config", str(tmp_path / "config.json"), "--split", "train")["samples"]
    assert findings("--config", str(tmp_path / "config.json"), "--image-size", "16")["tokens_per_sample"] < by_config["tokens_per_sample"]


def test_weak_extractors_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "matching.json").write_text('{"order": ["pixels", "vae"]}')
    assert doctor.main([str(data), *SIZES]) == 1
    said = capsys.readouterr().out
    assert "LOOK FIRST: the points were made by weak extractors only (pixels, vae)" in said
    assert said.endswith("look first\n")
    assert doctor.main([str(data), *SIZES, "--looked"]) == 0
    assert capsys.readouterr().out.endswith("fit for training\n")
    (data / "matching.json").write_text('{"order": 3}')
    assert doctor.main([str(data), *SIZES]) == 2
    assert 'matching.json: must name the extractors in "order"' in capsys.readouterr().err


def test_points_of_two_extractors_are_compared(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data / "points", tmp_path / "other/points")
    assert doctor.main([str(data), *SIZES, "--against", str(tmp_path / "other")]) == 0
    assert "extractors agree         on 100.0% of cells\n" in capsys.readouterr().out
    for file in (tmp_path / "other/points").iterdir():
        tensors = load_file(file)
        moved = {name: pairs + torch.tensor([3 if pairs[:, 0].max() < 33 else -3, 0], dtype=pairs.dtype) for name, pairs in tensors.items()}
        save_file({name: pairs.clamp(min=0) for name, pairs in moved.items()}, file)
    findings = tmp_path / "findings.json"
    assert doctor.main([str(data), *SIZES, "--against", str(tmp_path / "other"), "--json", str(findings)]) == 1
    assert json.loads(findings.read_text())["matches"]["agreement"] < 0.2
    assert "LOOK FIRST: the extractors agree on " in capsys.readouterr().out
    next((tmp_path / "other/points").glob("train-*")).unlink()
    assert doctor.main([str(data), *SIZES, "--against", str(tmp_path / "other")]) == 1
    assert re.search(r"NOT FIT: 1 of \d+ samples cannot be read", capsys.readouterr().out)
    assert doctor.main([str(data), *SIZES, "--against", str(tmp_path / "nowhere")]) == 2
    assert "--against: there is no such folder" in capsys.readouterr().err


def test_what_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(tmp_path), *SIZES]) == 2
    assert "holds neither dataset.json (multi-reference format) nor a folder data" in capsys.readouterr().err
    assert doctor.main([str(tmp_path / "nowhere"), *SIZES]) == 2
    assert "there is no such folder" in capsys.readouterr().err


# ---- training


@pytest.mark.usefixtures("fresh_accelerator")
def test_training_refuses_a_starved_set(world: Path, data: Path, tmp_path: Path) -> None:
    for file in (data / "points").glob("train-*"):
        file.unlink()
    starved = {"data__root": str(data)}
    with pytest.raises(ValueError, match=r"only 0 of \d+ references \(0%\) have correspondence points, but data.min_point_coverage asks"):
        Trainer(runs.make_config(world, tmp_path / "run", **starved))
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(runs.make_config(world, tmp_path / "run", **starved, data__min_point_coverage=0.0))


@pytest.mark.usefixtures("fresh_accelerator")
def test_training_leaves_out_what_cannot_be_read(world: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = sorted((data / "images").glob("train-*_target.png"))[0]
    picture.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=picture.name):
        Trainer(runs.make_config(world, tmp_path / "run", data__root=str(data)))
    AcceleratorState._reset_state(reset_partial_state=True)
    config = runs.make_config(world, tmp_path / "run", data__root=str(data), data__skip_invalid=True, training__max_steps=2)
    trainer = Trainer(config)
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 1
    assert picture.name in lines[0]["message"]
    assert "1 of" in caplog.text
    everything = len(trainer.dataset.dataset)
    assert len(trainer.dataset) == len(trainer.dataset.batch_keys) == everything - 1
    assert lines[0]["index"] not in [trainer.dataset._readable[i] for i in range(len(trainer.dataset))]
    assert [trainer.dataset.inspect(i).id for i in range(everything - 1)] == [sample.id for sample in trainer.dataset]
    shutil.copyfile(
        sorted((data / "images").glob("train-*_target.png"))[1], picture
    )  # repaired: a new run takes it, a continued one does not
    for continues, left_out in ((True, 1), (False, 0)):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = Trainer(config, continues=continues)
        assert len(trainer.dataset) == everything - left_out
    trainer.fit()


def test_nothing_readable_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of the 2 samples can be read; the first: broken"):
        ReadableSamples(Stored(2, 2), [Unreadable(0, "broken"), Unreadable(1, "broken too")])
