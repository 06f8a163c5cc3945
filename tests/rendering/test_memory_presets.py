"""Memory presets: the pictures they must leave unchanged, those they may change, and what of a run's settings they refuse."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import inference
from mosaic.config.loading import Config, from_dict
from mosaic.pipeline.encoders import GivenPrompts, encode_each
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.rendering import loading, memory_presets
from mosaic.rendering.memory_presets import PRESETS, MemoryPreset, place_pipeline, resolve_preset
from mosaic.rendering.recipe import read_recipe
from mosaic.rendering.recipes import shared_recipe
from mosaic.weights import quantization
from tests import runs, tiny

CPU = torch.device("cpu")
PROMPTS = ("a cat", "a mug and a cat")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
quiet = pytest.mark.filterwarnings("ignore")  # warnings of an optional package are not ours


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_world(tmp_path_factory.mktemp("world"))
    entries = [{"index": i, "prompt": prompt, "image_paths": ["reference_0.png", "reference_1.png"]} for i, prompt in enumerate(PROMPTS)]
    (folder / "cases.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def config_of(world: Path, tmp_path: Path) -> Any:
    """Makes a config of `inference` settings."""

    def make(**settings: Any) -> Config:
        values = runs.settings(world, world / "unused")
        values["inference"] |= {"quantized_cache": str(tmp_path / "cache")} | settings
        return from_dict(values)

    return make


def render(pipeline: MosaicFluxPipeline, prompt: str = PROMPTS[1], **arguments: Any) -> torch.Tensor:
    """Pictures of two references."""
    call: dict[str, Any] = {
        "height": 16,
        "width": 24,
        "reference_size": 12,
        "num_inference_steps": 2,
        "max_sequence_length": tiny.TEXT_LENGTH,
    }
    call |= {"generator": torch.Generator().manual_seed(3), "output_type": "pt"} | arguments
    return pipeline(prompt, [tiny.picture(0), tiny.picture(1)], **call).images


# ---- what a preset leaves unchanged


def test_encoders_that_leave_change_nothing(config_of: Any, world: Path) -> None:
    plain = loading.load_pipeline(config_of(), world / "lora.safetensors", CPU)
    early = loading.load_pipeline(config_of(memory="48gb"), world / "lora.safetensors", CPU, PROMPTS)
    assert early.text_encoder is None
    assert early.text_encoder_2 is None
    for prompt in PROMPTS:
        assert torch.equal(render(early, prompt), render(plain, prompt))
    with pytest.raises(ValueError, match="the text encoders have left, and this prompt was not encoded before: 'a fish'"):
        render(early, "a fish")


def test_prompts_are_looked_up_in_their_order() -> None:
    pipeline = tiny.build_pipeline()
    known = encode_each(pipeline.encoders, [*PROMPTS, PROMPTS[0]], tiny.TEXT_LENGTH)
    assert len(known) == len(PROMPTS)
    given = GivenPrompts(pipeline.encoders, known)
    embeds, pooled = given.encode_prompts([PROMPTS[1], PROMPTS[0], PROMPTS[1]], tiny.TEXT_LENGTH)
    for row, prompt in enumerate((PROMPTS[1], PROMPTS[0], PROMPTS[1])):
        with torch.no_grad():
            want, want_pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=tiny.TEXT_LENGTH)
        assert torch.equal(embeds[row], want[0])
        assert torch.equal(pooled[row], want_pooled[0])
    with pytest.raises(ValueError, match="not encoded before"):
        given.encode_prompts([PROMPTS[0]], 4)


def test_blocks_that_wait_elsewhere_change_nothing(config_of: Any, world: Path) -> None:
    plain, offloaded = (loading.load_pipeline(config_of(), world / "lora.safetensors", CPU) for _ in range(2))
    place_pipeline(offloaded, MemoryPreset("offloaded", group_offload=True), CPU)
    assert torch.equal(render(offloaded), render(plain))
    assert torch.equal(render(offloaded), render(plain))


def test_tiles_are_used_above_the_size_of_the_vae_only(config_of: Any, world: Path) -> None:
    plain, tiled = (loading.load_pipeline(config_of(), world / "lora.safetensors", CPU) for _ in range(2))
    place_pipeline(tiled, MemoryPreset("tiled", vae_tiling=True), CPU)
    small, large = {"height": 16, "width": 16}, {}  # the VAE was made for 16 px, and 24 px are more
    torch.testing.assert_close(render(tiled, **small), render(plain, **small), atol=1e-5, rtol=0)  # references one by one: rounding
    assert 1e-3 < (render(tiled, **large) - render(plain, **large)).abs().mean() < 0.2


# ---- presets on a tiny model


@pytest.mark.parametrize(
    "name",
    [
        "80gb",
        "48gb",
        pytest.param("24gb", marks=[needs_torchao, quiet]),
        pytest.param("16gb", marks=[needs_bitsandbytes, quiet]),
        pytest.param("12gb", marks=[needs_torchao, quiet]),
    ],
)
def test_a_preset_renders_and_its_cache_gives_the_same(name: str, config_of: Any, world: Path, tmp_path: Path) -> None:
    config = config_of(memory=name)
    first = render(loading.load_pipeline(config, world / "lora.safetensors", CPU, PROMPTS))
    cached = {path.name for path in tmp_path.glob("cache/*")}
    again = loading.load_pipeline(config, world / "lora.safetensors", CPU, PROMPTS)
    assert {path.name for path in tmp_path.glob("cache/*")} == cached
    assert len(cached) == (PRESETS[name].transformer != "none") + (PRESETS[name].text_encoder_2 != "none")
    assert torch.equal(render(again), first)
    plain = render(loading.load_pipeline(config_of(), world / "lora.safetensors", CPU))
    assert torch.equal(first, plain) == (name in ("80gb", "48gb"))
    assert (first - plain).abs().mean() < 0.2


@needs_gguf
@quiet
@pytest.mark.parametrize("memory", ["none", "12gb"])
def test_a_gguf_file_in_place_of_the_transformer(memory: str, config_of: Any, world: Path, tmp_path: Path) -> None:
    if memory == "12gb" and importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao")
    file = runs.write_gguf(world / "model", tmp_path / "q8.gguf")
    pipeline = loading.load_pipeline(config_of(gguf=str(file), memory=memory), world / "lora.safetensors", CPU, PROMPTS)
    assert type(pipeline.transformer.transformer_blocks[0].attn.to_q.base_layer).__name__ == "GGUFLinear"
    plain = render(loading.load_pipeline(config_of(), world / "lora.safetensors", CPU))
    found = render(pipeline)
    assert not torch.equal(found, plain)
    assert (found - plain).abs().mean() < 0.05


def test_files_that_are_no_gguf_are_refused(config_of: Any, world: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"inference\.gguf: file not found"):
        loading.load_gguf(str(tmp_path / "a.gguf"), str(world / "model"), torch.float32)
    (tmp_path / "a.ckpt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"inference\.gguf must be a file \*\.gguf"):
        loading.load_gguf(str(tmp_path / "a.ckpt"), str(world / "model"), torch.float32)


@needs_gguf
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(200), b"no gguf at all" * 50])
def test_damaged_gguf_files_are_named(content: bytes, world: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gguf cannot be read as a GGUF transformer"):
        loading.load_gguf(str(tmp_path / "a.gguf"), str(world / "model"), torch.float32)


# ---- settings


@pytest.mark.parametrize(("name", "package"), [("24gb", "torchao"), ("16gb", "bitsandbytes"), ("12gb", "torchao")])
def test_a_missing_package_is_named(name: str, package: str, config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f'inference.memory "{name}".* needs the package {package}, .* pip install {package}'):
        resolve_preset(config_of(memory=name))
    with pytest.raises(ValueError, match=r"inference\.gguf needs the package gguf"):
        resolve_preset(config_of(gguf="a.gguf"))


def test_settings_that_exclude_each_other(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_presets, "check_quantization", lambda *_: None)
    with pytest.raises(ValueError, match=r"inference\.quantization must be null where inference\.gguf names the weights"):
        resolve_preset(config_of(gguf="a.gguf", quantization="int8"))
    with pytest.raises(ValueError, match='nf4 cannot be moved block by block as inference.memory "12gb" does'):
        resolve_preset(config_of(memory="12gb", quantization="nf4"))
    assert resolve_preset(config_of(memory="24gb", quantization="fp8")).transformer == "fp8"
    assert resolve_preset(config_of(memory="24gb", quantization="none")).transformer == "none"
    assert resolve_preset(config_of()) == memory_presets.PLAIN
    with pytest.raises(ValueError, match="must be made a preset"):
        resolve_preset(config_of(memory="auto"))


def test_the_recipe_tells_pictures_of_other_formats_apart(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_presets, "check_quantization", lambda *_: None)
    monkeypatch.setattr("mosaic.rendering.recipes.importlib.metadata.version", lambda _: "1")

    def storage(**settings: Any) -> Mapping[str, Any]:
        return shared_recipe(config_of(**settings), "model", "lora", "cpu").storage

    assert storage() == storage(memory="80gb") == storage(memory="48gb")
    others = [storage(), storage(memory="24gb"), storage(memory="16gb"), storage(memory="12gb"), storage(quantization="nf4")]
    assert all(others.count(other) == 1 for other in others)
    assert "torchao" in shared_recipe(config_of(memory="24gb"), "model", "lora", "cpu").versions


@needs_gguf
def test_the_recipe_knows_the_gguf_file(config_of: Any, world: Path, tmp_path: Path) -> None:
    files = [runs.write_gguf(world / "model", tmp_path / f"{kind}.gguf", kind) for kind in ("Q8_0", "Q4_0")]
    digests = {shared_recipe(config_of(gguf=str(file)), "model", "lora", "cpu").storage["gguf"] for file in files}
    assert len(digests) == 2


# ---- the command


def test_the_command_with_auto(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "config.json").write_text(json.dumps(runs.settings(world, world / "unused")))
    arguments = ["--config", str(world / "config.json"), "--output-dir", str(tmp_path / "out")]
    assert inference.main([*arguments, "--memory", "auto"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory auto: ")]
    assert len(said) == 1
    assert "memory auto: 80gb (" in said[0]
    assert " free" in said[0]
    recipe = read_recipe(tmp_path / "out/case_000.png")
    assert recipe["storage"] == {"transformer": "none", "text_encoder_2": "none", "vae_tiling": False}
    assert inference.main([*arguments, "--memory", "48gb"]) == 0
    assert f"{len(PROMPTS)} were finished before" in capsys.readouterr().out
    with Image.open(tmp_path / "out/case_000.png") as kept:
        before = kept.copy()
    assert inference.main(["--config", str(world / "config.json"), "--output-dir", str(tmp_path / "48"), "--memory", "48gb"]) == 0
    with Image.open(tmp_path / "48/case_000.png") as early:
        assert early.tobytes() == before.tobytes()


def test_a_full_device_is_said_with_the_cure(world: Path, config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(loading, "place_pipeline", full)
    with pytest.raises(ValueError, match='full with inference.memory "none": CUDA out of memory. Take a smaller inference.memory'):
        loading.load_pipeline(config_of(), world / "lora.safetensors", CPU)
