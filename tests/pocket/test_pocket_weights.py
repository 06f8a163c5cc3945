"""All pocket weights by one command: its stages, its time, going on, 128 px, and the start from weights with guidance."""

import json
import signal
import subprocess
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from scripts import make_pocket_weights, make_pocket_world, train_pocket_base
from scripts.pocket import base_data, dataset, model, sampling, stages, train_base, weights, world
from scripts.pocket.base_data import LAYOUTS, caption_ids
from scripts.pocket.distill_base import with_guidance
from scripts.pocket.model import build_pocket_flux, build_vae, save_pocket_flux
from scripts.pocket.tokenizers import caption_words, known_words
from tests import runs

#: Autocast meets float32 norm weights on a CPU: torch warns that it takes its slower path.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
CAPTIONS = ["a cat, two mugs and a fish on a beach", "drawings of two cats and two cars"]
SCENE = LAYOUTS[0]
SHARES = world.RegimeShares(0.25, 0.15)


@pytest.fixture
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: None) -> Path:
    """A folder with a few pictures, of 64 px or as the test's parameter says, and scenes of that size, so that no process has to draw any;
    models of one block of each kind.
    """
    pixels = getattr(request, "param", 64)
    monkeypatch.setattr(model, "DOUBLE_BLOCKS", 1)
    monkeypatch.setattr(model, "SINGLE_BLOCKS", 1)
    monkeypatch.setattr(train_base.BaseTraining, "sample", lambda _: None)
    folder = tmp_path / "weights"
    (folder / "vae/pictures").mkdir(parents=True)
    with monkeypatch.context() as few:
        for index, layout in enumerate(LAYOUTS):
            # At 128 px a VAE is trained, and shown with the 8 scenes that are a quarter of all.
            few.setattr(base_data, "_SHARD", 12 if (layout.name, pixels) == ("scene", 128) else 5)
            base_data._Shard(folder / "vae/pictures", index, 0, SHARES, pixels).draw()
    dataset.write_dataset(folder / "data", 4, 0, 2, 0, scene_size=pixels)
    return folder


def command(output: Path, *flags: str, device: str = "cpu") -> int:
    return make_pocket_weights.main(["--output", str(output), "--device", device, "--size", "tiny", "--from-scratch", *flags])


def check(output: Path) -> dict:
    """The record of a whole run at tiny size, after looking at the weights."""
    record = json.loads((output / "weights.json").read_text())
    assert list(record["stages"]) == list(stages.SHARES)
    assert all(entry["done"] for entry in record["stages"].values())
    steps = {name: record["stages"][name]["results"]["step"] for name in ("base", "guidance", "adapter", "finish")}
    assert set(steps.values()) == {2}
    pipeline = FluxPipeline.from_pretrained(output / "flux", local_files_only=True)
    assert pipeline.transformer.config.guidance_embeds
    first, last = (load_file(output / name / "lora.safetensors") for name in ("adapter", "finish"))
    assert any(not torch.equal(last[key], value) for key, value in first.items()), "it goes on"
    numbers = json.loads((output / "evaluation.json").read_text())
    assert numbers["regimes"]["twins"]["2"]["num_cases"] == 1
    entries = numbers["entries"]
    assert [entry["num_references"] for entry in entries] == [1, 2]
    assert record["stages"]["evaluation"]["results"]["identification"].keys() == {"1", "2"}
    return record


