"""Loading pipelines of diffusers of any class: LoRAs, number formats, offload, and what they cannot."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, FluxKontextPipeline, FluxPipeline
from safetensors.torch import save_file

from mosaic.config.schema import FieldError
from preprocess.construct import pipelines
from preprocess.construct.pipeline_settings import PipelineSettings
from preprocess.construct.pipelines import load_pipeline, means_of, pipeline_provenance, place_groups
from tests import tiny, tiny_extractors

CPU = torch.device("cpu")
CALL = {"height": 24, "width": 16, "num_inference_steps": 1, "max_sequence_length": tiny.TEXT_LENGTH, "output_type": "np"}


class Settings(PipelineSettings):
    path: ClassVar[str] = "room"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_extractors.save_flux(tmp_path_factory.mktemp("flux"))


def load(cls: Any, folder: Path, **values: Any) -> Any:
    return load_pipeline(cls, Settings(model=str(folder), **values), CPU, torch.float32)


def picture(pipeline: Any) -> np.ndarray:
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), **CALL).images


def test_any_class_is_loaded_and_named(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = load(AutoPipelineForText2Image, folder)
    assert type(found) is FluxPipeline
    assert type(load(FluxKontextPipeline, folder)) is FluxKontextPipeline
    capfd.readouterr()
    before = picture(found)
    assert "it/s" not in capfd.readouterr().err  # progress bars of single pictures
    place_groups(found, CPU)
    assert np.array_equal(picture(found), before)
    settings = Settings(model=str(folder))
    known = pipeline_provenance(found, settings, torch.float32)
    assert known | {"revision": ""} == {
        "pipeline": "FluxPipeline",
        "model": folder.name,
        "revision": "",
        "lora": None,
        "dtype": "float32",
        "quantization": "none",
    }
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    assert pipeline_provenance(found, Settings(model=str(copy)), torch.float32) == known  # of the files, wherever they lie
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    assert pipeline_provenance(found, Settings(model=str(copy)), torch.float32) != known


def test_a_lora_is_merged(folder: Path, tmp_path: Path) -> None:
    plain = load(FluxPipeline, folder)
    name = "transformer_blocks.0.attn.to_q"
    tensors = tiny.random_lora_file(tiny.linear_shapes(plain.transformer, [name]), 2, 0)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = load(FluxPipeline, folder, lora=str(tmp_path / "lora.safetensors"))
    matrices = [tensors[f"transformer.{name}.lora_{side}.weight"] for side in "BA"]
    weights = [pipeline.transformer.get_submodule(name).weight for pipeline in (plain, found)]
    torch.testing.assert_close(weights[1], weights[0] + matrices[0] @ matrices[1])
    half = load(FluxPipeline, folder, lora=str(tmp_path / "lora.safetensors"), lora_scale=0.5)
    torch.testing.assert_close(half.transformer.get_submodule(name).weight, weights[0] + 0.5 * matrices[0] @ matrices[1])
    assert not np.array_equal(picture(found), picture(plain))
    settings = [Settings(model=str(folder), lora=lora) for lora in (None, str(tmp_path / "lora.safetensors"))]
    assert len({pipeline_provenance(found, each, torch.float32)["lora"] for each in settings}) == 2
    save_file({"transformer.other.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"room\.lora: .*other\.safetensors is no LoRA of FluxPipeline"):
        load(FluxPipeline, folder, lora=str(tmp_path / "other.safetensors"))


def test_presets_are_means_and_means_are_checked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "check_quantization", lambda quantization, place: None)

    def means(**values: Any) -> tuple[str, str, bool]:
        found = means_of(Settings(model="a/b", **values))
        return found.quantization, found.offload, found.vae_tiling

    assert means() == ("none", "none", False)
    assert means(memory="48gb") == ("none", "model", False)
    assert means(memory="24gb") == ("int8", "model", False)
    assert means(memory="16gb") == ("nf4", "model", True)
    assert means(memory="12gb") == ("int8", "group", True)
    assert means(memory="12gb", offload="none", quantization="none") == ("none", "none", True)
    with pytest.raises(FieldError, match=r'room\.quantization cannot be "nf4" where blocks wait'):
        means(memory="12gb", quantization="nf4")
    asked = []
    monkeypatch.setattr(pipelines, "quantize_base", lambda *arguments: asked.append(arguments))
    found = load(FluxPipeline, folder, memory="16gb")
    assert asked == [(found.transformer, "nf4", CPU)]
    assert found.vae.use_tiling
    assert found.vae.use_slicing
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'room\.quantization "int8" needs the package torchao'):
        load(FluxPipeline, folder, memory="24gb")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"room\.model: model 'nowhere'"):
        load(FluxPipeline, Path("nowhere"))
    with pytest.raises(ValueError, match=r"room\.model: .* cannot be loaded as AutoPipelineForText2Image"):
        load(AutoPipelineForText2Image, tmp_path)
