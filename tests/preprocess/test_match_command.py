"""preprocess/match.py: what it writes, and that kills, restarts and processes do not show in it."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from mosaic.data import DatasetWriter, MultiReferenceDataset, ReferenceRecord, SampleRecord
from mosaic.data.multi_reference.points_file import read_match_scores
from mosaic.method.grids import Grid
from preprocess import match
from preprocess.extractors import build_extractor, extractor_spec, weakness
from preprocess.matching.masks import covered_cells, on_black, subject_mask
from preprocess.matching.matching import match_features, resize_features
from preprocess.matching.samples import sample_seed
from scripts.pocket.dataset import write_dataset
from tests import forks

NUM_SAMPLES = 12
FLAGS = ["--extractors", "pixels", "--set", "pixels.cells=32", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pocket data set without its points."""
    root = tmp_path_factory.mktemp("pocket") / "data"
    write_dataset(root, NUM_SAMPLES, 2, max_subjects=3, seed=0)
    for path in (root / "points").iterdir():
        path.unlink()
    return root


@pytest.fixture(scope="module")
def matched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert match.main(arguments(data, output)) == 0
    return output


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), *FLAGS, *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line of a command that must fail."""
    assert match.main(list(argv)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_points_files_hold_what_they_should(data: Path, matched: Path) -> None:
    files = sorted((matched / "points").iterdir())
    assert len(files) == NUM_SAMPLES
    assert len(contents(matched)) == NUM_SAMPLES + 1  # and the settings
    for number, path in enumerate(files):
        tensors = load_file(path)
        count = number % 3 + 1
        assert tensors.keys() == {f"{k}{end}" for k in range(count) for end in ("", ".similarity", ".cyclic")}
        taken: list[int] = []
        for k in range(count):
            points, similarity = tensors[f"{k}"], tensors[f"{k}.similarity"]
            assert (points.dtype, similarity.dtype) == (torch.int32, torch.float16)
            assert points.shape == (len(similarity), 2)
            assert len(points) > 20
            assert (similarity > 0).all()
            u, v = points.long().unbind(1)
            assert (v.diff() > 0).all()
            taken += v.tolist()
            mask = np.asarray(Image.open(data / "images" / f"{path.stem}_mask{k}.png")) > 127
            assert mask.reshape(-1)[v].all()  # the target grid has one cell per pixel
            white = np.asarray(Image.open(data / "images" / f"{path.stem}_ref{k}.png").convert("RGB")).min(axis=-1) >= 250
            cells = white.reshape(32, 4, 32, 4).mean(axis=(1, 3)).reshape(-1)
            assert (cells[u] <= 0.5).all()
        assert len(set(taken)) == len(taken)


def test_one_sample_by_hand(data: Path, matched: Path) -> None:
    """The whole way of one single-subject sample, step by step."""
    extractor = build_extractor(extractor_spec("pixels", {"cells": 32}))
    target, reference = (Image.open(data / "images" / f"train-00000000_{name}.png").convert("RGB") for name in ("target", "ref0"))
    mask = np.asarray(Image.open(data / "images" / "train-00000000_mask0.png")) > 127
    there = resize_features(extractor(target, 0), Grid(64, 64))
    here = extractor(reference, 0)
    assert here.shape[1:] == (32, 32)
    subject = torch.from_numpy((np.asarray(reference).min(axis=-1) < 250).reshape(32, 4, 32, 4).mean(axis=(1, 3)) >= 0.5)
    found = match_features(there, here, target_mask=torch.from_numpy(mask), reference_mask=subject)
    v = torch.from_numpy(np.flatnonzero(mask))
    tensors = load_file(matched / "points/train-00000000.safetensors")
    assert torch.equal(tensors["0"].long(), torch.stack([found.index[v], v], dim=1))
    assert torch.equal(tensors["0.similarity"], found.similarity[v].half())


def test_what_can_be_told_of_the_matches_is_recorded_and_read(data: Path, matched: Path, tmp_path: Path) -> None:
    both = ["--data", str(data), "--output", str(tmp_path), "--extractors", "pixels,vae", "--limit", "1", "--device", "cpu"]
    assert match.main([*both, "--set", "pixels.cells=16", "--set", "vae.size=64"]) == 0
    file = tmp_path / "points/train-00000000.safetensors"
    recorded = load_file(file)
    assert {name: tuple(recorded[f"0.{name}"].shape) for name in ("cyclic", "agreement")} == {"cyclic": (1,), "agreement": (1,)}
    assert 0 < recorded["0.agreement"] < recorded["0.cyclic"] < 1
    (scores,) = read_match_scores(file.read_bytes(), 1)
    assert scores == {name: recorded[f"0.{name}"].item() for name in ("cyclic", "agreement")}
    other = {"0": recorded["0"], "0.cyclic": torch.ones(7), "0.agreement": torch.tensor([1.5])}  # of a program that means other things
    assert read_match_scores(save(other), 1) == ({},)
    # Results of before, without scores, are finished.
    before = {name: tensor for name, tensor in recorded.items() if name in ("0", "0.similarity")}
    file.write_bytes(save(before))
    assert match.main([*both, "--set", "pixels.cells=16", "--set", "vae.size=64"]) == 0
    assert load_file(file).keys() == before.keys()


def test_weak_extractors_say_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert match.main(arguments(data, tmp_path, "--limit", "1")) == 0
    assert "match.py: note: weak extractors only (pixels): they compare colours" in capsys.readouterr().err
    assert weakness(["pixels", "vae"]).startswith("weak extractors only (pixels, vae)")
    assert weakness(["pixels", "dift"]) is weakness(["dinov2"]) is weakness([]) is None


def test_a_second_start_does_nothing(data: Path, matched: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in matched.rglob("*")}
    assert match.main(arguments(data, matched)) == 0
    assert f"0 samples matched, {NUM_SAMPLES} were finished before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in matched.rglob("*")} == before


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first row of a manifest."""
    table = pq.read_table(root / "manifest.parquet")
    rows = table.to_pylist()
    change(rows[0])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), root / "manifest.parquet")


