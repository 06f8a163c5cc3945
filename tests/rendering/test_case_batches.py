"""Cases made several at once: what goes together, the same pictures up to rounding, and the same promises as one at a time."""

import json
import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import inference
from mosaic.config.loading import load_config
from mosaic.images import load_image
from mosaic.pipeline import encoders
from mosaic.pipeline.encoders import RememberedEncoders
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.rendering import loading, rendering, start
from mosaic.rendering import runner as case_runner
from mosaic.rendering.batches import OWN, plan_batches, unfinished_batches
from mosaic.rendering.cases.pictures import ReferencePicture, ReferencePictures
from mosaic.rendering.cases.reading import read_cases
from mosaic.rendering.recipes import PictureJob, shared_recipe
from tests import runs
from tests.recipes import entry, make_recipe

PICTURES = [f"reference_{index}.png" for index in range(3)]
ENTRIES: list[dict[str, Any]] = [
    {"index": 1, "prompt": "a cat", "image_paths": PICTURES[:1]},
    {"index": 2, "prompt": "a cat and a mug", "image_paths": PICTURES[1:]},
    {"index": 3, "prompt": "a mug on the beach", "image_paths": PICTURES[1:2], "num_images_per_prompt": 2},
    {"index": 4, "prompt": "two fish", "image_paths": PICTURES[:1], "height": 8},
    {"index": 5, "prompt": "two fish", "image_paths": PICTURES[2:]},
]
BATCHES = [["case_001", "case_003_seed_45", "case_003_seed_46"], ["case_002"], ["case_004"], ["case_005"]]
NAMES = ["case_001", "case_002", "case_003_seed_45", "case_003_seed_46", "case_004", "case_005"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_world(tmp_path_factory.mktemp("world"))
    (folder / "cases.json").write_text(json.dumps(ENTRIES))
    (folder / "config.json").write_text(json.dumps(runs.settings(folder, folder / "unused")))
    return folder


def render(world: Path, output: Path, *settings: str, batch_size: int = 3) -> int:
    more = [part for setting in (f"inference.batch_size={batch_size}", *settings) for part in ("--set", setting)]
    return inference.main(["--config", str(world / "config.json"), "--output-dir", str(output), *more])


@pytest.fixture(scope="module")
def together(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("together")
    assert render(world, output) == 0
    return output


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(load_image(path)).astype(int)


def job(name: str, height: int, num_references: int, strength: float) -> PictureJob:
    references = (entry(name, strength=strength),) * num_references
    return PictureJob(name, None, make_recipe(name, prompt=name, height=height, references=references))


@given(st.lists(st.tuples(st.sampled_from([8, 16]), st.integers(1, 2), st.sampled_from([1.0, 0.5]))), st.integers(1, 4))
def test_every_job_is_in_one_batch_of_its_own_kind(kinds: list[tuple[int, int, float]], batch_size: int) -> None:
    jobs = [job(str(number), *kind) for number, kind in enumerate(kinds)]
    batches = plan_batches(jobs, batch_size)
    assert sorted((item.name for batch in batches for item in batch), key=int) == [item.name for item in jobs]
    assert [int(batch[0].name) for batch in batches] == sorted(int(batch[0].name) for batch in batches)
    for kind in set(kinds):
        own = [int(item.name) for batch in batches for item in batch if kinds[int(item.name)] == kind]
        assert own == [number for number, other in enumerate(kinds) if other == kind]
        sizes = [len(batch) for batch in batches if kinds[int(batch[0].name)] == kind]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
        assert all({kinds[int(item.name)] for item in batch} == {kind} for batch in batches if kinds[int(batch[0].name)] == kind)


def test_what_is_a_pictures_own_is_in_every_recipe(together: Path) -> None:
    for row in rows(together):
        assert set(OWN) <= row.keys()


def test_what_changes_pictures_is_in_the_recipe(world: Path) -> None:
    changes = {"batch_size": 2, "compile": True, "attention_backend": "native", "step_cache": "first_block"}
    settings = [[], *([f"inference.{name}={json.dumps(value)}"] for name, value in changes.items())]
    settings.append([*settings[-1], "inference.step_cache_threshold=0.1"])
    recipes = [shared_recipe(load_config(world / "config.json", given), "model", "lora", "cpu") for given in settings]
    assert len({json.dumps(asdict(recipe)) for recipe in recipes}) == len(settings)
    for (name, value), recipe in zip(changes.items(), recipes[1:], strict=False):
        assert getattr(recipe, name) == value


def test_one_missing_picture_brings_its_whole_batch() -> None:
    jobs = [job(str(number), 8, 1, 1.0) for number in range(5)]
    batches = plan_batches(jobs, 2)
    assert [[item.name for item in batch] for batch in unfinished_batches(batches, jobs[3:])] == [["2", "3"], ["4"]]


def test_pictures_are_those_of_single_runs_up_to_rounding(world: Path, together: Path, tmp_path: Path) -> None:
    assert render(world, tmp_path, batch_size=1) == 0
    assert [row["name"] for row in rows(together)] == [row["name"] for row in rows(tmp_path)] == NAMES
    assert {row["batch_size"] for row in rows(together)} == {3}
    for name in NAMES:
        assert np.abs(pixels(together / f"{name}.png") - pixels(tmp_path / f"{name}.png")).max() <= 2
    assert {row["digest"] for row in rows(together)}.isdisjoint(row["digest"] for row in rows(tmp_path))


def test_a_case_is_encoded_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [ENTRIES[0] | {"num_images_per_prompt": 3}, ENTRIES[0] | {"index": 9, "prompt": "a mug", "image_paths": PICTURES[1:]}]
    (world / "seeds.json").write_text(json.dumps(entries))
    more = ["--config", str(world / "config.json"), "--cases", str(world / "seeds.json"), "--report"]
    seen: list[str] = []
    with monkeypatch.context() as patch:
        encode_images, encode_prompt = encoders.encode_images, MosaicFluxPipeline.encode_prompt
        patch.setattr(encoders, "encode_images", lambda *rest: seen.append("references") or encode_images(*rest))
        patch.setattr(
            MosaicFluxPipeline, "encode_prompt", lambda self, **given: seen.append(given["prompt"][0]) or encode_prompt(self, **given)
        )
        assert inference.main([*more, "--output-dir", str(tmp_path / "once")]) == 0
    assert seen == ["a cat", "references", "a mug", "references"]
    monkeypatch.setattr(loading, "RememberedEncoders", lambda live: live)
    assert inference.main([*more, "--output-dir", str(tmp_path / "each")]) == 0
    once, each = (runs.files_below(tmp_path / name) for name in ("once", "each"))
    assert once.keys() == each.keys()
    assert [name for name in once if name != "manifest.jsonl" and once[name] != each[name]] == []


def test_only_the_same_prompts_and_pictures_share_their_encodings(world: Path) -> None:
    pipeline = MosaicFluxPipeline.from_pretrained(world / "model")
    pipeline.load_reference_lora(world / "lora.safetensors")
    pictures = [load_image(world / name) for name in PICTURES]

    def sample(prompts: list[str], references: list[list[Image.Image]], size: int = 12, length: int = 16) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        arguments = {"height": 16, "width": 16, "num_inference_steps": 1, "reference_size": size, "max_sequence_length": length}
        return pipeline(prompts, references, generator=generators, output_type="latent", **arguments).images

    calls: list[Any] = [
        (["a cat"], [pictures[:1]]),
        (["a cat"], [pictures[:1]]),
        (["a cat"], [pictures[1:2]]),
        (["a mug"], [pictures[1:2]]),
        (["a mug"], [pictures[1:2]], 8),
        (["a mug"], [pictures[1:2]], 8, 12),
        (["a mug", "a cat"], [pictures[:2], pictures[1::-1]]),
        (["a cat", "a cat"], [pictures[:2], pictures[:2]]),
        (["a cat"], [[]]),
        (["a cat"], [pictures[:2]]),
    ]
    expected = [sample(*call) for call in calls]
    pipeline.encoders = RememberedEncoders(pipeline.encoders)
    for call, latents in zip(calls, expected, strict=True):
        assert torch.equal(sample(*call), latents)


def test_batches_are_shared_out_whole(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(world / "config.json", [f"inference.output_dir={tmp_path}", "inference.batch_size=3"])
    cases = read_cases(world / "cases.json", runs.REFERENCE_SIZE)
    shares: list[list[list[str]]] = []
    monkeypatch.setattr(
        case_runner, "render_batches", lambda batches, *_, **__: shares.append([[item.name for item in batch] for batch in batches])
    )
    monkeypatch.setattr(start, "load_pipeline", lambda *_: SimpleNamespace(transformer=None))
    for index in range(2):
        state = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=False, device=torch.device("cpu"), wait_for_everyone=lambda: None
        )
        case_runner.run_cases(cases, config, state)
    assert shares == [BATCHES[0::2], BATCHES[1::2]]


def test_a_resumed_batch_is_the_same_bit_for_bit(world: Path, together: Path, tmp_path: Path) -> None:
    for name, data in runs.files_below(together).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / f"{BATCHES[0][1]}.png").unlink()
    kept = (tmp_path / f"{BATCHES[0][0]}.png").stat().st_mtime_ns
    assert render(world, tmp_path) == 0
    for name in NAMES:
        assert (tmp_path / f"{name}.png").read_bytes() == (together / f"{name}.png").read_bytes()
    assert (tmp_path / f"{BATCHES[0][0]}.png").stat().st_mtime_ns == kept  # finished: not written again
    seconds = [{row["name"]: row["seconds"] for row in rows(folder)} for folder in (together, tmp_path)]
    assert {name for name in NAMES if seconds[0][name] != seconds[1][name]} <= {BATCHES[0][1]}


def test_one_bad_picture_does_not_stop_its_batch(
    world: Path, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = rendering.read_references

    def fail(item: PictureJob, pictures: ReferencePictures) -> list[ReferencePicture]:
        if item.name == BATCHES[0][1]:
            raise OSError("gone")
        return read(item, pictures)

    monkeypatch.setattr(rendering, "read_references", fail)
    assert render(world, tmp_path) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].endswith(f"({BATCHES[0][1]}): OSError: gone")
    assert [row["name"] for row in rows(tmp_path)] == [name for name in NAMES if name != BATCHES[0][1]]
    for row in rows(tmp_path):
        assert np.abs(pixels(tmp_path / row["file"]) - pixels(together / row["file"])).max() <= 2


def test_a_batch_that_fails_as_a_whole_is_tried_one_by_one(
    world: Path, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample, held = rendering.sample, []

    def fail(jobs: list[PictureJob], *rest: Any) -> Any:
        assert not any(reference() is not None for reference in held)  # nothing of the failed call is left, for memory is short
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        if len(jobs) > 1 or jobs[0].name == BATCHES[0][2]:
            raise torch.OutOfMemoryError("out of\nmemory")
        return sample(jobs, *rest)

    monkeypatch.setattr(rendering, "sample", fail)
    assert render(world, tmp_path) == 1
    written = capsys.readouterr().err
    assert "note: 3 pictures at once failed (OutOfMemoryError: out of memory); they are tried one by one" in written
    assert [line for line in written.splitlines() if line.startswith("error: ")] == [
        f"error: {world / 'cases.json'}[2] ({BATCHES[0][2]}): OutOfMemoryError: out of memory"
    ]
    assert len(rows(tmp_path)) == len(NAMES) - 1
    for row in rows(tmp_path):
        assert np.abs(pixels(tmp_path / row["file"]) - pixels(together / row["file"])).max() <= 2