def test_the_command_makes_all_weights_and_goes_on(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(output, "--until", "base") == 0
    assert not (output / "flux").exists()
    trained = (output / "base/log.jsonl").read_text()
    assert command(output) == 0
    record = check(output)
    assert (output / "base/log.jsonl").read_text() == trained, "the base is not trained again"
    assert record["settings"]["twins_share"] == SHARES.twins
    monkeypatch.setattr(weights, "train", lambda *_: pytest.fail("nothing is left to do"))
    assert command(output) == 0
    assert json.loads((output / "weights.json").read_text())["stages"] == record["stages"]
    capsys.readouterr()
    assert command(output, "--twins-share", "0.5") == 2
    assert "was begun with other settings: twins_share was 0.25, is 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("output", [128], indirect=True)
def test_the_command_at_128_px(output: Path) -> None:
    assert command(output, "--pixels", "128", "--until", "tokens") == 0
    config = json.loads((output / "vae/export/config.json").read_text())
    assert (config["latent_channels"], len(config["block_out_channels"])) == (16, 4)  # 64 channels of a token, 8 pixels of a latent cell


def test_what_the_stages_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*flags: str) -> weights.Weights:
        given = ["--output", str(tmp_path), "--device", "cpu", "--twins-share", "0.5", "--mixed-share", "0.1", "--seed", "3", *flags]
        return weights.Weights(make_pocket_weights.parse_arguments(given))

    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command))
    large, usual = settings("--pixels", "128", "--workers", "6", "--batch-size", "64"), settings()
    large.draw_data()
    data = make_pocket_world.parse_arguments(commands[0][2:])
    assert (data.scene_size, data.twins_share, data.mixed_share, data.workers, data.num_samples) == (128, 0.5, 0.1, 3, 16_000)
    config = large.config("adapter")
    assert (config.data.image_size, config.data.reference_size, config.inference.height) == ((128, 128), 64, 128)
    assert (config.lora.pretrained, config.training.batch_size, config.training.seed) == (None, 16, 3)
    assert usual.config("adapter").lora.pretrained == str(weights.SHIPPED / "lora.safetensors")
    finish = usual.config("finish")
    assert finish.lora.pretrained == str(tmp_path / "adapter/lora.safetensors")
    assert finish.optimizer.learning_rate < usual.config("adapter").optimizer.learning_rate
    base = train_pocket_base.parse_arguments(large.base_settings(90.0))
    assert (base.max_minutes, base.steps, base.batch_size, base.seed, base.compile) == (1.5, None, 64, 3, False)
    assert base.sheets_share is None
    without = settings("--pixels", "128", "--sheets-share", "0").base_settings(90.0)
    assert train_pocket_base.parse_arguments(without).sheets_share == 0
    large.compiled = True
    assert train_pocket_base.parse_arguments(large.base_settings(90.0)).compile
    drawn: list[tuple] = []

    def render_all(*given: object) -> Generator[tuple[int, int]]:
        drawn.append(given)
        yield 1, 1

    monkeypatch.setattr(base_data, "render_all", render_all)
    assert large.pictures(1.0) == {"shards": 1}
    assert drawn == [(tmp_path / "vae/pictures", 6, 2.0, world.RegimeShares(0.5, 0.1), 128)]


@pytest.mark.gpu
def test_the_command_on_a_gpu_with_compiled_blocks(output: Path) -> None:
    assert command(output, device="cuda") == 0
    check(output)


def test_what_cannot_be_compiled_is_known_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda _: dict)
    with pytest.raises(ValueError, match="torch.compile does not work on this device: .*Give --no-compile"):
        weights.try_compiler(torch.device("cpu"))


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--minutes", "0"], "--minutes must be more than 0, got 0."),
        (["--batch-size", "2"], "--batch-size must be at least 4, got 2."),
        (["--workers", "0"], "--workers must be at least 1, got 0."),
        (["--sheets-share", "1.5"], "--sheets-share must lie in [0, 1], got 1.5."),
    ):
        assert command(tmp_path / "weights", *flags) == 2
        assert message in capsys.readouterr().err
    assert make_pocket_weights.main(["--output", str(tmp_path / "weights"), "--device", "cpu", "--sheets-share", "0"]) == 2
    assert "--sheets-share 0 needs --from-scratch: the shipped weights have learnt from sheets" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command(tmp_path / "weights", device="cuda") == 2
        assert "--device cuda: cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "weights").exists()


def test_time_that_a_stage_leaves_falls_to_those_after_it(tmp_path: Path) -> None:
    shares = {"one": 1.0, "none": 0.0, "two": 1.0, "three": 2.0}
    record = stages.Record(tmp_path / "record.json", {"size": "tiny"}, shares, 400.0)
    assert record.planned("one") == 100.0
    with record.stage("one") as entry:
        entry["found"] = 7
    record.entry("one")["seconds"] = 40.0
    assert (record.planned("none"), record.planned("two")) == (0.0, 120.0)
    with pytest.raises(RuntimeError), record.stage("two"):
        raise RuntimeError
    again = stages.Record(tmp_path / "record.json", {"size": "tiny"}, shares, 4000.0)
    assert (again.entry("one")["done"], again.entry("one")["found"], again.entry("two")["done"]) == (True, 7, False)
    assert again.planned("two") == 120.0, "decided once, since a training's learning rate decays to its end"
    again.entry("two")["seconds"] = 1e6
    assert again.planned("three") == 400.0, "never nothing"
    with pytest.raises(ValueError, match="begun with other settings: size was tiny, is full"):
        stages.Record(tmp_path / "record.json", {"size": "full"}, shares, 400.0)


def test_an_adapter_is_trained_for_a_time(world: Path, tmp_path: Path, fresh_accelerator: None) -> None:
    config = runs.make_config(world, tmp_path / "run", training__max_steps=100_000)
    handler = signal.getsignal(signal.SIGUSR1)
    path = weights.train_for(config, 0.6)
    step = weights.last_entry(path.parent / "metrics.jsonl")["step"]
    assert 1 <= step < 100_000
    trained = load_file(path.parent / f"checkpoints/step_{step:08d}/lora.safetensors")
    for key, value in load_file(path).items():
        torch.testing.assert_close(value, trained[key], rtol=0, atol=0)
    assert signal.getsignal(signal.SIGUSR1) == handler


