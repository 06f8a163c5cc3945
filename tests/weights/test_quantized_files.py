"""Quantised weights on disk: what is read equals what was quantised, a file is found again only by equal content, and damage is named."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, T5EncoderModel

from mosaic.weights import quantized_files
from mosaic.weights.quantization import PACKAGES
from mosaic.weights.quantized_files import quantized_key, quantized_model, read_quantized, write_quantized
from tests import runs, tiny

CPU = torch.device("cpu")
FORMATS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"),
            pytest.mark.filterwarnings("ignore"),  # those of an optional package are not ours
        ],
    )
    for name, package in PACKAGES.items()
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_model(tmp_path_factory.mktemp("model"))


def load_transformer(folder: Path) -> Callable[[], nn.Module]:
    return lambda: FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32)


def build_transformer(folder: Path) -> Callable[[], nn.Module]:
    return lambda: FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))


def refuse() -> nn.Module:
    raise AssertionError("the weights are in the cache")


def velocity(transformer: nn.Module) -> Tensor:
    with torch.no_grad():
        return transformer(**tiny.without_references(tiny.build_batch(guidance_embeds=False).inputs)).sample


@pytest.mark.parametrize("name", FORMATS)
def test_a_transformer_from_the_cache_is_the_quantised_one(name: str, model: Path, tmp_path: Path) -> None:
    folder = model / "transformer"
    exact = velocity(load_transformer(folder)())
    fresh = quantized_model(folder, load_transformer(folder), refuse, name, torch.float32, CPU, None)
    made = quantized_model(folder, load_transformer(folder), build_transformer(folder), name, torch.float32, CPU, tmp_path)
    (file,) = tmp_path.iterdir()
    read = quantized_model(folder, refuse, build_transformer(folder), name, torch.float32, CPU, tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    assert not torch.equal(velocity(fresh), exact)
    assert torch.equal(velocity(made), velocity(fresh))
    assert torch.equal(velocity(read), velocity(fresh))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in read.parameters())
    assert [type(module) for module in read.modules()] == [type(module) for module in fresh.modules()]
    assert read.dtype == fresh.dtype


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_encoder_from_the_cache_is_the_quantised_one(name: str, model: Path, tmp_path: Path) -> None:
    folder, tokens = model / "text_encoder_2", torch.arange(6)[None]

    def load() -> nn.Module:
        return T5EncoderModel.from_pretrained(folder, dtype=torch.float32)

    def build() -> nn.Module:
        return T5EncoderModel(AutoConfig.from_pretrained(folder))

    with torch.no_grad():
        exact = load()(tokens).last_hidden_state
        fresh = quantized_model(folder, load, refuse, name, torch.float32, CPU, None)(tokens).last_hidden_state
        quantized_model(folder, load, build, name, torch.float32, CPU, tmp_path)
        read = quantized_model(folder, refuse, build, name, torch.float32, CPU, tmp_path)(tokens).last_hidden_state
    assert torch.equal(read, fresh)
    assert 0 < (fresh - exact).norm() / exact.norm() < 0.3


class Packed(nn.Module):
    """Stands for a library: two buffers, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("codes", torch.arange(6, dtype=torch.uint8))
        self.register_buffer("again", self.codes)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 4-bit format without its library: tensors as they are."""
    monkeypatch.setattr(quantized_files, "_put_nf4", lambda model, tensors, device: tensors)
    monkeypatch.setattr(quantized_files, "quantize_base", lambda *_: None)
    monkeypatch.setattr(quantized_files.importlib.metadata, "version", lambda _: "1")


def test_a_file_holds_everything_once(packed: None, model: Path, tmp_path: Path) -> None:
    made = Packed()
    quantized_model(model / "transformer", lambda: made, Packed, "nf4", torch.float32, CPU, tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert load_file(file).keys() == {"linear.weight", "linear.bias", "codes"}
    read = quantized_model(model / "transformer", refuse, Packed, "nf4", torch.float32, CPU, tmp_path / "new")
    for name, tensor in made.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_the_content_names_the_file(packed: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(model / "transformer", tmp_path / "transformer"))
    keys = [quantized_key(model / "transformer", "nf4", torch.float32, CPU)]
    assert quantized_key(folder, "nf4", torch.float32, CPU) == keys[0]  # wherever it lies
    keys.append(quantized_key(folder, "int8", torch.float32, CPU))
    keys.append(quantized_key(folder, "nf4", torch.bfloat16, CPU))
    keys.append(quantized_key(folder, "nf4", torch.float32, torch.device("cuda")))
    monkeypatch.setattr(quantized_files.importlib.metadata, "version", lambda _: "2")
    keys.append(quantized_key(folder, "nf4", torch.float32, CPU))
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    keys.append(quantized_key(folder, "nf4", torch.float32, CPU))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"axes_dims_rope": [8, 4, 4]}))
    keys.append(quantized_key(folder, "nf4", torch.float32, CPU))
    assert len(set(keys)) == len(keys)


def damaged(file: Path, case: str) -> None:
    if case == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif case == "foreign":
        save_file({"a": torch.zeros(1)}, file)
    elif case == "another model":
        write_quantized(nn.Linear(2, 2), file, "nf4")
    else:
        write_quantized(nn.Sequential(), file, "nf4")


@pytest.mark.parametrize("case", ["cut", "foreign", "another model", "empty"])
def test_a_damaged_file_is_named(case: str, packed: None, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    write_quantized(Packed(), file, "nf4")
    damaged(file, case)
    with torch.device("meta"):
        module = Packed()
    with pytest.raises(ValueError, match=r"weights\.safetensors: not a usable file of quantised weights .* Delete it"):
        read_quantized(module, file, "nf4", CPU)


def test_the_file_of_another_format_is_refused(packed: None, tmp_path: Path) -> None:
    write_quantized(Packed(), tmp_path / "w.safetensors", "nf4")
    with pytest.raises(ValueError, match="holds nf4, not int8"):
        read_quantized(Packed(), tmp_path / "w.safetensors", "int8", CPU)


def test_a_folder_that_cannot_be_written_is_named(packed: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to .* inference.quantized_cache=null"):
        write_quantized(Packed(), tmp_path / "file" / "w.safetensors", "nf4")