@pytest.mark.parametrize("layout", ["compact", "release"])
def test_changed_pictures_are_matched_again(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, layout: str) -> None:
    """A target, a reference, a mask or a grid of points that were found before: each time one sample, and the doctor's reader refuses it."""
    root = shutil.copytree(data, tmp_path / "data")
    own = ["--layout", "release", "--grid", "16x16"] if layout == "release" else []
    flags = ["--data", str(root), *FLAGS, "--limit", "2", *own]
    assert match.main(flags) == 0
    name, mask = "train-00000000", Image.new("L", (64, 64), 0)
    mask.paste(255, (10, 10, 30, 30))
    changes: list[Callable[[], Any]] = [
        lambda: shutil.copy(root / "images/train-00000001_target.png", root / f"images/{name}_target.png"),
        lambda: shutil.copy(root / "images/train-00000001_ref0.png", root / f"images/{name}_ref0.png"),
        lambda: mask.save(root / f"images/{name}_mask0.png"),
        lambda: rewrite(root, lambda row: row.update(target_grid=[32, 128])),
    ]
    before = contents(root)
    for change in changes:
        change()
        if layout == "compact":
            dataset = MultiReferenceDataset(
                root, image_size=(64, 64), reference_size=64, target_token_grid=(8, 8), reference_token_grid=(8, 8)
            )
            with pytest.raises(ValueError, match=f"{name}.safetensors was found in other pictures, or on other grids, than those that"):
                dataset.inspect(0)
        assert match.main(flags) == 0
        again = f"1 samples matched, 1 of them again, for their pictures or grids have changed ({name}), 1 were finished before;"
        assert again in capsys.readouterr().out
        found = {path for path, content in contents(root).items() if before.get(path) != content}
        assert {path for path in found if path.startswith(("points", "coord"))} <= {path for path in before if name in path}
    assert match.main(flags) == 0
    assert "0 samples matched, 2 were finished before;" in capsys.readouterr().out
    anew = ["--data", str(root), "--output", str(tmp_path / "anew"), *FLAGS, "--limit", "2", *own]
    assert match.main(anew) == 0
    assert contents(root).items() >= contents(tmp_path / "anew").items()


