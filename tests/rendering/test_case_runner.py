"""The case runner: alone, over two processes, killed and resumed it gives the same pictures, names and manifest."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import inference
from mosaic.config.loading import load_config
from mosaic.images import load_image
from mosaic.pipeline import pipeline as pipelines
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.pipeline.sampler import Group
from mosaic.rendering import rendering, start
from mosaic.rendering import runner as case_runner
from mosaic.rendering.cases.pictures import ReferencePicture, ReferencePictures
from mosaic.rendering.cases.reading import read_cases
from mosaic.rendering.recipe import read_recipe
from mosaic.rendering.recipes import PictureJob
from mosaic.weights.digests import weights_digest
from tests import forks, runs

PICTURES = [f"reference_{index}.png" for index in range(3)]
ENTRIES: list[dict[str, Any]] = [
    {"index": 7, "prompt": "a cat on the beach", "image_paths": PICTURES[:1]},
    {"index": 2, "prompt": "a <cat> and a mug", "references": {"cat": PICTURES[1]}, "num_images_per_prompt": 2, "height": 8},
    {"index": 4, "instruction": "a mug", "input_images": PICTURES, "num_inference_steps": 3},
    {"grid": {"prompts": ["a cat", "a mug"], "references": ["reference_[01].png"]}, "index": 20, "seed": 5, "image_guidance_scale": 2},
]
NAMES = ["case_007", "case_002_seed_44", "case_002_seed_45", *(f"case_{index:03d}" for index in (4, 20, 21, 22, 23))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_world(tmp_path_factory.mktemp("world"))
    (folder / "cases.json").write_text(json.dumps(ENTRIES))
    (folder / "config.json").write_text(json.dumps(runs.settings(folder, folder / "unused")))
    return folder


def arguments(world: Path, output: Path, *more: str) -> list[str]:
    return ["--config", str(world / "config.json"), "--output-dir", str(output), *more]


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("alone")
    assert inference.main(arguments(world, output)) == 0
    return output


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def assert_same(found: Path, expected: Path) -> None:
    """Every file byte for byte, the manifest but for its seconds; nothing else is left behind."""
    first, second = runs.files_below(found), runs.files_below(expected)
    assert first.keys() == second.keys()
    assert [name for name in first if name != "manifest.jsonl" and first[name] != second[name]] == []
    assert [{**row, "seconds": 0} for row in rows(found)] == [{**row, "seconds": 0} for row in rows(expected)]


def run_two_processes(world: Path, output: Path, *more: str) -> str:
    """Run the command over two processes; returns what they print."""
    printed = world / f"{output.name}.log"
    codes = forks.wait(forks.start("inference.py", *arguments(world, output, *more), output=printed, processes=2))
    assert codes == [0, 0], printed.read_text()[-3000:]
    return printed.read_text()


# ---- what a run leaves


def test_names_and_recipes(alone: Path, world: Path) -> None:
    found = rows(alone)
    assert [row["name"] for row in found] == NAMES
    assert {path.name for path in alone.iterdir()} == {
        "manifest.jsonl",
        "overview.png",
        *(f"{name}{ending}" for name in NAMES for ending in (".png", "_panel.png")),
    }
    for row in found:
        recipe = read_recipe(alone / row["file"])
        assert recipe == {key: value for key, value in row.items() if key not in ("file", "seconds")}
        assert row["seconds"] > 0
        assert load_image(alone / row["file"]).size == (row["width"], row["height"])
        assert (row["model"]["name"], row["lora"]["name"]) == ("model", "lora.safetensors")  # no paths of a machine
        assert str(world) not in json.dumps(row)
        assert row["lora"]["digest"] == weights_digest(world / "lora.safetensors")
        assert {"torch", "diffusers", "python"} <= row["versions"].keys()
    assert found[1]["prompt"] == "a cat and a mug"
    assert [row["seed"] for row in found] == [49, 44, 45, 46, 5, 5, 5, 5]
    assert [row["num_inference_steps"] for row in found] == [2, 2, 2, 3, 2, 2, 2, 2]
    assert [row["height"] for row in found] == [16, 8, 8, 16, 16, 16, 16, 16]
    assert [len(row["references"]) for row in found] == [1, 1, 1, 3, 1, 1, 1, 1]
    assert len({row["digest"] for row in found}) == len(found)
    pictures = {(alone / row["file"]).read_bytes() for row in found}
    assert len(pictures) == len(found)


# ---- the same, whatever happens


def test_two_processes_give_the_same(world: Path, alone: Path, tmp_path: Path) -> None:
    assert run_two_processes(world, tmp_path / "out").count(f"{len(NAMES)} pictures in ") == 1
    assert_same(tmp_path / "out", alone)


def test_killed_and_resumed_gives_the_same(world: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    (process,) = forks.start("inference.py", *arguments(world, folder), output=tmp_path / "log")
    while not list(folder.glob("case_*[0-9].png")):
        assert process.exitcode is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (folder / "manifest.jsonl").exists()
    (journal,) = folder.glob(".journal_*")
    with open(journal, "a") as file:  # as if killed in the middle of a line, and of a picture
        file.write('{"name": "case_0')
    finished = len(list(folder.glob("case_*[0-9].png")))
    (folder / f".{NAMES[-1]}.png.partial").write_bytes(b"half")
    damaged = folder / f"{NAMES[-2]}.png"
    damaged.write_bytes((alone / damaged.name).read_bytes()[:-40])
    assert inference.main(arguments(world, folder)) == 0
    assert f"{len(NAMES)} pictures in {folder} ({finished} were finished before)" in capsys.readouterr().out
    assert_same(folder, alone)
    assert all(row["seconds"] > 0 for row in rows(folder))


def test_each_process_renders_its_share(world: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(world / "config.json", [f"inference.output_dir={tmp_path}"])
    cases = read_cases(world / "cases.json", runs.REFERENCE_SIZE)
    shares: list[list[str]] = []
    monkeypatch.setattr(case_runner, "render_batches", lambda batches, *_, **__: shares.append([job.name for (job,) in batches]))
    monkeypatch.setattr(start, "load_pipeline", lambda *_: SimpleNamespace(transformer=None))
    for name in (f"{NAMES[0]}.png", f"{NAMES[0]}_panel.png"):  # finished: what is left is shared out
        (tmp_path / name).write_bytes((alone / name).read_bytes())
    for index in range(3):
        state = SimpleNamespace(
            process_index=index, num_processes=3, is_main_process=False, device=torch.device("cpu"), wait_for_everyone=lambda: None
        )
        case_runner.run_cases(cases, config, state)
    assert shares == [NAMES[1::3], NAMES[2::3], NAMES[3::3]]


def test_pictures_of_other_cases_stay_in_the_manifest(world: Path, alone: Path, tmp_path: Path) -> None:
    path = world / "some.json"
    for entries in (ENTRIES[:1], ENTRIES[1:]):
        path.write_text(json.dumps(entries))
        assert inference.main(arguments(world, tmp_path, "--cases", str(path))) == 0
    assert [row["name"] for row in rows(tmp_path)] == [*NAMES[1:], NAMES[0]]
    (tmp_path / f"{NAMES[0]}.png").unlink()
    with open(tmp_path / "manifest.jsonl", "a") as file:
        file.write(json.dumps({"name": str(alone / NAMES[0]), "digest": rows(alone)[0]["digest"]}) + "\n")
    assert inference.main(arguments(world, tmp_path, "--cases", str(path))) == 0
    assert [row["name"] for row in rows(tmp_path)] == NAMES[1:]


def test_an_interruption_ends_in_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "render_batch", interrupt)
    assert inference.main(arguments(world, tmp_path)) == 130
    assert capsys.readouterr().err.endswith("interrupted: the same command goes on with the pictures that are missing\n")


def test_a_second_run_loads_nothing(world: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = runs.files_below(alone)
    monkeypatch.setattr(start, "load_pipeline", lambda *_: pytest.fail("all pictures are finished"))
    assert inference.main(arguments(world, alone)) == 0
    assert runs.files_below(alone) == before  # the seconds too


def test_finished_means_the_recipe_not_the_name(world: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    for name, data in runs.files_below(alone).items():
        save = folder / name
        save.parent.mkdir(exist_ok=True)
        save.write_bytes(data)
    rendered = []
    render = rendering.render_batch
    monkeypatch.setattr(
        rendering, "render_batch", lambda batch, *rest, **more: rendered.append(batch[0].name) or render(batch, *rest, **more)
    )
    changed = [dict(entry) for entry in ENTRIES]
    changed[0]["prompt"] = "a mug on the beach"
    (tmp_path / "reference_2.png").write_bytes((world / "reference_0.png").read_bytes())  # another picture under an old name
    for name in PICTURES[:2]:
        (tmp_path / name).write_bytes((world / name).read_bytes())
    (tmp_path / "cases.json").write_text(json.dumps(changed))
    (folder / f"{NAMES[1]}_panel.png").unlink()
    more = ["--cases", str(tmp_path / "cases.json")]
    assert inference.main(arguments(world, folder, *more)) == 0
    assert rendered == [NAMES[0], NAMES[1], NAMES[3]]
    changes = "inference.num_inference_steps=1", "model.reference_attention=isolated", "model.reference_position=index"
    for setting in (*changes, "inference.num_threads=2"):
        rendered.clear()
        assert inference.main(arguments(world, folder, *more, "--set", setting)) == 0
        assert len(rendered) == len(NAMES) - setting.startswith("inference.num_inference_steps")  # one case has its own


def test_threads_are_fixed_and_given_back(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(case_runner, "render_batches", lambda *_, **__: seen.append(torch.get_num_threads()))
    assert inference.main(arguments(world, tmp_path / "out", "--set", "inference.num_threads=2")) == 1
    assert (seen, torch.get_num_threads()) == ([2], before)


def test_another_batch_size_starts_from_the_same_noise(world: Path, alone: Path) -> None:
    found = [row for row in rows(alone) if row["index"] in (20, 22)]
    pipeline = MosaicFluxPipeline.from_pretrained(world / "model")
    pipeline.load_reference_lora(world / "lora.safetensors")
    pictures = pipeline(
        [row["prompt"] for row in found],
        [[load_image(world / PICTURES[0])]] * 2,
        **{key: found[0][key] for key in ("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale")},
        generator=[torch.Generator().manual_seed(row["seed"]) for row in found],
        reference_size=runs.REFERENCE_SIZE,
        max_sequence_length=found[0]["text_length"],
    ).images
    for row, picture in zip(found, pictures, strict=True):
        difference = np.asarray(picture).astype(int) - np.asarray(load_image(alone / row["file"])).astype(int)
        assert np.abs(difference).max() <= 2


# ---- what fails


def test_a_case_that_fails_does_not_stop_the_others(
    world: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = rendering.read_references

    def fail(job: PictureJob, pictures: ReferencePictures) -> list[ReferencePicture]:
        if job.name == NAMES[1]:
            raise RuntimeError("out of\nmemory")
        return read(job, pictures)

    monkeypatch.setattr(rendering, "read_references", fail)
    cases = [
        *ENTRIES,
        {"prompt": "", "image_paths": PICTURES, "index": 30},
        {"prompt": "a", "image_paths": PICTURES, "index": 31, "width": 18},
    ]
    path = world / "failing.json"
    path.write_text(json.dumps(cases))
    assert inference.main(arguments(world, tmp_path, "--cases", str(path))) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert [error.split(": ")[1] for error in errors] == [
        f"{path}[4].prompt",
        f"{path}[5].height, width",
        f"{path}[1] ({NAMES[1]})",
    ]
    assert errors[2].endswith("RuntimeError: out of memory")
    assert "height and width must be positive multiples of the token size 4 px, got 16 x 18" in errors[1]
    assert "2 bad cases" not in captured.err  # the size is known to be bad only with the model's config
    assert [row["name"] for row in rows(tmp_path)] == [name for name in NAMES if name != NAMES[1]]
    for row in rows(tmp_path):
        assert (tmp_path / row["file"]).read_bytes() == (alone / row["file"]).read_bytes()
    monkeypatch.setattr(rendering, "read_references", read)
    assert inference.main(arguments(world, tmp_path)) == 0
    assert_same(tmp_path, alone)


def test_a_reference_that_changes_on_the_way_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "reference.png"
    picture.write_bytes((world / PICTURES[0]).read_bytes())
    (tmp_path / "cases.json").write_text(json.dumps([{"prompt": "a", "image_paths": ["reference.png"]}]))
    load = start.load_pipeline

    def swap(*rest: Any) -> Any:
        picture.write_bytes((world / PICTURES[1]).read_bytes())
        return load(*rest)

    monkeypatch.setattr(start, "load_pipeline", swap)
    assert inference.main(arguments(world, tmp_path / "out", "--cases", str(tmp_path / "cases.json"))) == 1
    assert f"{picture}: has changed since the cases were checked. Start again." in capsys.readouterr().err


def test_a_picture_that_is_not_finite_fails(
    world: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise = pipelines.denoise

    def overflow(pipeline: MosaicFluxPipeline, group: Group, options: ResolvedOptions, after_step: Any) -> None:
        denoise(pipeline, group, options, after_step)
        group.latents = group.latents * (torch.inf if options.image_guidance_scale == 99 else 1)

    monkeypatch.setattr(pipelines, "denoise", overflow)
    path = world / "guided.json"
    path.write_text(json.dumps([ENTRIES[0] | {"index": 6, "image_guidance_scale": 99}, ENTRIES[0]]))
    for _ in range(2):  # it is not taken for finished
        assert inference.main(arguments(world, tmp_path, "--cases", str(path), "--report")) == 1
        captured = capsys.readouterr()
        assert f"1 pictures in {tmp_path}" in captured.out
        (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: {path}[0] (case_006): ValueError: the picture's values must be finite, but some are not.")
        assert "image_guidance_scale (99" in error
        assert [row["name"] for row in rows(tmp_path)] == ["case_007"]
        assert not list(tmp_path.glob("case_006*"))
    assert (tmp_path / "case_007.png").read_bytes() == (alone / "case_007.png").read_bytes()


def test_a_damaged_panel_of_another_case_hides_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world / "damaged.json"
    path.write_text(json.dumps(ENTRIES[:1]))
    assert inference.main(arguments(world, tmp_path, "--cases", str(path), "--report")) == 0
    with open(tmp_path / "case_007_panel.png", "r+b") as file:
        file.truncate(300)
    load = start.load_pipeline

    def take(*rest: Any) -> Any:
        (tmp_path / "overview.png").unlink()
        (tmp_path / "overview.png").mkdir()  # no picture can be written here
        return load(*rest)

    monkeypatch.setattr(start, "load_pipeline", take)
    path.write_text(json.dumps([ENTRIES[0] | {"index": 8}, {"prompt": "", "image_paths": PICTURES}]))
    assert inference.main(arguments(world, tmp_path, "--cases", str(path), "--report")) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [error.split(": ")[1] for error in errors] == [f"{path}[1].prompt", str(tmp_path)]
    assert "the contact sheets could not be written" in errors[1]
    assert {row["name"] for row in rows(tmp_path)} == {"case_007", "case_008"}
    page = (tmp_path / "report.html").read_text()
    assert "case_008_report.html" in page
    assert "case_007_report.html" not in page


def test_what_can_be_known_before_is_found_by_a_check_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "load_pipeline", lambda *_: pytest.fail("the model is loaded"))
    path, taken = world / "before.json", tmp_path / "taken"
    path.write_text(json.dumps([ENTRIES[0], {"prompt": "", "image_paths": PICTURES}]))
    taken.write_text("mine")
    (tmp_path / "out" / "manifest.jsonl").mkdir(parents=True)
    refused = {
        taken: f"must be a folder, but {taken} is a file. Name another, or move the file away.",
        taken / "a" / "b": f"must be a folder, but {taken / 'a' / 'b'} would lie below the file {taken}. Name another, or",
        tmp_path / "out": f"{tmp_path / 'out' / 'manifest.jsonl'} would be replaced, but it is a folder. Move it away, or name another",
    }
    for folder, message in refused.items():
        for more in ([], ["--check"]):
            assert inference.main(arguments(world, folder, "--cases", str(path), *more)) == 2
            errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert errors[0].startswith(f"error: {path}[1].prompt: ")  # bad cases are listed all the same
            assert errors[1].startswith(f"error: inference.output_dir: {message}")
            assert len(errors) == 2


def test_a_check_knows_the_token_size(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = world / "sizes.json"
    path.write_text(json.dumps([ENTRIES[0], ENTRIES[1] | {"height": 18}]))
    assert inference.main(arguments(world, tmp_path / "new" / "out", "--cases", str(path), "--check")) == 1
    captured = capsys.readouterr()
    assert captured.out == f"1 good cases in {path}\n"
    assert f"error: {path}[1].height, width: height and width must be positive multiples of the token size 4 px, got 18" in captured.err
    assert inference.main(arguments(world, tmp_path, "--cases", str(path), "--check", "--set", "inference.height=18")) == 2
    assert "error: inference.height, inference.width: height and width must be positive multiples" in capsys.readouterr().err
    (tmp_path / "model" / "vae").mkdir(parents=True)
    (tmp_path / "model" / "vae" / "config.json").write_text("{")
    assert inference.main(arguments(world, tmp_path, "--cases", str(path), "--check", "--model", str(tmp_path / "model"))) == 0
    assert "note: sizes and prompts are not checked against the model: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- the report


def test_files_of_a_report_of_an_earlier_recipe_go(world: Path, tmp_path: Path) -> None:
    path = world / "one.json"
    path.write_text(json.dumps(ENTRIES[:1]))
    for more, expected in ((["--report"], True), ([], True), (["--seed", "1"], False), (["--seed", "1", "--report"], True)):
        assert inference.main(arguments(world, tmp_path, "--cases", str(path), *more)) == 0
        found = {name: (tmp_path / name).exists() for name in ("case_007_attention.png", "case_007_report.html", "report.html")}
        assert set(found.values()) == {expected}, (more, found)
        assert ("attention" in rows(tmp_path)[0]) == expected


def test_a_report_over_two_processes_and_of_finished_pictures(world: Path, alone: Path, tmp_path: Path) -> None:
    run_two_processes(world, tmp_path / "two", "--report")
    one = tmp_path / "one"
    one.mkdir()
    for name, data in runs.files_below(alone).items():  # rendered before, without a report
        (one / name).write_bytes(data)
    assert inference.main(arguments(world, one, "--report")) == 0
    assert_same(tmp_path / "two", one)
    for row in rows(one):
        assert (one / row["file"]).read_bytes() == (alone / row["file"]).read_bytes()
        assert (one / f"{row['name']}_report.html").is_file()
        count = len(row["references"])
        assert [len(line) for line in row["attention"]["leakage"]] == [count] * count
        assert len(row["attention"]["entropy"]) == row["num_inference_steps"]


def test_other_points_make_another_report_of_the_same_picture(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = world / "points.json", []
    render = rendering.render_batch
    monkeypatch.setattr(rendering, "render_batch", lambda batch, *rest, **more: seen.append(batch[0].name) or render(batch, *rest, **more))
    for points, rendered, report in (([], 1, True), ([[5, 5]], 1, True), ([[5, 5]], 0, True), ([[9, 5]], 0, False), ([[9, 5]], 1, True)):
        seen.clear()
        path.write_text(json.dumps([{"prompt": "a cat", "references": [{"path": PICTURES[0], "points": points}]}]))
        assert inference.main(arguments(world, tmp_path, "--cases", str(path), *["--report"] * report)) == 0
        assert len(seen) == rendered, points
    assert len({row["digest"] for row in rows(tmp_path)}) == 1
    assert len(rows(tmp_path)[0]["attention"]["lines"]) == 1
