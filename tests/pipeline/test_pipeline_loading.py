"""Where a pipeline comes from: diffusers folders, dtypes, reference LoRA files with their settings, and what cannot be reached."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from mosaic.lora.adapter import has_reference_lora, reference_lora_modules, save_reference_lora
from mosaic.lora.files import LoraFile
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.weights.hub import resolve_lora_file
from tests import tiny
from tests.tiny import CALL, HEIGHT, SIZE, WIDTH, noise, run


@pytest.fixture(scope="module")
def shared() -> MosaicFluxPipeline:
    """One pipeline for the tests that do not change it."""
    return tiny.build_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX in an ordinary diffusers folder, saved by the stock pipeline."""
    path = tmp_path_factory.mktemp("flux") / "model"
    tiny.build_stock_pipeline().save_pretrained(path)
    return path


def test_from_pretrained_takes_our_transformer_in_place_of_the_stock_one(folder: Path, tmp_path: Path) -> None:
    assert json.loads((folder / "model_index.json").read_text())["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    pipeline = MosaicFluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is MosaicFluxPipeline
    assert type(pipeline.transformer) is MosaicFluxTransformer2DModel
    start = noise(1)
    want = run(tiny.build_pipeline(lora_rank=None), prompt="a cat", latents=start)
    torch.testing.assert_close(run(pipeline, prompt="a cat", latents=start), want, atol=1e-5, rtol=1e-5)
    tiny.attach_random_lora(pipeline.transformer)
    with_references = {"prompt": "a cat", "latents": start, "reference_images": [tiny.picture(1)]}
    want = run(tiny.build_pipeline(), **with_references)
    torch.testing.assert_close(run(pipeline, **with_references), want, atol=1e-5, rtol=1e-5)


def test_dtype(folder: Path) -> None:
    pipeline = MosaicFluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder_2.dtype} == {torch.bfloat16}
    tiny.attach_random_lora(pipeline.transformer)
    images = pipeline(**CALL | {"prompt": "a cat", "reference_images": [tiny.picture(1)], "output_type": "np"}).images
    assert np.isfinite(images).all()


def test_a_saved_pipeline_loads_again(tmp_path: Path) -> None:
    ours = tiny.build_pipeline(lora_rank=None)
    ours.save_pretrained(tmp_path / "saved")
    start = noise(1)
    for cls in (MosaicFluxPipeline, FluxPipeline):
        pipeline = cls.from_pretrained(tmp_path / "saved")
        pipeline.set_progress_bar_config(disable=True)
        keywords = {} if cls is MosaicFluxPipeline else {"max_sequence_length": tiny.TEXT_LENGTH}
        found = pipeline("a cat", height=HEIGHT, width=WIDTH, num_inference_steps=2, latents=start, output_type="latent", **keywords).images
        torch.testing.assert_close(found, run(ours, prompt="a cat", latents=start), atol=1e-5, rtol=1e-5)


def test_reference_lora_round_trip_with_its_settings(shared: MosaicFluxPipeline, tmp_path: Path) -> None:
    config = {
        "data": {"image_size": [HEIGHT, WIDTH], "reference_size": SIZE},
        "model": {"reference_attention": "isolated", "reference_position": "index"},
        "lora": {"rank": 3},
    }
    save_reference_lora(shared.transformer, tmp_path / "lora.safetensors", config)
    pipeline = tiny.build_pipeline(lora_rank=None)
    assert pipeline.load_reference_lora(tmp_path) == 3  # a folder: the file's default name
    assert pipeline.reference_config == config
    common = {
        "prompt": "a cat",
        "reference_images": [tiny.picture(1)],
        "latents": noise(1),
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    found = pipeline(**common).images  # sizes, mode and positions come from the file
    trained = {"reference_attention": "isolated", "reference_position": "index"}
    torch.testing.assert_close(found, run(shared, **common, **trained), atol=1e-5, rtol=1e-5)
    pipeline.save_reference_lora(tmp_path / "again.safetensors")
    third = tiny.build_pipeline(lora_rank=None)
    third.load_reference_lora(tmp_path / "again.safetensors")
    assert third.reference_config == config
    third.unload_reference_lora()
    assert third.reference_config == {}
    assert not has_reference_lora(third.transformer)


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    pipeline = tiny.build_pipeline(lora_rank=None)
    pipeline.reference_config = {"data": {"reference_size": SIZE}}
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        pipeline.load_reference_lora(tmp_path / "x.safetensors")
    assert pipeline.reference_config == {"data": {"reference_size": SIZE}}
    assert not has_reference_lora(pipeline.transformer)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "/no/such/folder"])
def test_an_unreachable_model_names_the_pocket_default(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=rf"model '{re.escape(name)}'.*assets/pocket/flux"):
        MosaicFluxPipeline.from_pretrained(name, cache_dir=tmp_path)


def test_a_folder_without_weights_names_the_pocket_default(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model '.*broken' cannot be loaded: .*assets/pocket/flux"):
        MosaicFluxPipeline.from_pretrained(tmp_path / "broken")


@pytest.mark.usefixtures("offline")
def test_an_unreachable_lora_names_the_pocket_default(shared: MosaicFluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="reference LoRA 'ByteDance-FanQie/MOSAIC' cannot be loaded.*assets/pocket"):
        shared.load_reference_lora("ByteDance-FanQie/MOSAIC", revision="none-such")
    with pytest.raises(FileNotFoundError, match=r"reference LoRA not found: .*nowhere\.safetensors"):
        shared.load_reference_lora(tmp_path / "nowhere.safetensors")


def test_lora_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").touch()
    (tmp_path / "other.safetensors").touch()
    assert resolve_lora_file(tmp_path) == tmp_path / "lora.safetensors"
    assert resolve_lora_file(tmp_path, "other.safetensors") == tmp_path / "other.safetensors"
    assert resolve_lora_file(str(tmp_path / "other.safetensors")) == tmp_path / "other.safetensors"


def test_a_reference_lora_is_opened_and_read_once(shared: MosaicFluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared.save_reference_lora(tmp_path / "lora.safetensors")
    opened, read = [], Counter()
    start, get = LoraFile.__init__, LoraFile.__getitem__
    monkeypatch.setattr(LoraFile, "__init__", lambda self, *rest: opened.append(rest) or start(self, *rest))
    monkeypatch.setattr(LoraFile, "__getitem__", lambda self, key: read.update([key]) or get(self, key))
    shared.load_reference_lora(tmp_path / "lora.safetensors")
    assert len(opened) == 1
    assert set(read.values()) == {1}
    assert len(read) == 2 * len(reference_lora_modules(shared.transformer))