def test_points_that_do_not_say_what_they_were_found_in_stay(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert match.main(arguments(data, tmp_path, "--limit", "2")) == 0
    path = sorted((tmp_path / "points").iterdir())[0]
    save_file(load_file(path), path)
    before = contents(tmp_path)
    assert match.main(arguments(data, tmp_path, "--limit", "2")) == 0
    assert "0 samples matched, 2 were finished before, 1 of these by an earlier version, which did not note" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_damaged_results_are_made_anew(data: Path, matched: Path, tmp_path: Path) -> None:
    assert match.main(arguments(data, tmp_path, "--limit", "4")) == 0
    files = sorted((tmp_path / "points").iterdir())
    assert len(files) == 4
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-5])
    files[2].write_bytes(files[3].read_bytes())  # of another K
    files[3].unlink()
    assert match.main(arguments(data, tmp_path)) == 0
    assert contents(tmp_path) == contents(matched)


def run_until_killed(argv: list[str], is_time: Callable[[], bool]) -> bool:
    """Run the command in a forked process and kill it when it is time; returns whether the kill came before its end."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(match.main(argv))
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if is_time():
            os.kill(child, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(child, 0)[1])
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.001)
    raise AssertionError("the run did not come to its end")


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_three_times_equals_uninterrupted(data: Path, matched: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL at random moments, early and late in a sample; then a run to the end. Equal file by file, and no file beside."""
    draw, kills = random.Random(seed), 0
    for goal in (2, 5, 8):

        def is_time(goal: int = goal) -> bool:
            if len(list(tmp_path.glob("points/*.safetensors"))) < goal:
                return False
            time.sleep(draw.random() * 0.05)
            return True

        kills += run_until_killed(arguments(data, tmp_path), is_time)
        finished = [path for path in tmp_path.glob("points/*.safetensors") if load_file(path)]
        assert goal <= len(finished) <= NUM_SAMPLES
    assert kills >= 1
    assert match.main(arguments(data, tmp_path)) == 0
    assert contents(tmp_path) == contents(matched)