def test_a_stop_from_outside_is_no_end_of_the_time(world: Path, tmp_path: Path, fresh_accelerator: None) -> None:
    config = runs.make_config(world, tmp_path / "run", training__max_steps=100_000)
    timer = threading.Timer(0.6, signal.raise_signal, (signal.SIGTERM,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        weights.train_for(config, 600.0)
    assert not (tmp_path / "run/lora.safetensors").exists()


def test_a_model_with_guidance_is_one_without_at_guidance_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "DOUBLE_BLOCKS", 1)
    monkeypatch.setattr(model, "SINGLE_BLOCKS", 1)
    components = build_pocket_flux(0, caption_words(CAPTIONS))
    guided = with_guidance(components["transformer"])
    for parameter in (*guided.time_text_embed.guidance_embedder.parameters(), guided.proj_out.weight):
        torch.nn.init.normal_(parameter, std=0.05)
    save_pocket_flux({**components, "transformer": guided}, tmp_path / "flux")
    plain = build_pocket_flux(1, caption_words(CAPTIONS))
    train_base.load_start(plain, tmp_path / "flux")
    ids = tuple(caption_ids(components[name], CAPTIONS) for name in ("tokenizer", "tokenizer_2"))
    noisy, time = torch.randn(2, SCENE.tokens, model.TOKEN_CHANNELS), torch.tensor([0.3, 0.9])
    given = {**components, "transformer": guided}
    with torch.no_grad():
        found = sampling.predict_velocity(plain, SCENE, noisy, time, ids)
        want, other = (sampling.predict_velocity(given, SCENE, noisy, time, ids, torch.full([2], g)) for g in (1.0, 2.0))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert (found - other).abs().max() > 1e-2


def test_the_words_of_a_start_are_known() -> None:
    words = caption_words(CAPTIONS)
    assert known_words(build_pocket_flux(0, words)["tokenizer_2"]) == set(words) - {","}


def test_at_128_px_a_scene_has_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "DOUBLE_BLOCKS", 1)
    monkeypatch.setattr(model, "SINGLE_BLOCKS", 1)
    components = build_pocket_flux(0, caption_words(CAPTIONS), pixels=128)
    sheet = next(layout for layout in LAYOUTS if layout.name == "sheet1")
    picture, small = (base_data.draw(sheet, 5, SHARES, pixels)[0] for pixels in (128, 64))
    assert (picture.shape, small.shape) == ((128, 192, 3), (64, 96, 3))
    halved = picture.reshape(64, 2, 96, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 4, "the same sheet"
    tokens = base_data.encode_samples(components["vae"].eval(), sheet, picture[None])
    assert tokens.shape == (1, sheet.tokens, 64)
    assert base_data.decode_samples(components["vae"], sheet, tokens).shape == (1, 128, 192, 3)
    assert sampling.sample_pictures(components, sheet, CAPTIONS[:1], 0, steps=1).shape == (1, 128, 192, 3)
    assert FluxPipeline(**components).vae_scale_factor == 8
    assert build_vae(0).config.latent_channels == 8


def test_no_process_is_started_where_all_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_data, "_SHARD", 1)
    monkeypatch.setattr(base_data, "LAYOUTS", LAYOUTS[:1])
    monkeypatch.setattr(base_data, "drawing_processes", lambda *_: pytest.fail("nothing is left to draw"))
    for shard in range(2):
        base_data._Shard(tmp_path, 0, shard, SHARES, 64).draw()
    assert list(base_data.render_all(tmp_path, 2, 2 / 20_000, SHARES)) == [(2, 2)]
    with pytest.raises(ValueError, match="pictures of 64 px"):
        list(base_data.render_all(tmp_path, 2, 2 / 20_000, SHARES, 128))
    with pytest.raises(ValueError, match="drawn with other shares of regimes"):
        list(base_data.render_all(tmp_path, 2, 2 / 20_000, world.RegimeShares(twins=0.9)))


def test_several_processes_write_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "drawing_processes", ThreadPoolExecutor)
    monkeypatch.setattr(dataset, "_DRAWN_AT_ONCE", 2)
    for name, workers in (("one", 1), ("two", 2)):
        dataset.write_dataset(tmp_path / name, 3, 2, 2, 7, shares=SHARES, workers=workers)
    one, two = (runs.files_below(tmp_path / name) for name in ("one", "two"))
    assert one == two
    with pytest.raises(ValueError, match="--workers must be at least 1; got 0"):
        dataset.write_dataset(tmp_path / "none", 3, 2, 2, 7, workers=0)