def test_two_processes_equal_one(data: Path, matched: Path, tmp_path: Path) -> None:
    flags = arguments(data, tmp_path)
    if not torch.accelerator.is_available():  # then the CPU need not be named
        place = flags.index("--device")
        del flags[place : place + 2]
    codes = forks.wait(forks.start("preprocess/match.py", *flags, output=tmp_path.with_suffix(".log"), processes=2))
    output = tmp_path.with_suffix(".log").read_text()
    assert codes == [0, 0], output[-3000:]
    shares = re.findall(r"process \d of 2: (\d+) samples matched", output)
    assert [int(share) for share in shares] == [NUM_SAMPLES // 2] * 2
    assert contents(tmp_path) == contents(matched)


def test_other_settings_are_refused_by_name(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert match.main(arguments(data, tmp_path, "--limit", "1")) == 0
    before = contents(tmp_path)
    for more, message in (
        (["--cycle", "2"], "matching.cycle was null and is now 2"),
        (["--set", "pixels.scales=2"], "extractors.pixels.scales was 4 and is now 2"),
        (["--dtype", "bfloat16"], 'dtype was "float32" and is now "bfloat16"'),
        (["--whole-references"], "matching.white_threshold was 5 and is now null"),
    ):
        assert message in refused(capsys, *arguments(data, tmp_path, *more))
    written = json.loads((tmp_path / "matching.json").read_text())
    del written["matching"]["affine"]
    (tmp_path / "matching.json").write_text(json.dumps(written))
    assert match.main(arguments(data, tmp_path, "--limit", "1")) == 0  # of before there was this filter
    (tmp_path / "matching.json").write_text("{")
    assert "not valid JSON" in refused(capsys, *arguments(data, tmp_path))
    (tmp_path / "matching.json").unlink()
    assert "has results already, but" in refused(capsys, *arguments(data, tmp_path))
    assert {name: content for name, content in before.items() if name != "matching.json"} == contents(tmp_path)


def test_points_of_others_are_not_taken_for_finished(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The pocket world brings exact points; they must neither be kept as matches nor be overwritten."""
    write_dataset(tmp_path / "data", 1, 0, max_subjects=1, seed=0)
    before = contents(tmp_path)
    assert "has results already" in refused(capsys, "--data", str(tmp_path / "data"), *FLAGS)
    assert contents(tmp_path) == before


def test_released_layout(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--layout", "release", "--score", "dot", "--background", "black", "--limit", "2"]
    assert match.main(arguments(data, tmp_path, *flags)) == 0
    names = set(contents(tmp_path))
    coordinates = {f"coord/pixels/train-{i:08d}_ref{k}.pt" for i, k in ((0, 0), (1, 0), (1, 1))}
    digests = {f"coord/pictures/train-{i:08d}.txt" for i in range(2)}
    assert names == coordinates | digests | {"coord/matching.json"}
    extractor = build_extractor(extractor_spec("pixels", {"cells": 32}))
    for path in sorted(coordinates):
        stored = torch.load(tmp_path / path, weights_only=True)
        assert (stored.dtype, stored.shape) == (torch.int64, (4096, 2))
        stem, k = path.split("/")[-1].removesuffix(".pt").split("_ref")
        target, reference, mask = (Image.open(data / "images" / f"{stem}_{part}.png") for part in ("target", f"ref{k}", f"mask{k}"))
        ours = on_black(target.convert("RGB"), np.asarray(mask) > 127)
        theirs = on_black(reference.convert("RGB"), subject_mask(reference.convert("RGB"), 5))
        maps = [resize_features(extractor(image, 0), Grid(64, 64)) for image in (ours, theirs)]
        index = match_features(*maps, score="dot").index
        assert torch.equal(stored, torch.stack([index // 64, index % 64], dim=1))  # y, x
    before = contents(tmp_path)
    (tmp_path / sorted(coordinates)[0]).write_bytes(b"damaged")
    assert match.main(arguments(data, tmp_path, *flags)) == 0
    assert contents(tmp_path) == before
    assert "--cycle must not be given with --layout release" in refused(
        capsys, *arguments(data, tmp_path, "--layout", "release", "--cycle", "1")
    )


def test_filters_and_consensus_only_remove(data: Path, matched: Path, tmp_path: Path) -> None:
    for name, flags in {
        "cycle": ["--cycle", "1"],
        "affine": ["--affine", "2"],
        "similarity": ["--min-similarity", "0.9"],
        "margin": ["--min-margin", "0.002"],
        "unique": ["--unique-u"],
    }.items():
        assert match.main(arguments(data, tmp_path / name, "--limit", "1", *flags)) == 0
        left, all_points = (load_file(folder / "points/train-00000000.safetensors") for folder in (tmp_path / name, matched))
        kept, full = ({tuple(pair) for pair in tensors["0"].tolist()} for tensors in (left, all_points))
        assert kept < full, name
        assert kept, name
    assert (load_file(tmp_path / "similarity/points/train-00000000.safetensors")["0.similarity"] >= 0.899).all()
    u = load_file(tmp_path / "unique/points/train-00000000.safetensors")["0"][:, 0].tolist()
    assert len(set(u)) == len(u)


def test_finer_grid_is_carried_to_the_manifests(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert match.main(arguments(data, tmp_path, "--limit", "2", "--grid", "64x128")) == 0
    points = load_file(tmp_path / "points/train-00000001.safetensors")
    for k in range(2):
        u, v = points[f"{k}"].unbind(1)
        assert len(u)
        assert u.max() < 32 * 32
        assert len(set(u.tolist())) == len(u)
        assert (v.diff() > 0).all()
    assert "must be a whole multiple" in refused(capsys, *arguments(data, tmp_path / "b", "--grid", "96x96"))
    assert not (tmp_path / "b").exists()


def test_contact_sheet(data: Path, tmp_path: Path) -> None:
    assert match.main(arguments(data, tmp_path, "--limit", "3", "--contact-sheet", "2")) == 0
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB"))
    assert sheet.shape[0] == 2 * 256 + 3 * 12  # the second sample has two references
    for colour in ((230, 57, 70), (29, 120, 216)):
        assert (sheet == colour).all(axis=-1).any(), colour


def test_results_fit_the_reader(data: Path, tmp_path: Path) -> None:
    """The trainer's reader takes the points; similarities are left out where the reader does not know them yet."""
    target, reference = Grid(8, 8), Grid(4, 4)
    assert match.main(arguments(data, tmp_path, "--limit", "3")) == 0
    for path in sorted((tmp_path / "points").iterdir()):
        from safetensors.torch import save_file

        tensors = {name: tensor for name, tensor in load_file(path).items() if "." not in name}
        save_file(tensors, data / "points" / path.name)
    try:
        sizes = {"image_size": (64, 64), "reference_size": 32, "target_token_grid": target, "reference_token_grid": reference}
        dataset = MultiReferenceDataset(data, "train", **sizes)
        assert all(len(points) for i in range(3) for points in dataset[i].points)
    finally:
        for path in (data / "points").iterdir():
            path.unlink()


def test_grids_that_are_not_square(tmp_path: Path) -> None:
    """A wide target and a tall reference whose pixels are told apart by colour: exact points, so rows and columns cannot be swapped."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 200, (8, 12, 3), dtype=np.uint8)
    target = Image.fromarray(pixels).resize((96, 64), Image.Resampling.NEAREST)
    part = pixels[:, 3:7]  # 8 rows, 4 columns
    reference = Image.fromarray(part).resize((32, 64), Image.Resampling.NEAREST)
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 24:56] = 1
    with DatasetWriter(tmp_path / "data") as writer:
        record = ReferenceRecord(reference, "part", np.zeros((0, 2), int), mask)
        writer.add(SampleRecord("wide", "train", "a part", target, [record], (8, 4), (8, 12)))
    (tmp_path / "data/points/wide.safetensors").unlink()
    flags = ["--extractors", "pixels", "--set", "pixels.scales=1", "--set", "pixels.cells=24", "--device", "cpu"]
    assert match.main(["--data", str(tmp_path / "data"), *flags, "--cycle", "0"]) == 0
    points = load_file(tmp_path / "data/points/wide.safetensors")["0"].tolist()
    exact = {(row * 4 + column, row * 12 + column + 3) for row in range(8) for column in range(4)}
    swapped = {(column * 8 + row, (column + 3) * 8 + row) for row, column in ((u // 4, u % 4) for u, _ in exact)}
    found = {tuple(pair) for pair in points}
    assert len(exact & found) >= 0.75 * len(exact)  # resizing mixes neighbours, most of all at the border
    assert len(swapped & found) < 0.1 * len(exact)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--extractors", "pixels,pixels"], "each extractor once"),
        (["--extractors", "pixels", "--set", "vae.size=3"], "vae is not among"),
        (["--extractors", "pixels", "--set", "pixels"], "must look like dift.size=768"),
        (["--extractors", "pixels", "--split", "test"], 'no sample of the split "test"'),
        (["--extractors", "pixels", "--limit", "0"], "--limit must be at least 1"),
        (["--extractors", "pixels", "--cycle", "-1"], "matching.cycle must be an integer of at least 0 or null"),
        (["--extractors", "pixels", "--min-similarity", "2"], "matching.min_similarity must be a number"),
        (["--extractors", "pixels", "--device", "tpu3"], "--device tpu3: cannot be used"),
        (["--extractors", "dinov2", "--set", "dinov2.model=no/such/place/x"], "dinov2.model"),
    ],
)
def test_mistakes_are_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str) -> None:
    assert message in refused(capsys, "--data", str(data), "--output", str(tmp_path / "new"), *flags)
    assert not (tmp_path / "new").exists()


def test_a_missing_picture_names_its_row(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = data / "images/train-00000001_ref1.png"
    kept = path.read_bytes()
    try:
        path.unlink()
        assert '(id "train-00000001").references[1].image: file not found' in refused(capsys, *arguments(data, tmp_path))
        path.write_bytes(kept[:200])
        assert "cannot be decoded" in refused(capsys, *arguments(data, tmp_path))
    finally:
        path.write_bytes(kept)


def test_seeds_differ_by_sample_and_by_base() -> None:
    seeds = {sample_seed(base, name) for base in (0, 1) for name in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, "a") == sample_seed(0, "a")


def test_masks_by_area() -> None:
    mask = np.zeros((6, 9), bool)
    mask[:3, :5] = True  # cells of 3 x 3 px: the first column whole, two thirds of the second
    assert covered_cells(mask, Grid(2, 3)).tolist() == [[True, True, False], [False, False, False]]
    mask[:, :] = False
    mask[0, 0] = True  # only the corner pixel, which a corner rule would take
    assert not covered_cells(mask, Grid(2, 3)).any()


def test_settings_file_says_what_was_done(matched: Path) -> None:
    settings = json.loads((matched / "matching.json").read_text())
    assert settings["extractors"] == {"pixels": {"cells": 32, "scales": 4}}
    assert (settings["layout"], settings["device"], settings["dtype"]) == ("compact", "cpu", "float32")
    assert settings["matching"]["consensus"] == 1
